import io
import re
import warnings
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.lower.float_layers import float_reasons
from cnngru_edge.export.normalize.normal_form import normalize
from cnngru_edge.models.errors import ExportError

FREE = 3  # of a dimension that is free


def run(model, feed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def feed_of(model):
    rng = np.random.default_rng(0)
    stored = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or FREE for d in kind.shape.dim]
        if kind.elem_type == TensorProto.INT64:
            feed[value.name] = rng.integers(0, 5, shape)
        else:
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feed


def normalized(model):
    """In normal form, and it computes what it did."""
    source = model.SerializeToString()
    graph = ir.from_proto(onnx.load_from_string(source))
    normalize(graph)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    feed = feed_of(model)
    expected, found = run(model, feed), run(proto, feed)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    again = ir.from_proto(proto)
    normalize(again)
    assert_same(ir.to_proto(again), ir.to_proto(graph))
    return proto


def assert_same(found, expected):
    """Node by node and tensor by tensor; types of values in between may be told or not."""
    assert list(found.graph.node) == list(expected.graph.node)
    first, second = (
        {tensor.name: tensor for tensor in model.graph.initializer} for model in (found, expected)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        values = [numpy_helper.to_array(t) for t in (tensor, second[name])]
        np.testing.assert_array_equal(*values)
    for values in ("input", "output"):
        names = [[value.name for value in getattr(m.graph, values)] for m in (found, expected)]
        assert names[0] == names[1]
    assert found.opset_import == expected.opset_import
    assert found.ir_version == expected.ir_version


def operators(model):
    return [node.op_type for node in model.graph.node]


def stored(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def made(text, opset=17, ir_version=8, **constants):
    """A model of ONNX's textual form, with these numbers as initializers."""
    model = helper.make_model(
        parser.parse_graph(text),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return model


def traced(module, *inputs, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), inputs, buffer, dynamo=False, opset_version=17, **options)
    return onnx.load_from_string(buffer.getvalue())


def floats(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_a_graph_of_ours_stays_as_it_is(tiny_onnx):
    model = onnx.load(tiny_onnx)
    graph = ir.load(tiny_onnx)
    normalize(graph)
    assert_same(ir.to_proto(graph), model)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 8)
        self.blocks = torch.nn.Sequential(
            torch.nn.Conv1d(8, 6, 3, padding=1),
            torch.nn.BatchNorm1d(6),
            torch.nn.ReLU(),
            torch.nn.Dropout(),
        )
        self.blocks[1].running_mean.normal_()
        self.blocks[1].running_var.uniform_(0.5, 2)
        self.rnn = torch.nn.LSTM(6, 4, num_layers=2, batch_first=True)
        self.inner = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, ids):
        x = self.blocks(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.head(torch.relu(self.inner(x))[:, -1])


@pytest.mark.parametrize("folds", [True, False])
def test_torchs_exporter(folds):
    options = {"do_constant_folding": folds, "dynamic_axes": {"ids": {0: "N", 1: "T"}}}
    if not folds:
        options["training"] = torch.onnx.TrainingMode.PRESERVE  # batch norms stay what they are
    model = traced(Network(), torch.zeros(2, 5, dtype=torch.int64), input_names=["ids"], **options)
    assert ("BatchNormalization" in operators(model)) == (not folds)
    found = normalized(model)
    assert not {"BatchNormalization", "Constant", "Dropout", "Gemm", "Identity"} & set(
        operators(found)
    )
    weights = {f"{name}.weight" for name in ("embedding", "blocks.0", "inner", "head")}
    assert {name for name in stored(found) if name.endswith(".weight")} == weights
    recurrent = {"LSTM": [], "Conv": [], "MatMul": []}
    for node in found.graph.node:
        if node.op_type in recurrent:
            recurrent[node.op_type].append(node.name)
    assert recurrent == {
        "LSTM": ["/rnn/LSTM", "/rnn/LSTM_1"],
        "Conv": ["/blocks/blocks.0/Conv"],
        "MatMul": ["/inner/MatMul", "/head/MatMul"],
    }


def test_torchs_newer_exporter_says_where_a_node_was():
    model = made(
        "g (float[N,4] x) => (float[N,M] y) { y = Gemm(x, val_3) }", opset=18, val_3=floats(4, 2)
    )
    model.ir_version = 10
    model.graph.node[0].name = "node_linear_7"
    scopes = model.graph.node[0].metadata_props.add()
    scopes.key, scopes.value = (
        "pkg.torch.onnx.name_scopes",
        "['', 'decoder', 'decoder.out', 'linear']",
    )
    found = normalized(model)
    assert [node.name for node in found.graph.node] == ["/decoder.out/MatMul"]
    assert list(stored(found)) == ["decoder.out.weight"]
    assert (found.opset_import[0].version, found.ir_version) == (17, 8)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0)])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (4, 5), (4, 1)], ids=str)
