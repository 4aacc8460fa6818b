"""Structures that networks are made of, each in INT8 and compared with float."""

import io
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, parser
from torch import nn

from cnngru_edge.calibration.ranges.choose import Range
from cnngru_edge.calibration.ranges.collect import observed_tensors, with_tensors_as_outputs
from cnngru_edge.export.lower.float_layers import float_reasons
from cnngru_edge.export.lower.recurrent import lower_recurrent
from cnngru_edge.export.normalize.normal_form import normalize
from cnngru_edge.export.quantize.run import lower, quantize_lowered
from cnngru_edge.export.targets.base import CPU, TARGETS
from cnngru_edge.export.targets.cpu_receipt import INT8, onnxruntime_coverage
from cnngru_edge.export.targets.trt import lint

torch.manual_seed(0)  # of the weights that are made while this is imported

FREE = 12  # of a dimension that is free


class Net(nn.Module):
    """Of a function and the modules that it calls."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, *inputs):
        return self.function(self, *inputs)


def traced(module, *inputs, free=None):
    """The normal form of a module's graph."""
    buffer = io.BytesIO()
    names = ["x", "z"][: len(inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            inputs,
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["y"],
            dynamic_axes={"x": free} if free else None,
        )
    return normal(onnx.load_from_string(buffer.getvalue()))


def normal(model):
    graph = ir.from_proto(model)
    normalize(graph)
    return ir.to_proto(graph)


def run(model, feed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    for value in session.get_inputs():
        if value.type == "tensor(int32)":  # what ids are for TensorRT
            feed = feed | {value.name: feed[value.name].astype(np.int32)}
    return dict(zip(names, session.run(names, feed), strict=True))


def feed_of(module_inputs):
    return dict(zip(("x", "z"), (value.numpy() for value in module_inputs), strict=False))


def quantized(model, feed, target=CPU, frames=None):
    """Its INT8 form, with the least and the greatest that each tensor is for this feed."""
    graph = ir.from_proto(onnx.load_from_string(model.SerializeToString()))
    found = run(observable(model), feed) | feed
    tensors = {}
    for name in observed_tensors(graph):
        low, high = float(found[name].min()), float(found[name].max())
        tensors[name] = Range(low, high, low, high, 0.0, 0.0, 0.0)
    lower(graph, target, frames)
    quantize_lowered(graph, tensors, target)
    return ir.to_proto(graph)


def observable(model):
    """With all that needs a range among its outputs."""
    graph = ir.from_proto(onnx.load_from_string(model.SerializeToString()))
    return ir.to_proto(with_tensors_as_outputs(graph))


def sqnr(expected, found):
    noise = float(np.sum((expected - found) ** 2))
    return 10 * np.log10(float(np.sum(expected**2)) / noise)


def floats(*shape):
    return torch.randn(*shape)


def tokens(*shape):
    return torch.randint(0, 20, shape)


def two_widths(net, x):
    wide = torch.cat([torch.relu(net.narrow(x)), net.wide(x), x], 1)
    return net.last(wide).amax(2)


def residual(net, x):
    x = torch.relu(net.first(x))
    y = torch.relu(net.second(x) + x)
    return net.head(torch.relu(net.third(y) + y).mean(2))


def separable(net, x):
    return net.head(net.pointwise(nn.functional.relu6(net.depthwise(x))).relu().mean((2, 3)))


def pooled(net, x):
    x = nn.functional.max_pool1d(torch.relu(net.first(x)), 2)
    x = nn.functional.avg_pool1d(torch.relu(net.second(x)), 2)
    return net.head(torch.relu(net.third(x)).flatten(1))


def embedded(net, ids):
    x = net.table(ids).transpose(1, 2)
    x = torch.relu(net.conv(x)).transpose(1, 2)
    x, _ = net.rnn(x)
    return net.head(x[:, -1])


def image(net, x):
    x = nn.functional.max_pool2d(torch.relu(net.first(x)), 2)
    x = torch.relu(net.second(x)).permute(0, 3, 1, 2).flatten(2)
    y, _ = net.rnn(x)
    return net.head(y)


def recurrent(net, x):
    y, _ = net.rnn(x)
    return net.head(y)


def gated(net, x):
    a = net.first(x)
    return net.head((a * torch.sigmoid(a)).mean(2)) * torch.tanh(net.gate(x.mean(2)))


def both_read(net, x):
    x = torch.relu(net.first(x))
    return net.head(x.flatten(1)) + net.second(x).flatten(1)


STRUCTURES = {
    "conv1d": (
        lambda net, x: net.last(torch.relu(net.first(x))),
        {
            "first": nn.Conv1d(8, 16, 5, padding=2, dilation=1),
            "last": nn.Conv1d(16, 4, 3, padding=2, dilation=2),
        },
        floats(2, 8, 30),
    ),
    "groups": (
        lambda net, x: net.head(torch.relu(net.second(torch.relu(net.first(x)))).mean(2)),
        {
            "first": nn.Conv1d(8, 16, 3, groups=4),
            "second": nn.Conv1d(16, 16, 3, groups=16),
            "head": nn.Linear(16, 6),
        },
        floats(2, 8, 30),
    ),
    "separable": (
        separable,
        {
            "depthwise": nn.Conv2d(8, 8, 3, groups=8, stride=2),
            "pointwise": nn.Conv2d(8, 24, 1),
            "head": nn.Linear(24, 6),
        },
        3 * floats(2, 8, 16, 16),
    ),
    "parallel": (
        two_widths,
        {
            "narrow": nn.Conv1d(8, 8, 3, padding=1),
            "wide": nn.Conv1d(8, 8, 7, padding=3),
            "last": nn.Conv1d(24, 6, 1),
        },
        floats(2, 8, 30),
    ),
    "residual": (
        residual,
        {
            "first": nn.Conv1d(8, 8, 3, padding=1),
            "second": nn.Conv1d(8, 8, 3, padding=1),
            "third": nn.Conv1d(8, 8, 3, padding=1),
            "head": nn.Linear(8, 6),
        },
        floats(2, 8, 30),
    ),
    "pooled": (
        pooled,
        {
            "first": nn.Conv1d(8, 8, 3, padding=1),
            "second": nn.Conv1d(8, 8, 3, padding=1),
            "third": nn.Conv1d(8, 8, 3, padding=1),
            "head": nn.Linear(64, 6),
        },
        floats(2, 8, 32),
    ),
    "embedding-gru": (
        embedded,
        {
            "table": nn.Embedding(20, 16),
            "conv": nn.Conv1d(16, 24, 3, padding=1),
            "rnn": nn.GRU(24, 16, batch_first=True),
            "head": nn.Linear(16, 4),
        },
        tokens(3, FREE),
    ),
    "embedding-both-ways": (
        embedded,
        {
            "table": nn.Embedding(20, 16),
            "conv": nn.Conv1d(16, 24, 3, padding=1),
            "rnn": nn.LSTM(24, 16, batch_first=True, bidirectional=True),
            "head": nn.Linear(32, 4),
        },
        tokens(3, FREE),
    ),
    "image": (
        image,
        {
            "first": nn.Conv2d(1, 8, 3, padding=1),
            "second": nn.Conv2d(8, 8, 3, padding=1),
            "rnn": nn.LSTM(64, 16, num_layers=2, batch_first=True, bidirectional=True),
            "head": nn.Linear(32, 4),
        },
        torch.rand(2, 1, 16, 24),
    ),
    "lstm": (
        recurrent,
        {"rnn": nn.LSTM(8, 16, num_layers=2, batch_first=True), "head": nn.Linear(16, 4)},
        floats(2, FREE, 8),
    ),
    "gated": (
        gated,
        {
            "first": nn.Conv1d(8, 16, 3),
            "gate": nn.Linear(8, 4),
            "head": nn.Linear(16, 4),
        },
        floats(2, 8, 30),
    ),
    "read-by-both": (
        both_read,
        {
            "first": nn.Conv1d(8, 4, 3, padding=1),
            "second": nn.Conv1d(4, 1, 3, padding=1),
            "head": nn.Linear(48, 12),
        },
        floats(2, 8, 12),
    ),
    "linear": (
        lambda net, x: net.last(torch.relu(net.norm(net.first(x)))),
        {"first": nn.Linear(8, 32), "norm": nn.BatchNorm1d(32), "last": nn.Linear(32, 4)},
        floats(16, 8),
    ),
    "left": (
        lambda net, x: torch.matmul(net.mix.weight, x) + net.mix.bias[:, None],
        {"mix": nn.Linear(8, 6)},
        floats(2, 8, 10),
    ),
    "shared": (
        lambda net, x: net.conv(torch.relu(net.conv(x))).mean(2),
        {"conv": nn.Conv1d(8, 8, 3, padding=1)},
        floats(2, 8, 20),
    ),
}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    """A module's name, graph, weights and what it is fed with."""
    torch.manual_seed(0)
    forward, modules, x = STRUCTURES[request.param]
    net = Net(forward, **modules)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.uniform_(0.5, 2)
    weights = {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in net.named_parameters()
        if "weight" in name and parameter.ndim > 1
    }
    return request.param, traced(net, x), weights, feed_of([x])


# In dB. What a recurrence adds up, and what is shared, is rounded more often.
LEAST = {"shared": 25}


def test_a_structure_is_in_int8_on_a_cpu(structure, tmp_path):
    name, model, weights, feed = structure
    found = quantized(model, feed)
    path = tmp_path / "int8.onnx"
    onnx.save(found, path)
    receipt = onnxruntime_coverage(path, feed)
    assert {layer.name: layer.weights for layer in receipt.layers} == weights
    assert {layer.precision for layer in receipt.layers} == {INT8}
    assert receipt.weights_int8 == 1
    expected = run(model, feed)["y"]
    assert sqnr(expected, run(found, feed)["y"]) > LEAST.get(name, 28)


def rtx_receipt(path, feed):
    """What TensorRT-RTX makes of a graph."""
    trt = pytest.importorskip("tensorrt_rtx")
    from cnngru_edge.export.targets.trt.receipt import rtx_coverage
    from cnngru_edge.runtime.backends.trt import library as trt_library

    log = trt_library.logger(trt)
    log.start()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(path.read_bytes()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    settings = builder.create_builder_config()
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(network, settings) is not None, log.lines[-5:]
    text = "\n".join(line for _, line in log.lines)
    return rtx_coverage(path, text, trt.__version__, feed), text


@pytest.mark.parametrize("target", [name for name in TARGETS if name != CPU])
def test_a_structure_is_in_int8_in_tensorrt(structure, target, tmp_path):
    name, model, weights, feed = structure
    found = quantized(model, feed, target)
    assert lint.lint(ir.from_proto(found), TARGETS[target]) == []
    expected = run(model, feed)["y"]
    assert sqnr(expected, run(found, feed)["y"]) > LEAST.get(name, 28) - 2
    path = tmp_path / "int8.onnx"
    onnx.save(found, path)
    receipt, _ = rtx_receipt(path, feed)
    assert {layer.name: layer.weights for layer in receipt.layers} == weights
    assert {layer.precision for layer in receipt.layers} == {INT8}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("both_ways", [False, True], ids=["forward", "both-ways"])
def test_a_cell_written_out_is_in_int8(kind, both_ways, target, tmp_path):
    torch.manual_seed(0)
    rnn = kind(16, 16, batch_first=True, bidirectional=both_ways)
    net = Net(recurrent, rnn=rnn, head=nn.Linear(32 if both_ways else 16, 6))
    x = floats(1, 4, 16)
    model, feed = traced(net, x), feed_of([x])
    graph, tensors = ir.from_proto(onnx.load_from_string(model.SerializeToString())), {}
    for name, values in (run(observable(model), feed) | feed).items():
        low, high = float(values.min()), float(values.max())
        tensors[name] = Range(low, high, low, high, 0.0, 0.0, 0.0)
    assert lower_recurrent(graph, 4) == {}
    quantize_lowered(graph, tensors, target)
    found = ir.to_proto(graph)
    assert not {"GRU", "LSTM", "Scan"} & {node.op_type for node in graph.graph.all_nodes()}
    assert sqnr(run(model, feed)["y"], run(found, feed)["y"]) > 28
    path = tmp_path / "int8.onnx"
    onnx.save(found, path)
    receipt = onnxruntime_coverage(path) if target == CPU else rtx_receipt(path, feed)[0]
    names = {layer.name for layer in receipt.layers}
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "head"} <= names
    assert ("rnn.weight_hh_l0_reverse" in names) == both_ways
    assert {layer.precision for layer in receipt.layers} == {INT8}


@pytest.mark.parametrize("target", TARGETS)
def test_any_length_and_batch_are_taken(target, tmp_path):
    """Zeros and ones of the graph's own inputs are enough for its receipt."""
    torch.manual_seed(0)
    forward, modules, _ = STRUCTURES["embedding-gru"]
    ids = tokens(16, FREE)
    model = traced(Net(forward, **modules), ids, free={0: "N", 1: "T"})
    found = quantized(model, feed_of([ids]), target)
    feed = {"x": np.random.default_rng(0).integers(0, 20, (2, 9))}
    assert sqnr(run(model, feed)["y"], run(found, feed)["y"]) > 26
    path = tmp_path / "int8.onnx"
    onnx.save(found, path)
    if target == CPU:
        receipt = onnxruntime_coverage(path)
        assert {layer.precision for layer in receipt.layers} == {INT8}
        macs = {layer.name: layer.macs for layer in receipt.layers}
        assert macs["table"] == 0
        assert macs["rnn.weight_hh_l0"] == 48 * 16 * 64  # 64 tokens


def test_a_graph_made_by_hand_is_in_int8(tmp_path):
    """Of opset 13, with Gemm and BatchNormalization, and no names."""
    rng = np.random.default_rng(0)
    text = """g (float[N,3,16] x) => (float[N,4] y) {
        c = Conv(x, k) b = BatchNormalization(c, gamma, beta, mean, variance) r = Relu(b)
        f = Flatten(r) h = Gemm <transB = 1, alpha = 0.5> (f, W1, b1) a = Relu(h)
        y = Gemm(a, W2, b2)
    }"""
    shapes = {"k": (8, 3, 3), "gamma": (8,), "beta": (8,), "mean": (8,), "variance": (8,)}
    shapes |= {"W1": (16, 112), "b1": (16,), "W2": (16, 4), "b2": (4,)}
    model = helper.make_model(
        parser.parse_graph(text), opset_imports=[helper.make_opsetid("", 13)], ir_version=7
    )
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        values = np.abs(values) + 0.5 if name == "variance" else values
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    feed = {"x": rng.standard_normal((6, 3, 16)).astype(np.float32)}
    expected = run(model, feed)["y"]
    found = quantized(normal(onnx.load_from_string(model.SerializeToString())), feed)
    assert sqnr(expected, run(found, feed)["y"]) > 28
    onnx.save(found, tmp_path / "int8.onnx")
    receipt = onnxruntime_coverage(tmp_path / "int8.onnx", feed)
    precisions = {layer.name: layer.precision for layer in receipt.layers}
    assert precisions == {"k": INT8, "W1": INT8, "W2": INT8}


def test_what_a_clip_wrote_keeps_its_name():
    """Where integers end as the Clip does, it is left out; the float graph has its tensor."""
    text = """g (float[2,3,16] x) => (float[2,4,P] y) {
        a = Conv(x, k) six = Clip(a, zero, most) y = Conv(six, v)
    }"""
    model = helper.make_model(
        parser.parse_graph(text), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    rng = np.random.default_rng(0)
    constants = {"k": rng.standard_normal((8, 3, 3)), "v": rng.standard_normal((4, 8, 3))}
    for name, values in (constants | {"zero": np.array(0), "most": np.array(6)}).items():
        tensor = numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    feed = {"x": rng.standard_normal((2, 3, 16)).astype(np.float32)}
    found = quantized(normal(onnx.load_from_string(model.SerializeToString())), feed)
    assert "Clip" not in {node.op_type for node in found.graph.node}
    assert "six_quantized" in {name for node in found.graph.node for name in node.output}
    assert sqnr(run(model, feed)["y"], run(found, feed)["y"]) > 28


@pytest.mark.parametrize(("outputs", "numbers"), [(16, 1), (1, 16), (16, 16)])
@pytest.mark.parametrize("rows", [8, 2**15], ids=["small", "large"])
def test_what_is_added_is_a_bias_if_there_is_one_for_each_output(outputs, numbers, rows):
    rng = np.random.default_rng(0)
    text = f"g (float[2,{rows}] x) => (float[2,16] y) {{ p = MatMul(x, w) y = Add(p, b) }}"
    model = helper.make_model(
        parser.parse_graph(text), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    for name, shape in {"w": (rows, outputs), "b": (numbers,)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    feed = {"x": rng.standard_normal((2, rows)).astype(np.float32)}
    found = quantized(normal(onnx.load_from_string(model.SerializeToString())), feed)
    assert sqnr(run(model, feed)["y"], run(found, feed)["y"]) > 25
    has_add = "Add" in {node.op_type for node in found.graph.node}
    assert has_add == (outputs != numbers)


@pytest.mark.parametrize("target", TARGETS)
def test_what_cannot_be_in_int8_does_not_stop_the_rest(target, tmp_path):
    torch.manual_seed(0)

    def forward(net, x):
        y, _ = net.odd(x)
        z, _ = net.rnn(y)
        weights = torch.softmax(net.query(z) @ z.transpose(1, 2), -1)
        return net.head(torch.relu(net.up((weights @ z).transpose(1, 2))).transpose(1, 2))

    net = Net(
        forward,
        odd=nn.RNN(8, 16, batch_first=True),
        rnn=nn.GRU(16, 16, batch_first=True),
        query=nn.Linear(16, 16),
        up=nn.ConvTranspose1d(16, 16, 2, stride=2),
        head=nn.Linear(16, 6),
    )
    x = floats(2, 6, 8)
    model, feed = traced(net, x), feed_of([x])
    graph = ir.from_proto(onnx.load_from_string(model.SerializeToString()))
    assert float_reasons(graph) == {
        "odd": "RNN has no INT8 form here",
        "up": "ConvTranspose has no INT8 form here",
        "MatMul": "a product of two activations, without weights",
        "MatMul_1": "a product of two activations, without weights",
    }
    found = quantized(model, feed, target)
    assert sqnr(run(model, feed)["y"], run(found, feed)["y"]) > 25
    path = tmp_path / "int8.onnx"
    onnx.save(found, path)
    receipt = onnxruntime_coverage(path, feed) if target == CPU else rtx_receipt(path, feed)[0]
    in_float = {layer.name for layer in receipt.layers if layer.precision != INT8}
    assert in_float == {"odd.weight_ih_l0", "odd.weight_hh_l0", "up"}
