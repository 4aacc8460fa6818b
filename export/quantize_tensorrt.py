"""INT8 for TensorRT and TensorRT-RTX: symmetric int8, weights and activations in Q/DQ pairs.

After the rules of NVIDIA's "Working with Quantized Types" page: a pair with a 0-D scale on what
every weighted operator reads, one with a scale for each output channel on its weight, none on what
it writes, and biases in float. The builder moves and fuses the pairs.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from cnngru_edge.calibration.collect import FRONTEND_NODES
from cnngru_edge.export import integer
from cnngru_edge.export.integer import Floats, RangeOf, named, values_of
from cnngru_edge.export.targets import Target

_WEIGHT_AXIS = {"Conv": 0, "MatMul": 1}  # output channels
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
        data, weight = node.inputs[:2]
        assert data is not None
        assert weight is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        tape = ir.tape.Tape(graph)
        if data not in pairs:
            affine = integer.symmetric_affine(range_of(data))
            scale = _storable(np.asarray(affine.scale), half)
            affine = integer.Affine(np.float32(scale), affine.zero_point)
            quantized = integer.quantized(tape, data, affine)
            pairs[data] = integer.dequantized(tape, quantized, affine, f"{data.name}")
        if weight not in weights:
            weights[weight] = _weight_pair(tape, weight, _WEIGHT_AXIS[node.op_type], half)
        node.replace_input_with(0, pairs[data])
        node.replace_input_with(1, weights[weight])
        graph.insert_before(node, tape.nodes)
    if half:
        _to_half(model, target)


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


def _to_half(model: ir.Model, target: Target) -> None:
    """FP16 from the features on; the front-end, and the graph's inputs and outputs, stay FP32."""
    graph = model.graph
    single = _single_precision(graph)
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node in single:
            continue
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.is_initializer():
                node.replace_input_with(index, _half_initializer(graph, value))
            elif value.is_graph_input() or value.producer() in single:
                if value not in casts:
                    tape = ir.tape.Tape(graph)
                    casts[value] = _cast(tape, value, ir.DataType.FLOAT16)
                    graph.insert_before(node, tape.nodes)
                node.replace_input_with(index, casts[value])
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = output.shape = None
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _body_to_half(attribute.as_graph())
    for index, output in enumerate(graph.outputs):
        writer = output.producer()
        if writer is None or writer in single:
            continue
        tape = ir.tape.Tape(graph)
        whole = _cast(tape, output, ir.DataType.FLOAT)
        graph.insert_after(writer, tape.nodes)
        whole.name, output.name = output.name, f"{output.name}_half"
        whole.type, whole.shape = output.type, output.shape
        output.type = output.shape = None
        graph.outputs[index] = whole
    graph.opset_imports[""] = target.max_opset
    model.ir_version = target.max_ir


def _single_precision(graph: ir.Graph) -> set[ir.Node]:
    """The front-end and what only depends on it, up to where it is first quantized or joined."""
    found: set[ir.Node] = set()
    halved = {"Conv", "MatMul", "QuantizeLinear", "DequantizeLinear", "Scan"}
    for node in graph:
        if (node.name or "").startswith(FRONTEND_NODES) or (
            node.op_type not in halved
            and all(
                value is None or value.is_initializer() or value.producer() in found
                for value in node.inputs
            )
        ):
            found.add(node)
    return found


def _body_to_half(body: ir.Graph) -> None:
    for value in (*body.inputs, *body.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in body:
        for index, read in enumerate(node.inputs):
            if read is not None and read.is_initializer():
                node.replace_input_with(index, _half_initializer(body, read))
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = output.shape = None


def _half_initializer(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The FP16 form of a float initializer; others as they are."""
    assert value.const_value is not None
    if value.const_value.dtype != ir.DataType.FLOAT:
        return value
    name = f"{value.name}_half"
    if name not in graph.initializers:
        half = values_of(value).astype(np.float16)
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(half)))
    return graph.initializers[name]


def _cast(tape: ir.tape.Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return named(tape.op("Cast", [value], {"to": dtype}), f"{value.name}_{dtype.name.lower()}")
