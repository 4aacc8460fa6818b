"""Audio through a session with the state carried, in chunks of any length."""

from cnngru_edge.runtime.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.session import Array, Session, initial_state


class Stream:
    """`batch` streams side by side through one session, each row with its own state."""

    def __init__(self, session: Session, batch: int = 1) -> None:
        self.session = session
        self.state = initial_state(session.spec, batch)

    def push(self, audio: Samples) -> Array:
        """Logits (N, S / chunk_length, C) of the next (N, S) samples.

        S is a multiple of `spec.chunk_length`. However the audio is cut, the logits are the same.
        """
        outputs = self.session.run({"audio": audio, **self.state})
        self.state = {s.name: outputs[s.next_name] for s in self.session.spec.state}
        return outputs["logits"]


def clip_logits(session: Session, samples: Samples) -> Array:
    """Logits (T, C) of one clip (S,): a stream of its own, padded with zeros to whole chunks."""
    padded = pad_to_multiple(samples, session.spec.chunk_length)
    logits: Array = Stream(session).push(padded[None])[0]
    return logits