def test_a_gemm_is_a_product_and_a_sum(trans_a, trans_b, factors, bias):
    alpha, beta = factors
    more = "" if bias is None else ", c"
    attributes = f"transA = {trans_a}, transB = {trans_b}, alpha = {alpha}, beta = {beta}"
    shape = "3,4" if trans_a else "4,3"
    constants = {"w": floats(*((5, 3) if trans_b else (3, 5)))}
    if bias is not None:
        constants["c"] = np.asarray(floats(*bias), np.float32)
    text = f"g (float[{shape}] x) => (float[4,5] y) {{ y = Gemm <{attributes}> (x, w{more}) }}"
    found = normalized(made(text, **constants))
    expected = ["Transpose"] * trans_a + ["MatMul"] + ["Add"] * (bias is not None and beta != 0)
    assert operators(found) == expected
    assert stored(found)["w.weight"].shape == (3, 5)
    if bias in {(), (1,), (5,), (1, 5)} and beta:
        (name,) = stored(found).keys() - {"w.weight"}
        assert stored(found)[name].shape == (5,)


def test_a_gemm_of_two_activations_stays():
    text = "g (float[4,3] x, float[3,5] z) => (float[4,5] y) { y = Gemm <alpha = 0.5> (x, z) }"
    assert operators(normalized(made(text))) == ["Gemm"]


BATCH_NORM = ("gamma", "beta", "mean", "variance")


def batch_norm(channels):
    values = {name: floats(channels) * (i + 1) for i, name in enumerate(BATCH_NORM)}
    return values | {"variance": np.abs(values["variance"]) + 0.5}


NORM = f"BatchNormalization(before, {', '.join(BATCH_NORM)})"


@pytest.mark.parametrize(
    ("shape", "layer", "constants", "left"),
    [
        ("N,2,9", "before = Conv(x, w)", {"w": floats(4, 2, 3)}, ["Conv"]),
        ("N,2,9", "before = Conv(x, w, b)", {"w": floats(4, 2, 3), "b": floats(4)}, ["Conv"]),
        ("N,4,9,9", "before = Conv<group=4>(x, w)", {"w": floats(4, 1, 3, 3)}, ["Conv"]),
        ("N,3", "before = MatMul(x, w)", {"w": floats(3, 4)}, ["MatMul", "Add"]),
        ("N,3", "p = MatMul(x, w) before = Add(b, p)", {"w": floats(3, 4), "b": floats(4)}, None),
        ("N,3", "before = Gemm<transB=1>(x, w, b)", {"w": floats(4, 3), "b": floats(4)}, None),
    ],
)
def test_a_batch_norm_is_part_of_the_layer_before_it(shape, layer, constants, left):
    out = ",".join(["N", *"ABC"[: shape.count(",")]])
    text = f"g (float[{shape}] x) => (float[{out}] y) {{ {layer} y = {NORM} }}"
    found = normalized(made(text, **constants, **batch_norm(4)))
    assert operators(found) == (left or ["MatMul", "Add"])


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("before = Conv(x, w) z = Relu(before)", {"w": floats(2, 2, 3)}),
        ("before = Conv(x, w) z = Conv(x, w)", {"w": floats(2, 2, 3)}),
        ("before = Relu(x) z = Neg(x)", {}),
        ("before = MatMul(x, w) z = Neg(x)", {"w": floats(9, 2)}),
    ],
    ids=["read-by-another", "shared-weight", "no-layer", "along-time"],
)
def test_a_batch_norm_stays_where_it_cannot_be(text, constants):
    text = f"g (float[N,2,9] x) => (float[N,2,K] y, float[N,2,L] z) {{ {text} y = {NORM} }}"
    assert "BatchNormalization" in operators(normalized(made(text, **constants, **batch_norm(2))))


