"""What an INT8 graph holds, as floats: its weights, and the ranges of its activations."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cnngru_edge.calibration.ranges.choose import Range
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import PASSED, Affine, Floats, values_of
from cnngru_edge.export.targets.base import CPU
from cnngru_edge.export.targets.cpu_receipt import weighted_products
from cnngru_edge.models.errors import ExportError
from cnngru_edge.runtime.session import PRECISION_KEY, TARGET_KEY

_NBITS_ZERO = 128  # of MatMulNBits' uint8 weights


@dataclass(frozen=True)
class Stored:
    """An INT8 graph's own numbers, whatever it was made from and whatever became of it since."""

    target: str
    weights: dict[str, Floats]  # by layer; those in float are not here
    biases: dict[str, Floats]  # by name
    affines: dict[str, Affine]  # by the name of the tensor

    def affine_of(self, value: ir.Value) -> Affine | None:
        """How a tensor of the float graph is quantized, if it is.

        What only moves values, or puts the past before them, is quantized as what it reads.
        """
        while value.name not in self.affines:
            node = value.producer()
            if node is None or node.op_type not in PASSED | {"Concat"}:
                return None
            source = node.inputs[-1 if node.op_type == "Concat" else 0]
            if source is None:
                return None
            value = source
        return self.affines[value.name]


def read_stored(path: Path) -> Stored:
    """Read an INT8 ONNX file of ours.

    Raises:
        ExportError: no such file, not one of ours, or not in INT8.
    """
    model = onnx_graph.load(path)
    if model.metadata_props.get(PRECISION_KEY) != "int8":
        raise ExportError(f"{path}: not in INT8; give the graph that 'cnngru-edge quantize' wrote")
    weights = {}
    for node, name, _ in weighted_products(model):
        if (weight := _dequantized_weight(node)) is not None:
            weights[name] = weight
    biases: dict[str, Floats] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        biases |= _biases(graph)
    affines = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        data = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if data is not None and not data.is_initializer():
            affines[(data.name or "").removesuffix("_float16")] = integer.affine_of(node)
    return Stored(model.metadata_props.get(TARGET_KEY, CPU), weights, biases, affines)


def _biases(graph: ir.Graph) -> dict[str, Floats]:
    """Vectors that may be biases, as floats, by the names that they have in the float graph."""
    found = {}
    for name, value in graph.initializers.items():
        if value.const_value is None or len(value.const_value.shape) != 1:
            continue
        stored = values_of(value)
        base = name.removesuffix("_int32")
        scale = graph.initializers.get(f"{base}_scale")
        if base != name and scale is not None:
            found[base] = (stored * values_of(scale)).astype(np.float32)
        elif np.issubdtype(stored.dtype, np.floating):
            found[name.removesuffix("_half")] = stored.astype(np.float32)
    return found


def range_of_affine(affine: Affine) -> Range:
    """The range that `integer.unsigned_affine` or `symmetric_affine` makes this of."""
    low, high = (float(affine.scale) * steps for steps in steps_of(affine))
    return Range(low, high, low, high, 0.0, 0.0, 0.0)


def steps_of(affine: Affine) -> tuple[int, int]:
    """The least and the largest multiple of its scale that a quantized tensor can hold."""
    limits = np.iinfo(affine.zero_point.dtype)
    zero = int(affine.zero_point)
    if zero == limits.min:
        return 0, int(limits.max) - zero
    return -(int(limits.max) - zero), int(limits.max) - zero  # without the one more below


def _dequantized_weight(node: ir.Node) -> Floats | None:
    """A weight as the float graph has it, (out, in, ...) of a Conv and (in, out) of a product."""
    inputs = node.inputs
    if node.op_type == "MatMulNBits":
        assert inputs[1] is not None
        assert inputs[2] is not None
        count, length = (node.attributes.get_int(name, 0) for name in ("N", "K"))
        integers = values_of(inputs[1]).astype(np.float32)  # (N, blocks, block)
        blocks = (integers - _NBITS_ZERO) * values_of(inputs[2]).reshape(count, -1, 1)
        whole: Floats = blocks.reshape(count, -1)[:, :length].T
        return whole
    if node.op_type == "MatMulIntegerToFloat":
        assert inputs[1] is not None
        assert inputs[3] is not None
        product: Floats = values_of(inputs[1]).astype(np.float32) * values_of(inputs[3])
        return product
    if node.op_type == "Gather":
        return _dequantized_table(node)
    weight = inputs[1]
    return _dequantized(weight) if weight is not None else None


def _dequantized_table(node: ir.Node) -> Floats | None:
    """An embedding's table (V, E): on a CPU its rows are dequantized after they were gathered."""
    table = node.inputs[0]
    assert table is not None
    if table.const_value is None:
        return _dequantized(table)
    after = (use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear")
    scale = next((reader.inputs[1] for reader in after), None)
    if scale is None:
        return None
    rows: Floats = values_of(table).astype(np.float32) * values_of(scale).astype(np.float32)
    return rows


def _dequantized(value: ir.Value) -> Floats | None:
    """What a pair of QuantizeLinear and DequantizeLinear makes of a weight; None without one."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source, scale = node.inputs[:2]
    assert source is not None
    assert scale is not None
    scales = values_of(scale).astype(np.float32)
    quantize = source.producer()
    stored = values_of(source if quantize is None else quantize.inputs[0])  # type: ignore[arg-type]
    shape = [1] * stored.ndim
    shape[node.attributes.get_int("axis", 1)] = -1
    scales = scales.reshape(shape)
    if quantize is not None:
        stored = integer.quantize(stored.astype(np.float32), scales, 0, np.int8)
    weight: Floats = stored.astype(np.float32) * scales
    return weight
