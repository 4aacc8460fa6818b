"""What known faults of torch's newer exporter have made of an ONNX file."""

from collections.abc import Iterator

import onnx_ir as ir

from cnngru_edge.export.graph.files import RECURRENT_OPS
from cnngru_edge.export.graph.layer_names import scopes_of
from cnngru_edge.export.graph.qdq import values_of

_TORCH = "pytorch"
_AGAIN = "export it again with torch.onnx.export(..., dynamo=False)"


def wrong_answers_of(model: ir.Model) -> str | None:
    """What makes a file answer otherwise than the module did that torch exported, in silence.

    The newer exporter wrote nn.GRU without linear_before_reset, which then is 0, and whose GRU is
    another one; nn.GRU has no such form, as GRUs of other frameworks may have
    (microsoft/onnxscript#2852, pytorch/pytorch#189225).
    """
    names = [
        _name(node)
        for node in _nodes(model)
        if node.op_type == "GRU" and not node.attributes.get_int("linear_before_reset", 0)
    ]
    if model.producer_name != _TORCH or not names:
        return None
    return (
        f"{', '.join(names)}: linear_before_reset is 0, as torch's nn.GRU never is, so the file "
        "answers otherwise than the module did, by a fault of torch's newer exporter with "
        f"onnxscript 0.6; {_AGAIN}, or with onnxscript 0.7.2 or newer, or give the module itself "
        "with --model"
    )


def frozen_time_of(model: ir.Model) -> str | None:
    """What fixes a file of torch's to the length that it was exported with.

    The newer exporter wrote the frames of its example into the shape that something is expanded to
    behind a recurrent layer, as where a backward direction is written by hand
    (pytorch/pytorch#191855). ONNX Runtime refuses other lengths, so it is for the reason of that.
    """
    nodes = list(_nodes(model))
    if model.producer_name != _TORCH or not any(node.op_type in RECURRENT_OPS for node in nodes):
        return None
    for node in nodes:
        target = node.inputs[1].producer() if node.op_type == "Expand" and node.inputs[1] else None
        if target is None or target.op_type != "Concat":
            continue
        sizes = [_size(part) for part in target.inputs]
        if sizes[0] is None and len(sizes) == 3 and (sizes[1] or 0) > 1:
            return (
                f"{_name(node)} expands to {sizes[1]} frames however long the input is, by a fault "
                f"of torch's newer exporter before 2.15; {_AGAIN}, or with torch 2.15 or newer"
            )
    return None


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _name(node: ir.Node) -> str:
    """The node's name, and the module that it was where the exporter says that."""
    name = node.name or f"{node.op_type} of {node.outputs[0].name}"
    module = scopes_of(node)
    return f"{name} ({module})" if module else name


def _size(part: ir.Value | None) -> int | None:
    """A dimension of a shape that is a constant."""
    if part is None:
        return None
    producer = part.producer()
    if producer is not None and producer.op_type == "Constant":
        value = producer.attributes.get("value")
        return int(value.as_tensor().numpy().reshape(-1)[0]) if value is not None else None
    return int(values_of(part).reshape(-1)[0]) if part.is_initializer() else None
