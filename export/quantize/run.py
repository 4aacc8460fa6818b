"""INT8 of a float graph: the plan that all targets share, and one lowering for each target."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir

from cnngru_edge.calibration.ranges.choose import Range, Ranges
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import LAYOUT
from cnngru_edge.export.lower.cells import HIDDEN
from cnngru_edge.export.lower.float_layers import float_reasons, weights_in_float
from cnngru_edge.export.lower.recurrent import lower_recurrent
from cnngru_edge.export.quantize.plan import Plan
from cnngru_edge.export.targets import cpu as quantize_cpu
from cnngru_edge.export.targets.base import CPU, MAX_FRAMES, TARGETS
from cnngru_edge.export.targets.receipt import coverage
from cnngru_edge.export.targets.trt import lint
from cnngru_edge.export.targets.trt import quantize as quantize_tensorrt
from cnngru_edge.models.atomic import file_sha256, staged
from cnngru_edge.models.errors import CalibrationError, ExportError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import ImageInput, read_spec, streamable
from cnngru_edge.runtime.session import CLIP_SAMPLES_KEY, PRECISION_KEY, SOURCE_KEY, TARGET_KEY

_SAME_VALUES = LAYOUT | {"DequantizeLinear", "QuantizeLinear"}
_HIDDEN_RANGE = Range(-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0)
_IMAGE_RANGE = Range(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
"""All of it: an image is mostly paper, and what is rare in it, the ink, is what counts."""


def quantize_onnx(
    source: Path,
    ranges: Path,
    out: Path,
    target: str = CPU,
    frames: int | None = None,
    plan: Plan | None = None,
) -> None:
    """Write the INT8 form of a float graph, with the ranges that were calibrated on it.

    Every convolution and linear layer and both products of every GRU are in INT8, but for what a
    plan keeps in float; the front-end stays FP32.

    Args:
        source: a float ONNX file of ours.
        ranges: its ranges.
        out: the file to write.
        target: one of TARGETS.
        frames: None for any length of audio; a number T (1 to MAX_FRAMES) for a graph that takes
            exactly T output frames at a time, the cell written out T times: of one stream on a CPU,
            of as many as are built for in TensorRT.
        plan: the precision of each layer; None for INT8 throughout.

    Raises:
        CalibrationError: the ranges are of another graph.
        ExportError: the source is not a float graph of ours, has no layer that can be in INT8, the
            plan is of another, or the result breaks a rule of its target.
    """
    model = onnx_graph.load(source)
    if model.metadata_props.get(PRECISION_KEY) != "fp32":
        raise ExportError(f"{source}: already quantized; give the float graph")
    sha256 = file_sha256(source)
    measured = Ranges.load(ranges, sha256)
    lower(model, target, frames)
    layers = layers_of(model)
    if not layers:
        reasons = [f"; {name} stays in float: {why}" for name, why in float_reasons(model).items()]
        raise ExportError(f"{source}: no layer of it can be in INT8{''.join(reasons[:1])}")
    if plan is not None:
        plan.check(layers)
    quantize_lowered(model, measured.tensors, target, plan.kept_in_float if plan else ())
    model.metadata_props.update({PRECISION_KEY: "int8", TARGET_KEY: target, SOURCE_KEY: sha256})
    if frames is None:
        model.metadata_props[CLIP_SAMPLES_KEY] = ",".join(map(str, measured.clip_samples))
    onnx_graph.save(model, out)


def quantize_checked(
    graph: Path,
    ranges: Path,
    out: Path,
    target: str,
    frames: int | None,
    min_coverage: float,
    plan: Plan | None = None,
) -> Coverage | None:
    """Write an INT8 graph if enough of it is in INT8; its receipt, where that can be had here.

    Enough is `min_coverage` of the weights that the plan has in INT8, of layers that can be.
    """
    with staged(out.parent) as stage:
        quantize_onnx(graph, ranges, stage / out.name, target, frames, plan)
        receipt = coverage(stage / out.name, target)
        if receipt is not None:
            layers, others = layers_in(graph), weights_in_float(onnx_graph.load(graph))
            planned = (plan or Plan(tuple(layers))).share_int8(layers, others)
            receipt.check(str(out), min_coverage * planned)
    return receipt


def lower(
    model: ir.Model, target: str = CPU, frames: int | None = None, *, by_gate: bool = False
) -> None:
    """Make of a float graph, in place, one whose products can be quantized one by one."""
    if frames is not None:
        _fix_length(model, frames, 1 if TARGETS[target] is None else None)
    lower_recurrent(model, frames, by_gate=by_gate)
    _separate(model)


def layers_of(model: ir.Model) -> dict[str, int]:
    """The layers of a lowered graph, in its order, and how many weights each has."""
    found = {}
    for node in integer.weighted_nodes(model):
        weight = integer.weight_of(node)
        assert weight is not None
        found[integer.layer_named(weight)] = integer.values_of(weight).size
    return found


def layers_in(graph: Path) -> dict[str, int]:
    """The same of a float ONNX file."""
    model = onnx_graph.load(graph)
    lower(model)
    return layers_of(model)


def quantize_lowered(
    model: ir.Model,
    tensors: Mapping[str, Range],
    target: str = CPU,
    kept_in_float: Collection[str] = (),
) -> None:
    """Quantize a lowered graph in place; see `quantize_onnx`."""
    builder = TARGETS[target]
    range_of = partial(_range_of, tensors)
    if builder is None:
        quantize_cpu.quantize(model, range_of, kept_in_float)
    else:
        quantize_tensorrt.quantize(model, range_of, builder, kept_in_float)
    onnx_graph.drop_unused(model)
    if builder is not None:
        lint.check(model, builder)


def _separate(model: ir.Model) -> None:
    """A weight and a bias of its own for each convolution: equal ones may be stored only once."""
    for node in model.graph:
        if node.op_type != "Conv":
            continue
        for index, role in ((1, "weight"), (2, "bias")):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.is_initializer() and len(value.uses()) > 1:
                name = f"{onnx_graph.module_of(node)}.{role}"
                if name == value.name:
                    continue
                own = ir.Value(name=name, type=value.type, const_value=value.const_value)
                model.graph.register_initializer(own)
                node.replace_input_with(index, own)


def _fix_length(model: ir.Model, frames: int, batch: int | None) -> None:
    """Inputs for `frames` output frames, and for so many streams if that is given."""
    if not 1 <= frames <= MAX_FRAMES:
        raise ExportError(f"a graph without loops takes 1 to {MAX_FRAMES} frames, got {frames}")
    spec = streamable(read_spec(model.metadata_props[METADATA_KEY]))
    sizes = {"S": frames * spec.chunk_length, "T": frames} | ({"N": batch} if batch else {})
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            sizes.get(size.value, size) if isinstance(size, ir.SymbolicDim) and size.value else size
            for size in value.shape
        )


def _range_of(tensors: Mapping[str, Range], value: ir.Value) -> Range:
    """What a tensor's values are quantized between."""
    if _is_hidden(value):
        return _HIDDEN_RANGE
    if value.is_graph_input() and value.name == ImageInput.name:
        return _IMAGE_RANGE
    found = value
    while found.name not in tensors:
        node = found.producer()
        if node is None or node.op_type not in _SAME_VALUES or node.inputs[0] is None:
            raise CalibrationError(
                f"no range for the tensor {value.name!r}; calibrate this graph again"
            )
        found = node.inputs[0]
    assert found.name is not None
    return tensors[found.name]


def _is_hidden(value: ir.Value) -> bool:
    """Whether a value is a GRU's hidden state, but for its layout."""
    node = value.producer()
    while HIDDEN not in value.meta and node is not None and node.op_type in LAYOUT:
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return HIDDEN in value.meta
