import numpy as np
import pytest

from cnngru_edge.calibration.ranges.choose import METHODS, Range, Ranges, Subset, range_of
from cnngru_edge.calibration.ranges.histogram import Histogram
from cnngru_edge.models.errors import CalibrationError


def range_for(values, method, percentile=99.9):
    histogram = Histogram()
    histogram.observe(np.asarray(values, np.float32))
    return range_of(histogram, method, percentile)


def rounding_error(values, amax):
    step = amax / 127
    return np.mean((values - step * np.clip(np.rint(values / step), -127, 127)) ** 2)


@pytest.fixture
def outliers(rng):
    """Nearly normal values with a few far away, as activations are."""
    return np.concatenate([rng.standard_normal(200_000), [40.0, -60.0]]).astype(np.float32)


def test_minmax_keeps_all(outliers):
    found = range_for(outliers, "minmax")
    assert (found.low, found.high) == (found.minimum, found.maximum)
    assert (found.low, found.high) == (-60.0, 40.0)
    assert found.clipped == 0


def test_percentile_keeps_that_share_of_the_magnitudes(outliers):
    found = range_for(outliers, "percentile", 99.0)
    assert (
        found.high == -found.low == pytest.approx(np.percentile(np.abs(outliers), 99.0), rel=0.02)
    )
    assert found.clipped == pytest.approx(0.01, abs=0.001)


def test_mse_has_the_least_error_there_is(outliers):
    found = range_for(outliers, "mse")
    tried = [rounding_error(outliers, amax) for amax in np.linspace(1, 60, 200)]
    assert rounding_error(outliers, found.high) <= min(tried) * 1.05
    assert rounding_error(outliers, found.high) < rounding_error(outliers, 60.0) / 1.5


def test_entropy_clips_outliers_and_keeps_the_rest(outliers):
    found = range_for(outliers, "entropy")
    assert 3.0 < found.high < 20.0


@pytest.mark.parametrize("method", METHODS)
def test_uniform_values_are_kept_whole(rng, method):
    found = range_for(rng.uniform(-1, 1, 200_000), method, 100.0)
    assert found.high == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_negative_after_a_relu(rng, method):
    found = range_for(np.maximum(rng.standard_normal(10_000), 0), method)
    assert found.low == 0.0
    assert 0 < found.high <= found.maximum


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_tensor_has_a_range(method):
    found = range_for(np.zeros(100), method)
    assert found.low == 0.0
    assert found.high == 0.0


def test_the_summary_is_of_the_values(outliers):
    found = range_for(outliers, "percentile")
    assert found.mean == pytest.approx(outliers.mean(), abs=0.02)
    assert found.std == pytest.approx(outliers.std(), rel=0.02)


def ranges(**change):
    tensors = {"/convs.0/Relu_output_0": Range(0.0, 4.0, 0.0, 5.0, 1.0, 0.5, 0.001)}
    fields = {
        "graph_sha256": "a" * 64,
        "clips_sha256": "b" * 64,
        "clips": 100,
        "duration_s": 100.0,
        "clip_samples": (8_000, 16_000, 24_000),
        "method": "percentile",
        "percentile": 99.99,
        "tensors": tensors,
        "convergence": (Subset(25, {"/convs.0/Relu_output_0": 3.5}),),
    }
    return Ranges(**fields | change)


def test_a_file_gives_the_same_ranges(tmp_path):
    ranges().save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json", "a" * 64) == ranges()


def test_ranges_of_another_graph_are_refused(tmp_path):
    path = tmp_path / "ranges.json"
    ranges().save(path)
    with pytest.raises(CalibrationError, match="ranges of another graph"):
        Ranges.load(path, "c" * 64)


def test_ranges_of_another_version_are_refused(tmp_path):
    path = tmp_path / "ranges.json"
    ranges().save(path)
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(CalibrationError, match="another version's format; calibrate again"):
        Ranges.load(path, "a" * 64)


def test_the_scale_is_made_of_the_largest_magnitude():
    assert Range(-4.0, 3.0, -5.0, 5.0, 0.0, 1.0, 0.0).amax == 4.0
    assert Range(0.0, 3.0, 0.0, 5.0, 0.0, 1.0, 0.0).amax == 3.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 3}', '{"format": 3, "tensors": {}}'])
def test_what_is_no_ranges_file_is_refused(tmp_path, text):
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="not a ranges file"):
        Ranges.load(path, "a" * 64)
