from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper, parser

from cnngru_edge.calibration.ranges.choose import CalibrateConfig, Range, Ranges
from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES, calibrate
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import RECURRENT
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets import cpu as quantize_cpu
from cnngru_edge.export.targets.base import MAX_FRAMES, TARGETS
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.export.verdict.compare import compare
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import CalibrationError, ExportError
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ConvSpec, FeatureSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import PRECISION_KEY, SOURCE_KEY
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


def range_of(low, high):
    return Range(low, high, low, high, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 51.0, 0.2, 0),
        (-1.0, 1.0, 1 / 127, 128),
        (-2.54, 1.0, 0.02, 128),
        (0.0, 0.0, 1 / 255, 0),
    ],
)
def test_an_unsigned_activation_uses_the_whole_of_a_byte(low, high, scale, zero_point):
    affine = integer.unsigned_affine(range_of(low, high))
    assert affine == integer.Affine(np.float32(scale), np.uint8(zero_point))


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(0.0, 25.4, 0.2), (-1.0, 1.0, 1 / 127), (-2.54, 1.0, 0.02), (0.0, 0.0, 1 / 127)],
)
def test_a_signed_activation_is_symmetric_about_zero(low, high, scale):
    affine = integer.symmetric_affine(range_of(low, high))
    assert affine == integer.Affine(np.float32(scale), np.int8(0))
    assert affine.zero_point.dtype == np.int8


def test_a_dead_channel_keeps_its_bias():
    weight = np.array([[1e-12], [1.0]], np.float32)
    scales = integer.weight_scales(weight, 0)
    bias = ir.Value(name="bias", const_value=ir.tensor(np.array([3.0, 3.0], np.float32)))
    held = integer.scales_that_hold(scales, bias, np.float32(0.1))
    assert held[1] == scales[1]
    integers = integer.quantize(np.float32([3.0, 3.0]), np.float32(0.1) * held, 0, np.int32)
    np.testing.assert_allclose(integers * (0.1 * held.astype(np.float64)), [3.0, 3.0], rtol=1e-6)


LOOP = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
loop (float[N,K] h0, float[T,N,K] x) => (float[N,K] hn, float[T,N,J] y) {
  hn, y = Scan<num_scan_inputs = 1, body = step (float[N,K] h, float[N,K] x_t)
      => (float[N,K] h_next, float[N,J] y_t) <float[1] weight = {0}, float[1] bias = {0}> {
    h_next = Identity(x_t)
    product = MatMul(x_t, weight)
    y_t = Add(product, bias)
  }>(h0, x)
}
"""


@pytest.mark.parametrize("size", [1, 5, 16, 100, 128, 130, 300])
def test_a_product_in_a_loop_is_of_integers_in_blocks(size, rng):
    weight = rng.standard_normal((size, 24)).astype(np.float32)
    weight[:, 3] = 0
    bias = rng.standard_normal(24).astype(np.float32)
    model = ir.from_proto(parser.parse_model(LOOP))
    body = next(model.graph.subgraphs())
    for name, values in (("weight", weight), ("bias", bias)):
        stored = body.initializers[name]
        stored.const_value, stored.shape = ir.tensor(values), ir.Shape(values.shape)
    next(node for node in body if node.op_type == "MatMul").outputs[0].meta[RECURRENT] = True
    quantize_cpu.quantize(model, lambda value: pytest.fail("its range is found frame by frame"))
    node = next(node for node in body if node.op_type == "MatMulNBits")
    integers, scales = (value.const_value.numpy() for value in node.inputs[1:3])
    restored = (integers.astype(np.float32) - 128) * scales[..., None]
    restored = restored.reshape(24, -1)
    assert not restored[:, size:].any()
    step = np.repeat(scales, integers.shape[2], axis=1)[:, :size]
    assert np.all(np.abs(restored[:, :size] - weight.T) <= 0.5001 * step)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = rng.uniform(-1, 1, (4, 2, size)).astype(np.float32)
    found = session.run(["y"], {"h0": x[0], "x": x})[0]
    expected = x @ weight + bias
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def optimized(path, folder):
    """The nodes that ONNX Runtime really runs, those of loops too."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(ir.load(folder / "optimized.onnx").graph.all_nodes())


@pytest.fixture(scope="module")
def run_nodes(exported, tmp_path_factory):
    return optimized(exported / "model.int8.onnx", tmp_path_factory.mktemp("optimized"))


def weighted(nodes):
    """How many operators have weights, by type, outside the front-end."""
    return Counter(
        node.op_type
        for node in nodes
        if any(part in node.op_type for part in ("Conv", "MatMul", "Gemm", "GRU"))
        and not node.name.startswith(FRONTEND_NODES)
    )


