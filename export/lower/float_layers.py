"""What of a float graph stays in float whatever the plan says, and why."""

import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import module_of
from cnngru_edge.export.graph.qdq import RECURRENT, layer_named, values_of, weight_of
from cnngru_edge.export.lower.recurrent import LOWERED, reason_in_float
from cnngru_edge.export.normalize.front_end import FOREIGN_FRONT_END

_WITHOUT_INT8 = frozenset(
    {
        "Attention",
        "ConvTranspose",
        "DeformConv",
        "Einsum",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "RNN",
    }
)
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


def float_reasons(model: ir.Model) -> dict[str, str]:
    """Of a float graph in normal form, before or after lowering: by layer, one line each.

    Named as receipts name them, what recurs by its module; a product without weights, which is no
    layer of a receipt, by its node. Our front-end, which is float by design, is not among them; of
    one that was found in a graph all that has weights is.
    """
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if (node.name or "").startswith(FRONTEND_NODES):
            if _is_of_foreign_front_end(node):
                found[_layer_of_front_end(node)] = "a part of the front-end: float by design"
            continue
        reason = _reason(node, is_inside=node.graph is not model.graph)
        if reason is not None:
            found[_layer(node)] = reason
    return found


def weights_in_float(model: ir.Model) -> int:
    """How many weights the layers have that stay in float whatever the plan says."""
    found: dict[ir.Value, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if (node.name or "").startswith(FRONTEND_NODES):
            continue
        if _reason(node, is_inside=node.graph is not model.graph) is None:
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and len(value.shape or ()) > 1:
                found[value] = values_of(value).size
    return sum(found.values())


def _reason(node: ir.Node, *, is_inside: bool) -> str | None:
    if node.op_type in _WITHOUT_INT8:
        return f"{node.op_type} has no INT8 form here"
    if node.op_type in LOWERED and not node.domain:
        return "it is in the body of a loop or branch" if is_inside else reason_in_float(node)
    if weight_of(node) is not None:
        is_own = is_inside and RECURRENT not in node.outputs[0].meta
        return "it is in the body of a loop or branch" if is_own else None
    if node.op_type not in _PRODUCTS or node.domain:
        return None
    constants = [value for value in node.inputs[:2] if value is not None and value.is_initializer()]
    if not constants:
        if node.op_type == "Conv":
            return "its weight is computed, and no constant"
        return "a product of two activations, without weights"
    rank = len(constants[0].shape or ())
    return f"its weight has {rank} dimensions, or is not where one is expected"


def _is_of_foreign_front_end(node: ir.Node) -> bool:
    """Whether a node has weights, and is of a front-end that was in the graph."""
    if node.op_type not in _PRODUCTS or not (node.name or "").startswith(FOREIGN_FRONT_END):
        return False
    return any(value is not None and value.is_initializer() for value in node.inputs[:2])


def _layer_of_front_end(node: ir.Node) -> str:
    """By its module where there is one: the exporter's names of weights are made up."""
    path = (node.name or "").removeprefix(FOREIGN_FRONT_END).split("/")[:-1]
    return ".".join(path) or _layer(node)


def _layer(node: ir.Node) -> str:
    if node.op_type in {*LOWERED, "RNN"}:
        return module_of(node) or (node.name or "").strip("/")
    for value in node.inputs:
        if value is not None and value.is_initializer() and len(value.shape or ()) > 1:
            return layer_named(value)
    return (node.name or node.op_type).strip("/").replace("/", ".")
