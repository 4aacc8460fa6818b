"""How a session hears clips: whole or as a stream, alone or after another clip."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.models.errors import InputError, SessionError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.inputs.audio import Samples, read_audio
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import Stream, fixed_length, flushed

_ROWS = 48  # clips at a time, side by side where a session takes so many


@dataclass(frozen=True)
class Heard:
    """A clip, and what is heard before it if the state is carried."""

    clip: Clip
    samples: Samples
    before: Samples

    def audio(self, spec: ModelSpec, offset_ms: float, is_fresh: bool) -> tuple[Samples, int]:
        """All samples, whole frames of them, and the number of frames before the clip's."""
        silence = np.zeros(round(offset_ms / 1000 * spec.features.sample_rate), np.float32)
        clip = flushed(spec, np.concatenate([silence, self.samples]))
        if is_fresh:
            return clip, 0
        before = flushed(spec, self.before)
        return np.concatenate([before, clip]), len(before) // spec.chunk_length


class Listener:
    """One session with its streams, which are reset before each hearing."""

    def __init__(self, name: str, session: Session, clips: int) -> None:
        fixed = session.inputs[0].shape[0]
        rows = min(_ROWS, max(clips, 1))
        self.name, self.session = name, session
        self._rows = fixed if isinstance(fixed, int) else min(rows, session.max_batch or rows)
        self._stream = Stream(session, self._rows)
        self._spec = self._stream.spec

    def listen_all(
        self, audio: Sequence[tuple[Samples, int]], chunks_ms: Sequence[float]
    ) -> dict[float | None, list[Array]]:
        """The clips in one push, by None, and as streams by the length of their chunks."""
        return {ms: self.listen(audio, ms) for ms in (None, *_fitting(self.session, chunks_ms))}

    def listen(
        self, audio: Sequence[tuple[Samples, int]], chunk_ms: float | None = None
    ) -> list[Array]:
        """Logits (T, C) of each clip, without those of what comes before it."""
        found: list[Array] = []
        for start in range(0, len(audio), self._rows):
            found += self._listen(audio[start : start + self._rows], chunk_ms)
        return found

    def _listen(self, audio: Sequence[tuple[Samples, int]], chunk_ms: float | None) -> list[Array]:
        spec = self._spec
        unit = fixed_length(self.session) or spec.chunk_length
        longest = max(len(samples) for samples, _ in audio)
        size = -(-longest // unit) * unit
        if chunk_ms is not None:
            size = round(chunk_ms / 1000 * spec.features.sample_rate)
        # The rows to the end of the batch are silent: their number changes how kernels round.
        batch = np.zeros((self._rows, -(-longest // size) * size), np.float32)
        for row, (samples, _) in zip(batch, audio, strict=False):
            row[: len(samples)] = samples
        self._stream.reset()
        pieces = [
            # A session may give out the same memory each time.
            self._stream.push(np.ascontiguousarray(batch[:, i : i + size])).copy()
            for i in range(0, batch.shape[1], size)
        ]
        logits = np.concatenate(pieces, axis=1)
        if not np.isfinite(logits).all():
            raise SessionError(f"the {self.name} answers NaN; its file is damaged, export it again")
        return [
            logits[i, skipped : len(samples) // spec.chunk_length]
            for i, (samples, skipped) in enumerate(audio)
        ]

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


def batches(
    clips: Sequence[Clip],
    order: Iterable[int],
    sample_rate: int,
    errors: list[InputError],
    progress: Callable[[int], None],
) -> Iterator[list[Heard]]:
    """The clips that can be read, in this order: each is heard after the one before it."""
    in_order = [clips[i] for i in order]
    before: Samples | None = None
    for start in range(0, len(clips), _ROWS):
        read: list[tuple[Clip, Samples]] = []
        for clip in (together := in_order[start : start + _ROWS]):
            try:
                read.append((clip, read_audio(clip.path, sample_rate).samples))
            except InputError as e:
                errors.append(e)
        if read:
            # None comes before the first: it is heard after the last of its batch.
            befores = [read[-1][1] if before is None else before, *(s for _, s in read[:-1])]
            before = read[-1][1]
            yield [Heard(c, s, b) for (c, s), b in zip(read, befores, strict=True)]
        progress(len(together))


def _fitting(session: Session, chunks_ms: Sequence[float]) -> tuple[float, ...]:
    """The chunks that a session takes, or its own where it takes none of them."""
    spec = streamable(session.spec)
    rate = spec.features.sample_rate
    if length := fixed_length(session):
        return (1000 * length / rate,)  # longer ones are the same steps again
    unit = spec.chunk_length
    fitting = tuple(
        ms
        for ms in chunks_ms
        if math.isclose(ms * rate / 1000, size := round(ms * rate / 1000)) and size % unit == 0
    )
    return fitting or (1000 * unit / rate,)
