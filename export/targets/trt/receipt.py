"""The receipt of an engine: from TensorRT's engine inspector, or TensorRT-RTX's build log."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from cnngru_edge.export.targets.cpu_receipt import Feed, layers_as_run, weighted_products
from cnngru_edge.models.receipt import HIDDEN, INT8, Coverage

_WEIGHT_BYTES = {"Int8": 1, "Half": 2}
_BYTES = {INT8: 1, "fp16": 2}
_UNNAMED = "not in the log"  # a product that no layer names has not become one of integers
_UNPROVEN = "not proven"
_OPAQUE = re.compile(r"Myelin|ForeignNode")
# The kernels that multiply, by type, name or tactic; not those that convert.
_PRODUCT = re.compile(r"gemm|conv(?!ert)|correlation|matrix|matmul|runtime_fusion|_myl_\w*Fc", re.I)
_INTEGER_TACTIC = re.compile(r"i8i8|i8i32|imma|int8|dp4a", re.I)
_FLOAT_TACTIC = re.compile(r"f16f16|f32f32|tf32|h884|h1688|h16816|hmma|sgemm|bf16", re.I)
_DATATYPE = re.compile(r"\b(int8|fp16|half|fp32|float|bf16|bfloat16)\b", re.I)
_NAMES = {"half": "fp16", "float": "fp32", "bfloat16": "bf16"}


def rtx_coverage(path: Path, log: str, version: str, feed: Feed | None = None) -> Coverage:
    """Of an ONNX file that TensorRT-RTX built: from the layers in its log.

    Args:
        path: the file that was built.
        log: the builder's verbose log, with detailed profiling verbosity.
        version: the builder's.
        feed: inputs to count multiply-accumulates on; by default those of `example_feed`.
    """
    built = [_BuiltLayer.parse(line) for line in log.splitlines() if line.startswith("Name: ")]
    layers = []
    nodes = list(weighted_products(ir.from_proto(onnx.load(path))))
    for layer in layers_as_run(path, optimized=False, feed=feed):
        precisions, size = set(), 1
        for node, name, weight in nodes:
            if name != layer.name:
                continue
            is_table = node.op_type == "Gather"
            holding = [
                (made, constant)
                for made in built
                if made.comes_from(node.name or "")
                and (
                    constant := made.holding(_shape(weight))
                    or _held_with_others(made, weight, nodes)
                )
            ]
            # A product that the log does not name has not become one of integers.
            precisions |= {
                INT8 if is_table and dtype == "Int8" else made.precision(dtype)
                for made, dtype in holding
            } or {_UNNAMED}
            size = max([size, *(_WEIGHT_BYTES.get(dtype, 4) for _, dtype in holding)])
        precision = "+".join(sorted(precisions))
        layers.append(replace(layer, precision=precision, bytes=layer.weights * size))
    return Coverage(f"tensorrt_rtx {version}: build log", tuple(layers))


def _shape(weight: ir.Value) -> tuple[int, ...]:
    assert weight.shape is not None
    return tuple(weight.shape.numpy())


def _held_with_others(
    made: "_BuiltLayer", weight: ir.Value, nodes: list[tuple[ir.Node, str, ir.Value]]
) -> str | None:
    """The data type of a weight in a product that the builder made of several with one input."""
    shapes = [_shape(other) for node, _, other in nodes if made.comes_from(node.name or "")]
    axis = 0 if len(_shape(weight)) > 2 else 1  # outputs
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if len(shapes) < 2 or len(rest) > 1:
        return None
    outputs = sum(shape[axis] for shape in shapes)
    whole = _shape(weight)
    return made.holding((*whole[:axis], outputs, *whole[axis + 1 :]))


def tensorrt_coverage(
    path: Path, inspected: str, version: str, feed: Feed | None = None
) -> Coverage:
    """Of an ONNX file that TensorRT built: from what the engine inspector shows of the engine.

    Proven INT8 is a kernel that multiplies, is made from the node, and whose tactic or whose inputs
    are all of INT8. What is in a block that TensorRT compiled as a whole and does not open (8.6) is
    hidden; all else that no such kernel can be found for is not proven.

    Args:
        path: the file that was built.
        inspected: the engine's information as JSON, built with detailed profiling verbosity.
        version: the builder's.
        feed: inputs to count multiply-accumulates on; by default those of `example_feed`.
    """
    shown = [layer for layer in json.loads(inspected)["Layers"] if isinstance(layer, dict)]
    products = [layer for layer in shown if _is_product(layer)]
    has_opaque = any(_OPAQUE.search(_text(layer, "LayerType", "Name")) for layer in shown)
    missing = HIDDEN if has_opaque else _UNPROVEN
    nodes = list(weighted_products(ir.from_proto(onnx.load(path))))
    layers = []
    for layer in layers_as_run(path, optimized=False, feed=feed):
        precisions = set()
        for node, name, _ in nodes:
            if name == layer.name:
                found = [made for made in products if _is_made_from(made, node.name or "")]
                precisions |= {_precision_of(made) for made in found} or {missing}
        # Of several frames some may not be shown: then the whole is not proven.
        unseen = precisions & {HIDDEN, _UNPROVEN}
        precision = min(unseen) if unseen else "+".join(sorted(precisions))
        size = layer.weights * _BYTES.get(precision, 4)
        layers.append(replace(layer, precision=precision, bytes=size))
    return Coverage(f"tensorrt {version}: engine inspector", tuple(layers))


def _text(layer: dict[str, Any], *keys: str) -> str:
    return " ".join(str(layer.get(key, "")) for key in keys)


def _is_product(layer: dict[str, Any]) -> bool:
    text = _text(layer, "LayerType", "TacticName", "ParameterType")
    return bool(_PRODUCT.search(text) or re.search(r"_myl_\w*Fc", layer.get("Name", "")))


def _is_made_from(layer: dict[str, Any], node: str) -> bool:
    """Whether an inspected layer comes from an ONNX node: named in its metadata, or by its name."""
    if f"[ONNX Layer: {node}]" in layer.get("Metadata", ""):
        return True
    return re.search(re.escape(node) + r"(?![\w/])", layer.get("Name", "")) is not None


def _precision_of(layer: dict[str, Any]) -> str:
    """Of a kernel's arithmetic; INT8 only if nothing that it reads says otherwise."""
    weights = layer.get("Weights")
    stored = list(_datatypes(weights.get("Type", ""))) if isinstance(weights, dict) else []
    read = [
        kind
        for tensor in (*layer.get("Inputs", []), *layer.get("Constants", []))
        for kind in _datatypes_of(tensor)
    ]
    tactic = layer.get("TacticName", "")
    if stored and stored != [INT8]:
        return stored[0]
    if read[:1] == [INT8] and _INTEGER_TACTIC.search(tactic):
        return INT8  # what else it reads are scales, a bias, a residual
    if stored and read[:1] == [INT8]:
        return INT8
    if read and set(read) == {INT8} and not _FLOAT_TACTIC.search(tactic):
        return INT8
    floats = [kind for kind in read if kind != INT8]
    return floats[0] if floats else _UNPROVEN