def test_every_operator_with_weights_runs_in_integers(run_nodes):
    assert weighted(run_nodes) == {"QLinearConv": 4, "MatMulIntegerToFloat": 2, "MatMulNBits": 1}


def test_only_the_product_with_the_state_is_in_a_loop(run_nodes):
    (scan,) = (node for node in run_nodes if node.op_type == "Scan")
    assert weighted(scan.attributes["body"].as_graph()) == {"MatMulNBits": 1}


def test_a_relu_is_where_the_integers_end(run_nodes):
    assert "Relu" not in {node.op_type for node in run_nodes}


def test_weights_are_signed_and_activations_are_not(run_nodes):
    convolutions = [node for node in run_nodes if node.op_type == "QLinearConv"]
    products = [node for node in run_nodes if node.op_type == "MatMulIntegerToFloat"]
    weights = [node.inputs[3] for node in convolutions] + [node.inputs[1] for node in products]
    zero_points = [node.inputs[2] for node in convolutions] + [node.inputs[4] for node in products]
    assert {value.dtype for value in weights} == {ir.DataType.INT8}
    assert {value.dtype for value in zero_points} == {ir.DataType.UINT8}


def test_every_weight_is_stored_in_a_byte(exported, kws12):
    graph = onnx_graph.load(exported / "model.int8.onnx").graph
    stored = [
        value.const_value
        for body in (graph, *graph.subgraphs())
        for value in body.initializers.values()
        if value.dtype in {ir.DataType.INT8, ir.DataType.UINT8} and value.shape.rank() > 1
    ]
    # Of this model, no block is padded.
    weights = [p for name, p in kws12.for_export().named_parameters() if "weight" in name]
    assert sum(tensor.size for tensor in stored) == sum(p.numel() for p in weights)


def test_the_file_is_less_than_a_third_as_large(exported):
    sizes = [(exported / f"model.{p}.onnx").stat().st_size for p in ("int8", "fp32")]
    assert sizes[0] <= 0.30 * sizes[1]


def test_a_tensor_that_is_only_moved_keeps_its_scale(exported):
    graph = onnx_graph.load(exported / "model.int8.onnx").graph
    product = next(node for node in graph if node.op_type == "MatMulIntegerToFloat")
    value, moves = product.inputs[0], 0
    while value.producer().op_type in integer.LAYOUT:
        value, moves = value.producer().inputs[0], moves + 1
    quantize = value.producer()
    assert moves == 3  # (N, C, T, F) to (T, N, C F)
    assert quantize.op_type == "QuantizeLinear"
    assert quantize.inputs[0].producer().op_type == "Relu"
    for found, expected in (
        (product.inputs[2], quantize.inputs[1]),
        (product.inputs[4], quantize.inputs[2]),
    ):
        assert found.const_value.numpy() == expected.const_value.numpy()


def test_the_past_of_a_tensor_has_its_scale(exported):
    graph = onnx_graph.load(exported / "model.int8.onnx").graph
    joined = [
        [value.producer() for value in node.inputs]
        for node in graph
        if node.op_type == "Concat" and node.name.endswith("_quantized")
    ]
    assert len(joined) == 3  # of four convolutions; the first reads floats
    for context, fresh in joined:
        assert context.op_type == fresh.op_type == "QuantizeLinear"
        for index in (1, 2):
            found, expected = (node.inputs[index].const_value for node in (context, fresh))
            assert found.numpy() == expected.numpy()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("frames", [None, 1], ids="{} frames".format)
def test_the_hidden_state_is_never_calibrated(exported, tmp_path, target, frames):
    source = exported / "model.fp32.onnx"
    ranges = Ranges.load(exported / "ranges.json", file_sha256(source))
    hidden = {name for name in ranges.tensors if name.startswith("/grus.")}
    assert hidden
    wild = {n: range_of(-9.0, 1e6) if n in hidden else r for n, r in ranges.tensors.items()}
    replace(ranges, tensors=wild).save(tmp_path / "ranges.json")
    quantize_onnx(source, exported / "ranges.json", tmp_path / "a.onnx", target, frames)
    quantize_onnx(source, tmp_path / "ranges.json", tmp_path / "b.onnx", target, frames)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_it_answers_as_the_float_model_does(exported, demo):
    comparison, errors = compare(
        exported / "model.fp32.onnx", exported / "model.int8.onnx", demo.root, demo.of("eval")
    )
    assert errors == []
    assert comparison.clips == len(demo.of("eval"))
    assert comparison.verdict != "worse"
    assert comparison.clean.agreement >= 0.98
    assert comparison.clean.reference_accuracy > 0.85


