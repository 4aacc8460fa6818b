"""From logits to what was said."""

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.spec.stream import SILENCE, ModelSpec
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.session import Array

READING_INTERVAL_S = 0.5
"""Time between two readings of a long clip: a word is held for about a second after its end."""


def clip_scores(spec: Spec, logits: Array) -> npt.NDArray[np.float64]:
    """Probability of each label for a clip, (T, C) logits to (C,).

    A model that can stream answers when a word is over, so a clip is read at its end. A longer
    clip, with the word anywhere in it, is also read every half second before that, no earlier than
    one second from its start; the reading counts that is least like silence.
    """
    if not isinstance(spec, ModelSpec):
        return softmax(logits[-1].astype(np.float64))
    frames_per_second = spec.features.sample_rate / spec.chunk_length
    step = round(READING_INTERVAL_S * frames_per_second)
    readings = logits[::-1][::step]  # the last frame first
    readings = readings[: max(1, 1 + (len(logits) - round(frames_per_second)) // step)]
    scores = softmax(readings.astype(np.float64))
    rivals = scores[:, spec.labels.index(SILENCE)] if SILENCE in spec.labels else -scores.max(1)
    best: npt.NDArray[np.float64] = scores[int(np.argmin(rivals))]
    return best


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return probabilities
