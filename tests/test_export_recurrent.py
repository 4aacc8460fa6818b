import io
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from cnngru_edge.export.lower.recurrent import lower_recurrent

DIRECTIONS = ("forward", "reverse", "bidirectional")
OPERATORS = ("GRU", "LSTM")
FORMS = pytest.mark.parametrize("unrolled", [False, True], ids=["scan", "unrolled"])
# For the operators that read a GRU's outputs.
INDICES = {"first": 0, "last": -1, "axis0": [0], "axis1": [1], "from": [-2], "to": [9]}


@dataclass(frozen=True)
class Sizes:
    frames: int = 5
    batch: int = 2
    inputs: int = 3
    hidden: int = 4
    direction: str = "forward"

    @property
    def directions(self):
        return 2 if self.direction == "bidirectional" else 1


SIZES = Sizes()


def gru_model(
    sizes=SIZES,
    *,
    op="GRU",
    layers=1,
    bias=True,
    state=True,
    name="/rnn/{}_{}",
    readers=(),
    outputs=None,
    opset=17,
    **attributes,
):
    """GRUs in a row, as PyTorch exports them: `x`, `h0`, `h1`, ... to `y`, `h0_next`, ...

    LSTMs have `c0`, `c1`, ... and `c0_next`, ... as well.

    Args:
        op: GRU or LSTM.
        sizes: of the first layer's input and of every layer's state.
        layers: how many.
        bias: whether they have B.
        state: whether they have an initial state.
        name: of a layer's node.
        readers: further nodes, in ONNX's textual form.
        outputs: of the graph; by default the last layer's Y and every Y_h and Y_c.
        opset: of the model.
        attributes: of every one.
    """
    rng = np.random.default_rng(0)
    count, hidden, inputs = sizes.directions, sizes.hidden, sizes.inputs
    constants = {"merged": np.array([0, 0, count * hidden])}
    constants |= {key: np.array(value) for key, value in INDICES.items()}
    nodes, x, states = [], "x", []
    gates, kinds = {"GRU": (3, "h"), "LSTM": (4, "hc")}[op]
    for layer in range(layers):
        shapes = {
            "w": (count, gates * hidden, inputs),
            "r": (count, gates * hidden, hidden),
            "b": (count, 2 * gates * hidden),
        }
        for key, shape in shapes.items():
            limit = 2 / np.sqrt(hidden)
            constants[f"{key}{layer}"] = rng.uniform(-limit, limit, shape).astype(np.float32)
        own = [f"{kind}{layer}" for kind in kinds]
        states += own
        last = layer == layers - 1
        y, read = "y" if last else f"y{layer}", [x, f"w{layer}", f"r{layer}"]
        read += [f"b{layer}" if bias else "", "", *(own if state else [])]
        node = helper.make_node(
            op,
            read,
            [y, *(f"{name}_next" for name in own)],
            name=name.format(op, layer),
            hidden_size=hidden,
            direction=sizes.direction,
            **attributes,
        )
        nodes.append(node)
        if not last:  # (T, D, N, H) to (T, N, D H)
            nodes.append(helper.make_node("Transpose", [y], [f"{y}_t"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"{y}_t", "merged"], [f"{y}_merged"]))
            x, inputs = f"{y}_merged", count * hidden
    nodes += [parser.parse_node(text) for text in readers]
    outputs = outputs or ["y", *(f"{name}_next" for name in states)]
    read = {name for node in nodes for name in node.input}
    shapes = dict.fromkeys(states if state else (), (count, "N", hidden))
    graph = helper.make_graph(
        nodes,
        "grus",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in ({"x": ("T", "N", sizes.inputs)} | shapes).items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(v, name) for name, v in constants.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def lowered(model, frames=None):
    graph = ir.from_proto(model)
    lower_recurrent(graph, frames)
    proto = ir.to_proto(graph)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    return proto


def run(model, feed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def assert_lowering_is_exact(model, sizes, unrolled):
    """It answers as ONNX Runtime's own operator does, and no operator is left that loops."""
    rng = np.random.default_rng(1)
    free = {"T": sizes.frames, "N": sizes.batch}
    shapes = {
        value.name: [free.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    feed = {name: rng.uniform(-1, 1, s).astype(np.float32) for name, s in shapes.items()}
    candidate = lowered(model, sizes.frames if unrolled else None)
    op_types = {node.op_type for node in ir.from_proto(candidate).graph.all_nodes()}
    assert not op_types & ({"GRU", "LSTM", "Loop", "Scan"} if unrolled else {"GRU", "LSTM"})
    expected, found = run(model, feed), run(candidate, feed)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    op=st.sampled_from(OPERATORS),
    unrolled=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
)
def test_every_lowering_computes_what_the_operator_does(data, op, unrolled, direction):
    sizes = Sizes(
        frames=data.draw(st.integers(1, 8 if unrolled else 10), "frames"),
        batch=data.draw(st.integers(1, 4), "batch"),
        inputs=data.draw(st.integers(1, 40), "inputs"),
        hidden=data.draw(st.integers(1, 40), "hidden"),
        direction=direction,
    )
    attributes = {}
    if op == "GRU":
        attributes["linear_before_reset"] = data.draw(st.integers(0, 1), "linear_before_reset")
    model = gru_model(
        sizes,
        op=op,
        layers=data.draw(st.integers(1, 2), "layers"),
        bias=data.draw(st.booleans(), "bias"),
        state=data.draw(st.booleans(), "state"),
        **attributes,
    )
    assert_lowering_is_exact(model, sizes, unrolled)


@FORMS
@pytest.mark.parametrize("opset", [13, 14, 15, 18, 21, 22])
def test_it_is_exact_in_every_opset(opset, unrolled):
    model = gru_model(state=False, linear_before_reset=1, opset=opset)
    assert_lowering_is_exact(model, SIZES, unrolled)


@FORMS
def test_nodes_need_no_names(unrolled):
    sizes = Sizes(direction="bidirectional")
    model = gru_model(sizes, layers=2, state=False, name="")
    assert_lowering_is_exact(model, sizes, unrolled)


@FORMS
@pytest.mark.parametrize("name", ["rnn.weight_ih_l0", "axis_1"])
def test_a_name_that_is_taken_is_another_tensor(name, unrolled):
    model = gru_model()
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("w0", name)
    gru = model.graph.node[0]
    gru.input[:] = [read.replace("w0", name) for read in gru.input]
    assert_lowering_is_exact(model, SIZES, unrolled)


@FORMS
def test_the_state_may_be_unsqueezed(unrolled):
    model = gru_model(readers=["h0 = Unsqueeze(state, axis0)"])
    model.graph.node.insert(0, model.graph.node.pop())
    model.graph.input[1].CopyFrom(
        helper.make_tensor_value_info("state", TensorProto.FLOAT, ("N", 4))
    )
    assert_lowering_is_exact(model, SIZES, unrolled)


ONE_DIRECTION = {
    "squeeze": ["out = Squeeze(y, axis1)"],
    "squeeze-without-axes": ["out = Squeeze(y)"],
    "squeeze-of-the-state": ["out = Squeeze(h0_next, axis0)"],
    "last-frame-of-a-squeeze": ["frames = Squeeze(y, axis1)", "out = Gather(frames, last)"],
    "two-squeezes": ["frames = Squeeze(y, axis1)", "out = Neg(frames)", "also = Squeeze(y, axis1)"],
}
ANY_DIRECTION = {
    "last-frame": ["out = Gather <axis = 0> (y, last)"],
    "first-frame": ["out = Gather <axis = 0> (y, first)"],
    "first-direction": ["out = Gather <axis = 1> (y, first)"],
    "last-direction": ["out = Gather <axis = 1> (y, last)"],
    "direction-kept": ["out = Gather <axis = 1> (y, axis0)"],
    "first-stream": ["out = Gather <axis = 2> (y, first)"],
    "last-frames": ["out = Slice(y, from, to, axis0)"],
    "first-state": ["out = Gather <axis = 0> (h0_next, first)"],
    "last-state": ["out = Gather <axis = 0> (h0_next, last)"],
    "state-of-a-stream": ["out = Gather <axis = 1> (h0_next, last)"],
    "transposed": ["out = Transpose <perm = [0, 2, 1, 3]> (y)"],
    "both": ["h = Unsqueeze(h0_next, axis0)", "out = Concat <axis = 0> (h, y)"],
}
READERS = [
    pytest.param(readers, direction, id=f"{name}-{direction}")
    for readings, directions in (
        (ONE_DIRECTION, ["forward"]),
        (ANY_DIRECTION, ["forward", "bidirectional"]),
    )
    for name, readers in readings.items()
    for direction in directions
]


@FORMS
@pytest.mark.parametrize("are_outputs", [False, True], ids=["inside", "outputs-too"])
@pytest.mark.parametrize("frames", [1, 4], ids="{} frames".format)
@pytest.mark.parametrize(("readers", "direction"), READERS)
def test_readers_get_what_they_read(readers, direction, frames, are_outputs, unrolled):
    sizes = Sizes(frames=frames, direction=direction)
    made = [name for name in ("out", "also") if any(r.startswith(name) for r in readers)]
    outputs = [*made, "y", "h0_next"] if are_outputs else made
    assert_lowering_is_exact(gru_model(sizes, readers=readers, outputs=outputs), sizes, unrolled)


@FORMS
@pytest.mark.parametrize(
    "readers",
    [
        ["out = Squeeze(y, axis1)", "also = Squeeze(y, axis1)"],
        ["out = Squeeze(h0_next, axis0)", "also = Gather(h0_next, first)"],
    ],
    ids=["Y", "Y_h"],
)
def test_two_outputs_may_be_one_tensor(readers, unrolled):
    model = gru_model(readers=readers, outputs=["out", "also"])
    assert_lowering_is_exact(model, SIZES, unrolled)


@FORMS
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op", "unused"),
    [("GRU", 0), ("GRU", 1), ("LSTM", 0), ("LSTM", 1), ("LSTM", 2)],
    ids=["Y-of-a-GRU", "Y_h-of-a-GRU", "Y", "Y_h", "Y_c"],
)
def test_an_output_may_be_left_out(op, unused, direction, unrolled):
    sizes = Sizes(direction=direction)
    outputs = ["y", "h0_next", "c0_next"][: 2 + (op == "LSTM")]
    del outputs[unused]
    model = gru_model(sizes, op=op, outputs=outputs)
    model.graph.node[0].output[unused] = ""
    assert_lowering_is_exact(model, sizes, unrolled)


@FORMS
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no-state"])
def test_the_batch_may_come_first(op, direction, state, unrolled):
    """ONNX Runtime's own operators refuse this layout: the other one says what is right."""
    sizes = Sizes(direction=direction)
    usual = gru_model(sizes, op=op, state=state)
    batch_first = gru_model(sizes, op=op, state=state, layout=1)
    for value in batch_first.graph.input:
        first, second = value.type.tensor_type.shape.dim[:2]
        one, other = second.dim_param or second.dim_value, first.dim_param or first.dim_value
        rest = [value.type.tensor_type.shape.dim[2].dim_value]
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, [one, other, *rest]))
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal((5, 2, 3)).astype(np.float32)}
    for name in (i.name for i in usual.graph.input[1:]):
        feed[name] = rng.uniform(-1, 1, (sizes.directions, 2, 4)).astype(np.float32)
    expected = run(usual, feed)
    found = run(
        lowered(batch_first, 5 if unrolled else None),
        {name: np.ascontiguousarray(value.swapaxes(0, 1)) for name, value in feed.items()},
    )
    for name, value in expected.items():
        value = value.transpose(2, 0, 1, 3) if name == "y" else value.swapaxes(0, 1)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x, h0, c0=None):
        y, h = self.rnn(x, h0 if c0 is None else (h0, c0))
        return y, h if c0 is None else h[0], y[:, -1]


