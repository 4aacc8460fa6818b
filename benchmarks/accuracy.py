"""Accuracy of artefacts on labelled recordings: alone, after other sounds, in noise, by class.

    python benchmarks/accuracy.py --data DIR [--task NAME] model.fp32.onnx model.int8.onnx

Prints Markdown. Each clip is heard by a stream whose state is carried from what came before it, and
read after the flush of 60 ms of silence, as `cnngru-edge run` does it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import EVAL, match_labels, read_corpus
from cnngru_edge.export.training.streams import excerpt, snr_gain
from cnngru_edge.models.spec.stream import SILENCE
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Session
from cnngru_edge.runtime.stream import Stream, flushed

BATCH = 64
SNRS_DB = (20, 10, 5, 0)

Disturb = Callable[[int, Samples], Samples]
"""Clip number and samples to what is heard: the clip in noise, or after other sounds."""


def answers(session: Session, clips: Sequence[Samples], disturb: Disturb) -> list[str]:
    """The label of each clip, read in the last frame of what `disturb` makes of it."""
    spec = streamable(session.spec)
    heard = [flushed(spec, disturb(i, c)) for i, c in enumerate(clips)]
    labels = np.empty(len(clips), object)
    # Streams of one length go side by side.
    order = sorted(range(len(heard)), key=lambda i: len(heard[i]))
    while order:
        length = len(heard[order[0]])
        rows = [i for i in order[:BATCH] if len(heard[i]) == length]
        logits = Stream(session, len(rows)).push(np.stack([heard[i] for i in rows]))
        for row, best in zip(rows, logits[:, -1].argmax(1), strict=True):
            labels[row] = spec.labels[best]
        order = order[len(rows) :]
    return labels.tolist()


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
@click.option("--seed", type=int, default=0)
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1, required=True)
def main(data: Path, task: str | None, seed: int, engines: tuple[Path, ...]) -> None:
    """Print a table of conditions and a table of classes, a column for each engine."""
    corpus = read_corpus(data, task)
    sessions = [open_session(path) for path in engines]
    spec = streamable(sessions[0].spec)
    rate = spec.features.sample_rate
    clips = corpus.of(EVAL)
    truth = list(match_labels(clips, spec.labels).values())
    samples = [read_audio(clip.path, rate).samples for clip in clips]
    noises = [read_audio(noise.path, rate).samples for noise in corpus.noises_of(EVAL)]
    words = [s for s, label in zip(samples, truth, strict=True) if label != SILENCE]

    def random(i: int) -> np.random.Generator:
        return np.random.default_rng([seed, i])

    def after_words(i: int, clip: Samples) -> Samples:
        before = [words[j] for j in random(i).integers(len(words), size=3)]
        return np.concatenate([*(pad_to_multiple(w, spec.chunk_length) for w in before), clip])

    def after_noise(i: int, clip: Samples) -> Samples:
        noise = noises[int(random(i).integers(len(noises)))]
        return np.concatenate([excerpt(noise, 3 * rate, random(i)), clip])

    def after_silence(i: int, clip: Samples) -> Samples:
        return np.concatenate([np.zeros(3 * rate, np.float32), clip])

    def in_noise(snr_db: float) -> Disturb:
        def disturb(i: int, clip: Samples) -> Samples:
            noise = excerpt(noises[int(random(i).integers(len(noises)))], len(clip), random(i))
            return clip + noise * snr_gain(clip, noise, snr_db)

        return disturb

    conditions: dict[str, Disturb] = {
        "alone, clean": lambda i, clip: clip,
        "after three other words": after_words,
    }
    conditions["after 3 s of silence"] = after_silence
    if noises:
        conditions["after 3 s of noise"] = after_noise
        conditions |= {f"in noise at {snr} dB": in_noise(snr) for snr in SNRS_DB}

    names = [path.name for path in engines]
    print(f"{len(clips)} clips of {len({c.speaker for c in clips})} speakers, seed {seed}\n")
    print(f"| accuracy, % | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    alone: list[list[str]] = []
    for name, disturb in conditions.items():
        found = [answers(session, samples, disturb) for session in sessions]
        alone = alone or found
        right = [100 * np.mean([a == t for a, t in zip(f, truth, strict=True)]) for f in found]
        print(f"| {name} | {' | '.join(f'{share:.1f}' for share in right)} |", flush=True)

    print(f"\n| class, alone, % | clips | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for label in spec.labels:
        rows = [i for i, t in enumerate(truth) if t == label]
        if rows:
            right = [100 * np.mean([f[i] == label for i in rows]) for f in alone]
            shares = " | ".join(f"{share:.1f}" for share in right)
            print(f"| {label} | {len(rows)} | {shares} |")


if __name__ == "__main__":
    main()
