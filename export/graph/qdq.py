"""QuantizeLinear and DequantizeLinear as ONNX defines them: the numbers and the nodes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cnngru_edge.calibration.ranges.choose import Range
from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import replace_value

LAYOUT = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move values and change none: quantized or not, one scale before and after."""

PASSED = LAYOUT | {"MaxPool"}
"""Operators that give of integers what they give of the values that these stand for."""

RECURRENT = "cnngru_edge.recurrent"
"""Mark in `Value.meta` of a product that is made for one frame at a time."""

Floats = npt.NDArray[np.float32]
RangeOf = Callable[[ir.Value], Range]
_LARGEST = 127  # int8 without -128, so that a weight and its negative round alike
_BIAS_LIMIT = 2**30  # half of an int32, which leaves room for the sum that the bias is added to


@dataclass(frozen=True)
class Affine:
    """8-bit quantization of an activation: value = scale * (q - zero_point)."""

    scale: np.floating[Any]
    zero_point: np.uint8 | np.int8


def weighted_nodes(model: ir.Model, kept_in_float: Collection[str] = ()) -> list[ir.Node]:
    """Convolutions, products with a constant, and embeddings, outside the front-end.

    In the bodies of loops only the products of a cell; without those of the layers that are kept in
    float.
    """
    return [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if (weight := weight_of(node)) is not None
        and (node.graph is model.graph or RECURRENT in node.outputs[0].meta)
        and layer_named(weight) not in kept_in_float
    ]


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant of a node that can be quantized, by what it does and what the constant is like.

    Of a Conv (outputs, inputs, ...), of a MatMul (inputs, outputs), of a Gather that looks vectors
    up the table (tokens, outputs).
    """
    index = _WEIGHTS.get(node.op_type)
    if index is None or node.domain or (node.name or "").startswith(FRONTEND_NODES):
        return None
    weight = node.inputs[index]
    if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.FLOAT:
        return None
    rank = len(weight.shape) if weight.shape is not None else 0
    if node.op_type == "Conv":
        return weight if rank > 2 else None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        return None
    return weight if rank == 2 else None


_WEIGHTS = {"Conv": 1, "MatMul": 1, "Gather": 0}  # by operator, the input that is the weight


def layer_of(node: ir.Node) -> str:
    """The layer that a weighted node is of, as receipts and plans name it."""
    weight = weight_of(node)
    assert weight is not None
    return layer_named(weight)


def layer_named(weight: ir.Value) -> str:
    """The layer that a weight is of."""
    return (weight.name or "").removesuffix(".weight")


def unsigned_affine(values: Range) -> Affine:
    """uint8 for x86: all 255 steps where nothing is negative, else symmetric about 128.

    Clipping at zero point 0 is a ReLU, which a runtime then leaves out.
    """
    if values.low >= 0:
        return Affine(np.float32(_positive(values.high) / 255), np.uint8(0))
    return Affine(symmetric_affine(values).scale, np.uint8(128))


def symmetric_affine(values: Range) -> Affine:
    """int8 about zero, the only kind that TensorRT has."""
    amax = max(-values.low, values.high)
    return Affine(np.float32(_positive(amax) / _LARGEST), np.int8(0))


def quantize(
    values: Floats, scale: Floats, zero_point: int, dtype: type[np.integer[Any]]
) -> npt.NDArray[Any]:
    """QuantizeLinear of ONNX: divide, round half to even, add the zero point, saturate."""
    limits = np.iinfo(dtype)
    rounded = np.rint(values / scale) + zero_point
    # int32's limits are no float32, and would saturate to one too many.
    saturated: npt.NDArray[Any] = np.clip(rounded.astype(np.float64), limits.min, limits.max)
    return saturated.astype(dtype)


def weight_scales(weight: Floats, axis: int) -> Floats:
    """Symmetric int8 scales, one for each index along `axis`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    amax = np.abs(weight).max(axis=others)
    return (np.where(amax > 0, amax, 1.0) / _LARGEST).astype(np.float32)


def quantized(tape: ir.tape.Tape, value: ir.Value, affine: Affine) -> ir.Value:
    """`value` through a QuantizeLinear."""
    name = free_name(tape, f"{value.name}_quantized")
    return named(tape.op("QuantizeLinear", [value, *parameters(tape, name, affine)]), name)


def dequantized(tape: ir.tape.Tape, value: ir.Value, affine: Affine, name: str) -> ir.Value:
    """An 8-bit value through a DequantizeLinear."""
    name = free_name(tape, f"{name}_dequantized")
    return named(tape.op("DequantizeLinear", [value, *parameters(tape, name, affine)]), name)


