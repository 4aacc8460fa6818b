"""INT8 for TensorRT and TensorRT-RTX: symmetric int8, weights and activations in Q/DQ pairs.

After the rules of NVIDIA's "Working with Quantized Types" page: a pair with a 0-D scale on what
every weighted operator reads, one with a scale for each output channel on its weight, none on what
it writes, and biases in float. The builder moves and fuses the pairs.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import Floats, RangeOf, named, values_of
from cnngru_edge.export.targets.base import Target
from cnngru_edge.export.targets.trt.half import to_half

_WEIGHT_AXIS = {"Conv": 0, "MatMul": 1, "Gather": 1}  # output channels
_LEAST_HALF = np.float32(2.0**-14)  # the smallest normal FP16: a scale below it loses bits


def quantize(
    model: ir.Model, range_of: RangeOf, target: Target, kept_in_float: Collection[str] = ()
) -> None:
    """Quantize in place every weighted operator outside the front-end.

    Args:
        model: a float graph whose GRUs are lowered.
        range_of: gives a tensor's range.
        target: strongly typed, with FP16 scales and weights stored in INT8, for there the type of a
            scale is the type of the arithmetic; else with FP32 scales and weights, which TensorRT
            8.6 asks for and folds as it builds.
        kept_in_float: layers to leave out.
    """
    half = target.strongly_typed
    pairs: dict[ir.Value, ir.Value] = {}
    weights: dict[ir.Value, ir.Value] = {}
    for node in integer.weighted_nodes(model, kept_in_float):
        weight = integer.weight_of(node)
        assert weight is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        tape = ir.tape.Tape(graph)
        if weight not in weights:
            weights[weight] = _weight_pair(tape, weight, _WEIGHT_AXIS[node.op_type], half)
            graph.insert_before(graph[0], tape.nodes)
            tape = ir.tape.Tape(graph)
        if node.op_type == "Gather":  # the builder moves what dequantizes the table behind it
            node.replace_input_with(0, weights[weight])
            continue
        data = node.inputs[0]
        assert data is not None
        if data not in pairs:
            affine = integer.symmetric_affine(range_of(data))
            scale = _storable(np.asarray(affine.scale), half)
            affine = integer.Affine(np.float32(scale), affine.zero_point)
            quantized = integer.quantized(tape, data, affine)
            pairs[data] = integer.dequantized(tape, quantized, affine, f"{data.name}")
        node.replace_input_with(0, pairs[data])
        node.replace_input_with(1, weights[weight])
        graph.insert_before(node, tape.nodes)
    _to_int32(model.graph)
    if half:
        to_half(model, target)


def _weight_pair(tape: ir.tape.Tape, weight: ir.Value, axis: int, half: bool) -> ir.Value:
    scales = _storable(integer.weight_scales(values_of(weight), axis), half)
    if half:
        return integer.dequantized_weight(tape, weight, axis, scales)
    name = f"{weight.name}_quantized"
    scale = tape.initializer(ir.tensor(scales), name=f"{weight.name}_scale")
    zero_point = tape.initializer(
        ir.tensor(np.zeros(len(scales), np.int8)), name=f"{weight.name}_zero_point"
    )
    quantized = named(tape.op("QuantizeLinear", [weight, scale, zero_point], {"axis": axis}), name)
    inputs = [quantized, scale, zero_point]
    return named(tape.op("DequantizeLinear", inputs, {"axis": axis}), f"{weight.name}_dequantized")


def _storable(scales: Floats, half: bool) -> Floats:
    """Scales as they are stored, so that the integers are made with just those."""
    if not half:
        return scales
    return np.maximum(scales, _LEAST_HALF).astype(np.float16).astype(np.float32)


def _to_int32(graph: ir.Graph) -> None:
    """Inputs and outputs of int64 as int32: 8.6 makes them that unasked, later ones do not."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.INT64:
            tape = ir.tape.Tape(graph)
            wide = named(tape.op("Cast", [value], {"to": ir.DataType.INT64}), f"{value.name}_int64")
            for reader, index in [use for use in value.uses() if use.node is not wide.producer()]:
                reader.replace_input_with(index, wide)
            graph.insert_before(graph[0], tape.nodes)
            value.dtype = ir.DataType.INT32
    for index, value in enumerate(graph.outputs):
        writer = value.producer()
        if value.dtype == ir.DataType.INT64 and writer is not None:
            tape = ir.tape.Tape(graph)
            narrow = tape.op("Cast", [value], {"to": ir.DataType.INT32})
            graph.insert_after(writer, tape.nodes)
            narrow.name, value.name = value.name, f"{value.name}_int64"
            narrow.type, narrow.shape = ir.TensorType(ir.DataType.INT32), value.shape
            graph.outputs[index] = narrow