def test_a_graph_made_by_hand_of_an_older_opset():
    """Without a name at any node, constants among the inputs, and Dropout as it was."""
    text = f"""g (float[N,2,9] x) => (float[N,3] y) {{
        before = Conv(x, kernel)
        normal = {NORM}
        active = Relu(normal)
        kept = Dropout(active)
        flat = Flatten(kept)
        same = Identity(flat)
        y = Gemm <transB = 1> (same, W1, b1)
    }}"""
    constants = {"kernel": floats(4, 2, 3), "W1": floats(3, 28), "b1": floats(3)} | batch_norm(4)
    model = made(text, opset=13, ir_version=3, **constants)
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    found = normalized(model)
    assert operators(found) == ["Conv", "Relu", "Flatten", "MatMul", "Add"]
    assert [value.name for value in found.graph.input] == ["x"]
    names = [node.name for node in found.graph.node]
    assert names == ["/kernel/Conv", "relu_2", "flatten_4", "/W1/MatMul", "/W1/Add"]
    assert {"kernel.weight", "W1.weight"} <= stored(found).keys()
    assert found.opset_import[0].version == 17


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 15, 18, 19, 21, 22, 23])
def test_opsets_are_brought_to_17(opset):
    text = """g (float[N,2,9] x) => (float[N,3,P] y) {
        a = Conv(x, w) b = Relu(a) y = MaxPool <kernel_shape = [2]> (b)
    }"""
    found = normalized(made(text, opset=opset, w=floats(3, 2, 3)))
    assert found.opset_import[0].version == 17


@pytest.mark.parametrize("attributes", ["", "<noop_with_empty_axes = 0>"])
@pytest.mark.parametrize("opset", [18, 20])
def test_what_a_later_opset_writes_otherwise_is_converted(opset, attributes):
    text = f"g (float[N,4,9] x) => (float[N,4,1] y) {{ y = ReduceMean {attributes} (x, axes) }}"
    found = normalized(made(text, opset=opset, axes=np.array([2])))
    assert operators(found) == ["ReduceMean"]


def test_an_opset_that_cannot_be_brought_to_17_is_refused():
    text = "later (float[N,2,3] x) => (float[N,4,4,2] y) { y = AffineGrid(x, size) }"
    model = made(text, opset=20, size=np.array([1, 1, 4, 4]))
    with pytest.raises(
        ExportError, match=r"^later: opset 20 cannot be brought to 17: AffineGrid.*; "
    ):
        normalized(model)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_of_a_later_opset_is_spelled_out(approximate):
    text = f"""g (float[N,4] x) => (float[N,4] y) {{
        a = Gelu <approximate = "{approximate}"> (x) y = Gelu <approximate = "{approximate}"> (a)
    }}"""
    found = normalized(made(text, opset=20))
    assert found.opset_import[0].version == 17
    assert {"Erf", "Tanh"} & set(operators(found)) == {"Erf" if approximate == "none" else "Tanh"}
    assert len({node.name for node in found.graph.node}) == len(found.graph.node)
    x = np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)
    gelu = partial(torch.nn.functional.gelu, approximate=approximate)
    expected = gelu(gelu(torch.from_numpy(x))).numpy()
    session = onnxruntime.InferenceSession(found.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=0, atol=1e-5)


def test_a_weight_may_stand_on_the_left():
    text = "g (float[N,3,9] x) => (float[N,5,9] y) { y = MatMul(w, x) }"
    found = normalized(made(text, w=floats(5, 3)))
    assert operators(found) == ["Transpose", "MatMul", "Transpose"]
    assert stored(found)["w.weight"].shape == (3, 5)


