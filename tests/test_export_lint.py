import onnx_ir as ir
import pytest
from onnx import parser

from cnngru_edge.export.graph.files import load
from cnngru_edge.export.targets.base import TENSORRT, TENSORRT_FP16
from cnngru_edge.export.targets.trt.lint import RULES, Violation, check, lint
from cnngru_edge.models.errors import ExportError

# What the rules ask for. Each case below breaks one of them by changing a line of one of these.

CONV_MATMUL = """
<ir_version: 8, opset_import: ["" : 17]>
conv_matmul (float[N,1,4,2] audio, float[N,1,1,2] state) => (float[N,5,2] logits)
<float s = {0.1}, int8 z = {0}, float[2] s2 = {0.1, 0.2}, int8[2] z2 = {0, 0}, int8[2] z02 = {0, 1},
 float16 s_half = {12288}, float[1] s_1d = {0.1}, float s_zero = {0}, float[2] s2_nan = {1, nan},
 uint8 z_uint8 = {0}, int8 z_one = {1}, int32 z_int32 = {0},
 float[2,1,1,2] kernel = {1, 2, 3, 4}, float[2] bias = {0, 0}, int32[2] bias_int32 = {0, 0},
 int8[2,2] weight = {1, 2, 3, 4}, int64[3] rows = {0, 5, 2}>
{
  q = QuantizeLinear(audio, s, z)
  q_state = QuantizeLinear(state, s, z)
  joined = Concat<axis = 2>(q_state, q)
  dq = DequantizeLinear(joined, s, z)
  q_kernel = QuantizeLinear<axis = 0>(kernel, s2, z2)
  dq_kernel = DequantizeLinear<axis = 0>(q_kernel, s2, z2)
  conv = Conv(dq, dq_kernel, bias)
  table = Reshape(conv, rows)
  q_table = QuantizeLinear(table, s, z)
  dq_table = DequantizeLinear(q_table, s, z)
  dq_weight = DequantizeLinear<axis = -1>(weight, s2, z2)
  logits = MatMul(dq_table, dq_weight)
}
"""

SCAN = """
<ir_version: 8, opset_import: ["" : 17]>
scan (float[T,N,2] x, float[N,2] h0) => (float[T,N,2] y, float[N,2] hn)
<float s = {0.1}, int8 z = {0}, int8 z_one = {1}, float[2] s2 = {0.1, 0.2}, int8[2] z2 = {0, 0},
 int8[2,2] weight = {1, 2, 3, 4}>
{
  dq_weight = DequantizeLinear<axis = 1>(weight, s2, z2)
  hn, y = Scan<num_scan_inputs = 1, body = step (float[N,2] h, float[N,2] x_t)
      => (float[N,2] h_next, float[N,2] y_t) {
    q_h = QuantizeLinear(h, s, z)
    dq_h = DequantizeLinear(q_h, s, z)
    product = MatMul(dq_h, dq_weight)
    h_next = Add(product, x_t)
    y_t = Identity(h_next)
  }>(h0, x)
}
"""

GEMM_GRU = """
<ir_version: 8, opset_import: ["" : 17]>
gemm_gru (float[T,2] x, float[1,1,1] h0) => (float[T,1,1,1] y, float[1,1,1] hn)
<float s = {0.1}, int8 z = {0}, float[2] s2 = {0.1, 0.2}, int8[2] z2 = {0, 0},
 int8[2,2] weight = {1, 2, 3, 4}, float[1,3,2] w = {1, 2, 3, 4, 5, 6}, float[1,3,1] r = {1, 2, 3},
 int8[1,3,1] r_int8 = {1, 2, 3}, int64[1] batch = {1}>
{
  q = QuantizeLinear(x, s, z)
  dq = DequantizeLinear(q, s, z)
  dq_weight = DequantizeLinear<axis = 0>(weight, s2, z2)
  gemm = Gemm<transB = 1>(dq, dq_weight)
  frames = Unsqueeze(gemm, batch)
  y, hn = GRU<hidden_size = 1, linear_before_reset = 1>(frames, w, r, , , h0)
}
"""

