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

from cnngru_edge.calibration.ranges.collect import activated
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.files import replace_value
from cnngru_edge.export.graph.qdq import RECURRENT, RangeOf, named, values_of

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
        if node.op_type == "Gather":
            _quantize_embedding(tape, node)
        elif node.op_type == "Conv" and activated(node.outputs[0]).is_graph_output():
            _quantize_last_convolution(tape, node, range_of)
        elif node.op_type == "Conv":
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
    clip = written.producer()
    if clip is not None and clip.op_type == "Clip" and _saturates(affine, clip):
        clipped, written = written, node.outputs[0]
        replace_value(clipped, written)
        # Under its name, by which an INT8 graph is compared with the float one.
        name, clipped.name = clipped.name, f"{clipped.name}_replaced"
        written.name = name
    _replace(written, integer.quantized(tape, written, affine), affine, tape)


def _saturates(affine: integer.Affine, clip: ir.Node) -> bool:
    """Whether integers end where a Clip at zero does, or before."""
    high = clip.inputs[2] if len(clip.inputs) > 2 else None
    largest = float(affine.scale) * np.iinfo(np.uint8).max
    return affine.zero_point == 0 and (
        high is None or (high.is_initializer() and largest <= float(values_of(high)) * 1.0001)
    )


def _quantize_last_convolution(tape: ir.tape.Tape, node: ir.Node, range_of: RangeOf) -> None:
    """One whose output is the graph's: of integers too, and not rounded to a byte."""
    data, weight, bias = [*node.inputs, None][:3]
    assert data is not None
    assert weight is not None
    affine = _quantize_joined(tape, data, range_of)
    dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert dequantize is not None
    quantized = dequantize.inputs[0]
    values = values_of(weight)
    scales = integer.weight_scales(values, axis=0)
    shape = (-1, *[1] * (values.ndim - 1))
    # Shifted into uint8: ONNX Runtime before 1.24 has no ConvInteger of int8 weights.
    shifted = integer.quantize(values, scales.reshape(shape), 0, np.int8).astype(np.int16) + 128
    inputs = [
        quantized,
        integer.stored(tape, f"{weight.name}_int8", shifted.astype(np.uint8)),
        integer.stored(tape, f"{weight.name}_input_zero_point", np.array(affine.zero_point)),
        integer.stored(tape, f"{weight.name}_zero_point", np.array(128, np.uint8)),
    ]
    sums = named(tape.op("ConvInteger", inputs, dict(node.attributes)), f"{node.name}_int32")
    floats = named(tape.op("Cast", [sums], {"to": ir.DataType.FLOAT}), f"{node.name}_sums")
    steps = integer.stored(
        tape, f"{weight.name}_steps", (affine.scale * scales).reshape(shape[:-1]).astype(np.float32)
    )
    result = named(tape.op("Mul", [floats, steps]), f"{node.name}_int8")
    if bias is not None:
        column = integer.stored(tape, f"{bias.name}_column", values_of(bias).reshape(shape[:-1]))
        result = named(tape.op("Add", [result, column]), f"{node.name}_biased")
    replace_value(node.outputs[0], result)


def _quantize_embedding(tape: ir.tape.Tape, node: ir.Node) -> None:
    """Vectors are looked up as integers, with a scale for each of their components."""
    weight, ids = node.inputs
    assert weight is not None
    assert ids is not None
    values = values_of(weight)
    scales = integer.weight_scales(values, axis=1)
    table = integer.stored(
        tape, f"{weight.name}_int8", integer.quantize(values, scales, 0, np.int8)
    )
    looked_up = named(tape.op("Gather", [table, ids], {"axis": 0}), f"{node.name}_int8")
    scale = integer.stored(tape, f"{weight.name}_scale", scales)
    floats = tape.op("DequantizeLinear", [looked_up, scale], {"axis": -1})
    integer.take_over(node.outputs[0], floats)


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
    weight = node.inputs[1]
    biases = [v for v in readers[0].inputs if v is not None and v.is_initializer()]
    assert weight is not None
    # One number for all outputs, or more than there are outputs, is something else than a bias.
    is_bias = bool(biases) and values_of(biases[0]).shape == values_of(weight).shape[1:]
    return readers[0] if is_bias else None


def _write(node: ir.Node, product: ir.Value) -> None:
    """Let `product` stand for what a node, or the Add of its bias, wrote."""
    add = _add_of_bias(node)
    named(product, f"{node.name}_int8")
    replace_value((add or node).outputs[0], product)


