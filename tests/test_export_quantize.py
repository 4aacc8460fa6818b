from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from cnngru_edge.calibration.collect import calibrate
from cnngru_edge.calibration.ranges import CalibrateConfig, Range, Ranges
from cnngru_edge.export import integer
from cnngru_edge.export.compare import compare
from cnngru_edge.export.inspection import inspect
from cnngru_edge.export.onnx_graph import export_onnx, file_sha256
from cnngru_edge.export.quantize import quantize_onnx
from cnngru_edge.models.errors import CalibrationError
from cnngru_edge.runtime.audio import read_audio
from cnngru_edge.runtime.session import PRECISION_KEY, SOURCE_KEY, open_session
from cnngru_edge.runtime.stream import clip_logits


def onnx_quantize(values, scale, zero_point):
    """QuantizeLinear as ONNX Runtime computes it."""
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info(
                "y", helper.np_dtype_to_tensor_dtype(zero_point.dtype), [None]
            )
        ],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zero_point, "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": values})[0]


@settings(deadline=None, max_examples=30)
@given(
    values=hnp.arrays(np.float32, 40, elements=st.floats(-300, 300, width=32)),
    scale=st.sampled_from([0.5, 1.0, 1 / 127, 0.037]),
    zero_point=st.sampled_from([np.uint8(0), np.uint8(128), np.int8(0)]),
)
def test_quantized_numbers_are_onnx_runtimes_to_the_bit(values, scale, zero_point):
    scale = np.float32(scale)
    found = integer.quantize(values, scale, int(zero_point), type(zero_point))
    assert np.array_equal(found, onnx_quantize(values, scale, np.asarray(zero_point)))


def test_halves_are_rounded_to_even():
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert integer.quantize(halves, np.float32(1), 0, np.int8).tolist() == [0, 2, 2, 0, -2]


def test_an_int32_saturates():
    big = np.array([1e30, -1e30], np.float32)
    limits = np.iinfo(np.int32)
    assert integer.quantize(big, np.float32(1), 0, np.int32).tolist() == [limits.max, limits.min]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 51.0, 0.2, 0),
        (-1.0, 1.0, 1 / 127, 128),
        (-2.54, 1.0, 0.02, 128),
        (0.0, 0.0, 1 / 255, 0),
    ],
)
def test_an_activation_uses_the_whole_of_a_byte(low, high, scale, zero_point):
    affine = integer.activation_affine(Range(low, high, low, high, 0.0, 0.0, 0.0))
    assert affine == integer.Affine(np.float32(scale), np.uint8(zero_point))


def test_a_dead_channel_keeps_its_bias():
    weight = np.array([[1e-12], [1.0]], np.float32)
    scales = integer.weight_scales(weight, 0)
    bias = ir.Value(name="bias", const_value=ir.tensor(np.array([3.0, 3.0], np.float32)))
    held = integer.scales_that_hold(scales, bias, np.float32(0.1))
    assert held[1] == scales[1]
    integers = integer.quantize(np.float32([3.0, 3.0]), np.float32(0.1) * held, 0, np.int32)
    np.testing.assert_allclose(integers * (0.1 * held.astype(np.float64)), [3.0, 3.0], rtol=1e-6)


def optimized(path, folder):
    """The nodes that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def test_convolutions_and_linear_layers_run_in_integers(exported, tmp_path):
    graph = optimized(exported / "model.int8.onnx", tmp_path)
    count = Counter(node.op_type for node in graph.node)
    assert count["QLinearConv"] == 4
    assert count["MatMulIntegerToFloat"] == 1
    assert count["Relu"] == 0  # clipping at zero point 0 is one
    # What is left in float: the front-end's two products, and the GRU.
    assert (count["Conv"], count["MatMul"], count["GRU"]) == (1, 1, 1)
    convolutions = [node for node in graph.node if node.op_type == "QLinearConv"]
    types = {i.name: i.data_type for i in graph.initializer}
    assert {types[node.input[3]] for node in convolutions} == {TensorProto.INT8}
    assert {types[node.input[2]] for node in convolutions} == {TensorProto.UINT8}


def test_all_weights_are_int8_but_the_front_ends(exported):
    coverage = inspect(exported / "model.int8.onnx")["coverage"]
    assert coverage["weights_int8"] == 1.0
    assert {(layer["name"], layer["precision"]) for layer in coverage["layers"]} == {
        *((f"convs.{i}.conv", "int8") for i in range(4)),
        ("grus.0", "int8"),
        ("head", "int8"),
    }
    assert inspect(exported / "model.fp32.onnx")["coverage"]["weights_int8"] == 0.0


def test_it_is_a_third_of_the_size(exported):
    sizes = [(exported / f"model.{p}.onnx").stat().st_size for p in ("int8", "fp32")]
    assert sizes[0] < sizes[1] / 3


def test_it_answers_as_the_float_model_does(exported, demo):
    comparison, errors = compare(
        exported / "model.fp32.onnx", exported / "model.int8.onnx", demo.of("eval")
    )
    assert errors == []
    assert comparison.clips == len(demo.of("eval"))
    assert comparison.passed
    assert comparison.agreement >= 0.98
    assert comparison.reference_accuracy > 0.85


def test_logits_are_close_to_the_float_models(exported, demo):
    signal = noise = 0.0
    with (
        open_session(exported / "model.fp32.onnx") as reference,
        open_session(exported / "model.int8.onnx") as candidate,
    ):
        for clip in demo.of("eval")[::10]:
            samples = read_audio(clip.path, 16_000).samples
            expected, found = (clip_logits(s, samples) for s in (reference, candidate))
            signal += float(np.sum(expected**2))
            noise += float(np.sum((found - expected) ** 2))
    assert 10 * np.log10(signal / noise) > 20  # dB


def test_where_it_comes_from_travels_inside(exported):
    with open_session(exported / "model.int8.onnx") as session:
        assert session.precision == session.metadata[PRECISION_KEY] == "int8"
        assert session.metadata[SOURCE_KEY] == file_sha256(exported / "model.fp32.onnx")


def test_a_tensor_without_a_range_is_named(tiny, demo, tmp_path):
    source, ranges_path = tmp_path / "tiny.onnx", tmp_path / "ranges.json"
    export_onnx(tiny.for_export(), source)
    clips = [clip.path for clip in demo.clips[:4]]
    ranges, _ = calibrate(source, clips, CalibrateConfig(min_clips=1))
    tensors = {k: v for k, v in ranges.tensors.items() if k != "/convs.1/Relu_output_0"}
    Ranges(**vars(ranges) | {"tensors": tensors}).save(ranges_path)
    with pytest.raises(
        CalibrationError, match=r"no range for the tensor '/convs\.1/Relu_output_0'"
    ):
        quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_several_layers_are_quantized(tiny, demo, tmp_path):
    source, ranges_path = tmp_path / "tiny.onnx", tmp_path / "ranges.json"
    export_onnx(tiny.for_export(), source)
    ranges, _ = calibrate(source, [c.path for c in demo.clips[:8]], CalibrateConfig(min_clips=1))
    ranges.save(ranges_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    layers = inspect(tmp_path / "out.onnx")["coverage"]["layers"]
    assert [layer["name"] for layer in layers] == [
        "convs.0.conv", "convs.1.conv", "grus.0", "grus.1", "head",
    ]  # fmt: skip
    assert {layer["precision"] for layer in layers} == {"int8"}
