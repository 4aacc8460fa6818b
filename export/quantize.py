"""INT8 for ONNX Runtime on a CPU: QuantizeLinear and DequantizeLinear put into the float graph."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from cnngru_edge.calibration.collect import FRONTEND_NODES, WEIGHTED, activated
from cnngru_edge.calibration.ranges import Range, Ranges
from cnngru_edge.export import integer, onnx_graph, recurrent
from cnngru_edge.models.errors import CalibrationError, ExportError
from cnngru_edge.runtime.session import PRECISION_KEY, SOURCE_KEY

HIDDEN_RANGE = Range(-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0)
"""Of a GRU's output, whatever the data: it is a mean of tanh values and of itself."""

_WEIGHT_AXIS = {"Conv": 0, "MatMul": 1}  # output channels


def quantize_onnx(source: Path, ranges: Path, target: Path) -> None:
    """Write the INT8 form of a float graph, with the ranges that were calibrated on it.

    Convolutions and linear layers compute in integers, with uint8 activations and int8 weights per
    channel; the GRU keeps its float operator and gets INT8 weights; the front-end stays float.

    Raises:
        CalibrationError: the ranges are of another graph.
        ExportError: the source is not a float graph of ours.
    """
    graph = onnx_graph.load(source)
    if graph.metadata_props.get(PRECISION_KEY) != "fp32":
        raise ExportError(f"{source}: already quantized; give the float graph")
    sha256 = onnx_graph.file_sha256(source)
    quantize_graph(graph, Ranges.load(ranges, sha256))
    graph.metadata_props.update({PRECISION_KEY: "int8", SOURCE_KEY: sha256})
    onnx_graph.save(graph, target)


def quantize_graph(graph: ir.Model, ranges: Ranges) -> None:
    """Quantize in place every weighted operator outside the front-end, in the graph's order."""
    for node in list(graph.graph):
        if node.op_type not in WEIGHTED or (node.name or "").startswith(FRONTEND_NODES):
            continue
        tape = ir.tape.Tape(graph.graph)
        if node.op_type == "GRU":
            recurrent.quantize_gru_weights(tape, node)
        else:
            _quantize_product(tape, node, ranges)
        graph.graph.insert_before(node, tape.nodes)
    common.RemoveUnusedNodesPass()(graph)
    common.TopologicalSortPass()(graph)


def _quantize_product(tape: ir.tape.Tape, node: ir.Node, ranges: Ranges) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None
    assert weight is not None
    affine = _quantize_data(tape, data, ranges)
    axis = _WEIGHT_AXIS[node.op_type]
    scales = integer.weight_scales(integer.values_of(weight), axis)
    if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        scales = integer.scales_that_hold(scales, bias, affine.scale)
        node.replace_input_with(2, integer.dequantized_bias(tape, bias, affine.scale, scales))
    node.replace_input_with(1, integer.dequantized_weight(tape, weight, axis, scales))
    if node.op_type == "Conv":
        # Quantized in and out, a convolution is one integer operator. A linear layer is without
        # it, and logits are better not rounded.
        written = activated(node.outputs[0])
        affine = integer.activation_affine(_range_of(written, ranges))
        _replace(written, integer.quantized(tape, written, affine), affine, tape)


def _quantize_data(tape: ir.tape.Tape, data: ir.Value, ranges: Ranges) -> integer.Affine:
    """Put a pair on what an operator reads, unless its parts are quantized already."""
    concat = data.producer()
    if concat is not None and concat.op_type == "Concat":
        context, fresh = concat.inputs
        assert context is not None
        assert fresh is not None
        dequantize = fresh.producer()
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            # The context is the past of the same tensor: one scale, and integers are joined.
            affine = integer.affine_of(dequantize)
            parts = [integer.quantized(tape, context, affine), dequantize.inputs[0]]
            joined = tape.op("Concat", parts, {"axis": concat.attributes["axis"].as_int()})
            _replace(data, integer.named(joined, f"{data.name}_quantized"), affine, tape)
            return affine
    affine = integer.activation_affine(_range_of(data, ranges))
    _replace(data, integer.quantized(tape, data, affine), affine, tape)
    return affine


def _replace(
    value: ir.Value, quantized: ir.Value, affine: integer.Affine, tape: ir.tape.Tape
) -> None:
    """Let all that read `value` read its quantized form instead."""
    readers = [use for use in value.uses() if use.node is not quantized.producer()]
    dequantized = integer.dequantized(tape, quantized, affine, f"{value.name}")
    for reader, index in readers:
        reader.replace_input_with(index, dequantized)


def _range_of(value: ir.Value, ranges: Ranges) -> Range:
    if _is_hidden(value):
        return HIDDEN_RANGE
    if value.name is None or value.name not in ranges.tensors:
        raise CalibrationError(
            f"no range for the tensor {value.name!r}; calibrate this graph again"
        )
    return ranges.tensors[value.name]


def _is_hidden(value: ir.Value) -> bool:
    """Whether a value is a GRU's output, but for its layout."""
    node = value.producer()
    while node is not None and node.op_type in {"Transpose", "Squeeze"} and node.inputs[0]:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "GRU"