def _quantize_joined(tape: ir.tape.Tape, data: ir.Value, range_of: RangeOf) -> integer.Affine:
    """Put a pair on what a convolution reads, unless its parts are quantized already."""
    node = data.producer()
    if node is not None and integer.is_of_activation(node):
        return integer.affine_of(node)
    if (affine := _pass_integers(data)) is not None:
        _replace(data, data, affine, tape)
        return affine
    if node is not None and node.op_type == "Concat":
        affine = _affine_of_parts(node, range_of)
        if affine is not None:
            # Of one scale, so that integers are joined.
            parts = []
            for part in node.inputs:
                assert part is not None
                writer = part.producer()
                is_quantized = writer is not None and integer.is_of_activation(writer)
                parts.append(
                    writer.inputs[0]
                    if is_quantized and writer is not None
                    else integer.quantized(tape, part, affine)
                )
            joined = tape.op("Concat", parts, {"axis": node.attributes["axis"].as_int()})
            name = integer.free_name(tape, f"{data.name}_quantized")
            _replace(data, named(joined, name), affine, tape)
            return affine
    affine = integer.unsigned_affine(range_of(data))
    _replace(data, integer.quantized(tape, data, affine), affine, tape)
    return affine


def _affine_of_parts(concat: ir.Node, range_of: RangeOf) -> integer.Affine | None:
    """The one quantization of what a Concat joins, if it has one.

    Parts that are not quantized have none of their own where the whole takes on no more than the
    others do: they are the past of the same tensor.
    """
    found: integer.Affine | None = None
    low = high = 0.0
    others = 0
    for part in concat.inputs:
        writer = part.producer() if part is not None else None
        if writer is None or not integer.is_of_activation(writer):
            others += 1
            continue
        affine = integer.affine_of(writer)
        if found is not None and affine != found:
            return None
        found = affine
        source = writer.inputs[0].producer() if writer.inputs[0] is not None else None
        if source is None or source.op_type != "QuantizeLinear" or source.inputs[0] is None:
            return None
        own = range_of(source.inputs[0])
        low, high = min(low, own.minimum), max(high, own.maximum)
    if found is None or not others:
        return found
    whole = range_of(concat.outputs[0])
    return found if low <= whole.minimum and whole.maximum <= high else None


def _pass_integers(data: ir.Value) -> integer.Affine | None:
    """Let what only moves values move integers, from those of a layer before to `data`."""
    moves: list[ir.Node] = []
    source = data
    while (node := source.producer()) is not None and node.op_type in integer.PASSED:
        is_read_by_others = bool(moves) and len(list(source.uses())) != 1
        if is_read_by_others or len(node.outputs) > 1 or source.is_graph_output():
            return None
        moves.append(node)
        assert node.inputs[0] is not None
        source = node.inputs[0]
    if not moves or node is None or not integer.is_of_activation(node):
        return None
    moves[-1].replace_input_with(0, node.inputs[0])
    for move in moves:
        move.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    return integer.affine_of(node)


def _quantize_passed(
    tape: ir.tape.Tape, data: ir.Value, range_of: RangeOf
) -> tuple[ir.Value, integer.Affine]:
    """What a product reads as integers; those of a layer before are only moved, at their scale."""
    node = data.producer()
    if integer.is_of_activation(node):
        assert node is not None
        quantized = node.inputs[0]
        assert quantized is not None
        return quantized, integer.affine_of(node)
    if len(list(data.uses())) == 1 and (affine := _pass_integers(data)) is not None:
        return data, affine
    for use in data.uses():  # two directions of a GRU read the same
        if use.node.op_type == "QuantizeLinear":
            return use.node.outputs[0], integer.affine_of(use.node)
    affine = integer.unsigned_affine(range_of(data))
    return integer.quantized(tape, data, affine), affine


def _replace(
    value: ir.Value, quantized: ir.Value, affine: integer.Affine, tape: ir.tape.Tape
) -> None:
    """Let all that read `value` read its quantized form instead, which may be itself."""
    writer = quantized.producer() if quantized is not value else None
    readers = [use for use in value.uses() if use.node is not writer]
    dequantized = integer.dequantized(tape, quantized, affine, f"{value.name}")
    for reader, index in readers:
        reader.replace_input_with(index, dequantized)
