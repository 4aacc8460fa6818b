"""A graph of another opset as one of the opset that every target parses."""

import onnx
import onnx_ir as ir
from onnx import defs, version_converter

from cnngru_edge.models.errors import ExportError

OPSET = 17
"""What every TensorRT since 8.6 parses (its operator table)."""
IR_VERSION = 8
"""The IR version of its time."""


def bring_to_opset(model: ir.Model) -> None:
    """Rewrite a graph in place for OPSET.

    Later opsets mostly added types: where all that a graph uses was there before, the number is all
    that changes. What else there is to do is done by ONNX's own converter.

    Raises:
        ExportError: it uses what OPSET does not have.
    """
    found = model.opset_imports.get("", 1)
    model.ir_version = IR_VERSION
    if found == OPSET:
        return
    strange = _strangers(model, OPSET) if found > OPSET else []
    if strange:  # the converter knows the way down from 18, where axes became inputs, not from 20
        lowest = (n for n in range(OPSET + 1, found) if not _strangers(model, n))
        model.opset_imports[""] = next(lowest, found)
    if strange or found < OPSET:
        try:
            proto = version_converter.convert_version(ir.to_proto(model), OPSET)
            onnx.checker.check_model(proto)
        except Exception as e:  # the converter's errors have no common base but this
            # Of several lines, the first says it; what follows is where in the library.
            reason = " ".join(strange) or str(e).strip().splitlines()[0]
            raise ExportError(
                f"{model.graph.name}: opset {found} cannot be brought to {OPSET}: {reason}; export "
                f"it with opset {OPSET}"
            ) from e
        inputs, outputs = model.graph.inputs, model.graph.outputs
        converted = ir.from_proto(proto).graph
        for old, new in zip(
            (*inputs, *outputs), (*converted.inputs, *converted.outputs), strict=True
        ):
            new.shape = old.shape
        model.graph = converted
    model.graph.opset_imports[""] = OPSET


def _strangers(model: ir.Model, opset: int) -> list[str]:
    """Operators that an opset does not have, or not with these inputs and attributes."""
    found: dict[str, None] = {}  # in the order of the graph, each once
    for node in model.graph.all_nodes():
        if node.domain:
            continue
        where = node.name or f"{node.op_type} of {node.outputs[0].name}"
        try:
            schema = defs.get_schema(node.op_type, opset)
        except defs.SchemaError:
            found[f"{node.op_type} ({where}) is of a later opset"] = None
            continue
        if len(node.inputs) > schema.max_input or set(node.attributes) - set(schema.attributes):
            found[f"{node.op_type} ({where}) is used as in a later opset"] = None
    return list(found)