# In types as a strongly typed graph has them: the front-end float, the rest FP16, its
# numbers in bits (0.125 is 12288).
HALF = """
<ir_version: 9, opset_import: ["" : 19]>
half (float[N,2] audio) => (float16[N,2] logits)
<float16 s = {12288}, int8 z = {0}, float s_float = {0.1}, float16[2] s2 = {12288, 13312},
 float[2] s2_float = {0.1, 0.2}, int8[2] z2 = {0, 0},
 float[2,2] filters = {1, 2, 3, 4}, int8[2,2] weight = {1, 2, 3, 4}>
{
  mel = MatMul(audio, filters)
  half = Cast<to = 10>(mel)
  q = QuantizeLinear(half, s, z)
  dq = DequantizeLinear(q, s, z)
  dq_weight = DequantizeLinear<axis = 1>(weight, s2, z2)
  logits = MatMul(dq, dq_weight)
}
"""

CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[N,1,8] audio) => (float[N,T,1] logits)
<float[1,1,2] kernel = {1, 2}, int64[1] first = {0}, int64[1] rest = {-1}, int64[1] one = {1}>
{
  conv = Conv(audio, kernel)
  relu = Relu(conv)
  shape = Shape(relu)
  batch = Slice(shape, first, one)
  size = Concat<axis = 0>(batch, rest, one)
  logits = Reshape(relu, size)
}
"""


def graph_of(text, old="", new=""):
    """A graph from ONNX's textual form, its nodes named after what they make."""
    assert text.count(old) == 1 or not old
    graph = ir.from_proto(parser.parse_model(text.replace(old, new)))
    for node in graph.graph.all_nodes():
        node.name = f"/{node.outputs[0].name}"
    return graph


@pytest.mark.parametrize(
    ("text", "target"),
    [
        pytest.param(CONV_MATMUL, TENSORRT, id="conv-matmul"),
        pytest.param(SCAN, TENSORRT, id="scan"),
        pytest.param(GEMM_GRU, TENSORRT, id="gemm-gru"),
        pytest.param(CNN, TENSORRT, id="float"),
        pytest.param(CNN.replace("N,1,8", "N,1,S"), TENSORRT, id="any-length"),
        pytest.param(CONV_MATMUL, TENSORRT_FP16, id="conv-matmul-strongly-typed"),
        pytest.param(HALF, TENSORRT_FP16, id="half"),
        pytest.param(CNN, TENSORRT_FP16, id="float-strongly-typed"),
    ],
)
def test_a_graph_that_keeps_the_rules_passes(text, target):
    graph = graph_of(text)
    before = ir.to_proto(graph)
    assert lint(graph, target) == []
    check(graph, target)
    assert ir.to_proto(graph) == before


def broken(rule, text, old, new, where, message, target=TENSORRT, name=""):
    return pytest.param(
        text, old, new, target, Violation(rule, where, message), id=f"{rule}{name and f'-{name}'}"
    )


Q, DQ = "q = QuantizeLinear(audio, s, z)", "dq = DequantizeLinear(joined, s, z)"