def sqnr(reference, candidate, clips):
    """Of the logits, in dB."""
    signal = noise = 0.0
    with open_session(reference) as a, open_session(candidate) as b:
        for clip in clips:
            samples = read_audio(clip.path, a.spec.features.sample_rate).samples
            expected, found = (clip_logits(session, samples) for session in (a, b))
            signal += float(np.sum(expected**2))
            noise += float(np.sum((found - expected) ** 2))
    return 10 * np.log10(signal / noise)


def test_logits_are_close_to_the_float_models(exported, demo):
    found = sqnr(exported / "model.fp32.onnx", exported / "model.int8.onnx", demo.of("eval")[::10])
    assert found > 30


@pytest.mark.parametrize("frames", [1, 4, 8], ids="{} frames".format)
def test_chunks_of_a_fixed_length_give_the_same(exported, demo, tmp_path, frames):
    source, path = exported / "model.fp32.onnx", tmp_path / "chunk.onnx"
    quantize_onnx(source, exported / "ranges.json", path, frames=frames)
    assert sqnr(source, path, demo.of("eval")[::25]) > 30
    nodes = optimized(path, tmp_path)
    assert not {"GRU", "Loop", "Scan"} & {node.op_type for node in nodes}
    assert set(weighted(nodes)) <= {"QLinearConv", "MatMulIntegerToFloat", "MatMulNBits"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("frames", [0, MAX_FRAMES + 1])
def test_lengths_without_a_graph_are_refused(exported, tmp_path, target, frames):
    with pytest.raises(
        ExportError, match=rf"^a graph without loops takes 1 to 8 frames, got {frames}$"
    ):
        quantize_onnx(
            exported / "model.fp32.onnx",
            exported / "ranges.json",
            tmp_path / "out.onnx",
            target,
            frames,
        )
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_quantized_graph_is_not_quantized_again(exported, tmp_path, target):
    with pytest.raises(ExportError, match=r"model\.int8\.onnx: already quantized"):
        quantize_onnx(
            exported / "model.int8.onnx", exported / "ranges.json", tmp_path / "out.onnx", target
        )


def test_where_it_comes_from_travels_inside(exported):
    with open_session(exported / "model.int8.onnx") as session:
        assert session.precision == session.metadata[PRECISION_KEY] == "int8"
        assert session.metadata[SOURCE_KEY] == file_sha256(exported / "model.fp32.onnx")


def calibrated(model, demo, folder):
    """A model's float graph and its ranges on a few clips."""
    source, ranges_path = folder / "float.onnx", folder / "ranges.json"
    export_onnx(model.for_export(), source)
    ranges, _ = calibrate(source, [c.path for c in demo.clips[:8]], CalibrateConfig(min_clips=1))
    ranges.save(ranges_path)
    return source, ranges_path, ranges


def test_a_tensor_without_a_range_is_named(tiny, demo, tmp_path):
    source, ranges_path, ranges = calibrated(tiny, demo, tmp_path)
    tensors = {k: v for k, v in ranges.tensors.items() if k != "/convs.1/Relu_output_0"}
    replace(ranges, tensors=tensors).save(ranges_path)
    with pytest.raises(
        CalibrationError, match=r"no range for the tensor '/convs\.1/Relu_output_0'"
    ):
        quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_several_layers_are_quantized(tiny, demo, tmp_path):
    source, ranges_path, _ = calibrated(tiny, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    assert weighted(optimized(tmp_path / "out.onnx", tmp_path)) == {
        "QLinearConv": 2,
        "MatMulIntegerToFloat": 3,
        "MatMulNBits": 2,
    }
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 15


def small_model(*convs):
    features = FeatureSpec(n_fft=164, win_length=160, hop_length=80, n_mels=8)
    return CnnGru(ModelSpec(("yes", "no"), features, convs, hidden_size=8)).eval()


@pytest.mark.parametrize("kernels", [(1, 1), (1, 3), (3, 1)], ids="{0[0]}-{0[1]}".format)
def test_convolutions_may_carry_no_past(demo, tmp_path, kernels):
    model = small_model(*(ConvSpec(4, (frames, 3)) for frames in kernels))
    for block in model.convs:
        torch.nn.init.normal_(block.norm.bias)
    source, ranges_path, _ = calibrated(model, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 20


def test_layers_may_share_their_numbers(demo, tmp_path):
    """The exporter keeps equal tensors once, like all the biases of a model without training."""
    model = small_model(*[ConvSpec(4, (3, 3))] * 3)
    bias = torch.randn(4)
    for block in model.convs:
        block.norm.bias.data.copy_(bias)
    model.convs[2].conv.weight.data.copy_(model.convs[1].conv.weight)
    source, ranges_path, _ = calibrated(model, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx")
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 20
