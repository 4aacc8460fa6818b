"""The float ONNX graph of a model: audio and state, or one whole input, to logits."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import module_of, save
from cnngru_edge.export.graph.layer_names import rename_initializer
from cnngru_edge.export.trace.frontend_constants import compute_frontend_constants
from cnngru_edge.export.trace.torchscript import example_inputs
from cnngru_edge.export.trace.tracer import traced
from cnngru_edge.export.trace.whole import whole_graph
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.session import PRECISION_KEY


def export_onnx(model: CnnGru | WholeModel, path: Path) -> None:
    """Write `model` as ONNX: free batch N and samples S, every state a named input and output.

    One that takes its input whole has that alone, of free length where its spec fixes none.
    """
    if isinstance(model, WholeModel):
        _save(whole_graph(model), model.spec, path)
        return
    states = model.spec.state
    inputs = ["audio", *(state.name for state in states)]
    outputs = ["logits", *(state.next_name for state in states)]
    free = {name: {0: "N"} for name in (*inputs, *outputs)}
    free["audio"][1], free["logits"][1] = "S", "T"
    graph = traced(model, example_inputs(model), inputs, outputs, free)
    tidy(graph)
    copy_leading_dimensions(graph)
    # Shape inference cannot see that a chunk shorter than its context leaves the state's size.
    for value, state in zip(graph.graph.outputs[1:], states, strict=True):
        value.shape = ir.Shape(("N", *state.shape))
    compute_frontend_constants(graph, model.log_mel)
    _save(graph, model.spec, path)


def _save(graph: ir.Model, spec: Spec, path: Path) -> None:
    graph.metadata_props.update({METADATA_KEY: spec.to_json(), PRECISION_KEY: "fp32"})
    save(graph, path)


def tidy(graph: ir.Model) -> None:
    """Fold the exporter's constants, and name weights after the module that they belong to."""
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    passes(graph)
    roles = {"GRU": (None, "W", "R", "B"), "MatMul": (None, "weight")}
    for node in graph.graph:
        if (node.name or "").startswith(FRONTEND_NODES):
            continue
        for role, value in zip(roles.get(node.op_type, ()), node.inputs, strict=False):
            if role and value is not None and value.is_initializer():
                rename_initializer(graph.graph, value, f"{module_of(node)}.{role}")


def copy_leading_dimensions(graph: ir.Model) -> None:
    """Let a Reshape keep its input's leading dimensions by a 0, where it reads them off a Shape.

    A target of constants saves three nodes a time, and a builder then knows the other dimensions.
    """
    for node in list(graph.graph):
        target = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] else None
        if target is None or target.op_type != "Concat":
            continue
        dimensions: list[int] = []
        for part in target.inputs:
            assert part is not None
            if part.const_value is not None:
                dimensions += part.const_value.numpy().tolist()
            else:
                dimensions += [0] * _leading_dimensions(part, node.inputs[0], len(dimensions))
        name = f"{node.name}_shape"
        shape = ir.Value(name=name, const_value=ir.tensor(np.array(dimensions, np.int64)))
        graph.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
    common.RemoveUnusedNodesPass()(graph)


def _leading_dimensions(part: ir.Value, data: ir.Value | None, position: int) -> int:
    """How many dimensions of `data` a part of a shape holds: [x.shape[i]], or x.shape[i:n]."""
    node = part.producer()
    if node is not None and node.op_type == "Unsqueeze" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    assert node is not None
    shape, index = node.inputs[:2]
    assert shape is not None
    assert index is not None
    assert index.const_value is not None
    source = shape.producer()
    same = source is not None and source.op_type == "Shape" and source.inputs[0] is data
    if not same or index.const_value.numpy().item() != position:
        raise ExportError(f"{part.name}: a Reshape to something else than its input's dimensions")
    if node.op_type == "Gather":
        return 1
    end = node.inputs[2]
    assert end is not None
    assert end.const_value is not None
    return int(end.const_value.numpy().item()) - position
