import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnngru_edge.calibration.ranges.histogram import BINS, Histogram

VALUES = hnp.arrays(
    np.float32,
    st.integers(1, 50),
    elements=st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False),
)


def histogram_of(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.observe(part)
    return histogram


def same(a, b):
    return (
        a.exponent == b.exponent
        and np.array_equal(a.counts, b.counts)
        and (a.minimum, a.maximum) == (b.minimum, b.maximum)
    )


@given(VALUES, VALUES, VALUES)
def test_order_and_grouping_do_not_matter(a, b, c):
    whole = histogram_of(np.concatenate([a, b, c]))
    assert same(histogram_of(c, a, b), whole)
    left, right = histogram_of(a), histogram_of(b, c)
    left.merge(right)
    assert same(left, whole)
    other = histogram_of(b, c)
    other.merge(histogram_of(a))
    assert same(other, whole)


@given(VALUES)
def test_every_value_is_in_its_bin(values):
    histogram = histogram_of(values)
    width = 2.0**histogram.exponent
    edges = np.arange(-BINS, BINS + 1) * width
    expected, _ = np.histogram(values.astype(np.float64), edges)
    assert np.array_equal(histogram.counts, expected)
    assert histogram.total == values.size
    # At least half of the bins of one side are in use: the width is no coarser than it must be.
    if np.abs(values).max() > 1e-6:
        assert np.abs(values).max() >= BINS / 2 * width


def test_magnitudes_fold_the_signs_together():
    histogram = histogram_of(np.array([-3.0, 3.0, 1.0, 0.5], np.float32))
    assert histogram.magnitudes.sum() == 4
    assert histogram.magnitudes[int(3.0 / 2.0**histogram.exponent) - 1 :].sum() == 2


def test_zeros_alone_are_counted():
    histogram = histogram_of(np.zeros(7, np.float32))
    assert histogram.total == 7
    assert (histogram.minimum, histogram.maximum) == (0.0, 0.0)


def test_memory_does_not_grow_with_values(rng):
    histogram = Histogram()
    for scale in (1e-3, 1.0, 1e3):
        histogram.observe((scale * rng.standard_normal(10_000)).astype(np.float32))
    assert histogram.counts.shape == (2 * BINS,)
    assert histogram.total == 30_000
    assert histogram.centres[0] == pytest.approx((-BINS + 0.5) * 2.0**histogram.exponent)
