"""What a target's builder asks of a graph, checked before the builder sees it.

TensorRT answers much of this with an engine that is silently wrong or silently float, not with an
error. Sources: the operator table of onnx-tensorrt and its `QuantizeLinear` importer (8.6, 10.1),
IQuantizeLayer in NvInfer.h, the pages "Working with Quantized Types" and "ONNX opset guide" of the
TensorRT documentation; what they leave open was tried with TensorRT-RTX 1.7.1.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import shape_inference

from cnngru_edge.export.graph.files import RECURRENT_OPS
from cnngru_edge.export.targets.base import Target
from cnngru_edge.models.errors import ExportError


@dataclass(frozen=True)
class Violation:
    """A rule, the node or value (or the graph) that breaks it, and how."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} (rule {self.rule})"


def check(graph: ir.Model, target: Target) -> None:
    """Pass a graph that keeps the rules of `target`.

    Raises:
        ExportError: it breaks one, or is not valid ONNX.
    """
    if violations := lint(graph, target):
        others = len(violations) - 1
        more = f" and {others} more" if others else ""
        raise ExportError(f"{violations[0]}{more}: not a graph for {target.name}")


def lint(graph: ir.Model, target: Target) -> list[Violation]:
    """Every violation of the rules of `target`, in the order of the rules; subgraphs included.

    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        # On a copy, and with the types and shapes that rules ask for.
        typed = ir.from_proto(shape_inference.infer_shapes(ir.to_proto(graph)))
    except shape_inference.InferenceError as e:
        reason = " ".join(str(e).split())
        raise ExportError(f"{graph.graph.name}: not valid ONNX: {reason}") from e
    found = (
        Violation(rule, where, message)
        for rule, broken in RULES.items()
        for where, message in broken(typed, target)
    )
    return list(dict.fromkeys(found))  # a weight with many readers is one violation


Faults = Iterator[tuple[str, str]]  # where, message

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FRAME = re.compile(r"/frame_\d+(/|$)")
"""In the names of nodes of a cell that is written out, frame by frame."""
_LAYOUT = ("Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_INTEGER = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")


def _opset(graph: ir.Model, target: Target) -> Faults:
    """The operator tables end here; the parser itself does not check (ONNX opset guide)."""
    opset = graph.opset_imports.get("", 0)
    if opset > target.max_opset:
        yield f"{graph.graph.name}", f"opset {opset}, expected at most {target.max_opset}"


def _ir_version(graph: ir.Model, target: Target) -> Faults:
    """Each parser is built against one release of ONNX (Versioning.md of ONNX)."""
    if graph.ir_version > target.max_ir:
        found = f"IR version {graph.ir_version}"
        yield f"{graph.graph.name}", f"{found}, expected at most {target.max_ir}"


def _int64_io(graph: ir.Model, target: Target) -> Faults:
    """TensorRT 8.6 makes an int64 input or output int32, later ones do not (9.0 changelog)."""
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if _dtype(value) == "int64":
            yield (
                f"{value.name}",
                "is an int64 input or output, expected int32 (token ids) or float32",
            )


def _unrolled_time(graph: ir.Model, target: Target) -> Faults:
    """A cell that is written out has as many steps as it was written with."""
    if not any(_FRAME.search(node.name or "") for node in graph.graph):
        return
    for value in graph.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if axis > 0 and not isinstance(size, int):
                found = f"is free along axis {axis} and the frames are written out"
                yield f"{value.name}", f"{found}, expected only the batch free"


def _domain(graph: ir.Model, target: Target) -> Faults:
    """Operators outside ONNX's own domain would be plugins."""
    for node in graph.graph.all_nodes():
        if node.domain:
            yield _name(node), f"{node.op_type} is of the domain {node.domain}, expected ONNX's own"


def _integer_operator(graph: ir.Model, target: Target) -> Faults:
    """Not in the operator table: integers come from Q/DQ pairs around float operators."""
    for node in _nodes(graph, *_INTEGER):
        yield _name(node), f"{node.op_type} is not supported, expected Q/DQ around a float operator"


