"""A float ONNX file from another exporter, as a graph that takes what our graphs take."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from cnngru_edge.export.normal_form import normalize
from cnngru_edge.export.onnx_trace import traced
from cnngru_edge.models.errors import ExportError, SpecError
from cnngru_edge.models.own import OwnModel, OwnSpec
from cnngru_edge.models.whole_spec import LETTERS, AudioInput, WholeSpec, fixed_length_of
from cnngru_edge.runtime.inputs import example_input


class OnnxModule(nn.Module):
    """The original file in ONNX Runtime, to be called as a module is that was loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if not path.is_file():
            raise SpecError(f"{path}: no such file")
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as e:  # its exceptions have no common base but this
            reason = str(e).strip().splitlines()[-1]
            raise SpecError(f"{path}: ONNX Runtime does not open it ({reason})") from e
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs) or "none"
            raise SpecError(f"{path}: expected one input, it has {names}")
        self._input = inputs[0]

    @property
    def takes_any_batch(self) -> bool:
        """Whether the first axis of its input is free."""
        return bool(self._input.shape) and not isinstance(self._input.shape[0], int)

    def forward(self, x: Tensor) -> Tensor:
        """Its first output."""
        given = x.numpy()
        if self._input.type == "tensor(int32)":
            given = given.astype(np.int32)
        return torch.from_numpy(self._session.run(None, {self._input.name: given})[0])


class OnnxModel(OwnModel):
    """An ONNX file between our features and our logits; it is traced nowhere, but copied."""

    module: OnnxModule

    def __init__(self, path: Path, spec: WholeSpec) -> None:
        super().__init__(OnnxModule(path), spec)
        self.free_batch = self.module.takes_any_batch

    def for_export(self) -> "OnnxModel":
        """Itself: a session cannot be copied."""
        return self


def load_onnx(path: Path, own: OwnSpec) -> OnnxModel:
    """Open a float ONNX file with one input.

    Raises:
        SpecError: it does not open, or has several inputs.
    """
    if own.arguments:
        raise SpecError(f"{path}: [model] of a spec is for a class, not for an ONNX file")
    return OnnxModel(path, own.spec)


def graph_of(model: OnnxModel) -> ir.Model:
    """The file's graph in normal form, features before it and logits (N, T, C) after it.

    Raises:
        ExportError: it is not a float graph that can be brought to normal form.
    """
    path, kind = model.module.path, model.spec.input
    try:
        body = ir.load(path)
        normalize(body)
    except ExportError as e:
        raise ExportError(f"{path}: {e}") from e
    (given,) = body.graph.inputs
    if given.dtype == ir.DataType.INT32:
        _cast_from_int64(body.graph, given)
    if isinstance(kind, AudioInput) and (model.log_mel or "1" in kind.layout):
        body = _behind(_Front(model), model, body)
    else:
        given.name = kind.name
    example = torch.from_numpy(example_input(model.spec)[None])
    _write_logits(body.graph, model.answered(example).dim() == 3, model.time_first)
    rows = "N" if model.free_batch else 1
    length = fixed_length_of(kind) or LETTERS[kind.name]
    (given,) = body.graph.inputs
    given.shape = ir.Shape([rows, *example.shape[1:-1], length])
    return body


class _Front(nn.Module):
    """What comes before the file: features, and the order of axes."""

    def __init__(self, model: OwnModel) -> None:
        super().__init__()
        self.log_mel, self._order = model.log_mel, model.given_to_module

    def forward(self, audio: Tensor) -> Tensor:
        """What the file is given of (N, S)."""
        return self._order(audio)


def _behind(front: nn.Module, model: OnnxModel, body: ir.Model) -> ir.Model:
    """The graph of a module in torch, and the body behind it."""
    example = (torch.from_numpy(example_input(model.spec)[None]),)
    free = {"audio": {0: "N", 1: "S"}, "given": {0: "N"}}
    before = traced(front, example, ["audio"], ["given"], free)
    normalize(before)
    (given,) = body.graph.inputs
    version = min(before.ir_version, body.ir_version)
    first, second = ir.to_proto(before), ir.to_proto(body)
    first.ir_version = second.ir_version = version
    try:
        joined = onnx.compose.merge_models(first, second, io_map=[("given", given.name or "")])
    except ValueError as e:
        raise ExportError(f"{model.module.path}: features cannot be put before it ({e})") from e
    return ir.from_proto(joined)


def _cast_from_int64(graph: ir.Graph, given: ir.Value) -> None:
    tape = ir.tape.Tape(graph)
    uses = list(given.uses())
    cast = tape.op("Cast", [given], {"to": ir.DataType.INT32.value})
    cast.name = "tokens_int32"
    for node, index in uses:
        node.replace_input_with(index, cast)
    given.dtype = ir.DataType.INT64
    graph.insert_before(graph[0], tape.nodes)


def _write_logits(graph: ir.Graph, has_frames: bool, time_first: bool) -> None:
    """One output of that name, (N, T, C)."""
    logits = graph.outputs[0]
    del graph.outputs[1:]
    tape = ir.tape.Tape(graph)
    if not has_frames:
        axis = tape.initializer(ir.tensor(np.array([1], np.int64)), name="frame_axis")
        graph.outputs[0] = tape.op("Unsqueeze", [logits, axis])
    elif time_first:
        graph.outputs[0] = tape.op("Transpose", [logits], {"perm": [1, 0, 2]})
    graph.extend(tape.nodes)
    graph.outputs[0].name = "logits"
    graph.outputs[0].dtype = ir.DataType.FLOAT
    graph.outputs[0].shape = None
