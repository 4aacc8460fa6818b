import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper, parser

from cnngru_edge.export.lower.float_layers import float_reasons
from cnngru_edge.export.quantize.run import layers_of, lower


def made(text, **constants):
    model = helper.make_model(
        parser.parse_graph(text), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    for name, shape in constants.items():
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name.replace("__", ".")))
    graph = ir.from_proto(model)
    for node in graph.graph.all_nodes():
        node.name = f"/{node.outputs[0].name}/{node.op_type}"
        for index, value in enumerate(node.inputs):
            if value is not None and f"{value.name}.weight" in graph.graph.initializers:
                node.replace_input_with(index, graph.graph.initializers[f"{value.name}.weight"])
    return graph


TWO = "a product of two activations, without weights"
NO_FORM = "{} has no INT8 form here"


@pytest.mark.parametrize(
    ("text", "constants", "expected"),
    [
        ("y = MatMul(x, w)", {"w": (4, 4)}, {}),
        ("y = MatMul(x, x)", {}, {"y.MatMul": TWO}),
        ("y = Gemm(x, x)", {}, {"y.Gemm": TWO}),
        ('y = Einsum <equation = "ij,jk->ik"> (x, w)', {"w": (4, 4)}, {"w": NO_FORM}),
        ("y = MatMul(x, w)", {"w": (3, 4, 4)}, {"w": "its weight has 3 dimensions"}),
        ("y = MatMul(w, x)", {"w": (4, 4)}, {"w": "its weight has 2 dimensions"}),
    ],
    ids=["int8", "product", "gemm", "einsum", "batched", "left"],
)
def test_what_stays_in_float_has_a_reason(text, constants, expected):
    graph = made(f"g (float[4,4] x) => (float[4,K] y) {{ {text} }}", **constants)
    node = next(iter(graph.graph))
    found = float_reasons(graph)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason.format(node.op_type))


@pytest.mark.parametrize(
    ("text", "constants", "expected"),
    [
        ("y = Conv(x, k)", {"k": (2, 2, 3)}, {}),
        ("y = Conv(x, x)", {}, {"y.Conv": "its weight is computed, and no constant"}),
        ("y = ConvTranspose(x, k)", {"k": (2, 2, 3)}, {"k": "ConvTranspose has no INT8 form here"}),
        (
            "y, h = RNN <hidden_size = 4> (x, w, r)",
            {"w": (1, 4, 9), "r": (1, 4, 4)},
            {"y": "RNN has no INT8 form here"},
        ),
        (
            "y, h = GRU <hidden_size = 4, clip = 3.0> (x, w, r)",
            {"w": (1, 12, 9), "r": (1, 12, 4)},
            {"y": "this GRU cannot be lowered because of its clip; "},
        ),
        ("y, h = LSTM <hidden_size = 4> (x, w, r)", {"w": (1, 16, 9), "r": (1, 16, 4)}, {}),
    ],
    ids=["conv", "computed", "transposed", "rnn", "gru", "lstm"],
)
def test_layers_over_time_have_reasons(text, constants, expected):
    graph = made(f"g (float[2,2,9] x) => (float[A,B,C] y) {{ {text} }}", **constants)
    found = float_reasons(graph)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason)
    lower(graph)
    assert float_reasons(graph) == found
    assert bool(layers_of(graph)) == (not expected)


def test_the_body_of_a_loop_stays_in_float():
    text = """g (float[5,4] x, float[4] s) => (float[4] y, float[5,4] ys) {
        y, ys = Scan <num_scan_inputs = 1, body = b (float[4] a, float[4] x_t)
            => (float[4] a_next, float[4] out) {
            row = Reshape(x_t, shape)
            product = MatMul(row, w)
            flat = Reshape(product, size)
            a_next = Add(a, flat)
            out = Identity(a_next)
        }> (s, x)
    }"""
    graph = made(text, w=(4, 4))
    for name, shape in {"shape": [1, 4], "size": [4]}.items():
        value = ir.Value(name=name, const_value=ir.tensor(np.array(shape)))
        graph.graph.register_initializer(value)
    assert float_reasons(graph) == {"w": "it is in the body of a loop or branch"}
    assert layers_of(graph) == {}
