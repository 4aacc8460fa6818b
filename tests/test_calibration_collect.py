import json

import numpy as np
import onnx_ir as ir
import pytest

from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import (
    CLIPS_PER_STREAM,
    calibrate,
    observed_tensors,
    smallest_subset,
)
from cnngru_edge.models.errors import CalibrationError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import pad_to_multiple, read_audio
from cnngru_edge.runtime.stream import Stream

FEW = CalibrateConfig(method="minmax", min_clips=1)


@pytest.fixture(scope="module")
def graph(exported):
    return exported / "model.fp32.onnx"


@pytest.fixture(scope="module")
def clips(demo):
    return [clip.path for clip in demo.of("calib")[::10]]


def test_every_weighted_operator_is_observed_but_the_front_end(graph):
    model = ir.load(graph)
    names = observed_tensors(model)
    assert [name for name in names if "log_mel" in name] == []
    assert [name for name in names if name.endswith("Relu_output_0")] == [
        f"/convs.{i}/Relu_output_0" for i in range(4)
    ]
    assert "/convs.0/Concat_output_0" in names
    (gru,) = (node for node in model.graph if node.op_type == "GRU")
    assert gru.inputs[0].name in names


def test_the_result_is_the_same_for_any_number_of_workers(graph, clips, tmp_path):
    files = []
    for workers in (1, 2):
        config = CalibrateConfig(method="percentile", min_clips=1, workers=workers)
        ranges, errors = calibrate(graph, clips, config)
        assert errors == []
        ranges.save(tmp_path / f"{workers}.json")
        files.append((tmp_path / f"{workers}.json").read_bytes())
    assert files[0] == files[1]


def test_the_state_is_carried_from_clip_to_clip(graph, clips):
    pair = clips[:2]
    with open_session(graph) as session:
        stream, amax = Stream(session), 0.0
        for path in pair:
            samples = pad_to_multiple(read_audio(path, 16_000).samples, 320)
            stream.push(samples[None])
            amax = max(amax, float(np.abs(stream.state["gru0_hidden"]).max()))
    # The last frame of the second clip is reached only with the first clip's state.
    together, _ = calibrate(graph, pair, FEW)
    apart = [calibrate(graph, [path], FEW)[0] for path in pair]
    name = "/grus.0/GRU_output_0"
    assert together.tensors[name].mean != pytest.approx(
        np.mean([r.tensors[name].mean for r in apart]), abs=1e-4
    )
    assert together.tensors[name].maximum >= amax - 1e-3 or together.tensors[name].minimum <= -amax


def test_progress_is_told_of_every_clip(graph, clips):
    done = []
    calibrate(graph, clips, FEW, done.append)
    assert sum(done) == len(clips)
    assert max(done) <= CLIPS_PER_STREAM


def test_other_audio_has_another_hash(graph, clips):
    first, second = (calibrate(graph, part, FEW)[0] for part in (clips[:3], clips[1:4]))
    assert first.clips_sha256 != second.clips_sha256
    assert first.graph_sha256 == second.graph_sha256


def test_subsets_lie_in_each_other_and_take_of_every_label():
    subsets = [[i for i in range(800) if smallest_subset(i) >= halvings] for halvings in range(4)]
    assert [len(subset) for subset in subsets] == [800, 400, 200, 100]
    for part, whole in zip(subsets[1:], subsets, strict=False):
        assert set(part) < set(whole)
    # Sorted by labels of 20 clips each, and at every place in a stream.
    for halvings, subset in enumerate(subsets):
        of_label = [sum(i // 20 == label for i in subset) for label in range(40)]
        assert max(of_label) - min(of_label) <= 2
        assert min(of_label) >= 20 // 2**halvings - 1
        assert {i % CLIPS_PER_STREAM for i in subset} == set(range(CLIPS_PER_STREAM))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_subset_has_the_ranges_of_its_clips(graph, clips, workers):
    config = CalibrateConfig(method="minmax", min_clips=1, workers=workers)
    ranges, _ = calibrate(graph, clips[:8], config)
    assert [subset.clips for subset in ranges.convergence] == [1, 2, 4]
    alone, _ = calibrate(graph, clips[:1], config)  # the first clip has no past
    assert ranges.convergence[0].tensors == {n: r.amax for n, r in alone.tensors.items()}
    assert alone.convergence == ()
    for name, whole in ranges.tensors.items():
        amax = [subset.tensors[name] for subset in ranges.convergence]
        assert amax == sorted(amax)
        assert amax[-1] <= whole.amax
    assert any(r.amax > ranges.convergence[0].tensors[n] for n, r in ranges.tensors.items())


def test_a_clip_that_cannot_be_read_is_in_no_subset(graph, clips, tmp_path):
    (tmp_path / "bad.wav").touch()
    ranges, errors = calibrate(graph, [tmp_path / "bad.wav", *clips[1:8]], FEW)
    assert len(errors) == 1
    assert ranges.clips == 7
    assert [subset.clips for subset in ranges.convergence] == [1, 3]


def test_too_few_clips_are_refused(graph, clips):
    with pytest.raises(CalibrationError, match=r"3 recordings can be used, .* at least 100"):
        calibrate(graph, clips[:3], CalibrateConfig())


def test_a_range_contains_what_the_tensor_took_on(graph, clips):
    ranges, _ = calibrate(graph, clips, FEW)
    text = json.loads(json.dumps({name: vars(r) for name, r in ranges.tensors.items()}))
    assert all(r["low"] <= r["mean"] <= r["high"] for r in text.values())
    assert ranges.tensors["/convs.0/Relu_output_0"].low == 0.0
    # A mean of tanh values, but for the rounding of the runtime.
    assert -1.00001 <= ranges.tensors["/grus.0/GRU_output_0"].low < 0
