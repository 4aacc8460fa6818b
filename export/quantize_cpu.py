"""INT8 for ONNX Runtime on a CPU: uint8 activations, int8 weights.

A convolution becomes QLinearConv when ONNX Runtime loads the graph, from the QuantizeLinear and
DequantizeLinear around it. Products are written as its own operators
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): over all frames
MatMulIntegerToFloat, and in a loop, one frame at a time, MatMulNBits, which quantizes the frame
by itself and reads its weights 1.4 times as fast. Signed activations would be 30 times slower.
"""

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from cnngru_edge.calibration.collect import activated
from cnngru_edge.export import integer
from cnngru_edge.export.integer import RECURRENT, RangeOf, named, values_of
from cnngru_edge.export.onnx_graph import replace_value

_DOMAIN = "com.microsoft"
_BLOCK = 128
"""Weights that share a scale in MatMulNBits: the largest that its kernels for one frame like."""
_LARGE = 2**18
"""Weights that a product has to have for MatMulNBits to be worth it in a stream: 1.4 times as fast
then, and up to half as fast in a clip."""
_INT8_PRODUCTS = 4
"""MatMulNBits' accuracy_level: the input is quantized too, and products are of integers."""


def quantize(model: ir.Model, range_of: RangeOf, kept_in_float: Collection[str] = ()) -> None:
    """Quantize in place every weighted operator outside the front-end, in the graph's order."""
    model.graph.opset_imports[_DOMAIN] = 1
    for node in integer.weighted_nodes(model, kept_in_float):
        assert node.graph is not None
        tape = ir.tape.Tape(node.graph)
        if node.op_type == "Conv":
            _quantize_convolution(tape, node, range_of)
        elif _is_read_frame_by_frame(node):
            _quantize_product_of_a_frame(tape, node)
        else:
            _quantize_product(tape, node, range_of)
        node.graph.insert_before(node, tape.nodes)


def _is_read_frame_by_frame(node: ir.Node) -> bool:
    """Whether reading the weights is what a product takes time for, at least in a stream."""
    weight = node.inputs[1]
    assert weight is not None
    return RECURRENT in node.outputs[0].meta or values_of(weight).size >= _LARGE


def _quantize_convolution(tape: ir.tape.Tape, node: ir.Node, range_of: RangeOf) -> None:
    """Quantized in and out, a convolution is one integer operator, its ReLU included."""
    data, weight, bias = [*node.inputs, None][:3]
    assert data is not None
    assert weight is not None
    affine = _quantize_joined(tape, data, range_of)
    scales = integer.weight_scales(values_of(weight), axis=0)
    if bias is not None:
        scales = integer.scales_that_hold(scales, bias, affine.scale)
        node.replace_input_with(2, integer.dequantized_bias(tape, bias, affine.scale, scales))
    node.replace_input_with(1, integer.dequantized_weight(tape, weight, 0, scales))
    written = activated(node.outputs[0])
    affine = integer.unsigned_affine(range_of(written))
    _replace(written, integer.quantized(tape, written, affine), affine, tape)


def _quantize_product(tape: ir.tape.Tape, node: ir.Node, range_of: RangeOf) -> None:
    """A linear layer over all frames at once, its bias included; logits are better not rounded."""
    data, weight = node.inputs[:2]
    assert data is not None
    assert weight is not None
    quantized, affine = _quantize_passed(tape, data, range_of)
    values = values_of(weight)
    scales = integer.weight_scales(values, axis=1)
    scale, zero_point = integer.parameters(tape, f"{weight.name}_input", affine)
    inputs = [
        quantized,
        integer.stored(tape, f"{weight.name}_int8", integer.quantize(values, scales, 0, np.int8)),
        scale,
        integer.stored(tape, f"{weight.name}_scale", scales),
        zero_point,
        None,
        _bias(node),
    ]
    _write(node, tape.op("MatMulIntegerToFloat", inputs, domain=_DOMAIN))


