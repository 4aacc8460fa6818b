"""Words in long streams: false accepts an hour against false rejects, and what context costs.

    python benchmarks/streaming.py --data DIR --engine A.onnx --engine B.onnx --out DIR

Writes streaming.md (tables) and det.svg. The words are the evaluation clips, strung together with
pauses in background; the false accepts are those on recordings without any of the words, speech
and noise, heard in several mixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import EVAL, match_labels, read_corpus
from cnngru_edge.export.verdict.long_streams import (
    LongStream,
    MixConfig,
    Score,
    background_streams,
    detect,
    load,
    score,
    stream_logits,
    word_streams,
)
from cnngru_edge.models.nets.checkpoint import load_checkpoint
from cnngru_edge.models.spec.stream import SILENCE, DecisionSpec, ModelSpec
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import FLUSH_S, clip_logits

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.965, 0.97, 0.975, 0.98)
NOISE_SNRS_DB = (20.0, 10.0, 5.0)  # at which the speech without words is heard besides clean
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97")


@dataclass(frozen=True)
class Streams:
    """What is heard: words in background, and background without words."""

    words: list[LongStream]
    silent: list[LongStream]
    kinds: list[str]  # of each of the latter


@dataclass(frozen=True)
class Point:
    """What a decision gives."""

    words: Score
    silent: Score
    by_kind: dict[str, Score]

    @property
    def cells(self) -> str:
        """Of a Markdown table."""
        return (
            f"{100 * self.words.false_rejects:.1f} | {self.silent.false_accepts} | "
            f"{self.silent.false_accepts_per_hour:.1f} | {self.silent.false_accepts_bound:.1f} | "
            f"{self.words.false_accepts} | {self.words.false_accepts_per_hour:.0f} |"
        )


HEAD = (
    "false rejects, % | false accepts without words | an hour | at most, 95 % | false accepts "
    "between words | an hour |\n"
)


def measure(
    spec: ModelSpec, decision: DecisionSpec, streams: Streams, logits: list[Array]
) -> Point:
    """Run the Detector over all of them."""
    decided = replace(spec, decision=decision)
    scores = [
        score(detect(decided, rows), stream, decided)
        for rows, stream in zip(logits, [*streams.words, *streams.silent], strict=True)
    ]
    split = len(streams.words)
    by_kind = dict.fromkeys(streams.kinds, Score())
    for kind, found in zip(streams.kinds, scores[split:], strict=True):
        by_kind[kind] += found
    return Point(sum(scores[:split], Score()), sum(scores[split:], Score()), by_kind)


def context(
    session: Session,
    streams: Sequence[LongStream],
    logits: Sequence[Array],
    clips: Sequence[Samples],
) -> tuple[float, float, float]:
    """Accuracy on each clip alone, cut out of its stream, and in its stream; read at its end."""
    spec = streamable(session.spec)
    rate, labels = spec.features.sample_rate, spec.labels
    right: list[tuple[bool, bool, bool]] = []
    for stream, rows in zip(streams, logits, strict=True):
        for word in stream.words:
            start, end = word.samples
            stop = end + round(FLUSH_S * rate)
            alone = clip_logits(session, clips[word.clip])[-1]
            # Its own background goes on behind it, so there is nothing to flush.
            cut = clip_logits(session, stream.audio[start:stop])[
                (stop - start) // spec.chunk_length - 1
            ]
            within = rows[stop // spec.chunk_length - 1]
            answers = [labels[int(row.argmax())] == word.label for row in (alone, cut, within)]
            right.append((answers[0], answers[1], answers[2]))
    alone_share, cut_share, in_share = np.mean(right, axis=0)
    return float(alone_share), float(cut_share), float(in_share)


def svg(curves: dict[str, list[tuple[float, float]]], least: float) -> str:
    """False accepts an hour (log, none at the left edge) against false rejects in percent."""
    left, top, width, height = 64, 16, 520, 320
    most = max(x for points in curves.values() for x, _ in points)
    decades = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(max(most, 10)))) + 1)
    highest = 50.0

    def at(x: float, y: float) -> str:
        share = (np.log10(max(x, 10.0 ** decades[0])) - decades[0]) / (len(decades) - 1)
        down = 1 - min(y, highest) / highest
        return f"{left + share * width:.1f},{top + down * height:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {left + width + 20} {top + height + 56}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for decade in decades:
        x, _ = at(10.0**decade, 0).split(",")
        parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{top + height}" stroke="#ddd"/>')
        name = "0" if decade == decades[0] else f"{10.0**decade:g}"
        parts.append(f'<text x="{x}" y="{top + height + 16}" text-anchor="middle">{name}</text>')
    for percent in range(0, int(highest) + 1, 10):
        _, y = at(1, percent).split(",")
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end" dy="4">{percent}</text>')
    right, top_of_goal = at(1, 5).split(",")
    parts.append(
        f'<rect x="{left}" y="{top_of_goal}" width="{float(right) - left:.1f}" '
        f'height="{top + height - float(top_of_goal):.1f}" fill="#2e8b57" fill-opacity="0.15"/>'
        f'<text x="{left + 6}" y="{float(top_of_goal) - 4:.1f}" fill="#2e8b57">goal</text>'
    )
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(at(x, y) for x, y in points if y <= highest)
        dash = ' stroke-dasharray="5 4"' if i % 2 else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts.append(
            f'<text x="{left + width - 8}" y="{top + 18 + 16 * i}" text-anchor="end" '
            f'fill="{colour}">{name}</text>'
        )
    parts += [
        f'<text x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">'
        "false accepts an hour, speech and noise without words (log)</text>",
        f'<text transform="translate(16 {top + height / 2}) rotate(-90)" text-anchor="middle">'
        "false rejects, % of words</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def build(
    clips: list[Samples],
    labels: list[str],
    speech: list[Samples],
    noises: list[Samples],
    rate: int,
    snr_db: float,
    seed: int,
) -> Streams:
    """The same for the same seed."""
    rng = np.random.default_rng(seed)
    plain = MixConfig(gain_db=(0.0, 0.0))
    mix = replace(plain, snr_db=(snr_db, snr_db))
    words = word_streams(clips, labels, noises, sample_rate=rate, seconds=0, rng=rng, config=mix)
    silent = background_streams(speech, rng=rng, config=plain)
    kinds = ["speech, clean"] * len(speech)
    for db in NOISE_SNRS_DB:
        noisy = replace(plain, snr_db=(db, db))
        silent += background_streams(speech, noises=noises, rng=rng, config=noisy)
        kinds += [f"speech at {db:g} dB"] * len(speech)
    for gain_db in (0.0, -12.0):
        quiet = replace(plain, gain_db=(gain_db, gain_db))
        silent += background_streams(noises, rng=rng, config=quiet)
        kinds += ["noise"] * len(noises)
    return Streams(words, silent, kinds)


def hours(recordings: Sequence[Samples], rate: int) -> float:
    """In all."""
    return sum(len(recording) for recording in recordings) / rate / 3600


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task", default="sc12", show_default=True, help="Of the words.")
@click.option(
    "--speech-task", default="intent", show_default=True, help="Speech without the words."
)
@click.option("--engine", "engines", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option(
    "--decision",
    "decisions",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Tuned checkpoint whose decision is measured besides that of each engine; of the first, "
    "the curve too.",
)
@click.option("--snr", type=float, default=20.0, show_default=True, help="Of the words, in dB.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    data: Path,
    task: str,
    speech_task: str,
    engines: tuple[Path, ...],
    decisions: tuple[Path, ...],
    snr: float,
    seed: int,
    out: Path,
) -> None:
    """Write the tables and the curve."""
    corpus = read_corpus(data, task)
    sessions = [open_session(path) for path in engines]
    specs = [streamable(session.spec) for session in sessions]
    spec = specs[0]
    rate = spec.features.sample_rate
    kept, clips, _ = load([clip for clip in corpus.of(EVAL) if clip.label != SILENCE], spec)
    labels = [match_labels([clip], spec.labels)[clip.path] for clip in kept]
    _, speech, _ = load(read_corpus(data, speech_task).of(EVAL), spec)
    _, noises, _ = load(corpus.noises_of(EVAL), spec)
    streams = build(clips, labels, speech, noises, rate, snr, seed)

    named = {"as exported": None} | {
        f"tuned ({path.stem})": streamable(load_checkpoint(path).spec).decision
        for path in decisions
    }
    outputs = [stream_logits(session, [*streams.words, *streams.silent]) for session in sessions]
    curves: dict[str, list[tuple[float, float]]] = {}
    points: list[str] = []
    details: list[str] = []
    kinds: list[str] = []
    for path, own, logits in zip(engines, specs, outputs, strict=True):
        for name, given in named.items():
            decision = given or own.decision
            found = measure(own, decision, streams, logits)
            points.append(f"| {path.name} | {name} | {found.cells}")
            rates = [f"{part.false_accepts_per_hour:.0f}" for part in found.by_kind.values()]
            kinds.append(f"| {path.name} | {name} | {' | '.join(rates)} |")
            if name not in list(named)[:2]:
                continue
            swept = []
            for threshold in THRESHOLDS:
                common = replace(
                    decision,
                    threshold=threshold,
                    thresholds=(),
                    release=min(decision.release, threshold),
                )
                swept.append((threshold, measure(own, common, streams, logits)))
            label = f"{path.name}, smoothing {decision.smoothing_s:g} s"
            curves[label] = [
                (p.silent.false_accepts_per_hour, 100 * p.words.false_rejects) for _, p in swept
            ]
            rows = "\n".join(f"| {threshold:g} | {p.cells}" for threshold, p in swept)
            details.append(
                f"{label}, release {decision.release:g}, one threshold for all words:\n\n"
                f"| threshold | {HEAD}|---|---|---|---|---|---|---|\n{rows}"
            )
    text = [
        f"{len(clips)} evaluation clips, {sum(label in spec.words for label in labels)} of them "
        f"words to find, once each, {hours([s.audio for s in streams.words], rate):.2f} h at "
        f"{snr:g} dB SNR. Without words: {hours(speech, rate):.2f} h of speech and "
        f"{hours(noises, rate):.2f} h of noise; the speech heard clean and in noise at "
        f"{', '.join(f'{db:g}' for db in NOISE_SNRS_DB)} dB, the noise at 0 and -12 dB of gain: "
        f"{hours([s.audio for s in streams.silent], rate):.2f} h. Seed {seed}.",
        f"| engine | decision | {HEAD}|---|---|---|---|---|---|---|---|\n" + "\n".join(points),
        f"| false accepts an hour | decision | {' | '.join(dict.fromkeys(streams.kinds))} |\n"
        f"|---|---|{'---|' * len(set(streams.kinds))}\n" + "\n".join(kinds),
        *details,
        "| accuracy, % | alone, clean | alone, cut out of the stream | in the stream |\n"
        "|---|---|---|---|\n"
        + "\n".join(
            f"| {path.name} | "
            + " | ".join(
                f"{100 * share:.1f}"
                for share in context(session, streams.words, logits[: len(streams.words)], clips)
            )
            + " |"
            for path, session, logits in zip(engines, sessions, outputs, strict=True)
        ),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "streaming.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    least = 1 / hours([s.audio for s in streams.silent], rate)
    (out / "det.svg").write_text(svg(curves, least / 10), encoding="utf-8")
    print(out / "streaming.md", out / "det.svg")


if __name__ == "__main__":
    main()
