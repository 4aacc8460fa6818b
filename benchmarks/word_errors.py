"""Word and character errors of CTC models on connected words: by length, after others, in noise.

    python benchmarks/word_errors.py --data DIR [--task NAME] ctc.fp32.onnx ctc.int8.onnx

Prints Markdown. The strings are those of benchmarks/connected_words.py, of the evaluation speakers;
what is heard is the most probable character of each frame, without a word list or language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from connected_words import strings_of
from torchaudio.functional import edit_distance

from cnngru_edge.calibration.corpus.read import EVAL, read_corpus
from cnngru_edge.export.training.connected import Utterance
from cnngru_edge.export.training.ctc import greedy_texts
from cnngru_edge.export.training.streams import excerpt, snr_gain
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Session
from cnngru_edge.runtime.stream import Stream, flushed

SNRS_DB = (20, 10, 5, 0)


@dataclass(frozen=True)
class Errors:
    """Rates in percent."""

    words: float
    characters: float

    def __str__(self) -> str:
        """As a cell of the tables."""
        return f"{self.words:.1f} / {self.characters:.1f}"


def texts(session: Session, strings: Sequence[Samples], before: Sequence[Samples]) -> list[str]:
    """What is heard of each string, the state carried from the one before it, if there is one."""
    spec, found = streamable(session.spec), []
    for i, samples in enumerate(strings):
        stream = Stream(session)
        if before:
            stream.push(pad_to_multiple(before[i], spec.chunk_length)[None])
        logits = stream.push(flushed(spec, samples)[None])
        found += greedy_texts(torch.from_numpy(np.array(logits)), spec.labels)
    return found


def errors(expected: Sequence[str], found: Sequence[str]) -> Errors:
    """Substitutions, insertions and deletions for each hundred words, and characters."""
    pairs = list(zip(expected, found, strict=True))
    words = sum(edit_distance(e.split(), f.split()) for e, f in pairs)
    characters = sum(edit_distance(e, f) for e, f in pairs)
    return Errors(
        100 * words / sum(len(e.split()) for e in expected),
        100 * characters / sum(len(e) for e in expected),
    )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
@click.option("--seed", type=int, default=0)
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1, required=True)
def main(data: Path, task: str | None, seed: int, engines: tuple[Path, ...]) -> None:
    """Print a row for each condition, a column for each engine."""
    corpus = read_corpus(data, task)
    sessions = [open_session(path) for path in engines]
    rate = streamable(sessions[0].spec).features.sample_rate
    strings = strings_of(corpus, EVAL, (1, 6), seed)
    singles = strings_of(corpus, EVAL, (1, 1), seed)
    noises = [read_audio(noise.path, rate).samples for noise in corpus.noises_of(EVAL)]

    def report(
        name: str,
        chosen: Sequence[Utterance],
        disturb: Callable[[Samples], Samples] = lambda samples: samples,
        before: Sequence[Samples] = (),
    ) -> list[list[str]]:
        heard = [disturb(string.samples) for string in chosen]
        found = [texts(session, heard, before) for session in sessions]
        expected = [string.text for string in chosen]
        cells = " | ".join(str(errors(expected, f)) for f in found)
        words = sum(len(text.split()) for text in expected)
        print(f"| {name} | {len(chosen)} | {words} | {cells} |", flush=True)
        return found

    speakers = len({string.speaker for string in strings})
    print(f"{len(strings)} strings of {speakers} speakers, seed {seed}\n")
    print(f"| WER / CER, % | strings | words | {' | '.join(path.name for path in engines)} |")
    print(f"|---|---|---|{'---|' * len(engines)}")
    found_singles = report("single words", singles)
    found = report("strings", strings)
    expected = [string.text for string in strings]
    for length in range(1, 7):
        rows = [i for i, text in enumerate(expected) if len(text.split()) == length]
        if rows:
            of_length = [errors([expected[i] for i in rows], [f[i] for i in rows]) for f in found]
            cells = " | ".join(map(str, of_length))
            print(f"| of {length} | {len(rows)} | {length * len(rows)} | {cells} |")
    rng = np.random.default_rng(seed)
    report("after another string", strings, before=[s.samples for s in strings[::-1]])
    report(
        "after 10 s of silence", strings, before=[np.zeros(10 * rate, np.float32)] * len(strings)
    )
    if noises:
        before = [excerpt(noises[int(rng.integers(len(noises)))], 10 * rate, rng) for _ in strings]
        report("after 10 s of noise", strings, before=before)
    for snr_db in SNRS_DB if noises else ():
        rng = np.random.default_rng([seed, snr_db])

        def disturb(
            samples: Samples, rng: np.random.Generator = rng, snr_db: float = snr_db
        ) -> Samples:
            noise = excerpt(noises[int(rng.integers(len(noises)))], len(samples), rng)
            return samples + noise * snr_gain(samples, noise, snr_db)

        report(f"in noise at {snr_db} dB", strings, disturb)
    print(f"\n| single word, % right | clips | {' | '.join(path.name for path in engines)} |")
    print(f"|---|---|{'---|' * len(engines)}")
    for word in sorted({string.text for string in singles}):
        rows = [i for i, string in enumerate(singles) if string.text == word]
        right = [100 * np.mean([f[i] == word for i in rows]) for f in found_singles]
        print(f"| {word} | {len(rows)} | {' | '.join(f'{share:.1f}' for share in right)} |")


if __name__ == "__main__":
    main()
