"""Audio through a session with the state carried, in chunks of any length."""

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec import ModelSpec
from cnngru_edge.runtime.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.session import Array, Session, initial_state

FLUSH_S = 0.06
"""Silence after a clip's end: a word cut off there is heard out, as it is in a stream."""


class Stream:
    """`batch` streams side by side through one session, each row with its own state."""

    def __init__(self, session: Session, batch: int = 1) -> None:
        streams = session.inputs[0].shape[0]
        if isinstance(streams, int) and streams != batch:
            raise SessionError(f"this session is for {streams} at a time, not for {batch} streams")
        self.session = session
        self.state = initial_state(session.spec, batch)

    def push(self, audio: Samples) -> Array:
        """Logits (N, S / chunk_length, C) of the next (N, S) samples.

        S is a multiple of `spec.chunk_length`, and of the session's own length if it takes audio of
        one length only. However the audio is cut, the logits are the same.
        """
        fixed = fixed_length(self.session)
        length = fixed or self.session.spec.chunk_length
        if audio.shape[1] % length or not audio.size:
            raise SessionError(
                f"this session takes {length} samples at a time, and {audio.shape[1]} are no "
                "multiple of that"
            )
        if fixed is None:
            return self._run(audio)
        pieces = range(0, audio.shape[1], length)
        return np.concatenate([self._run(audio[:, i : i + length]) for i in pieces], axis=1)

    def _run(self, audio: Samples) -> Array:
        outputs = self.session.run({"audio": audio, **self.state})
        self.state = {s.name: outputs[s.next_name] for s in self.session.spec.state}
        return outputs["logits"]


def fixed_length(session: Session) -> int | None:
    """Samples that a session takes at a time, or None for any multiple of a chunk."""
    length = session.inputs[0].shape[1]
    return length if isinstance(length, int) else None


def flushed(spec: ModelSpec, samples: Samples) -> Samples:
    """A clip (S,) with FLUSH_S of silence after it, and zeros up to the next whole chunk."""
    silence = np.zeros(round(FLUSH_S * spec.features.sample_rate), np.float32)
    return pad_to_multiple(np.concatenate([samples, silence]), spec.chunk_length)


def clip_logits(session: Session, samples: Samples) -> Array:
    """Logits (T, C) of one clip (S,): a stream of its own, flushed."""
    audio = flushed(session.spec, samples)
    frames = len(audio) // session.spec.chunk_length
    audio = pad_to_multiple(audio, fixed_length(session) or session.spec.chunk_length)
    logits: Array = Stream(session).push(audio[None])[0, :frames]
    return logits
