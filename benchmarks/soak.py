r"""Hours of audio through one INT8 stream: nothing may grow, drift or depend on how it was cut.

    python benchmarks/soak.py --engine build/kws12/model.int8.onnx \
        --reference build/kws12/model.fp32.onnx --hours 24

Clips in random order at random gain, in pieces of one frame to a second, as fast as they go. At the
end the last minutes run again, in another session, in one push, from a copy of the state.
"""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import DEMO, EVAL, read_corpus
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples, read_audio
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import Stream, fixed_length

WINDOW_S = 120.0
"""Audio in which the first and the last hidden states are compared, and which runs again."""
WARM_UP_S = 600.0
"""Audio after which memory may no longer grow."""
PIECE_S = 1.0
GAINS_DB = (-30.0, 6.0)
GAP_S = 0.5


@dataclass(frozen=True)
class Soak:
    """What hours of audio have done to a stream."""

    audio_s: float
    pushes: int
    compute_s: float  # of the stream, without the reference
    max_abs_error: float  # of the logits in the last minutes, to the same minutes in one push
    resident_mib: float  # at the end
    growth_mib: float | None  # from the warm-up to the end, if the audio lasts longer
    first_rms: float | None  # of h, to the float stream, in the first minutes
    last_rms: float | None


def soak(
    engine: Path,
    reference: Path | None,
    clips: Sequence[Samples],
    audio_s: float,
    *,
    window_s: float = WINDOW_S,
    warm_up_s: float = WARM_UP_S,
    seed: int = 0,
) -> Soak:
    """Push `audio_s` seconds of the clips through the engine, and see."""
    with ExitStack() as held:
        session = held.enter_context(open_session(engine))
        stream = held.enter_context(Stream(session))
        other = None
        if reference is not None:
            other = held.enter_context(Stream(held.enter_context(open_session(reference))))
        rate = session.spec.features.sample_rate
        pushed, pushes, compute_s, warm = 0, 0, 0.0, 0.0
        errors: dict[str, list[float]] = {"first": [], "last": []}
        state: dict[str, Array] | None = None
        # Taken at the start, so that it is no growth: the last minutes and their logits.
        room_s = window_s + 2 * PIECE_S
        tail = np.ones(int(room_s * rate), np.float32)
        frames = len(tail) // session.spec.chunk_length
        logits = np.ones((frames, len(session.spec.labels)), np.float32)
        kept = 0
        for piece in _pieces(clips, session, seed):
            at_s = pushed / rate
            if at_s >= audio_s:
                break
            if at_s >= warm_up_s and not warm:
                warm = resident_mib()
            if at_s >= audio_s - window_s and state is None:
                state = {name: value.copy() for name, value in stream.state.items()}
            start = time.perf_counter()
            found = stream.push(piece[None])
            compute_s += time.perf_counter() - start
            pushed += len(piece)
            pushes += 1
            if other is not None:
                other.push(piece[None])
                part = "first" if at_s < window_s else "last" if state is not None else None
                if part:
                    errors[part].append(_hidden_error(stream, other))
            if state is not None:
                frame = kept // session.spec.chunk_length
                tail[kept : kept + len(piece)] = piece
                logits[frame : frame + found.shape[1]] = found[0]
                kept += len(piece)
        end = resident_mib()
        assert state is not None
        again = _run_again(engine, state, tail[:kept])
        rms = {
            part: float(np.sqrt(np.mean(found))) if found else None
            for part, found in errors.items()
        }
        return Soak(
            audio_s=pushed / rate,
            pushes=pushes,
            compute_s=compute_s,
            max_abs_error=float(np.abs(logits[: len(again)] - again).max()),
            resident_mib=end,
            growth_mib=end - warm if warm else None,
            first_rms=rms["first"],
            last_rms=rms["last"],
        )


def resident_mib() -> float:
    """Memory that this process has now, from /proc."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _pieces(clips: Sequence[Samples], session: Session, seed: int) -> Iterator[Samples]:
    """Audio without an end, in pieces of random length that the session takes."""
    rng = np.random.default_rng(seed)
    spec = streamable(session.spec)
    rate = spec.features.sample_rate
    unit = fixed_length(session) or spec.chunk_length
    most = max(int(PIECE_S * rate) // unit, 1)
    rest = np.zeros(0, np.float32)
    while True:
        size = int(rng.integers(1, most + 1)) * unit
        while len(rest) < size:
            clip = clips[int(rng.integers(len(clips)))]
            gain = 10 ** (rng.uniform(*GAINS_DB) / 20)
            gap = np.zeros(int(rng.uniform(0, GAP_S) * rate), np.float32)
            rest = np.concatenate([rest, (gain * clip).astype(np.float32), gap])
        yield rest[:size]
        rest = rest[size:]


def _hidden_error(stream: Stream, other: Stream) -> float:
    """Mean square of what the hidden states differ by."""
    a, b = stream.state, other.state
    names = [name for name in a if name.endswith("_hidden")]
    return float(np.mean([np.mean((a[name] - b[name]) ** 2) for name in names]))


def _run_again(engine: Path, state: dict[str, Array], audio: Samples) -> Array:
    """Logits (T, C) of audio from a state on, in a session of its own, in as few runs as it can."""
    with open_session(engine) as session:
        length = session.max_samples or len(audio)
        pieces = []
        for start in range(0, len(audio), length):
            outputs = session.run({"audio": audio[None, start : start + length], **state})
            state = {s.name: outputs[s.next_name].copy() for s in session.spec.state}
            pieces.append(outputs["logits"][0].copy())
        return np.concatenate(pieces)


@click.command()
@click.option("--engine", type=click.Path(path_type=Path), required=True)
@click.option("--reference", type=click.Path(path_type=Path))
@click.option("--hours", type=float, default=24)
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
def main(engine: Path, reference: Path | None, hours: float, data: Path) -> None:
    """Print a table."""
    with open_session(engine) as session:
        rate = session.spec.features.sample_rate
    clips = [read_audio(clip.path, rate).samples for clip in read_corpus(data).of(EVAL)]
    found = soak(engine, reference, clips, 3600 * hours)
    print(f"| {engine.name} | |\n|---|---|")
    print(f"| audio | {found.audio_s / 3600:.2f} h in {found.pushes:,} pieces |")
    print(f"| real-time factor | {found.compute_s / found.audio_s:.5f} |")
    print(f"| logits of the last {WINDOW_S:.0f} s, run again | {found.max_abs_error:.2g} apart |")
    since = "" if found.growth_mib is None else f", {found.growth_mib:+.2f} since the warm-up"
    print(f"| memory | {found.resident_mib:.1f} MiB{since} |")
    if found.first_rms is not None and found.last_rms is not None:
        print(f"| RMS error of h, first {WINDOW_S:.0f} s | {found.first_rms:.5f} |")
        print(f"| RMS error of h, last {WINDOW_S:.0f} s | {found.last_rms:.5f} |")


if __name__ == "__main__":
    main()