def _datatypes_of(tensor: dict[str, Any]) -> Iterator[str]:
    """Of a tensor that holds more than one number; the key is written in several ways."""
    if tensor.get("Dimensions") in ([], [1]):
        return
    for key, text in tensor.items():
        if key.lower() in {"datatype", "format/datatype"}:
            yield from list(_datatypes(str(text)))[:1]


def _datatypes(text: str) -> Iterator[str]:
    for found in _DATATYPE.findall(text):
        yield _NAMES.get(found.lower(), found.lower())


@dataclass(frozen=True)
class _BuiltLayer:
    """A line of the table of layers in TensorRT's log."""

    names: str  # of itself, its constants and the ONNX nodes that it was made from
    inputs: tuple[str, ...]  # data types
    constants: tuple[tuple[tuple[int, ...], str], ...]  # shapes, data types

    @classmethod
    def parse(cls, line: str) -> "_BuiltLayer":
        name, _, rest = line.partition(", LayerType: ")
        inputs, _, rest = rest.partition(", Constants: [")
        constants, _, rest = rest.partition(", Outputs: [")
        metadata = rest.partition("Metadata: ")[2]
        tensor = re.compile(r"Dimensions: \[([\d,-]*)\].*?Datatype: (\w+)")
        return cls(
            f"{name} {re.findall(r'Name: ([^,]*),', constants)} {metadata}",
            tuple(dtype for _, dtype in tensor.findall(inputs)),
            tuple(
                (tuple(int(size) for size in sizes.split(",") if size), dtype)
                for sizes, dtype in tensor.findall(constants)
            ),
        )

    def comes_from(self, node: str) -> bool:
        return re.search(re.escape(node) + r"(?!_?\d|/)", self.names) is not None

    def holding(self, shape: tuple[int, ...]) -> str | None:
        """The data type in which this layer holds a weight of this shape, if it does."""
        if len(shape) > 2:  # a convolution's, whose input channels may be padded
            kernel = [size for size in shape[2:] if size > 1]
            for found, dtype in self.constants:
                same_outputs = len(found) > 2 and found[0] == shape[0]
                if same_outputs and [size for size in found[2:] if size > 1] == kernel:
                    return dtype
            return None
        # Odd sizes are padded with a row or column of zeros: 29 labels have 30 outputs.
        for sizes in (sorted(shape[-2:]), sorted(size + size % 2 for size in shape[-2:])):
            for found, dtype in self.constants:
                if sorted(found[-2:]) == sizes:
                    return dtype
        return None

    def precision(self, weight: str) -> str:
        """Integers only if both the weight and what it is multiplied with are."""
        # Of a state that begins with zeros, the first frame's product is of two constants.
        matrices = [dtype for shape, dtype in self.constants if len(shape) > 1]
        others = self.inputs or matrices[1:]
        if weight == "Int8" and "Int8" not in others:
            return "float (int8 weights)"
        return {"Int8": INT8, "Float": "fp32", "Half": "fp16"}.get(weight, weight.lower())
