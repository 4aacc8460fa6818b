"""ONNX files of ours, and what every pass over their graphs needs; free of torch."""

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

from cnngru_edge.calibration.ranges.collect import FRONTEND_CONSTANTS
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.spec.stream import METADATA_KEY

RECURRENT_OPS = frozenset({"GRU", "LSTM", "RNN"})
"""The recurrent operators of ONNX."""


def load(path: Path) -> ir.Model:
    """Read a graph, or say why not.

    Raises:
        ExportError: no such file, no ONNX, or without a model spec in it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        graph = ir.load(path)
    except Exception as e:  # protobuf's errors have no common base but this
        raise ExportError(f"{path}: not an ONNX file") from e
    if METADATA_KEY not in graph.metadata_props:
        raise ExportError(
            f"{path}: no model spec inside (metadata {METADATA_KEY!r}), so it was not written by "
            "cnngru-edge; make one with 'cnngru-edge trace'"
        )
    return graph


def save(graph: ir.Model, path: Path) -> None:
    """Check a graph against the ONNX standard and write it, whole or not at all."""
    graph.producer_name = "cnngru-edge"
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    write_file(path, proto.SerializeToString(deterministic=True))


def module_of(node: ir.Node) -> str:
    """The PyTorch module that a node was traced from: `/convs.0/conv/Conv` is of `convs.0.conv`."""
    return ".".join((node.name or "").strip("/").split("/")[:-1])


def drop_unused(model: ir.Model) -> None:
    """Remove what no output needs, in the bodies of loops too, and put nodes in order."""
    common.RemoveUnusedNodesPass()(model)
    for body in model.graph.subgraphs():
        for name in [name for name, value in body.initializers.items() if not value.uses()]:
            del body.initializers[name]
    common.TopologicalSortPass()(model)


def fold_frontend(model: ir.Model) -> ir.Model:
    """Replace the nodes that compute the front-end's matrices by what they compute, in place."""
    inside = {n for n in model.graph if (n.name or "").startswith(FRONTEND_CONSTANTS)}
    matrices = [
        node.outputs[0]
        for node in model.graph
        if node in inside and any(use.node not in inside for use in node.outputs[0].uses())
    ]
    names = [value.name or "" for value in matrices]
    if not names:
        return model
    part = ir.Model(ir.convenience.extract(model.graph, [], names), ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(
        ir.to_proto(part).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for value, matrix in zip(matrices, session.run(names, {}), strict=True):
        stored = ir.Value(name=f"{value.name}_computed", const_value=ir.tensor(matrix))
        model.graph.register_initializer(stored)
        replace_value(value, stored)
    drop_unused(model)
    return model


def replace_value(value: ir.Value, other: ir.Value) -> None:
    """Let all that read `value` read `other`, which takes its name where that is the graph's."""
    if value.is_graph_output():
        other.name, other.type, other.shape = value.name, value.type, value.shape
        value.name = f"{value.name}_replaced"
    ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)