@pytest.fixture(scope="module", params=[torch.nn.GRU, torch.nn.LSTM], ids=OPERATORS)
def traced(request):
    """A module of PyTorch, and its graph."""
    torch.manual_seed(0)
    module, buffer = Recurrent(request.param).eval(), io.BytesIO()
    states = ["h0", "c0"][: 1 + (request.param is torch.nn.LSTM)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 6, 3), *(torch.zeros(4, 2, 4) for _ in states)),
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=["x", *states],
            output_names=["y", "h", "last"],
            dynamic_axes={"x": {0: "N", 1: "T"}, **{name: {1: "N"} for name in states}},
        )
    return module, onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("frames", [None, 6], ids=["scan", "unrolled"])
def test_layers_of_pytorch_compute_the_same(traced, rng, frames):
    module, model = traced
    feed = {"x": rng.standard_normal((3, 6, 3)).astype(np.float32)}
    for name in (value.name for value in model.graph.input[1:]):
        feed[name] = rng.uniform(-1, 1, (4, 3, 4)).astype(np.float32)
    found = run(lowered(model, frames), feed)
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, feed.values()))
    for name, value in zip(("y", "h", "last"), expected, strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("frames", [None, 6], ids=["scan", "unrolled"])
def test_weights_have_the_names_and_values_of_pytorchs(traced, frames):
    module, model = traced
    graph = ir.from_proto(lowered(model, frames)).graph
    bodies = [graph, *graph.subgraphs()]
    found = {k: v.const_value.numpy() for body in bodies for k, v in body.initializers.items()}
    weights = {name: value for name, value in module.named_parameters() if "weight" in name}
    assert {name for name in found if name.startswith("rnn.weight")} == set(weights)
    for name, weight in weights.items():
        gates = weight.detach().chunk(weight.shape[0] // 4)
        order = [1, 0, 2] if len(gates) == 3 else [0, 3, 1, 2]  # ONNX's: z r n and i o f c
        expected = torch.cat([gates[i] for i in order]).T
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def reasons(model):
    """Why operators were left as they are; the graph then computes what it did."""
    graph = ir.from_proto(model)
    found = lower_recurrent(graph)
    assert model.graph.node[-1].op_type in {node.op_type for node in graph.graph}
    return found


@pytest.mark.parametrize(
    ("op", "attributes", "found"),
    [
        ("GRU", {"clip": 3.0}, "clip"),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}, "activations"),
        ("GRU", {"activations": ["Sigmoid", "Tanh", "Tanh", "Tanh"]}, "activations"),
        ("GRU", {"activations": ["Relu", "Tanh"], "clip": 3.0}, "clip, activations"),
        ("LSTM", {"input_forget": 1}, "input_forget"),
        ("LSTM", {"activations": ["Sigmoid", "Tanh", "Relu"]}, "activations"),
    ],
)
def test_what_no_cell_computes_is_left_as_it_is(op, attributes, found):
    assert reasons(gru_model(op=op, **attributes)) == {
        "rnn": f"this {op} cannot be lowered because of its {found}; supported are constant "
        "float32 weights, sigmoid and tanh, no clip and no sequence lengths"
    }


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("index", [1, 2, 3], ids=["W", "R", "B"])
@pytest.mark.parametrize("is_computed", [True, False], ids=["computed", "input"])
def test_an_operator_whose_weights_are_no_constants_is_left_as_it_is(op, index, is_computed):
    model = gru_model(op=op)
    node = model.graph.node[0]
    if is_computed:
        model.graph.node.insert(0, parser.parse_node(f"late = Neg({node.input[index]})"))
        node.input[index] = "late"
    else:
        node.input[index] = "x"
    assert f" because of its {'_WRB'[index]}; " in reasons(model)["rnn"]


