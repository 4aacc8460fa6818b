"""What is inside an artefact, read from the file itself."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cnngru_edge.calibration.collect import FRONTEND_NODES, WEIGHTED
from cnngru_edge.export.onnx_graph import file_sha256, load, module_of
from cnngru_edge.runtime.session import open_session

_BITS_KEPT = {"INT8": "int8", "UINT8": "int8", "FLOAT": "fp32", "FLOAT16": "fp16"}


@dataclass(frozen=True)
class Layer:
    """An operator with weights, by the name of the PyTorch module that it came from."""

    name: str
    op: str
    precision: str  # in which the weights are stored
    weights: int
    bytes: int


def inspect(path: Path) -> dict[str, Any]:
    """Format, hash, inputs and outputs, spec, size and layers of a `.onnx` or `.ts` file."""
    with open_session(path) as session:
        found: dict[str, Any] = {
            "format": path.suffix.removeprefix("."),
            "sha256": file_sha256(path),
            "size_bytes": path.stat().st_size,
            "backend": session.backend,
            "precision": session.precision,
            "inputs": [asdict(i) for i in session.inputs],
            "outputs": [asdict(o) for o in session.outputs],
            "spec": asdict(session.spec),
        }
    if path.suffix == ".onnx":
        found["coverage"] = coverage(load(path))
    return found


def coverage(graph: ir.Model) -> dict[str, Any]:
    """How the weights behind the front-end are stored: layer by layer, and the INT8 share."""
    layers = [
        _layer(node)
        for node in graph.graph
        if node.op_type in WEIGHTED and not (node.name or "").startswith(FRONTEND_NODES)
    ]
    total = sum(layer.weights for layer in layers)
    int8 = sum(layer.weights for layer in layers if layer.precision == "int8")
    return {"weights_int8": int8 / total, "layers": [asdict(layer) for layer in layers]}


def _layer(node: ir.Node) -> Layer:
    stored = [
        _stored(value) for value in node.inputs[1 : 3 if node.op_type == "GRU" else 2] if value
    ]
    dtypes = {tensor.dtype.name for tensor in stored}
    weights = sum(math.prod(tensor.shape.numpy()) for tensor in stored)
    return Layer(
        module_of(node),
        node.op_type,
        "+".join(sorted(_BITS_KEPT.get(dtype, dtype.lower()) for dtype in dtypes)),
        weights,
        sum(tensor.nbytes for tensor in stored),
    )


def _stored(value: ir.Value) -> ir.TensorProtocol:
    """The constant behind a weight, looking through a DequantizeLinear."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        value = node.inputs[0]
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value
