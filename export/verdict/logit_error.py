"""How far a model's logits are from those of the float model, on the same clips."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.models.errors import CorpusError
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.agreement import sqnr_db
from cnngru_edge.runtime.decode.answer import clip_answer
from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.session import Array
from cnngru_edge.runtime.stream import clip_logits


@dataclass(frozen=True)
class LogitError:
    """Power of the float logits and of what differs from them, by frame; and the answers."""

    signal: Array  # (T,), summed over clips and labels
    noise: Array  # (T,)
    labels: tuple[str, ...]
    flips: int  # clips with another answer than float's

    @property
    def sqnr_db(self) -> float | None:
        """Over all frames; None if nothing differs."""
        return sqnr(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def curve(self) -> tuple[float | None, ...]:
        """The same of each frame, from a clip's beginning."""
        return tuple(sqnr(float(s), float(n)) for s, n in zip(self.signal, self.noise, strict=True))


class FloatAnswers:
    """A float model's logits of some clips, to hold those of others against."""

    def __init__(self, reference: Path, clips: Sequence[Samples]) -> None:
        if not clips:
            raise CorpusError("no recordings to measure on: none of the set can be read")
        self._clips = clips
        self.spec, self._logits = self._run(reference)
        self.labels = self._labels(self._logits)
        lengths = sorted(len(logits) for logits in self._logits)
        self.frames = lengths[len(lengths) // 2]  # of the median clip

    def error(self, path: Path) -> LogitError:
        """How far an artefact's answers are from those of the float model."""
        _, found = self._run(path)
        signal, noise = np.zeros((2, max(len(logits) for logits in self._logits)))
        for expected, logits in zip(self._logits, found, strict=True):
            signal[: len(expected)] += np.square(expected, dtype=np.float64).sum(1)
            noise[: len(expected)] += np.square(logits - expected, dtype=np.float64).sum(1)
        labels = self._labels(found)
        flips = sum(a != b for a, b in zip(labels, self.labels, strict=True))
        return LogitError(signal, noise, labels, flips)

    def _run(self, path: Path) -> tuple[Spec, list[Array]]:
        with open_session(path) as session:
            return session.spec, [clip_logits(session, samples) for samples in self._clips]

    def _labels(self, logits: Sequence[Array]) -> tuple[str, ...]:
        return tuple(clip_answer(self.spec, clip) for clip in logits)


def sqnr(signal: float, noise: float) -> float | None:
    """`sqnr_db` of two powers; None without noise, for JSON has no infinity."""
    found = sqnr_db(signal, noise)
    return None if found == math.inf else found


@contextmanager
def saved(model: ir.Model) -> Iterator[Path]:
    """A graph as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx_graph.save(model, path)
        yield path