def test_an_operator_with_sequence_lengths_is_left_as_it_is():
    model = gru_model(layers=2)
    lengths = numpy_helper.from_array(np.array([5, 5], np.int32), "lengths")
    model.graph.initializer.append(lengths)
    model.graph.node[0].input[4] = "lengths"
    graph = ir.from_proto(model)
    assert " because of its sequence_lens; " in lower_recurrent(graph)["rnn"]
    feed = {"x": np.ones((5, 2, 3), np.float32)}
    feed |= {name: np.full((1, 2, 4), 0.5, np.float32) for name in ("h0", "h1")}
    left = ir.to_proto(graph)
    assert Counter(node.op_type for node in left.graph.node)["GRU"] == 1  # the other one is lowered
    found, expected = run(left, feed), run(model, feed)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_peepholes_are_left_as_they_are():
    model = gru_model(op="LSTM")
    holes = numpy_helper.from_array(np.full((1, 12), 0.5, np.float32), "holes")
    model.graph.initializer.append(holes)
    model.graph.node[0].input.append("holes")
    assert " because of its peepholes; " in reasons(model)["rnn"]


def test_the_usual_activations_may_be_spelled_out():
    model = gru_model(activations=["Sigmoid", "Tanh"])
    assert_lowering_is_exact(model, SIZES, unrolled=False)


