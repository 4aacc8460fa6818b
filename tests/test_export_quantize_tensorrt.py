import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import parser
from packaging.version import Version

from cnngru_edge.calibration.ranges.choose import CalibrateConfig, Range
from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES, calibrate
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets import base as targets
from cnngru_edge.export.targets.trt import lint
from cnngru_edge.export.targets.trt import quantize as quantize_tensorrt
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ConvSpec, FeatureSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import CLIP_SAMPLES_KEY, HostStreams
from cnngru_edge.runtime.stream import Stream, clip_logits

FLOAT, HALF = "tensorrt", "tensorrt-fp16"
PAIR = ("QuantizeLinear", "DequantizeLinear")
CASES = [(target, frames) for target in (FLOAT, HALF) for frames in (None, 1, 4)]


def case_id(case):
    target, frames = case
    return f"{target}-{frames or 'any'}"


def only(cases):
    """Just these of the fixture `quantized`."""
    return pytest.mark.parametrize("quantized", cases, indirect=True, ids=case_id)


fixed_length = only([case for case in CASES if case[1] is not None])
half_precision = only([case for case in CASES if case[0] == HALF])


@dataclass(frozen=True)
class Quantized:
    target: str
    frames: int | None
    path: Path
    graph: ir.Graph

    @property
    def half(self):
        return self.target == HALF

    def nodes(self, *op_types):
        return [node for node in self.graph.all_nodes() if node.op_type in op_types]

    @property
    def weighted(self):
        nodes = self.nodes("Conv", "MatMul")
        return [node for node in nodes if not node.name.startswith(FRONTEND_NODES)]

    @property
    def initializers(self):
        bodies = (self.graph, *self.graph.subgraphs())
        return [value for body in bodies for value in body.initializers.values()]


