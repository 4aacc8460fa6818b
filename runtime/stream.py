"""Audio through a session with the state carried, in chunks of any length."""

from collections.abc import Sequence

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, WholeSpec, streamable
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.inputs.read import fitted
from cnngru_edge.runtime.session import Array, Session, initial_state

FLUSH_S = 0.06
"""Silence after a clip's end: a word cut off there is heard out, as it is in a stream."""


class Stream:
    """`batch` streams side by side through one session, each row with its own state."""

    def __init__(self, session: Session, batch: int = 1) -> None:
        self.session, self.spec = session, streamable(session.spec)
        rows = session.inputs[0].shape[0]
        if isinstance(rows, int) and rows != batch:
            raise SessionError(f"this session is for {rows} at a time, not for {batch} streams")
        if session.max_batch is not None and batch > session.max_batch:
            raise SessionError(
                f"this session is for at most {session.max_batch} streams, not for {batch}"
            )
        self._streams = session.streams(batch)
        self._is_closed = False

    @property
    def state(self) -> dict[str, Array]:
        """The states (N, ...) that the next chunk starts from, by input name."""
        return self._streams.state

    def push(self, audio: Samples) -> Array:
        """Logits (N, S / chunk_length, C) of the next (N, S) samples.

        S is a multiple of `spec.chunk_length`, and of the session's own length if it takes audio of
        one length only. However the audio is cut, the logits are the same.
        """
        length = fixed_length(self.session) or self.spec.chunk_length
        if audio.shape[1] % length or not audio.size:
            raise SessionError(
                f"this session takes {length} samples at a time, and {audio.shape[1]} are no "
                "multiple of that"
            )
        most = self.session.max_samples
        if most is None or audio.shape[1] <= most:
            return self._streams.advance(audio)
        starts = range(0, audio.shape[1], most)
        pieces = [self._streams.advance(audio[:, i : i + most]) for i in starts]
        return np.concatenate(pieces, axis=1)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        self._streams.reset(rows)

    def close(self) -> None:
        """Give back what the session holds for these streams."""
        if not self._is_closed:  # what it held may be another's by now
            self._streams.close()
        self._is_closed = True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fixed_length(session: Session) -> int | None:
    """Samples that a session takes at a time, or None for any multiple of a chunk."""
    length = session.inputs[0].shape[1]
    return length if isinstance(length, int) else None


def flushed(spec: ModelSpec, samples: Samples) -> Samples:
    """A clip (S,) with FLUSH_S of silence after it, and zeros up to the next whole chunk."""
    silence = np.zeros(round(FLUSH_S * spec.features.sample_rate), np.float32)
    return pad_to_multiple(np.concatenate([samples, silence]), spec.chunk_length)


def clip_feed(spec: Spec, given: Array) -> dict[str, Array]:
    """All inputs for one run over a whole clip, phrase or image, as `read_input` gives it."""
    if isinstance(spec, WholeSpec):
        return {spec.input.name: fitted(spec, given)[None]}
    return {"audio": flushed(spec, given)[None], **initial_state(spec, 1)}


def clip_logits(session: Session, given: Array) -> Array:
    """Logits (T, C) of one clip, phrase or image, as `read_input` gives it.

    Of a model that can stream, those of a stream of its own, flushed.
    """
    spec = session.spec
    if isinstance(spec, WholeSpec):
        whole: Array = session.run(clip_feed(spec, given))["logits"][0]
        return whole
    audio = flushed(spec, given)
    frames = len(audio) // spec.chunk_length
    audio = pad_to_multiple(audio, fixed_length(session) or spec.chunk_length)
    with Stream(session) as stream:
        logits: Array = stream.push(audio[None])[0, :frames]
    return logits