BROKEN = [
    broken("opset", CNN, ": 17", ": 18", "cnn", "opset 18, expected at most 17"),
    broken(
        "opset", HALF, ": 19", ": 20", "half", "opset 20, expected at most 19",
        TENSORRT_FP16, "fp16",
    ),
    broken(
        "ir-version", CNN, "ir_version: 8", "ir_version: 9",
        "cnn", "IR version 9, expected at most 8",
    ),
    broken(
        "int64-io", CNN, "(float[N,T,1] logits)", "(float[N,T,1] logits, int64[3] size)",
        "size", "is an int64 input or output, expected int32 (token ids) or float32",
    ),
    broken(
        "unrolled-time", CNN.replace("relu", "frame_0"), "float[N,1,8]", "float[N,1,S]", "audio",
        "is free along axis 2 and the frames are written out, expected only the batch free",
    ),
    broken(
        "domain", CNN.replace('"" : 17', '"" : 17, "com.microsoft" : 1'),
        "Relu(conv)", "com.microsoft.Gelu(conv)",
        "/relu", "Gelu is of the domain com.microsoft, expected ONNX's own",
    ),
    broken(
        "integer-operator", CONV_MATMUL, "MatMul(dq_table, dq_weight)",
        "MatMul(dq_table, dq_weight)\n  extra = MatMulInteger(weight, weight)",
        "/extra", "MatMulInteger is not supported, expected Q/DQ around a float operator",
    ),
    broken(
        "zero-point", CONV_MATMUL, DQ, "dq = DequantizeLinear(joined, s)",
        "/dq", "has no zero point, expected int8 zeros", name="missing",
    ),
    broken(
        "zero-point", CONV_MATMUL, DQ, "dq = DequantizeLinear(joined, s, z_one)",
        "/dq", "zero point is 1, expected 0", name="one",
    ),
    broken(
        "zero-point", CONV_MATMUL, "(kernel, s2, z2)", "(kernel, s2, z02)",
        "/q_kernel", "zero point is 1, expected 0", name="one-channel",
    ),
    broken(
        "zero-point", CONV_MATMUL, "(kernel, s2, z2)", "(kernel, s2, z)",
        "/q_kernel", "has 1 zero points and 2 scales", name="size",
    ),
    broken(
        "zero-point", CONV_MATMUL, DQ, f"zero = Sub(z, z)\n  {DQ.replace('z)', 'zero)')}",
        "/dq", "zero point is not a constant", name="computed",
    ),
    broken(
        "zero-point", SCAN, "QuantizeLinear(h, s, z)", "QuantizeLinear(h, s, z_one)",
        "/q_h", "zero point is 1, expected 0", name="in-a-scan",
    ),
    broken(
        "zero-point", HALF, "QuantizeLinear(half, s, z)", "QuantizeLinear(half, s)",
        "/q", "has no zero point, expected int8 zeros", TENSORRT_FP16, "missing-fp16",
    ),
    broken(
        "int8-only", CONV_MATMUL, "(table, s, z)", "(table, s, z_uint8)",
        "/q_table", "integers are uint8, expected int8",
    ),
    broken(
        "float-bias", CONV_MATMUL, "conv = Conv(dq, dq_kernel, bias)",
        "dq_bias = DequantizeLinear(bias_int32, s, z_int32)\n"
        "  conv = Conv(dq, dq_kernel, dq_bias)",
        "/dq_bias", "dequantizes an int32 bias, expected a float one",
    ),
    broken(
        "scale-value", CONV_MATMUL, Q, "q = QuantizeLinear(audio, s_zero, z)",
        "/q", "scale is 0, expected a finite number above 0", name="zero",
    ),
    broken(
        "scale-value", CONV_MATMUL, "(kernel, s2, z2)", "(kernel, s2_nan, z2)",
        "/q_kernel", "scale is nan, expected a finite number above 0", name="nan",
    ),
    broken(
        "scale-value", CONV_MATMUL, Q, f"max = ReduceMax<keepdims = 0>(audio)\n  {Q}".replace(
            "s, z", "max, z"
        ),
        "/q", "scale is not a constant", name="computed",
    ),
    broken(
        "activation-scale", CONV_MATMUL, Q, "q = QuantizeLinear(audio, s_1d, z)",
        "/q", "scale of an activation has shape (1,), expected ()", name="1-d",
    ),
    broken(
        "activation-scale", CONV_MATMUL, DQ, "dq = DequantizeLinear<axis = 3>(joined, s2, z2)",
        "/dq", "scale of an activation has shape (2,), expected ()", name="per-channel",
    ),
    broken(
        "weight-axis", CONV_MATMUL, "QuantizeLinear<axis = 0>(kernel",
        "QuantizeLinear<axis = 3>(kernel",
        "/q_kernel", "weight of a Conv has its scales along axis 3, expected axis 0",
        name="conv",
    ),
    broken(
        "weight-axis", CONV_MATMUL, "Conv(dq, dq_kernel, bias)", "ConvTranspose(dq, dq_kernel)",
        "/q_kernel", "weight of a ConvTranspose has its scales along axis 0, expected axis 1",
        name="conv-transpose",
    ),
    broken(
        "weight-axis", CONV_MATMUL, "axis = -1", "axis = 0",
        "/dq_weight", "weight of a MatMul has its scales along axis 0, expected axis 1",
        name="matmul",
    ),
    broken(
        "weight-axis", GEMM_GRU, "transB = 1", "transB = 0",
        "/dq_weight", "weight of a Gemm has its scales along axis 0, expected axis 1",
        name="gemm",
    ),
    broken(
        "weight-axis", SCAN, "axis = 1", "axis = 0",
        "/dq_weight", "weight of a MatMul has its scales along axis 0, expected axis 1",
        name="outside-a-scan",
    ),
    broken(
        "scale-dtype", CONV_MATMUL, Q, "q = QuantizeLinear(audio, s_half, z)",
        "/q", "scale is float16, expected float",
    ),
    broken(
        "scale-dtype", HALF, "QuantizeLinear(half, s, z)", "QuantizeLinear(half, s_float, z)",
        "/q", "scale is float, expected float16 as its input is", TENSORRT_FP16, "quantize",
    ),
    broken(
        "scale-dtype", HALF, "(weight, s2, z2)", "(weight, s2_float, z2)",
        "/logits", "reads float and float16, expected one type", TENSORRT_FP16, "product",
    ),
    broken(
        "scale-dtype", HALF, "dq_weight = DequantizeLinear<axis = 1>(weight, s2, z2)",
        "dq_float = DequantizeLinear<axis = 1>(weight, s2_float, z2)\n"
        "  dq_weight = Cast<to = 10>(dq_float)",
        "/logits", "has scales of float and float16, expected one type",
        TENSORRT_FP16, "behind-a-cast",
    ),
    broken(
        "gru-weights", GEMM_GRU, "y, hn = GRU<hidden_size = 1, linear_before_reset = 1>"
        "(frames, w, r,", "dq_r = DequantizeLinear(r_int8, s, z)\n  y, hn = "
        "GRU<hidden_size = 1, linear_before_reset = 1>(frames, w, dq_r,",
        "/dq_r", "quantizes R of the GRU /y, expected float weights, or the cell written out",
    ),
    broken(
        "lone-quantize", CONV_MATMUL, DQ, f"{DQ}\n  integers = Cast<to = 1>(q)",
        "/q", "is read by Cast, expected a DequantizeLinear",
    ),
    broken(
        "lone-quantize", CONV_MATMUL, "(float[N,5,2] logits)",
        "(float[N,5,2] logits, int8[N,1,5,2] joined)",
        "/q_state", "is read by the output joined, expected a DequantizeLinear", name="output",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "old", "new", "target", "violation"), BROKEN)
