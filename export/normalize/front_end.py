"""A front-end inside a graph that somebody else exported: found, so that it stays in float."""

import math

import numpy as np
import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.qdq import values_of

FOREIGN_FRONT_END = f"{FRONTEND_NODES}found/"
"""Where the nodes of a front-end are that is not ours."""

_FEATURES = frozenset({"Log", "STFT", "DFT"})
_MAGNITUDES = frozenset({"Abs", "Pow", "ReduceL2", "ReduceSumSquare"})
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_TRANSFORMS = frozenset({"DFT", "STFT"})
_ARITHMETIC = _MAGNITUDES | {
    "Add",
    "Cast",
    "Concat",
    "Div",
    "Expand",
    "Flatten",
    "Gather",
    "GatherND",
    "Identity",
    "Mul",
    "Neg",
    "Pad",
    "Reciprocal",
    "ReduceMean",
    "ReduceSum",
    "Reshape",
    "Slice",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
}
"""What a front-end does with samples besides its products: it moves, scales and squares them."""
_MOST_PRODUCTS = 2
"""In a row: the Fourier transform, and the mel filters."""


def mark_front_end(model: ir.Model) -> None:
    """Name all that leads to a logarithm or a Fourier transform as the front-end's nodes are named.

    A power spectrum overflows FP16, and INT8 leaves nothing of what a logarithm reads: so whoever
    made the front-end, it stays in FP32. What else than one a logarithm may follow, a network
    above all, is told by what cannot be in a front-end: any operator but the few that are listed
    here, a third product in a row, a product with a bias, a convolution that is not over the one
    channel of a waveform. A spectrum is squared, or its absolute taken, before the logarithm.
    """
    of_samples = _computed_of_inputs(model.graph)
    for node in list(model.graph):
        if node.op_type not in _FEATURES or (node.name or "").startswith(FRONTEND_NODES):
            continue
        before = _ancestors(node)
        if not _is_front_end(
            node, [found for found in model.graph if found in before & of_samples]
        ):
            continue
        for found in before:
            if not (found.name or "").startswith(FRONTEND_NODES):
                found.name = f"{FOREIGN_FRONT_END}{(found.name or '').lstrip('/')}"


def _is_front_end(last: ir.Node, path: list[ir.Node]) -> bool:
    """Whether all from the samples to `last` can be of a front-end.

    Args:
        last: a logarithm or a Fourier transform.
        path: it and what it depends on, as far as that depends on the graph's input.
    """
    if last not in path:
        return False
    in_a_row: dict[ir.Node, int] = {}
    for node in path:
        writers = (value.producer() for value in node.inputs if value is not None)
        before = max((in_a_row.get(writer, 0) for writer in writers if writer), default=0)
        is_known = node.op_type in _ARITHMETIC | _PRODUCTS | _TRANSFORMS or _is_floor(node)
        is_peak = node.op_type == "ReduceMax" and not before  # that samples are divided by
        if node is not last and (node.domain or not (is_known or is_peak)):
            return False
        if (count := _products(node, before)) is None or before + count > _MOST_PRODUCTS:
            return False
        in_a_row[node] = before + count
    is_squared = any(node.op_type in _MAGNITUDES or _squares(node) for node in path)
    return last.op_type in _TRANSFORMS or (in_a_row[last] > 0 and is_squared)


def _products(node: ir.Node, before: int) -> int | None:
    """How many products of a front-end a node is; None if it is one of a network.

    Args:
        node: between the samples and the features.
        before: products in a row before it.
    """
    if node.op_type in _TRANSFORMS:
        return 1
    if node.op_type == "Add":
        return None if _has_bias(node) else 0
    if node.op_type not in _PRODUCTS:
        return 0
    weight = next((v for v in node.inputs[:2] if v is not None and v.const_value is not None), None)
    if weight is None:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2].const_value
        if bias is None or bias.numpy().any():
            return None
    if node.op_type == "Conv":
        outputs, channels, *kernel = values_of(weight).shape
        is_framing = channels == 1 and not before
        if not is_framing and math.prod(kernel) > 1:
            return None
        if is_framing and (outputs == 1 or _only_moves(weight)):
            return 0  # a filter for pre-emphasis, or a cutting of frames
    return 1


def _only_moves(weight: ir.Value) -> bool:
    """Whether each output of a convolution is one of the numbers that it reads."""
    rows = values_of(weight).reshape(len(values_of(weight)), -1)
    return bool(np.isin(rows, (0, 1)).all() and (rows.sum(1) == 1).all())


def _has_bias(add: ir.Node) -> bool:
    """Whether an Add brings a product a number for each of its outputs."""
    constants = [value for value in add.inputs if value is not None and value.is_initializer()]
    writers = [value.producer() for value in add.inputs if value is not None]
    return any(values_of(value).size > 1 for value in constants) and any(
        writer is not None and writer.op_type in _PRODUCTS for writer in writers
    )


def _is_floor(node: ir.Node) -> bool:
    """Whether a node raises what is smaller than a positive number, and lowers nothing."""
    if node.op_type == "Clip":
        floor, ceiling = [*node.inputs[1:], None, None][:2]
        if ceiling is not None:
            return False
    elif node.op_type == "Max":
        floor = next((v for v in node.inputs if v is not None and v.is_initializer()), None)
    else:
        return False
    return floor is not None and floor.is_initializer() and bool((values_of(floor) > 0).all())


def _squares(node: ir.Node) -> bool:
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _computed_of_inputs(graph: ir.Graph) -> set[ir.Node]:
    """What is computed of the numbers that the graph is given, not just of their shape."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in {"Shape", "Size"}:
            continue
        if any(
            v is not None and (v.is_graph_input() or v.producer() in found) for v in node.inputs
        ):
            found.add(node)
    return found


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """The node, and all that it depends on."""
    found: set[ir.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            writers = (value.producer() for value in node.inputs if value is not None)
            left += [writer for writer in writers if writer is not None]
    return found