@pytest.fixture(scope="module", params=CASES, ids=case_id)
def quantized(request, exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "model.onnx"
    quantize_onnx(exported / "model.fp32.onnx", exported / "ranges.json", path, *request.param)
    return Quantized(*request.param, path, onnx_graph.load(path).graph)


class AsWritten:
    """A session without ONNX Runtime's optimizations, which round FP16 biases to integers."""

    def __init__(self, path):
        with open_session(path) as session:
            self.spec, self.inputs = session.spec, session.inputs
            self.max_batch, self.max_samples = session.max_batch, session.max_samples
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def run(self, feed):
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def streams(self, batch):
        return HostStreams(self, batch)


def sqnr(source, path, clips):
    """Of the logits of a quantized graph, in dB; the audio in chunks as long as it takes them."""
    signal = noise = 0.0
    candidate = AsWritten(path)
    with open_session(source) as reference:
        for clip in clips:
            samples = read_audio(clip.path, reference.spec.features.sample_rate).samples
            expected, found = (clip_logits(s, samples) for s in (reference, candidate))
            signal += float(np.sum(expected**2))
            noise += float(np.sum((found - expected) ** 2))
    return 10 * np.log10(signal / noise)


def test_logits_are_close_to_the_float_models(quantized, exported, demo):
    if quantized.target == "tensorrt-fp16" and Version(onnxruntime.__version__) < Version("1.30"):
        pytest.skip("ONNX Runtime before 1.30 adds up FP16 on a CPU in FP16, to 26 dB")
    assert sqnr(exported / "model.fp32.onnx", quantized.path, demo.of("eval")[::25]) > 30


def test_streams_side_by_side_do_not_touch_each_other(quantized, demo):
    clips = np.stack([read_audio(c.path, 16_000).samples[:7_680] for c in demo.clips[::150]])
    candidate = AsWritten(quantized.path)
    together = Stream(candidate, batch=len(clips)).push(clips)
    for row, clip in zip(together, clips, strict=True):
        np.testing.assert_allclose(row, Stream(candidate).push(clip[None])[0], rtol=0, atol=0.01)


def test_only_onnx_own_operators_are_used(quantized):
    assert {node.domain for node in quantized.graph.all_nodes()} == {""}
    assert set(quantized.graph.opset_imports) == {""}


def test_it_keeps_the_rules_of_its_target(quantized):
    graph = onnx_graph.load(quantized.path)
    lint.check(graph, targets.TENSORRT_FP16 if quantized.half else targets.TENSORRT)


def test_a_graph_with_half_precision_is_not_for_older_builders(quantized):
    rules = {
        violation.rule for violation in lint.lint(onnx_graph.load(quantized.path), targets.TENSORRT)
    }
    expected = {"opset", "ir-version", "zero-point", "scale-dtype"} if quantized.half else set()
    assert rules == expected


def test_zero_points_are_zeros_of_int8(quantized):
    for node in quantized.nodes(*PAIR):
        scale, zero_point = [*node.inputs, None][1:3]
        if quantized.half and zero_point is None:  # int8, as its data is
            assert node.op_type == "DequantizeLinear"
            assert node.inputs[0].dtype == ir.DataType.INT8
            continue
        zeros = zero_point.const_value.numpy()
        assert zeros.dtype == np.int8
        assert zeros.shape == scale.const_value.shape.numpy()
        assert not zeros.any()


def test_every_product_and_convolution_reads_pairs(quantized):
    steps = quantized.frames or 1
    assert len(quantized.nodes("Conv")) == 4
    assert len(quantized.weighted) == 4 + 1 + steps + 1  # the state's product once for each frame
    for node in quantized.weighted:
        data, weight = (value.producer() for value in node.inputs[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert data.inputs[0].producer().op_type == "QuantizeLinear"
        assert data.inputs[1].const_value.shape.rank() == 0
        scales, axis = weight.inputs[1].const_value.numpy(), weight.attributes["axis"].as_int()
        stored = weight.inputs[0]
        if not quantized.half:
            quantize = stored.producer()
            assert quantize.op_type == "QuantizeLinear"
            assert quantize.attributes["axis"].as_int() == axis
            assert quantize.inputs[1] is weight.inputs[1]
            stored = quantize.inputs[0]
        assert axis == {"Conv": 0, "MatMul": 1}[node.op_type]
        assert scales.shape == (stored.const_value.shape[axis],)


def test_a_tensor_is_quantized_once(quantized):
    pairs = quantized.nodes("QuantizeLinear")
    assert len({node.inputs[0] for node in pairs}) == len(pairs)


def test_what_a_product_writes_is_not_quantized(quantized):
    for node in quantized.weighted:
        (reader,) = {use.node.op_type for use in node.outputs[0].uses()}
        assert reader == ("Relu" if node.op_type == "Conv" else "Add")


def test_biases_are_float(quantized):
    dtype = ir.DataType.FLOAT16 if quantized.half else ir.DataType.FLOAT
    biases = [node.inputs[2] for node in quantized.nodes("Conv")]
    for node in quantized.weighted:
        if node.op_type == "MatMul":
            (add,) = (use.node for use in node.outputs[0].uses())
            biases += [value for value in add.inputs if value.is_initializer()]
    assert len(biases) == len(quantized.weighted)
    assert {value.dtype for value in biases} == {dtype}
    assert ir.DataType.INT32 not in {value.dtype for value in quantized.initializers}


def test_the_hidden_state_has_the_range_of_tanh(quantized):
    products = [node for node in quantized.weighted if node.op_type == "MatMul"]
    scales = [node.inputs[0].producer().inputs[1].const_value.numpy() for node in products]
    step = np.float16(1 / 127) if quantized.half else np.float32(1 / 127)
    assert scales.count(step) == len(products) - 1  # all but the first, which reads convolutions


@half_precision
def test_stored_integers_are_the_weights_to_half_a_step(quantized, exported):
    floats = onnx_graph.load(exported / "model.fp32.onnx").graph.initializers
    for name in ("convs.0.conv.weight", "convs.3.conv.weight", "head.weight"):
        stored = quantized.graph.initializers
        integers, scales = (
            stored[name + end].const_value.numpy() for end in ("_int8", "_scale_half")
        )
        scales = scales.reshape((-1, 1, 1, 1) if integers.ndim == 4 else (1, -1)).astype(np.float32)
        error = np.abs(integers * scales - floats[name].const_value.numpy())
        assert np.all(error <= 0.57 * scales)  # a scale that was rounded down ends at 127 steps


def test_a_graph_of_a_fixed_length_has_no_loop(quantized):
    loops = quantized.nodes("GRU", "If", "Loop", "Scan")
    assert [node.op_type for node in loops] == ([] if quantized.frames else ["Scan"])


@fixed_length
def test_of_a_graph_of_a_fixed_length_only_the_batch_is_free(quantized, kws12):
    graph = onnx.load(quantized.path)
    states = [["N", *state.shape] for state in kws12.spec.state]
    sizes = [size_of(value) for value in graph.graph.input]
    assert sizes == [["N", quantized.frames * kws12.spec.chunk_length], *states]
    sizes = [size_of(value) for value in graph.graph.output]
    assert sizes == [["N", quantized.frames, 12], *states]
    for value in (*graph.graph.input, *graph.graph.output):  # as a build settles it
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    free = [
        value.name
        for node in ir.from_proto(inferred).graph
        for value in node.outputs
        if value.shape is None or not value.shape.is_static()
    ]
    assert free == []


def size_of(value):
    dimensions = value.type.tensor_type.shape.dim
    return [dimension.dim_param or dimension.dim_value for dimension in dimensions]


def test_a_graph_of_any_length_says_how_long_its_clips_were(quantized, exported):
    found = onnx_graph.load(quantized.path).metadata_props.get(CLIP_SAMPLES_KEY)
    if quantized.frames:
        assert found is None
        return
    measured = json.loads((exported / "ranges.json").read_text())["clip_samples"]
    assert [int(samples) for samples in found.split(",")] == measured == sorted(measured)


def test_versions_are_those_of_the_target(quantized):
    model = onnx_graph.load(quantized.path)
    versions = (model.opset_imports[""], model.ir_version)
    assert versions == ((19, 9) if quantized.half else (17, 8))


def test_inputs_outputs_and_the_front_end_are_float(quantized):
    assert {v.dtype for v in (*quantized.graph.inputs, *quantized.graph.outputs)} == {
        ir.DataType.FLOAT
    }
    floats = {value.name for value in quantized.initializers if value.dtype == ir.DataType.FLOAT}
    frontend = {name for name in floats if name.startswith((FRONTEND_NODES, "log_mel."))}
    assert {"log_mel.window", "log_mel.mel_centre"} <= frontend
    rest = floats - frontend
    if quantized.half:
        assert rest == {"feature_mean", "feature_std"}
    else:
        assert ir.DataType.FLOAT16 not in {value.dtype for value in quantized.initializers}


@half_precision
def test_half_precision_scales_are_normal_numbers(quantized):
    scales = [node.inputs[1].const_value.numpy() for node in quantized.nodes(*PAIR)]
    assert {scale.dtype for scale in scales} == {np.dtype(np.float16)}
    assert min(scale.min() for scale in scales) >= 2.0**-14
    assert all(np.isfinite(scale).all() for scale in scales)


def test_weights_take_a_byte_where_the_target_reads_that(quantized, exported):
    sizes = [path.stat().st_size for path in (quantized.path, exported / "model.fp32.onnx")]
    assert sizes[0] / sizes[1] <= (0.30 if quantized.half else 1.03)


PRODUCT = """
<ir_version: 8, opset_import: ["" : 17]>
product (float[N,2] x) => (float[N,3] y)
<float[2,3] weight = {0.001, 1, 0, -0.0005, 3e-5, 0}> {
  y = MatMul(x, weight)
}
"""


def test_a_scale_that_half_precision_does_not_hold_is_raised():
    model = ir.from_proto(parser.parse_model(PRODUCT))
    narrow = Range(-1e-4, 1e-4, -1e-4, 1e-4, 0.0, 0.0, 0.0)
    quantize_tensorrt.quantize(model, lambda value: narrow, targets.TENSORRT_FP16)
    assert lint.lint(model, targets.TENSORRT_FP16) == []
    found = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    least, one = np.float16(2.0**-14), np.float16(1 / 127)
    assert found["x_quantized_scale_half"] == found["x_dequantized_scale_half"] == least
    assert found["weight_scale_half"].tolist() == [least, one, one]
    assert found["weight_int8"].tolist() == [[16, 127, 0], [-8, 0, 0]]


SMALL_CONSTANTS = """
<ir_version: 8, opset_import: ["" : 17]>
ratio (float[N,2] x) => (float[N,2] y)
<float[2,2] weight = {1, 1e-9, -1e-9, 1}, float little = {1e-8}, float[2] shift = {-1e-9, 0},
 float little_half = {3}> {
  a = MatMul(x, weight)
  b = Abs(a)
  c = Add(b, little)
  d = Div(a, c)
  e = Add(d, shift)
  y = Mul(e, little_half)
}
"""


def test_what_keeps_a_divisor_from_zero_is_not_zero_in_half_precision():
    model = ir.from_proto(parser.parse_model(SMALL_CONSTANTS))
    wide = Range(-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0)
    quantize_tensorrt.quantize(model, lambda value: wide, targets.TENSORRT_FP16, ["weight"])
    made = {node.op_type: node for node in model.graph if node.op_type != "Add"}
    first, second = (node for node in model.graph if node.op_type == "Add")
    least = 2.0**-14
    assert first.inputs[1].const_value.numpy() == least
    assert second.inputs[1].const_value.numpy().tolist() == [-least, 0]
    assert made["Mul"].inputs[1].const_value.numpy() == 3  # and not what little became
    assert made["MatMul"].inputs[1].const_value.numpy().tolist() == [[1, 0], [0, 1]]
    found = run(ir.to_proto(model), np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(found, [[-3 * least, 0]], rtol=1e-3)


def run(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def calibrated(model, demo, folder):
    """A model's float graph and its ranges on a few clips."""
    source, ranges_path = folder / "float.onnx", folder / "ranges.json"
    export_onnx(model.for_export(), source)
    ranges, _ = calibrate(source, [c.path for c in demo.clips[:8]], CalibrateConfig(min_clips=1))
    ranges.save(ranges_path)
    return source, ranges_path


def small_model(*convs):
    features = FeatureSpec(n_fft=164, win_length=160, hop_length=80, n_mels=8)
    return CnnGru(ModelSpec(("yes", "no"), features, convs, hidden_size=8)).eval()


TARGETS = pytest.mark.parametrize("target", [FLOAT, HALF])


@TARGETS
@pytest.mark.parametrize("frames", [None, 3], ids="{} frames".format)
def test_several_layers_are_quantized(tiny, demo, tmp_path, target, frames):
    source, ranges_path = calibrated(tiny, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx", target, frames)
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 20


@TARGETS
@pytest.mark.parametrize("kernels", [(1, 1), (1, 3), (3, 1)], ids="{0[0]}-{0[1]}".format)
def test_convolutions_may_carry_no_past(demo, tmp_path, target, kernels):
    model = small_model(*(ConvSpec(4, (frames, 3)) for frames in kernels))
    for block in model.convs:
        torch.nn.init.normal_(block.norm.bias)
    source, ranges_path = calibrated(model, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx", target)
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 20


@TARGETS
def test_layers_may_share_their_numbers(demo, tmp_path, target):
    """The exporter keeps equal tensors once, like all the biases of a model without training."""
    model = small_model(*[ConvSpec(4, (3, 3))] * 3)
    bias = torch.randn(4)
    for block in model.convs:
        block.norm.bias.data.copy_(bias)
    model.convs[2].conv.weight.data.copy_(model.convs[1].conv.weight)
    source, ranges_path = calibrated(model, demo, tmp_path)
    quantize_onnx(source, ranges_path, tmp_path / "out.onnx", target)
    assert sqnr(source, tmp_path / "out.onnx", demo.clips[:8]) > 20