FOUR = "float[1,1,4] {4.0, 0.5, 0.5, 0.5}"
HALF = "float[1,1,4] {0.5, 0.5, -0.5, -1.0}"


@pytest.mark.parametrize(
    ("nodes", "is_within_one"),
    [
        (f"a = Constant <value = {HALF}> ()", True),
        (f"a = Constant <value = {FOUR}> ()", False),
        (f"b = Constant <value = {FOUR}> () a = Tanh(b)", True),
        (f"b = Constant <value = {FOUR}> () a = Expand(b, size)", False),
        (f"b = Constant <value = {HALF}> () a = Expand(b, size)", True),
        ("a = ConstantOfShape(size)", True),
        ("a = ConstantOfShape <value = float[1] {4.0}> (size)", False),
        ("b = ConstantOfShape(size) a = Neg(b)", False),
        ("b = Slice(h0, zeros, size) a = Identity(b)", True),
        ("b, a = GRU <hidden_size = 4> (x, w0, r0)", True),
        (
            f"c = Constant <value = {FOUR}> () b, a = GRU <hidden_size = 4> (x, w0, r0, , , c)",
            False,
        ),
    ],
)
def test_a_state_that_may_be_beyond_what_hidden_states_are_is_not_lowered(nodes, is_within_one):
    """Their range is never measured: it is -1 to 1."""
    model = gru_model()
    graph = f"g (float x) => (float y) {{ {nodes} }}"
    model.graph.node[0].input[5] = "a"
    for node in reversed(parser.parse_graph(graph).node):
        model.graph.node.insert(0, node)
    for name, values in {"size": [1, 2, 4], "zeros": [0, 0, 0]}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    found = lower_recurrent(ir.from_proto(model))
    if is_within_one:
        assert found == {}
    else:
        assert set(found.values()) == {
            "its initial state may be beyond -1 to 1, between which hidden states are quantized"
        }


def test_what_the_only_input_starts_with_may_be_of_any_size():
    model = gru_model()
    del model.graph.input[1]
    model.graph.node[0].input[5] = "x"
    assert "its initial state may be beyond -1 to 1" in reasons(model)["rnn"]