def _zero_point(graph: ir.Model, target: Target) -> Faults:
    """IQuantizeLayer is symmetric: a constant of zeros, as long as the scale.

    8.6's importer takes three inputs and no fewer. Later ones read a missing one as int8, where
    ONNX says uint8 for a QuantizeLinear.
    """
    for node in _nodes(graph, *_PAIR):
        zero_point = _input(node, 2)
        if zero_point is None:
            if not target.strongly_typed or node.op_type == "QuantizeLinear":
                yield _name(node), "has no zero point, expected int8 zeros"
            continue
        values, scales = _constant(zero_point), _constant(node.inputs[1])
        if values is None:
            yield _name(node), "zero point is not a constant"
        elif (values != 0).any():
            yield _name(node), f"zero point is {values[values != 0].flat[0]:g}, expected 0"
        elif scales is not None and scales.size != values.size:
            yield _name(node), f"has {values.size} zero points and {scales.size} scales"


def _int8_only(graph: ir.Model, target: Target) -> Faults:
    """TensorRT-RTX reads uint8 as int8 and clips at 127 without an error; 8.6 and 10.1 refuse."""
    for node in _nodes(graph, *_PAIR):
        dtype = _integer_type(node)
        if dtype not in {None, "int8", "int32"}:  # int32 is a bias's
            yield _name(node), f"integers are {dtype}, expected int8"


def _float_bias(graph: ir.Model, target: Target) -> Faults:
    """A DequantizeLinear of int32 does not parse (TensorRT-RTX), so a bias stays float."""
    for node in _nodes(graph, "DequantizeLinear"):
        if _integer_type(node) == "int32":
            yield _name(node), "dequantizes an int32 bias, expected a float one"


def _scale_value(graph: ir.Model, target: Target) -> Faults:
    """IQuantizeLayer: scales are build-time constants above 0."""
    for node in _nodes(graph, *_PAIR):
        scales = _constant(node.inputs[1])
        if scales is None:
            yield _name(node), "scale is not a constant"
        elif (wrong := scales[~(np.isfinite(scales) & (scales > 0))]).size > 0:
            yield _name(node), f"scale is {wrong.flat[0]:g}, expected a finite number above 0"


def _activation_scale(graph: ir.Model, target: Target) -> Faults:
    """Only weights are per channel; of shape (1,), a scale leaves its convolution in float."""
    constants = _constants(graph)
    for node in _nodes(graph, *_PAIR):
        scale = node.inputs[1]
        shape = () if scale is None or scale.shape is None else tuple(scale.shape)
        if node.inputs[0] not in constants and shape != ():
            yield _name(node), f"scale of an activation has shape {shape}, expected ()"


def _weight_axis(graph: ir.Model, target: Target) -> Faults:
    """A scale belongs to an output channel; along another axis the operator stays float."""
    for product in _nodes(graph, *_PRODUCTS):
        for node in _quantizers(product.inputs[1]):
            scales, weight = _constant(node.inputs[1]), node.inputs[0]
            if scales is None or scales.size == 1 or weight is None or weight.shape is None:
                continue
            rank = len(weight.shape)
            axis, expected = node.attributes.get_int("axis", 1) % rank, _output_axis(product, rank)
            if axis != expected:
                found = f"weight of a {product.op_type} has its scales along axis {axis}"
                yield _name(node), f"{found}, expected axis {expected}"


def _scale_dtype(graph: ir.Model, target: Target) -> Faults:
    """8.6 reads any scale as float32; strongly typed, a DequantizeLinear has its scale's type.

    A Cast after it makes no product of scales of two types: the builder fuses past the Cast.
    """
    if not target.strongly_typed:
        for node in _nodes(graph, *_PAIR):
            scale = _dtype(node.inputs[1])
            if scale not in {None, "float"}:
                yield _name(node), f"scale is {scale}, expected float"
        return
    for node in _nodes(graph, "QuantizeLinear"):
        data, scale = _dtype(node.inputs[0]), _dtype(node.inputs[1])
        if data and scale and data != scale:
            yield _name(node), f"scale is {scale}, expected {data} as its input is"
    for node in _nodes(graph, *_PRODUCTS):
        scales = [pair.inputs[1] for value in node.inputs for pair in _quantizers(value)]
        for found, values in (("reads", node.inputs), ("has scales of", scales)):
            dtypes = sorted({dtype for value in values if (dtype := _dtype(value))})
            if len(dtypes) > 1:
                yield _name(node), f"{found} {' and '.join(dtypes)}, expected one type"
                break