def test_weights_that_are_shared_stay_so():
    text = """g (float[N,3] x, float[N,3] z) => (float[N,3] y) {
        a = Gemm <transB = 1> (x, w) b = Gemm <transB = 1> (z, w) y = Add(a, b)
    }"""
    found = normalized(made(text, w=floats(3, 3)))
    first, second = (node for node in found.graph.node if node.op_type == "MatMul")
    assert first.input[1] == second.input[1]
    assert len(found.graph.initializer) == 1


def test_a_table_that_is_the_head_as_well_stays_what_it_is():
    text = """g (int64[N,2] ids) => (float[N,2,20] y) {
        x = Gather(table, ids) turned = Transpose <perm = [1, 0]> (table) y = MatMul(x, turned)
    }"""
    found = normalized(made(text, table=floats(20, 4)))
    assert operators(found) == ["Gather", "MatMul"]
    shapes = {name: values.shape for name, values in stored(found).items()}
    assert shapes == {"table.weight": (20, 4), "turned.weight": (4, 20)}


def test_what_is_computed_of_constants_alone_is_done_once():
    text = """g (float[N,4] x) => (float[N,2] y) {
        w = Transpose <perm = [1, 0]> (stored) half = Mul(w, factor) y = MatMul(x, half)
    }"""
    found = normalized(made(text, stored=floats(2, 4), factor=np.float32(0.5)))
    assert operators(found) == ["MatMul"]


def test_layers_of_one_module_have_names_of_their_own():
    model = made(
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul(x, val_1) y = MatMul(a, val_2) }",
        val_1=floats(4, 4),
        val_2=floats(4, 4) + 1,
    )
    for node, name in zip(model.graph.node, ("MatMul", "MatMul_1"), strict=True):
        node.name = f"/attention/{name}"
    found = normalized(model)
    assert [node.name for node in found.graph.node] == ["/attention/MatMul", "/attention_2/MatMul"]
    assert set(stored(found)) == {"attention.weight", "attention_2.weight"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(np.float16, "float16"), (np.float64, "double")],
)
def test_other_floats_are_refused(kind, name):
    text = f"net ({name}[N,4] x) => ({name}[N,2] y) {{ y = MatMul(x, w) }}"
    model = made(text, w=floats(4, 2).astype(kind))
    with pytest.raises(
        ExportError,
        match=rf"^net: x is {name}, expected float32; export the model in float32$",
    ):
        normalize(ir.from_proto(model))


def test_a_graph_that_is_quantized_is_refused():
    text = (
        "net (float[N] x) => (float[N] y) { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }"
    )
    with pytest.raises(ExportError, match=r"^net: already quantized; give the float graph$"):
        normalize(ir.from_proto(made(text, s=np.float32(0.1))))


def test_a_front_end_is_named_as_one():
    """Whoever made it: what leads to a logarithm, with no network before it, stays in float."""
    text = """g (float[N,1,40] audio) => (float[N,3,P] y) {
        real = Conv <strides = [4]> (audio, cosine) imaginary = Conv <strides = [4]> (audio, sine)
        a = Mul(real, real) b = Mul(imaginary, imaginary) power = Add(a, b)
        turned = Transpose <perm = [0, 2, 1]> (power) mel = MatMul(turned, filters)
        floor = Add(mel, little) log = Log(floor) back = Transpose <perm = [0, 2, 1]> (log)
        hidden = Conv(back, w) y = Softplus(hidden)
    }"""
    found = normalized(
        made(
            text,
            cosine=floats(5, 1, 8),
            sine=floats(5, 1, 8) + 1,
            filters=np.abs(floats(5, 4)),
            little=np.float32(1e-3),
            w=floats(3, 4, 2),
        )
    )
    outside = [n.op_type for n in found.graph.node if not n.name.startswith(FRONTEND_NODES)]
    assert outside == ["Transpose", "Conv", "Softplus"]
    assert "w.weight" in stored(found)