def test_a_broken_rule_is_named_with_its_node(text, old, new, target, violation):
    graph = graph_of(text, old, new)
    found = lint(graph, target)
    assert found[0].rule == violation.rule
    assert violation in found
    assert {v.rule for v in found} == {violation.rule}
    with pytest.raises(ExportError) as caught:
        check(graph, target)
    line = str(caught.value)
    assert line.startswith(f"{found[0].where}: {found[0].message} (rule {violation.rule})")
    assert line.endswith(f": not a graph for {target.name}")
    assert "\n" not in line


def test_every_rule_is_broken_above():
    assert {case.values[-1].rule for case in BROKEN} == set(RULES)


def test_the_float_graph_passes(exported):
    graph = load(exported / "model.fp32.onnx")
    assert lint(graph, TENSORRT) == []
    assert lint(graph, TENSORRT_FP16) == []


def test_the_graph_for_onnx_runtime_does_not(exported):
    graph = load(exported / "model.int8.onnx")
    found = lint(graph, TENSORRT)
    assert {v.rule for v in found} == {
        "domain", "float-bias", "int8-only", "lone-quantize", "zero-point",
    }  # fmt: skip
    with pytest.raises(ExportError, match=rf"\(rule domain\) and {len(found) - 1} more: "):
        check(graph, TENSORRT)


def test_a_weight_with_many_readers_is_one_violation():
    again = "logits = MatMul(dq_table, dq_weight)\n  again = MatMul(dq_table, dq_weight)"
    text = CONV_MATMUL.replace("logits = MatMul(dq_table, dq_weight)", again)
    assert len(lint(graph_of(text, "axis = -1", "axis = 0"), TENSORRT)) == 1


def test_a_node_without_a_name_is_known_by_what_it_makes():
    graph = graph_of(CONV_MATMUL, DQ, "dq = DequantizeLinear(joined, s, z_one)")
    for node in graph.graph:
        node.name = None
    assert lint(graph, TENSORRT)[0].where == "DequantizeLinear of dq"


def test_what_is_no_onnx_is_refused():
    graph = graph_of(CNN, "Relu(conv)", "com.example.Relu(conv)")
    with pytest.raises(ExportError, match=r"^cnn: not valid ONNX: .*/relu.*com\.example"):
        lint(graph, TENSORRT)
