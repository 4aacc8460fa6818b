"""INT8 of a float graph: the plan that all targets share, and one lowering for each target."""

from functools import partial
from pathlib import Path

import onnx_ir as ir

from cnngru_edge.calibration.ranges import Range, Ranges
from cnngru_edge.export import lint, onnx_graph, quantize_cpu, quantize_tensorrt
from cnngru_edge.export.inspection import coverage
from cnngru_edge.export.integer import LAYOUT
from cnngru_edge.export.recurrent import HIDDEN, lower_grus
from cnngru_edge.export.targets import CPU, MAX_FRAMES, TARGETS
from cnngru_edge.models.atomic import staged
from cnngru_edge.models.errors import CalibrationError, ExportError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec import METADATA_KEY, ModelSpec
from cnngru_edge.runtime.session import CLIP_SAMPLES_KEY, PRECISION_KEY, SOURCE_KEY, TARGET_KEY

_HIDDEN_RANGE = Range(-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0)


def quantize_onnx(
    source: Path, ranges: Path, out: Path, target: str = CPU, frames: int | None = None
) -> None:
    """Write the INT8 form of a float graph, with the ranges that were calibrated on it.

    Every convolution and linear layer and both products of every GRU are in INT8; the front-end
    stays FP32.

    Args:
        source: a float ONNX file of ours.
        ranges: its ranges.
        out: the file to write.
        target: one of TARGETS.
        frames: None for any length of audio; a number T (1 to MAX_FRAMES) for a graph that takes
            exactly T output frames at a time, the cell written out T times: of one stream on a CPU,
            of as many as are built for in TensorRT.

    Raises:
        CalibrationError: the ranges are of another graph.
        ExportError: the source is not a float graph of ours, or the result breaks a rule of its
            target.
    """
    model = onnx_graph.load(source)
    if model.metadata_props.get(PRECISION_KEY) != "fp32":
        raise ExportError(f"{source}: already quantized; give the float graph")
    sha256 = onnx_graph.file_sha256(source)
    measured = Ranges.load(ranges, sha256)
    quantize_model(model, measured, target, frames)
    model.metadata_props.update({PRECISION_KEY: "int8", TARGET_KEY: target, SOURCE_KEY: sha256})
    if frames is None:
        model.metadata_props[CLIP_SAMPLES_KEY] = ",".join(map(str, measured.clip_samples))
    onnx_graph.save(model, out)


def quantize_checked(
    graph: Path, ranges: Path, out: Path, target: str, frames: int | None, min_coverage: float
) -> Coverage | None:
    """Write an INT8 graph if enough of it is in INT8; its receipt, where that can be had here."""
    with staged(out.parent) as stage:
        quantize_onnx(graph, ranges, stage / out.name, target, frames)
        receipt = coverage(stage / out.name, target)
        if receipt is not None:
            receipt.check(str(out), min_coverage)
    return receipt


def quantize_model(
    model: ir.Model, ranges: Ranges, target: str = CPU, frames: int | None = None
) -> None:
    """Quantize a float graph in place; see `quantize_onnx`."""
    builder = TARGETS[target]
    if frames is not None:
        _fix_length(model, frames, 1 if builder is None else None)
    lower_grus(model, frames)
    _separate(model)
    range_of = partial(_range_of, ranges)
    if builder is None:
        quantize_cpu.quantize(model, range_of)
    else:
        quantize_tensorrt.quantize(model, range_of, builder)
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
    spec = ModelSpec.from_json(model.metadata_props[METADATA_KEY])
    sizes = {"S": frames * spec.chunk_length, "T": frames} | ({"N": batch} if batch else {})
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            sizes.get(size.value, size) if isinstance(size, ir.SymbolicDim) and size.value else size
            for size in value.shape
        )


def _range_of(ranges: Ranges, value: ir.Value) -> Range:
    """What a tensor's values are quantized between."""
    if _is_hidden(value):
        return _HIDDEN_RANGE
    if value.name is None or value.name not in ranges.tensors:
        raise CalibrationError(
            f"no range for the tensor {value.name!r}; calibrate this graph again"
        )
    return ranges.tensors[value.name]


def _is_hidden(value: ir.Value) -> bool:
    """Whether a value is a GRU's hidden state, but for its layout."""
    node = value.producer()
    while HIDDEN not in value.meta and node is not None and node.op_type in LAYOUT:
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return HIDDEN in value.meta
