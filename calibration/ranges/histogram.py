"""Histograms of a tensor's values: bounded memory, exact merging, no range known beforehand."""

import math

import numpy as np
import numpy.typing as npt

BINS = 4096
"""Bins on each side of zero: 16 for every level of an int8."""

_SMALLEST_EXPONENT = -40  # bins 1e-12 wide; nothing in a network needs finer ones


class Histogram:
    """Counts in 2 * BINS bins of width 2**exponent, with a bin's edge at zero.

    When a value lies outside, the width doubles and neighbours are added up. Both are exact in
    binary arithmetic, so the counts depend on the values alone and not on their order or grouping:
    histograms of the parts of a corpus merge into the histogram of the whole, to the last count.
    """

    def __init__(self) -> None:
        self.exponent = _SMALLEST_EXPONENT
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * BINS, np.int64)
        self.minimum = math.inf
        self.maximum = -math.inf

    def observe(self, values: npt.NDArray[np.float32]) -> None:
        """Count every element of an array of any shape."""
        low, high = float(values.min()), float(values.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._widen(_exponent_for(max(abs(low), abs(high))))
        bins = np.floor(np.ldexp(values.ravel(), -self.exponent)).astype(np.int64) + BINS
        # -BINS * width itself is in the first bin, and nothing is below it.
        self.counts += np.bincount(bins, minlength=2 * BINS)

    def merge(self, other: "Histogram") -> None:
        """Add what another histogram of the same tensor has counted."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self._widen(other.exponent)
        self.counts += _folded(other.counts, self.exponent - other.exponent)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The value in the middle of each bin, (2 * BINS,)."""
        centres: npt.NDArray[np.float64] = np.ldexp(np.arange(-BINS, BINS) + 0.5, self.exponent)
        return centres

    @property
    def magnitudes(self) -> npt.NDArray[np.int64]:
        """Counts of absolute values, (BINS,), the first bin beginning at zero."""
        return self.counts[BINS:] + self.counts[BINS - 1 :: -1]

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _folded(self.counts, exponent - self.exponent)
            self.exponent = exponent


def _exponent_for(amax: float) -> int:
    """The least exponent with amax < BINS * 2**exponent."""
    if amax == 0:
        return _SMALLEST_EXPONENT
    return max(_SMALLEST_EXPONENT, math.frexp(amax)[1] - (BINS.bit_length() - 1))


def _folded(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    for _ in range(min(doublings, 2 * BINS.bit_length())):  # by then all is in the two middle bins
        folded = np.zeros_like(counts)
        folded[BINS // 2 : BINS // 2 + BINS] = counts.reshape(-1, 2).sum(1)
        counts = folded
    return counts
