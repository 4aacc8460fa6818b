"""One table of the models that come with the project: accuracy, size and speed, float and INT8.

    python benchmarks/zoo.py [--data DIR] [--task NAME] [--models NAME]... [--readme README.md]

Run it in the project's folder, as `make zoo` does. Each model is exported to a folder below
build/zoo, which compares it: models that hear on the recordings of --data, CTC models on strings
that benchmarks/connected_words.py joins from them, the others on the demos that come with the
package. The large CTC model of benchmarks/large_ctc.py has random weights. Prints Markdown.

Latency is from samples, token ids or pixels in a numpy array to logits in one, batch 1, one thread.
INT8 and float take turns, so that what else goes on slows both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

import click
import torch
from connected_words import write_strings
from large_ctc import large_model, write_models

from cnngru_edge.calibration.corpus.read import DEMO, Corpus, demo_for, read_corpus
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.export.artefacts import CHUNK, FLOAT, INT8, RANGES
from cnngru_edge.export.chain.evidence import versions
from cnngru_edge.export.chain.pipeline import Model, export
from cnngru_edge.export.commands.source import Source, load_source
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.verdict.compare import Comparison
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.nets.checkpoint import PRETRAINED
from cnngru_edge.models.spec.stream import CTC, KWS, ModelSpec
from cnngru_edge.models.spec.whole import CRNN, TEXT, Spec, TokenInput, WholeSpec, sample_rate_of
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.bench import measure_steps, measure_whole
from cnngru_edge.runtime.inputs.read import example_input
from cnngru_edge.runtime.session import Session

OUT = Path("build/zoo")
CHECKPOINTS = tuple(PRETRAINED.glob("*.safetensors"))
FAMILIES = (KWS, CTC, TEXT, CRNN)  # in the order of the rows
EXAMPLE_NAME = "keyword_crnn"
EXAMPLE = Source(
    module="examples.keyword_crnn:KeywordCrnn",
    weights=Path(f"examples/{EXAMPLE_NAME}.pt"),
    spec=Path("examples/keyword_crnn.toml"),
)
LARGE = "large_ctc"
NAMES = (*(path.stem for path in CHECKPOINTS), EXAMPLE_NAME, LARGE)
BEGIN, END = "<!-- zoo: written by make zoo -->", "<!-- /zoo -->"
CLIP_S = 1.0
ROUNDS, ROUND_S, WARM_UP_S = 25, 0.1, 0.02
HEADERS = (
    "model",
    "family",
    "parameters",
    "answers; compared on",
    "right, float",
    "right, INT8",
    "KB, float / INT8",
    "whole input, ms, INT8 / float",
    "step of a stream, ms, INT8 / float",
)

Right: TypeAlias = tuple[str, str]
"""Of a model: how much it has right in float and in INT8, with what is counted."""


@dataclass(frozen=True)
class Speed:
    """Median milliseconds for something."""

    what: str
    int8_ms: float
    float_ms: float

    def __str__(self) -> str:
        return f"{self.int8_ms:.3f} / {self.float_ms:.3f} ({self.what})"


@dataclass(frozen=True)
class Row:
    """A model in the table."""

    name: str
    family: str
    parameters: int
    task: str
    right: Right | None  # None of a model that is not trained
    sizes: tuple[int, int]  # float, INT8, bytes
    whole: Speed
    step: Speed | None  # None of a model that cannot be a stream


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [HEADERS, ("---",) * len(HEADERS)]
    lines += [
        (
            row.name,
            row.family,
            f"{row.parameters:,}",
            row.task,
            *(row.right or ("-", "-")),
            " / ".join(f"{size / 1000:,.0f}" for size in row.sizes),
            str(row.whole),
            str(row.step or "-"),
        )
        for row in rows
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replaced(readme: str, made: str) -> str:
    """The text with `made` between its two markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise click.ClickException(f"the file needs one line {BEGIN!r} and one {END!r}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{made}{END}{rest.split(END)[1]}"


def shares_right(comparison: Comparison, spec: Spec) -> Right:
    """What an export has compared."""
    if comparison.error_rates and isinstance(spec, ModelSpec):
        rates = comparison.error_rates.conditions[0].rates
        errors = (rates.reference_wer, rates.candidate_wer)
        first, second = (f"{1 - wer:.1%} of words (WER {wer:.1%})" for wer in errors)
        return first, second
    clean, of = comparison.clean, " of whole lines" if spec.writes_text else ""
    return f"{clean.reference_accuracy:.1%}{of}", f"{clean.candidate_accuracy:.1%}{of}"


def corpus_for(spec: Spec, data: Path, task: str | None) -> tuple[Corpus, str]:
    """What a model is calibrated and compared with, and what to call its examples."""
    if (demo := demo_for(spec)) != DEMO:
        tokens = isinstance(spec, WholeSpec) and isinstance(spec.input, TokenInput)
        return read_corpus(demo), f"{'phrases' if tokens else 'images'} of {demo.name}"
    corpus = read_corpus(data, task)
    source = task or corpus.root.name
    if spec.family != CTC:
        return corpus, f"clips of {source}"
    write_strings(corpus, OUT / "connected", seed=0)
    return read_corpus(OUT / "connected"), f"strings joined from {source}"


def in_turns(what: str, int8: Session, exact: Session, length: int | None) -> Speed:
    """Both sessions, a short round each in turn, with so many samples or a whole input."""

    def measured(session: Session) -> float:
        if length is None:
            timing = measure_whole(session, 1, CLIP_S, ROUND_S, WARM_UP_S)
        else:
            timing = measure_steps(session, what, 1, length, ROUND_S, WARM_UP_S)
        return timing.host_ms.median

    took: tuple[list[float], list[float]] = ([], [])
    for i in range(ROUNDS):
        for side in (i % 2, 1 - i % 2):
            took[side].append(measured((int8, exact)[side]))
    return Speed(what, median(took[0]), median(took[1]))


def speeds(folder: Path) -> tuple[Speed, Speed | None]:
    """Of a whole input, and of a step of a stream where the model can be one."""
    with open_session(folder / INT8) as int8, open_session(folder / FLOAT) as exact:
        spec = exact.spec
        if isinstance(spec, WholeSpec):
            size = example_input(spec, CLIP_S).shape[-1]
            what = f"{size} {'words' if isinstance(spec.input, TokenInput) else 'columns'}"
            if rate := sample_rate_of(spec):
                what = f"{size / rate:g} s"
            return in_turns(what, int8, exact, None), None
        chunk, rate = spec.chunk_length, spec.features.sample_rate
        length = round(CLIP_S * rate / chunk) * chunk
        whole = in_turns(f"{length / rate:g} s", int8, exact, length)
        with open_session(folder / CHUNK) as step:
            return whole, in_turns(f"{1000 * chunk / rate:g} ms", step, exact, chunk)


def row_of(name: str, model: Model, task: str, right: Right | None) -> Row:
    """A model whose artefacts lie in its folder."""
    exact, int8 = ((OUT / name / file).stat().st_size for file in (FLOAT, INT8))
    parameters = sum(p.numel() for p in model.parameters())
    whole, step = speeds(OUT / name)
    return Row(name, model.spec.family, parameters, task, right, (exact, int8), whole, step)


def exported(model: Model, name: str, data: Path, task: str | None) -> Row:
    """Export a trained model, and measure it."""
    click.echo(f"{name} ...", err=True)
    spec = model.spec
    corpus, examples = corpus_for(spec, data, task)
    comparison = export(model, corpus, OUT / name, CalibrateConfig(), name=name).comparisons[INT8]
    answers = "a text" if spec.writes_text else f"one of {len(spec.labels)} labels"
    said = f"{answers}; {comparison.clips:,} {examples}"
    return row_of(name, model, said, shares_right(comparison, spec))


def large() -> Row:
    """The untrained CTC model."""
    folder = OUT / LARGE
    folder.mkdir(parents=True, exist_ok=True)
    model = large_model()
    write_models(model, folder)
    quantize_onnx(folder / FLOAT, folder / RANGES, folder / INT8)
    return row_of(folder.name, model, "a text; not trained", None)


def origin(data: Path, task: str | None) -> str:
    """By which command and on what the table was made."""
    given = "" if data.resolve() == DEMO else f" DATA=DIR{f' TASK={task}' if task else ''}"
    found = versions()
    cpu, _ = found.pop("cpu"), found.pop("platform")
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"Made by `make zoo{given}` on one thread of {cpu}, medians of {ROUNDS} rounds in which "
        f"INT8 and float take turns; {packages}."
    )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DEMO, help="Recordings.")
@click.option("--task", help="Which task of a manifest.csv that lists several.")
@click.option("--models", type=click.Choice(NAMES), multiple=True, help="Rows; all if not given.")
@click.option("--readme", type=click.Path(path_type=Path), help="Also write the table into it.")
def main(data: Path, task: str | None, models: Sequence[str], readme: Path | None) -> None:
    """Print the table."""
    if readme and models:
        raise click.UsageError("--readme has all models; leave --models out")
    if readme:
        replaced(readme.read_text(encoding="utf-8"), "")  # before the long part
    torch.set_num_threads(1)
    chosen = models or NAMES
    found = [load_source(Source(path)) for path in CHECKPOINTS if path.stem in chosen]
    found.sort(key=lambda loaded: FAMILIES.index(loaded[0].spec.family))
    found += [load_source(EXAMPLE)] if EXAMPLE_NAME in chosen else []
    rows = [exported(model, name, data, task) for model, name, _ in found]
    rows += [large()] if LARGE in chosen else []
    made = f"{table(rows)}\n{origin(data, task)}\n"
    print(made, end="")
    if readme:
        write_file(readme, replaced(readme.read_text(encoding="utf-8"), made).encode())


if __name__ == "__main__":
    main()
