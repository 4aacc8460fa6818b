"""Events out of a stream of logits: what was said, and when."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.runtime.decode.label import softmax
from cnngru_edge.runtime.session import Array


@dataclass(frozen=True)
class Detection:
    """A word in a stream."""

    time: float  # s from the start of the stream to where it was sure, about the word's end
    label: str
    score: float  # its probability, averaged over the smoothing


class Detector:
    """Turns the logits of a stream into detections, by the model's DecisionSpec.

    A label is detected when the average of its probability is the largest and reaches its
    threshold; again only after it has fallen below the release, so that a word that the model holds
    on to is one detection. `unknown` and `silence` are none.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._labels, decision = spec.labels, spec.decision
        self._frame_s = spec.chunk_length / spec.features.sample_rate
        self._thresholds = [decision.threshold_of(label) for label in spec.labels]
        self._release = decision.release
        self._smoothing = max(round(decision.smoothing_s / self._frame_s), 1)
        self._refractory = round(decision.refractory_s / self._frame_s)
        self._is_word = np.array([label in spec.words for label in spec.labels])
        self.reset()

    def reset(self) -> None:
        """Begin a stream."""
        self._frames = 0
        self._next = 0  # frame from which on there may be a detection
        self._recent: deque[Array] = deque(maxlen=self._smoothing)
        self._armed = self._is_word.copy()

    def push(self, logits: Array) -> list[Detection]:
        """The detections in the next frames, logits (T, C)."""
        found = []
        for probabilities in softmax(logits.astype(np.float64)):
            self._frames += 1
            self._recent.append(probabilities)
            # Over the whole window from the first frame on: at the start nothing is sure.
            average = np.sum(self._recent, axis=0) / self._smoothing
            self._armed |= self._is_word & (average < self._release)
            best = int(average.argmax())
            score = float(average[best])
            if self._armed[best] and score >= self._thresholds[best] and self._frames > self._next:
                self._armed[best] = False
                self._next = self._frames + self._refractory
                found.append(Detection(self._frames * self._frame_s, self._labels[best], score))
        return found