FRONT_ENDS = {
    "of the STFT": """
        peak = ReduceMax <keepdims = 1> (x) scaled = Div(x, peak)
        f = STFT <onesided = 1> (scaled, step, window)
        squares = Mul(f, f) power = ReduceSum <keepdims = 0> (squares, last)
        mel = MatMul(power, filters) floor = Clip(mel, little) y = Log(floor)""",
    "of matrices": """
        p = Reshape(x, frames) f = MatMul(p, kernel) a = Abs(f) mel = MatMul(a, filters)
        floor = Max(mel, little) y = Log(floor)""",
    "filters on the left": """
        p = Reshape(x, frames) f = MatMul(p, kernel) a = Pow(f, two)
        turned = Transpose <perm = [0, 2, 1]> (a) mel = MatMul(batched, turned)
        floor = Add(mel, little) y = Log(floor)""",
}


@pytest.mark.parametrize("body", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_front_ends_of_several_kinds_are_found(body):
    numbers = {
        "step": np.array(4),
        "window": np.abs(floats(8)),
        "last": np.array([-1]),
        "filters": np.abs(floats(5, 3)),
        "batched": np.abs(floats(1, 3, 5)),
        "little": np.float32(1e-4),
        "two": np.float32(2),
        "frames": np.array([0, 10, 4]),
        "kernel": floats(4, 5),
    }
    used = {name: v for name, v in numbers.items() if re.search(rf"\b{name}\b", body)}
    found = normalized(made(f"g (float[N,40] x) => (float[N,P,Q] y) {{ {body} }}", **used))
    assert all(node.name.startswith(FRONTEND_NODES) for node in found.graph.node)


NETWORKS = {
    "peak": "a = MatMul(x, w) b = Abs(a) c = ReduceMax <keepdims = 1> (b) y = Log(c)",
    "softmax": "a = MatMul(x, w) b = Softmax(a) y = Log(b)",
    "relu6": "a = MatMul(x, v) b = Clip(a, zero, six) c = MatMul(b, w) d = Add(c, one) y = Log(d)",
    "selu": "a = MatMul(x, w) b = Selu(a) c = Mul(b, b) y = Log(c)",
    "three in a row": "a = MatMul(x, v) b = MatMul(a, v) c = MatMul(b, w) d = Abs(c) y = Log(d)",
    "bias": "a = MatMul(x, w) b = Add(a, bias) c = Abs(b) y = Log(c)",
    "exponential": "a = MatMul(x, w) b = Exp(a) y = Log(b)",
    "never squared": "a = MatMul(x, w) b = Add(a, one) y = Log(b)",
    "no product": "a = Abs(x) y = Log(a)",
    "clamped at zero": "a = MatMul(x, w) b = Mul(a, a) c = Clip(b, zero) y = Log(c)",
}


@pytest.mark.parametrize("body", NETWORKS.values(), ids=NETWORKS)
def test_a_logarithm_after_a_network_makes_no_front_end(body):
    text = f"g (float[N,4] x) => (float[N,P] y) {{ {body} }}"
    numbers = {"zero": np.float32(0), "six": np.float32(6), "one": np.float32(1)}
    matrices = {"w": floats(4, 2), "v": floats(4, 4), "bias": floats(2)}
    used = {name: v for name, v in (numbers | matrices).items() if re.search(rf"\b{name}\b", body)}
    found = normalized(made(text, **used))
    assert not any(node.name.startswith(FRONTEND_NODES) for node in found.graph.node)


def test_convolutions_one_after_the_other_are_no_front_end():
    text = """g (float[N,1,40] x) => (float[N,4,P] y) {
        a = Conv <strides = [2]> (x, w) b = Mul(a, a) c = Conv(b, v) d = Mul(c, c) y = Log(d)
    }"""
    found = normalized(made(text, w=floats(4, 1, 8), v=floats(4, 4, 3)))
    assert not any(node.name.startswith(FRONTEND_NODES) for node in found.graph.node)


def test_a_graph_of_features_has_no_front_end():
    text = "g (float[N,4] x) => (float[N,2] y) { a = MatMul(x, w) b = Abs(a) y = Log(b) }"
    graph = ir.from_proto(made(text, w=floats(4, 2)))
    normalize(graph, of_samples=False)
    assert not any(node.name.startswith(FRONTEND_NODES) for node in graph.graph)
    normalize(graph)
    assert all(node.name.startswith(FRONTEND_NODES) for node in graph.graph)
    assert float_reasons(graph) == {"w": "a part of the front-end: float by design"}