def _gru_weights(graph: ir.Model, target: Target) -> Faults:
    """The importer makes a loop of it: quantized weights fold back to float, or fail to compile."""
    for recurrent in _nodes(graph, *RECURRENT_OPS):
        for index, weight in ((1, "W"), (2, "R")):
            for node in _quantizers(recurrent.inputs[index]):
                found = f"quantizes {weight} of the {recurrent.op_type} {_name(recurrent)}"
                yield _name(node), f"{found}, expected float weights, or the cell written out"


def _lone_quantize(graph: ir.Model, target: Target) -> Faults:
    """Integers are for the DequantizeLinear that the builder fuses, past a change of layout."""
    for node in _nodes(graph, "QuantizeLinear"):
        for reader in _readers(node.outputs[0]):
            if reader != "DequantizeLinear":
                yield _name(node), f"is read by {reader}, expected a DequantizeLinear"


RULES: dict[str, Callable[[ir.Model, Target], Faults]] = {
    "opset": _opset,
    "ir-version": _ir_version,
    "int64-io": _int64_io,
    "unrolled-time": _unrolled_time,
    "domain": _domain,
    "integer-operator": _integer_operator,
    "zero-point": _zero_point,
    "int8-only": _int8_only,
    "float-bias": _float_bias,
    "scale-value": _scale_value,
    "activation-scale": _activation_scale,
    "weight-axis": _weight_axis,
    "scale-dtype": _scale_dtype,
    "gru-weights": _gru_weights,
    "lone-quantize": _lone_quantize,
}
"""By name, what finds the breaches: on a graph with inferred types, where and how."""


def _nodes(graph: ir.Model, *op_types: str) -> list[ir.Node]:
    """ONNX's own operators of these types, in subgraphs too."""
    nodes = graph.graph.all_nodes()
    return [node for node in nodes if node.op_type in op_types and not node.domain]


def _constants(graph: ir.Model) -> set[ir.Value]:
    """Initializers, and what is computed from nothing else."""
    found: set[ir.Value] = set()
    for node in graph.graph.all_nodes():
        inputs = [value for value in node.inputs if value is not None]
        found.update(value for value in inputs if value.is_initializer())
        # A subgraph reads more than the inputs of its node.
        whole = bool(inputs) and node.op_type not in {"If", "Loop", "Scan"}
        if node.op_type == "Constant" or (whole and found.issuperset(inputs)):
            found.update(node.outputs)
    return found


def _quantizers(value: ir.Value | None) -> Iterator[ir.Node]:
    """The DequantizeLinear that makes a value, whatever its type; the QuantizeLinear before it."""
    for op_type in ("Cast", *reversed(_PAIR)):
        node = None if value is None else value.producer()
        if node is not None and node.op_type == op_type:
            value = node.inputs[0]
            if op_type in _PAIR:
                yield node


def _output_axis(product: ir.Node, rank: int) -> int:
    """The axis of a weight along which a product's outputs lie."""
    gemm = 1 - product.attributes.get_int("transB", 0)
    return {"Conv": 0, "ConvTranspose": 1, "Gemm": gemm, "MatMul": rank - 1}[product.op_type]


def _readers(value: ir.Value) -> Iterator[str]:
    """The operators that read a value, or a new layout of it."""
    if value.is_graph_output():
        yield f"the output {value.name}"
    for use in value.uses():
        if use.node.op_type in _LAYOUT:
            for output in use.node.outputs:
                yield from _readers(output)
        else:
            yield use.node.op_type


def _integer_type(node: ir.Node) -> str | None:
    """Of the integers of a pair's half: its zero point's, or what a DequantizeLinear reads."""
    zero_point = _input(node, 2)
    if zero_point is None and node.op_type == "DequantizeLinear":
        return _dtype(node.inputs[0])
    return _dtype(zero_point)


def _dtype(value: ir.Value | None) -> str | None:
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return _dtype(node.inputs[1])  # ONNX before opset 19 says float whatever the scale
    return None if value is None or value.dtype is None else value.dtype.name.lower()


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of an initializer or a Constant, as what they are or wider."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float64)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _name(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name}"
