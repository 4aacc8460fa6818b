"""A corpus of connected words made from one of single words, for `export`, `compare` and `run`.

    python benchmarks/connected_words.py --data DIR [--task NAME] --out build/connected

Writes FLAC files and a manifest.csv (path, set, text, speaker) of the calibration and evaluation
speakers: a string from each clip. The same seed gives the same files. Without recordings of your
own, `--data calibration/demo` makes it of the synthesized clips.
"""

import csv
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import soundfile

from cnngru_edge.calibration.corpus.read import CALIB, EVAL, Corpus, read_corpus
from cnngru_edge.export.training.connected import ConnectedConfig, Utterance, connect
from cnngru_edge.runtime.inputs.audio import read_audio

RATE = 16_000


def strings_of(corpus: Corpus, set_name: str, words: tuple[int, int], seed: int) -> list[Utterance]:
    """A string from each clip of the set that has a word in it, in the clips' order."""
    clips = [clip for clip in corpus.of(set_name) if clip.text]
    spoken = [Utterance(read_audio(c.path, RATE).samples, c.text, c.speaker) for c in clips]
    config = replace(ConnectedConfig(phrase_share=0.0), words=words)
    return connect(spoken, RATE, config, np.random.default_rng(seed))


def write_strings(corpus: Corpus, out: Path, seed: int) -> int:
    """Write the strings of two sets as a corpus; how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [("path", "set", "text", "speaker")]
    for set_name in (CALIB, EVAL):
        for i, string in enumerate(strings_of(corpus, set_name, ConnectedConfig.words, seed)):
            path = f"{set_name}{i:04}.flac"
            peak = max(1.0, float(np.abs(string.samples).max()))
            soundfile.write(out / path, string.samples / peak, RATE)
            rows.append((path, set_name, string.text, string.speaker))
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    return len(rows) - 1


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=0)
def main(data: Path, task: str | None, out: Path, seed: int) -> None:
    """Write the strings."""
    print(f"{write_strings(read_corpus(data, task), out, seed)} strings in {out}")


if __name__ == "__main__":
    main()
