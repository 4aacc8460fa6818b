"""From histograms to ranges, and the file that carries them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from cnngru_edge.calibration.ranges.histogram import BINS, Histogram
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import CalibrationError

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

MIN_CLIPS = 100
"""Fewer do not show what a network takes on."""

_FORMAT = 3
_LEVELS = 128  # of an int8 on each side of zero
_CANDIDATES = 128  # thresholds tried by mse, evenly up to the largest value


@dataclass(frozen=True)
class CalibrateConfig:
    """How ranges are chosen, and how many recordings there must be."""

    method: Method = "entropy"
    percentile: float = 99.99
    min_clips: int = MIN_CLIPS
    workers: int = 1


@dataclass(frozen=True)
class Range:
    """What a tensor's values are quantized between, and a summary of them."""

    low: float
    high: float
    minimum: float
    maximum: float
    mean: float
    std: float
    clipped: float  # share of the values outside low to high

    @property
    def amax(self) -> float:
        """The largest magnitude inside: what a scale is made of."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Subset:
    """What a part of the recordings alone would have given."""

    clips: int
    tensors: Mapping[str, float]  # amax


@dataclass(frozen=True)
class Ranges:
    """Ranges of a graph's tensors, and what they were measured on."""

    graph_sha256: str
    clips_sha256: str
    clips: int
    duration_s: float
    clip_samples: tuple[int, int, int]  # the shortest, the median, the longest
    method: Method
    percentile: float
    tensors: Mapping[str, Range]
    convergence: tuple[Subset, ...] = ()  # each inside the next: an eighth, a quarter, half

    def save(self, path: Path) -> None:
        """Write as JSON, the same bytes for the same ranges."""
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=1, sort_keys=True)
        write_file(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path, graph_sha256: str) -> "Ranges":
        """Read ranges, which must be of the graph with this hash.

        Raises:
            CalibrationError: no such file, not a ranges file, or of another graph.
        """
        if not path.is_file():
            raise CalibrationError(f"{path}: no such file; 'cnngru-edge calibrate' writes it")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != _FORMAT:
                raise CalibrationError(f"{path}: another version's format; calibrate again")
            raw["tensors"] = {name: Range(**r) for name, r in raw["tensors"].items()}
            raw["convergence"] = tuple(Subset(**subset) for subset in raw["convergence"])
            shortest, middle, longest = map(int, raw["clip_samples"])
            ranges = cls(**raw | {"clip_samples": (shortest, middle, longest)})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CalibrationError(f"{path}: not a ranges file of 'cnngru-edge calibrate'") from e
        if ranges.graph_sha256 != graph_sha256:
            raise CalibrationError(
                f"{path}: ranges of another graph (sha256 {ranges.graph_sha256[:12]}, this one is "
                f"{graph_sha256[:12]}); run 'cnngru-edge calibrate' on this graph"
            )
        return ranges


def range_of(histogram: Histogram, method: Method, percentile: float) -> Range:
    """Choose what to keep of a tensor's values.

    minmax keeps all; percentile that share of the magnitudes, in percent; entropy loses the least
    information (the Kullback-Leibler calibration of TensorRT: S. Migacz, "8-bit inference with
    TensorRT", GTC 2017); mse has the least squared error of rounding and clipping together. All but
    minmax are symmetric about zero, or begin at zero for a tensor without negative values.
    """
    low, high = histogram.minimum, histogram.maximum
    if method != "minmax":
        amax = max(abs(low), abs(high))
        amax = min(amax, _THRESHOLDS[method](histogram, percentile))
        low, high = (0.0 if low >= 0 else -amax), amax
    counts, centres = histogram.counts, histogram.centres
    mean = float(np.average(centres, weights=counts))
    std = float(np.average((centres - mean) ** 2, weights=counts)) ** 0.5
    half = np.ldexp(0.5, histogram.exponent)  # of a bin; one that a limit lies in is inside
    outside = (centres + half < low) | (centres - half > high)
    return Range(
        low,
        high,
        histogram.minimum,
        histogram.maximum,
        mean,
        std,
        float(counts[outside].sum() / histogram.total),
    )


def _percentile(histogram: Histogram, percentile: float) -> float:
    shares = np.cumsum(histogram.magnitudes) / histogram.total
    kept = int(np.searchsorted(shares, percentile / 100)) + 1
    return float(np.ldexp(kept, histogram.exponent))


def _mse(histogram: Histogram, percentile: float) -> float:
    del percentile
    counts = histogram.magnitudes.astype(np.float64)
    values = np.arange(BINS) + 0.5  # in bins
    used = int(np.flatnonzero(counts)[-1]) + 1
    thresholds = used * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    steps = thresholds / (_LEVELS - 1)
    errors = [
        counts @ (values - step * np.minimum(np.round(values / step), _LEVELS - 1)) ** 2
        for step in steps
    ]
    return float(np.ldexp(thresholds[int(np.argmin(errors))], histogram.exponent))


def _entropy(histogram: Histogram, percentile: float) -> float:
    del percentile
    counts = histogram.magnitudes.astype(np.float64)
    counts[0] = counts[1]  # exact zeros (ReLU, padding) cost nothing and would outweigh all else
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else _LEVELS
    kept = range(_LEVELS, max(used, _LEVELS) + 1, _LEVELS // 4)
    divergences = [_divergence(counts, n) for n in kept]
    return float(np.ldexp(kept[int(np.argmin(divergences))], histogram.exponent))


def _divergence(counts: npt.NDArray[np.float64], kept: int) -> float:
    """KL divergence from _LEVELS levels of `kept` bins, what is beyond clipped into the last."""
    reference = counts[:kept].copy()
    reference[-1] += counts[kept:].sum()
    # Each level spreads its mass evenly over those of its bins that have any.
    level = np.arange(kept) * _LEVELS // kept
    mass = np.bincount(level, weights=counts[:kept], minlength=_LEVELS)
    nonzero = reference > 0
    bins = np.bincount(level, weights=nonzero, minlength=_LEVELS)
    spread = np.divide(mass, bins, out=np.zeros(_LEVELS), where=bins > 0)
    quantized = np.where(nonzero, spread[level], 0.0)
    if not quantized.sum():
        return np.inf
    p, q = reference[nonzero] / reference.sum(), quantized[nonzero] / quantized.sum()
    with np.errstate(divide="ignore"):  # what has no level left is infinitely far away
        return float(np.sum(p * np.log(p / q)))


_THRESHOLDS = {"percentile": _percentile, "mse": _mse, "entropy": _entropy}
