"""A graph of another opset as one of the opset that every target parses."""

import math
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, version_converter

from cnngru_edge.export.graph.files import replace_value
from cnngru_edge.models.errors import ExportError, first_line

OPSET = 17
"""What every TensorRT since 8.6 parses (its operator table)."""
_GELU = 20
"""The first opset that has an operator of this name; the converter knows no way down from it."""
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
    if found > OPSET:
        _drop_what_axes_say(model)
    if found >= _GELU:
        _spell_out_gelus(model)
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
            reason = ", ".join(strange) or first_line(e)
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


def _drop_what_axes_say(model: ir.Model) -> None:
    """What reductions do without axes, where it is the default; torch's newer exporter writes it.

    Since opset 18 every reduction has the attribute; the converter leaves it where it cannot be.
    """
    for node in model.graph.all_nodes():
        if not node.domain and node.attributes.get_int("noop_with_empty_axes", 1) == 0:
            del node.attributes["noop_with_empty_axes"]


def _spell_out_gelus(model: ir.Model) -> None:
    """Write Gelu as torch does for earlier opsets, and ONNX as the operator's meaning."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Gelu" or node.domain:
            continue
        x, graph = node.inputs[0], node.graph
        assert x is not None
        assert graph is not None
        number = partial(_number, graph, node)
        tape = ir.tape.Tape(graph)
        if node.attributes.get_string("approximate", "none") == "tanh":
            cube = tape.op("Mul", [tape.op("Mul", [x, x]), x])
            inner = tape.op("Add", [x, tape.op("Mul", [cube, number("cubic", 0.044715)])])
            scale = number("scale", math.sqrt(2 / math.pi))
            bent = tape.op("Tanh", [tape.op("Mul", [inner, scale])])
        else:
            bent = tape.op("Erf", [tape.op("Div", [x, number("root", math.sqrt(2))])])
        shifted = tape.op("Add", [bent, number("one", 1.0)])
        product = tape.op("Mul", [tape.op("Mul", [x, shifted]), number("half", 0.5)])
        for place, part in enumerate(tape.nodes):
            part.name = f"{node.name or node.outputs[0].name}/{part.op_type}_{place}"
        graph.insert_before(node, tape.nodes)
        replace_value(node.outputs[0], product)
        graph.remove(node, safe=True)


def _number(graph: ir.Graph, node: ir.Node, name: str, value: float) -> ir.Value:
    """A constant of the operators that stand for a node, in the main graph or in a loop."""
    name = f"{node.name or node.outputs[0].name}/{name}"
    stored = ir.Value(name=name, const_value=ir.tensor(np.float32(value)))
    graph.register_initializer(stored)
    return stored


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
