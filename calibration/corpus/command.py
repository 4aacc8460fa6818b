"""The command `demo`: corpora of our own for the models that read phrases and images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import click

from cnngru_edge.models.atomic import staged, write_file
from cnngru_edge.models.errors import CorpusError
from cnngru_edge.runtime.cli import FILE
from cnngru_edge.runtime.progress import progress_bars

PHRASES, DIGITS = "phrases", "digits"

_MANIFEST = "manifest.csv"
_IMAGES = "images"
_BITS = 4  # a pixel in a file


@click.command()
@click.argument("kind", type=click.Choice([PHRASES, DIGITS]))
@click.option("--out", type=FILE, required=True, help="Folder to write to.")
@click.option("--count", type=click.IntRange(0, 20_000), default=4800, help="Examples to train on.")
@click.option(
    "--held-out",
    type=click.IntRange(1, 5000),
    default=480,
    help="Examples to calibrate with, and as many more to evaluate with.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="The same seed makes the same.")
def demo(kind: str, out: Path, count: int, held_out: int, seed: int) -> None:
    """Make a corpus: PHRASES of a voice assistant with their intents, or images of DIGITS.

    It is written whole or not at all. The examples that are held out are worded or drawn otherwise
    than those to train on, and the same for every --count.
    """
    if out.is_dir() and any(out.iterdir()):
        raise CorpusError(f"{out}: not empty; a corpus goes into a folder of its own")
    with staged(out) as stage:
        rows = (
            _phrases(count, held_out, seed)
            if kind == PHRASES
            else _digits(stage / _IMAGES, count, held_out, seed)
        )
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows(rows)
        write_file(stage / _MANIFEST, table.getvalue().encode())
    click.echo(out / _MANIFEST)


def _phrases(count: int, held_out: int, seed: int) -> list[Sequence[str]]:
    from cnngru_edge.calibration.corpus.phrases import make_phrases

    phrases = make_phrases(count, held_out, seed)
    return [("text", "set", "label"), *((p.text, p.set, p.label) for p in phrases)]


def _digits(folder: Path, count: int, held_out: int, seed: int) -> list[Sequence[str]]:
    from cnngru_edge.calibration.corpus.digits import make_lines

    folder.mkdir()
    rows: list[Sequence[str]] = [("path", "set", "text", "style")]
    with progress_bars() as bar:
        lines = make_lines(count, held_out, seed)
        total = count + 2 * held_out
        bar.start()
        for i, line in enumerate(bar.track(lines, total, description="draw")):
            path = folder / f"{line.set}_{i:05}.png"
            line.image.save(path, optimize=True, bits=_BITS)
            rows.append((f"{folder.name}/{path.name}", line.set, line.text, line.style))
    return rows
