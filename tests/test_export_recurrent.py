import io
import warnings
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

from cnngru_edge.export.recurrent import lower_grus
from cnngru_edge.models.errors import ExportError

DIRECTIONS = ("forward", "reverse", "bidirectional")
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
    layers=1,
    bias=True,
    state=True,
    name="/rnn/GRU_{}",
    readers=(),
    outputs=None,
    opset=17,
    **attributes,
):
    """GRUs in a row, as PyTorch exports them: `x`, `h0`, `h1`, ... to `y`, `h0_next`, ...

    Args:
        sizes: of the first layer's input and of every layer's state.
        layers: how many.
        bias: whether they have B.
        state: whether they have an initial state.
        name: of a layer's node.
        readers: further nodes, in ONNX's textual form.
        outputs: of the graph; by default the last layer's Y and every Y_h.
        opset: of the model.
        attributes: of every GRU.
    """
    rng = np.random.default_rng(0)
    count, hidden, inputs = sizes.directions, sizes.hidden, sizes.inputs
    constants = {"merged": np.array([0, 0, count * hidden])}
    constants |= {key: np.array(value) for key, value in INDICES.items()}
    nodes, x, states = [], "x", []
    for layer in range(layers):
        shapes = {
            "w": (count, 3 * hidden, inputs),
            "r": (count, 3 * hidden, hidden),
            "b": (count, 6 * hidden),
        }
        for key, shape in shapes.items():
            limit = 2 / np.sqrt(hidden)
            constants[f"{key}{layer}"] = rng.uniform(-limit, limit, shape).astype(np.float32)
        states.append(f"h{layer}")
        last = layer == layers - 1
        y, read = "y" if last else f"y{layer}", [x, f"w{layer}", f"r{layer}"]
        read += [f"b{layer}" if bias else "", "", f"h{layer}" if state else ""]
        node = helper.make_node(
            "GRU",
            read,
            [y, f"h{layer}_next"],
            name=name.format(layer),
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
    lower_grus(graph, frames)
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
    assert not op_types & ({"GRU", "Loop", "Scan"} if unrolled else {"GRU"})
    expected, found = run(model, feed), run(candidate, feed)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), unrolled=st.booleans(), direction=st.sampled_from(DIRECTIONS))
def test_every_lowering_computes_what_the_operator_does(data, unrolled, direction):
    sizes = Sizes(
        frames=data.draw(st.integers(1, 8 if unrolled else 10), "frames"),
        batch=data.draw(st.integers(1, 4), "batch"),
        inputs=data.draw(st.integers(1, 40), "inputs"),
        hidden=data.draw(st.integers(1, 40), "hidden"),
        direction=direction,
    )
    model = gru_model(
        sizes,
        layers=data.draw(st.integers(1, 2), "layers"),
        bias=data.draw(st.booleans(), "bias"),
        state=data.draw(st.booleans(), "state"),
        linear_before_reset=data.draw(st.integers(0, 1), "linear_before_reset"),
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
@pytest.mark.parametrize("unused", [0, 1], ids=["Y", "Y_h"])
def test_an_output_may_be_left_out(unused, direction, unrolled):
    sizes = Sizes(direction=direction)
    model = gru_model(sizes, outputs=["h0_next" if unused == 0 else "y"])
    model.graph.node[0].output[unused] = ""
    assert_lowering_is_exact(model, sizes, unrolled)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x, h0):
        y, h = self.rnn(x, h0)
        return y, h, y[:, -1]


@pytest.fixture(scope="module")
def traced():
    """A module of PyTorch, and its graph."""
    torch.manual_seed(0)
    module, buffer = Recurrent().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 6, 3), torch.zeros(4, 2, 4)),
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=["x", "h0"],
            output_names=["y", "h", "last"],
            dynamic_axes={"x": {0: "N", 1: "T"}, "h0": {1: "N"}},
        )
    return module, onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("frames", [None, 6], ids=["scan", "unrolled"])
def test_layers_of_pytorch_compute_the_same(traced, rng, frames):
    module, model = traced
    x = rng.standard_normal((3, 6, 3)).astype(np.float32)
    h0 = rng.uniform(-1, 1, (4, 3, 4)).astype(np.float32)
    found = run(lowered(model, frames), {"x": x, "h0": h0})
    with torch.no_grad():
        expected = module(torch.from_numpy(x), torch.from_numpy(h0))
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
        reset, update, new = weight.detach().chunk(3)  # in ONNX's order: update first
        np.testing.assert_array_equal(found[name], torch.cat([update, reset, new]).T, err_msg=name)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({"layout": 1}, "layout"),
        ({"clip": 3.0}, "clip"),
        ({"activations": ["Sigmoid", "Relu"]}, "activations"),
        ({"activations": ["Sigmoid", "Tanh", "Tanh", "Tanh"]}, "activations"),
        ({"layout": 1, "clip": 3.0}, "layout, clip"),
    ],
    ids=["layout", "clip", "activations", "activations-backward", "two"],
)
def test_what_no_cell_computes_is_refused(attributes, found):
    with pytest.raises(ExportError, match=rf"^/rnn/GRU_0: .* because of its {found}; supported"):
        lowered(gru_model(**attributes))


@pytest.mark.parametrize("index", [1, 2, 3], ids=["W", "R", "B"])
@pytest.mark.parametrize("is_computed", [True, False], ids=["computed", "input"])
def test_weights_that_are_no_constants_are_refused(index, is_computed):
    model = gru_model()
    gru = model.graph.node[0]
    if is_computed:
        model.graph.node.insert(0, parser.parse_node(f"late = Neg({gru.input[index]})"))
        gru.input[index] = "late"
    else:
        gru.input[index] = "x"
    with pytest.raises(ExportError, match=rf"^/rnn/GRU_0: .* because of its {'_WRB'[index]}; "):
        lowered(model)


def test_sequence_lengths_are_refused():
    model = gru_model()
    lengths = numpy_helper.from_array(np.array([5, 5], np.int32), "lengths")
    model.graph.initializer.append(lengths)
    model.graph.node[0].input[4] = "lengths"
    with pytest.raises(ExportError) as caught:
        lowered(model)
    assert str(caught.value) == (
        "/rnn/GRU_0: this GRU cannot be lowered because of its sequence_lens; supported are "
        "constant float32 weights, sigmoid and tanh, (T, N, I) layout, no clip and no "
        "sequence lengths"
    )


def test_the_usual_activations_may_be_spelled_out():
    model = gru_model(activations=["Sigmoid", "Tanh"])
    assert_lowering_is_exact(model, SIZES, unrolled=False)