def dequantized_weight(
    tape: ir.tape.Tape, weight: ir.Value, axis: int, scales: Floats | None = None
) -> ir.Value:
    """A float initializer stored as int8 with one scale for each index along `axis`."""
    values = values_of(weight)
    scales = weight_scales(values, axis) if scales is None else scales
    shape = [1] * values.ndim
    shape[axis] = -1
    name = f"{weight.name}"
    integers = quantize(values, scales.reshape(shape), 0, np.int8)
    inputs = [
        stored(tape, f"{name}_int8", integers),
        stored(tape, f"{name}_scale", scales),
    ]
    name = free_name(tape, f"{name}_dequantized")
    return named(tape.op("DequantizeLinear", inputs, {"axis": axis}), name)


def dequantized_bias(
    tape: ir.tape.Tape, bias: ir.Value, input_scale: np.float32, weight_scales: Floats
) -> ir.Value:
    """A float bias stored as int32 in steps of input scale times weight scale, as the sum is."""
    scales = (input_scale * weight_scales).astype(np.float32)
    integers = quantize(values_of(bias), scales, 0, np.int32)
    inputs = [
        stored(tape, f"{bias.name}_int32", integers),
        stored(tape, f"{bias.name}_scale", scales),
    ]
    name = free_name(tape, f"{bias.name}_dequantized")
    return named(tape.op("DequantizeLinear", inputs, {"axis": 0}), name)


def scales_that_hold(scales: Floats, bias: ir.Value, input_scale: np.float32) -> Floats:
    """Weight scales raised where a bias would not fit an int32: channels all but dead."""
    least = np.abs(values_of(bias)) / (input_scale * _BIAS_LIMIT)
    return np.maximum(scales, least).astype(np.float32)


def values_of(value: ir.Value) -> Floats:
    """The numbers of an initializer."""
    assert value.const_value is not None, f"{value.name} is no initializer"
    return value.const_value.numpy()


def stored(tape: ir.tape.Tape, name: str, values: npt.NDArray[Any]) -> ir.Value:
    """An initializer of the tape's graph; one for the same name and values, whoever reads it."""
    graph = tape.graph_like
    assert isinstance(graph, ir.Graph)
    while (existing := graph.initializers.get(name)) is not None:
        found = values_of(existing)
        if found.dtype == values.dtype and np.array_equal(found, values):
            return existing
        name += "_"
    return tape.initializer(ir.tensor(np.array(values, order="C")), name=name)


def take_over(value: ir.Value, made: ir.Value) -> None:
    """Let `made` stand for a value, under its name, which ranges are kept by."""
    if not value.is_graph_output():
        made.name, value.name = value.name, f"{value.name}_replaced"
        made.type, made.shape = value.type, value.shape
    replace_value(value, made)
    node = made.producer()
    assert node is not None
    node.name = f"{made.name}_dequantized"


def free_name(tape: ir.tape.Tape, name: str) -> str:
    """A name for a value of the tape's graph, the given one unless another value has it."""
    graph = tape.graph_like
    assert isinstance(graph, ir.Graph)
    taken = {output.name for node in (*graph, *tape.nodes) for output in node.outputs}
    while name in taken:
        name += "_"
    return name


def parameters(tape: ir.tape.Tape, name: str, affine: Affine) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point as 0-D initializers: TensorRT takes a scale of shape (1,) for none."""
    return (
        stored(tape, f"{name}_scale", np.asarray(affine.scale)),
        stored(tape, f"{name}_zero_point", np.asarray(affine.zero_point)),
    )


def is_of_activation(node: ir.Node | None) -> bool:
    """Whether a node is the DequantizeLinear of a tensor with one scale, none of a weight."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return False
    data, scale, _ = node.inputs
    if data is None or scale is None or data.is_initializer():
        return False
    return scale.const_value is not None and scale.const_value.shape.rank() == 0


def affine_of(dequantize: ir.Node) -> Affine:
    """What a DequantizeLinear node of an activation was made with."""
    _, scale, zero_point = dequantize.inputs
    assert scale is not None
    assert zero_point is not None
    kind = np.uint8 if zero_point.dtype == ir.DataType.UINT8 else np.int8
    return Affine(np.float32(values_of(scale)), kind(values_of(zero_point)))


def named(value: ir.Value, name: str) -> ir.Value:
    """Name a value, and the node that makes it, after what they are."""
    value.name = name
    node = value.producer()
    assert node is not None
    node.name = name
    return value


def _positive(amax: float) -> float:
    return amax if amax > 0 else 1.0