def _quantize_product_of_a_frame(tape: ir.tape.Tape, node: ir.Node) -> None:
    """The same in a loop; the input's scale is found anew for each frame and block."""
    data, weight = node.inputs[:2]
    assert data is not None
    assert weight is not None
    values = values_of(weight).T  # (outputs, inputs)
    outputs, inputs = values.shape
    block = min(_BLOCK, max(16, 2 ** math.ceil(math.log2(inputs))))
    blocks = math.ceil(inputs / block)
    padded = np.pad(values, ((0, 0), (0, blocks * block - inputs)))
    padded = padded.reshape(outputs * blocks, block)
    scales = integer.weight_scales(padded, axis=0)
    integers = integer.quantize(padded, scales[:, None], 128, np.uint8)
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": 8,
        "block_size": block,
        "accuracy_level": _INT8_PRODUCTS,
    }
    parameters = [
        data,
        integer.stored(tape, f"{weight.name}_int8", integers.reshape(outputs, blocks, block)),
        integer.stored(tape, f"{weight.name}_scale", scales.reshape(outputs, blocks)),
        None,
        None,
        _bias(node),
    ]
    _write(node, tape.op("MatMulNBits", parameters, attributes, domain=_DOMAIN))


def _bias(node: ir.Node) -> ir.Value | None:
    """The bias that an Add brings to a product, if that is all that reads it."""
    add = _add_of_bias(node)
    return next((v for v in add.inputs if v and v.is_initializer()), None) if add else None


def _add_of_bias(node: ir.Node) -> ir.Node | None:
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    biases = [v for v in readers[0].inputs if v is not None and v.is_initializer()]
    return readers[0] if biases and values_of(biases[0]).ndim == 1 else None


def _write(node: ir.Node, product: ir.Value) -> None:
    """Let `product` stand for what a node, or the Add of its bias, wrote."""
    add = _add_of_bias(node)
    named(product, f"{node.name}_int8")
    replace_value((add or node).outputs[0], product)


def _quantize_joined(tape: ir.tape.Tape, data: ir.Value, range_of: RangeOf) -> integer.Affine:
    """Put a pair on what a convolution reads, unless its parts are quantized already."""
    node = data.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return integer.affine_of(node)
    if node is not None and node.op_type == "Concat":
        context, fresh = node.inputs
        assert context is not None
        assert fresh is not None
        dequantize = fresh.producer()
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            # The context is the past of the same tensor: one scale, and integers are joined.
            affine = integer.affine_of(dequantize)
            parts = [integer.quantized(tape, context, affine), dequantize.inputs[0]]
            joined = tape.op("Concat", parts, {"axis": node.attributes["axis"].as_int()})
            _replace(data, named(joined, f"{data.name}_quantized"), affine, tape)
            return affine
    affine = integer.unsigned_affine(range_of(data))
    _replace(data, integer.quantized(tape, data, affine), affine, tape)
    return affine


def _quantize_passed(
    tape: ir.tape.Tape, data: ir.Value, range_of: RangeOf
) -> tuple[ir.Value, integer.Affine]:
    """What a product reads as integers; those of a layer before are only moved, at their scale."""
    moves = []
    source = data
    while (node := source.producer()) is not None and node.op_type in integer.LAYOUT:
        if len(list(source.uses())) != 1:
            break
        moves.append(node)
        assert node.inputs[0] is not None
        source = node.inputs[0]
    if moves and node is not None and node.op_type == "DequantizeLinear":
        moves[-1].replace_input_with(0, node.inputs[0])
        for move in moves:
            move.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        return data, integer.affine_of(node)
    for use in data.uses():  # two directions of a GRU read the same
        if use.node.op_type == "QuantizeLinear":
            return use.node.outputs[0], integer.affine_of(use.node)
    affine = integer.unsigned_affine(range_of(data))
    return integer.quantized(tape, data, affine), affine


def _replace(
    value: ir.Value, quantized: ir.Value, affine: integer.Affine, tape: ir.tape.Tape
) -> None:
    """Let all that read `value` read its quantized form instead."""
    readers = [use for use in value.uses() if use.node is not quantized.producer()]
    dequantized = integer.dequantized(tape, quantized, affine, f"{value.name}")
    for reader, index in readers:
        reader.replace_input_with(index, dequantized)
