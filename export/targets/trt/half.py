"""FP16 for a strongly typed TensorRT: a type in the graph is the type in the engine."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import RECURRENT_OPS
from cnngru_edge.export.graph.qdq import Floats, free_name, named, stored, values_of
from cnngru_edge.export.targets.base import Target

_KEPT_SINGLE = frozenset({"DFT", "Resize", "STFT", "Upsample"})
"""Operators whose inputs cannot all be FP16: the scales of a Resize are FP32."""
_AXES_AS_ATTRIBUTE = frozenset(
    f"Reduce{kind}"
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_LARGEST = float(np.finfo(np.float16).max)
_LEAST = float(np.finfo(np.float16).tiny)

Halves = dict[tuple[ir.Graph, ir.Value], ir.Value]
"""FP16 forms of initializers, by the graph that they are for."""


def to_half(model: ir.Model, target: Target) -> None:
    """FP16 from the features on; the front-end, and the graph's inputs and outputs, stay FP32."""
    graph = model.graph
    _raise_opset(model, target.max_opset)
    single = _single_precision(graph) | _kept_single(graph)
    casts: dict[ir.Value, ir.Value] = {}
    halves: Halves = {}
    for node in list(graph):
        if node in single:
            continue
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.is_initializer():
                node.replace_input_with(index, _half_initializer(graph, value, halves))
            elif value.is_graph_input() or value.producer() in single:
                if value.dtype not in {None, ir.DataType.FLOAT}:
                    continue
                if value not in casts:
                    tape = ir.tape.Tape(graph)
                    casts[value] = _cast(tape, value, ir.DataType.FLOAT16)
                    graph.insert_before(node, tape.nodes)
                node.replace_input_with(index, casts[value])
        _result_to_half(node)
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.GRAPH:
                _body_to_half(attribute.as_graph(), halves)
    for index, output in enumerate(graph.outputs):
        writer = output.producer()
        if writer is None or writer in single or output.dtype not in {None, ir.DataType.FLOAT}:
            continue
        tape = ir.tape.Tape(graph)
        whole = _cast(tape, output, ir.DataType.FLOAT)
        half_name = free_name(tape, f"{output.name}_half")
        graph.insert_after(writer, tape.nodes)
        whole.name, output.name = output.name, half_name
        whole.type, whole.shape = output.type, output.shape
        output.type = output.shape = None
        graph.outputs[index] = whole
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


def _body_to_half(body: ir.Graph, halves: Halves) -> None:
    for value in (*body.inputs, *body.outputs):
        if value.dtype in {None, ir.DataType.FLOAT}:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in body:
        for index, read in enumerate(node.inputs):
            if read is not None and read.is_initializer():
                node.replace_input_with(index, _half_initializer(body, read, halves))
        _result_to_half(node)


def _result_to_half(node: ir.Node) -> None:
    """What an operator makes of no float at all: FP16 as well, and no types that were."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get_tensor("value") if "value" in node.attributes else None
        if value is None or value.dtype == ir.DataType.FLOAT:
            filled = np.zeros(1) if value is None else value.numpy()
            half = ir.tensor(filled.astype(np.float16))
            node.attributes["value"] = ir.AttrTensor("value", half)
    for output in node.outputs:
        if not output.is_graph_output():
            output.type = output.shape = None


def _raise_opset(model: ir.Model, opset: int) -> None:
    """Write what opset 18 writes otherwise than 17; what came later are types."""
    for node in model.graph.all_nodes():
        graph = node.graph
        assert graph is not None
        if node.op_type in _AXES_AS_ATTRIBUTE and "axes" in node.attributes:
            axes = np.array(node.attributes["axes"].as_ints(), np.int64)
            tape = ir.tape.Tape(graph)
            name = free_name(tape, f"{node.outputs[0].name}_axes")
            del node.attributes["axes"]
            node.resize_inputs(2)
            node.replace_input_with(1, stored(tape, name, axes))
        elif node.op_type == "Split" and len([v for v in node.inputs if v is not None]) == 1:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    model.graph.opset_imports[""] = opset
    for body in model.graph.subgraphs():
        body.opset_imports[""] = opset


def _is_kept_single(node: ir.Node) -> bool:
    has_lengths = len(node.inputs) > 4 and node.inputs[4] is not None
    return node.op_type in _KEPT_SINGLE or (node.op_type in RECURRENT_OPS and has_lengths)


def _kept_single(graph: ir.Graph) -> set[ir.Node]:
    """Operators that stay in FP32, and the casts that are put around them."""
    found: set[ir.Node] = set()
    for node in [node for node in graph if _is_kept_single(node)]:
        tape = ir.tape.Tape(graph)
        for index, value in enumerate(node.inputs):
            if value is None or value.is_initializer() or value.is_graph_input():
                continue
            if value.dtype in {None, ir.DataType.FLOAT}:
                whole = _cast(tape, value, ir.DataType.FLOAT)
                node.replace_input_with(index, whole)
        found.update((node, *tape.nodes))
        graph.insert_before(node, tape.nodes)
    return found


def _half_initializer(graph: ir.Graph, value: ir.Value, halves: Halves) -> ir.Value:
    """The FP16 form of a float initializer; others as they are."""
    assert value.const_value is not None
    if value.const_value.dtype != ir.DataType.FLOAT:
        return value
    if (graph, value) not in halves:
        tape = ir.tape.Tape(graph)
        name = free_name(tape, f"{value.name}_half")
        halves[graph, value] = stored(tape, name, _rounded(values_of(value)))
    return halves[graph, value]


def _rounded(values: Floats) -> npt.NDArray[np.float16]:
    """In FP16, saturated; what is small is raised to the smallest normal number, its sign kept.

    What keeps a divisor from zero would be zero itself. In a matrix there is none of that, and what
    rounds to zero in it is next to nothing.
    """
    limited = np.clip(values, -_LARGEST, _LARGEST)
    if values.ndim < 2 or values.size == 1:
        is_small = (limited != 0) & (np.abs(limited) < _LEAST)
        limited = np.where(is_small, np.copysign(_LEAST, limited), limited)
    return limited.astype(np.float16)


def _cast(tape: ir.tape.Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    name = free_name(tape, f"{value.name}_{dtype.name.lower()}")
    return named(tape.op("Cast", [value], {"to": dtype}), name)
