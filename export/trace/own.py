"""The graph of a module or file that is not ours: our features, its layers, our logits."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import RECURRENT_OPS
from cnngru_edge.export.graph.layer_names import outside_front_end
from cnngru_edge.export.normalize.normal_form import normalize
from cnngru_edge.export.trace.free_length import of_any_length
from cnngru_edge.export.trace.frontend_constants import compute_frontend_constants
from cnngru_edge.export.trace.own_onnx import OnnxModel
from cnngru_edge.export.trace.torchscript import not_traced
from cnngru_edge.export.trace.tracer import replaced, traced
from cnngru_edge.models.errors import EdgeError, ExportError
from cnngru_edge.models.own.wrapper import LEAST_PROBABILITY, OwnModel
from cnngru_edge.models.spec.whole import LETTERS, AudioInput, fixed_length_of
from cnngru_edge.runtime.inputs.read import example_input

_GIVEN = "given"
"""What a module is given by the nodes before it."""


def own_graph(model: OwnModel) -> ir.Model:
    """The graph in normal form, batch and length free where the model and its spec allow it.

    Raises:
        ExportError: torch cannot trace it, or the file is not a float graph.
    """
    kind = model.spec.input
    body = _read(model) if isinstance(model, OnnxModel) else _traced(model)
    (given,) = body.graph.inputs
    if isinstance(kind, AudioInput) and (model.log_mel or "1" in kind.layout):
        body = _behind_features(model, body)
    else:
        _call(body.graph, given, kind.name)
    (given,) = body.graph.inputs
    rows = "N" if model.free_batch else 1
    length = fixed_length_of(kind) or LETTERS[kind.name]
    given.shape = ir.Shape([rows, *example_input(model.spec).shape[:-1], length])
    return body


class _Body(nn.Module):
    """The module, and its answer as logits (N, T, C)."""

    def __init__(self, model: OwnModel) -> None:
        super().__init__()
        self.module, self._model = model.module, [model]  # a list: no module of this one

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what the module takes."""
        (model,) = self._model
        logits = model.logits_of(model.answered(x))
        return logits if logits.dtype == torch.float32 else logits.float()


class _Front(nn.Module):
    """What comes before the module: features, and the order of axes."""

    def __init__(self, model: OwnModel) -> None:
        super().__init__()
        self.log_mel, self._order = model.log_mel, model.given_to_module

    def forward(self, audio: Tensor) -> Tensor:
        """What the module is given of (N, S)."""
        return self._order(audio)


def _traced(model: OwnModel) -> ir.Model:
    example = torch.from_numpy(example_input(model.spec)[None])
    with torch.no_grad():
        example = model.given_to_module(example)
    free: dict[str, dict[int, str]] = {_GIVEN: {}, "logits": {}}
    if model.free_batch:
        free[_GIVEN][0] = free["logits"][0] = "N"
    if fixed_length_of(model.spec.input) is None:
        free[_GIVEN][model.time_axis] = "L"
        if model.spec.writes_text:
            free["logits"][1] = "T"
    try:
        with unpacked(), of_any_length(), warnings.catch_warnings():
            # Whether the trace is right is seen when it answers as the module does.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            graph = traced(_Body(model), (example,), [_GIVEN], ["logits"], free)
    except EdgeError:
        raise
    except Exception as e:  # torch's exporter has no common base, and runs the owner's code
        raise not_traced(e) from e
    for node in graph.graph.all_nodes():
        node.name = outside_front_end((node.name or "").replace("/module/", "/", 1))
        if node.op_type in RECURRENT_OPS and len(node.inputs) > 4 and node.inputs[4] is not None:
            node.replace_input_with(4, None)  # lengths: every clip is whole here
    for value in list(graph.graph.initializers.values()):
        own = (value.name or "").removeprefix("module.")
        if own != value.name and own not in graph.graph.initializers:
            value.name = own
    normalize(graph, of_samples=_takes_samples(model))
    written = {v.name: v for node in graph.graph for v in node.outputs}
    for name, value in written.items():
        own = (name or "").replace("/module/", "/", 1)
        if own not in written and own not in graph.graph.initializers:
            value.name = own
    return graph


def _takes_samples(model: OwnModel) -> bool:
    """Whether a module may begin with a front-end of its own."""
    return isinstance(model.spec.input, AudioInput) and model.log_mel is None


def _read(model: OnnxModel) -> ir.Model:
    """The graph of a file, its first output as logits."""
    path = model.module.path
    try:
        # Torch's newer exporter keeps weights in a file beside it; what is made is one file.
        graph = ir.external_data.load_to_model(ir.load(path))
        for node in graph.graph.all_nodes():
            node.name = outside_front_end(node.name or "") or None
        normalize(graph, of_samples=_takes_samples(model))
    except ExportError as e:
        raise ExportError(f"{path}: {e}") from e
    (given,) = graph.graph.inputs
    if given.dtype == ir.DataType.INT32:
        _cast_from_int64(graph.graph, given)
    example = torch.from_numpy(example_input(model.spec)[None])
    answer = model.answered(model.given_to_module(example))
    _write_logits(graph.graph, model, answer.dim() == 3)
    return graph


def _behind_features(model: OwnModel, body: ir.Model) -> ir.Model:
    """The graph with the features, and the order of axes, before it."""
    example = (torch.from_numpy(example_input(model.spec)[None]),)
    free = {"audio": {0: "N", 1: "S"}, _GIVEN: {0: "N"}}
    before = traced(_Front(model), example, ["audio"], [_GIVEN], free)
    normalize(before)
    if model.log_mel is not None:
        compute_frontend_constants(before, model.log_mel.log_mel)
    (given,) = body.graph.inputs
    to_module = f"{_GIVEN}_to_module"
    _call(body.graph, given, to_module)
    _vacate(body.graph, "audio")
    version = min(before.ir_version, body.ir_version)
    first, second = ir.to_proto(before), ir.to_proto(body)
    first.ir_version = second.ir_version = version
    first = onnx.compose.add_prefix(first, "front/", rename_nodes=False, rename_inputs=False)
    for node in first.graph.node:  # all of it is the front-end, the order of axes too
        if not node.name.startswith(FRONTEND_NODES):
            node.name = f"{FRONTEND_NODES}layout{node.name}"
    taken = {node.name for node in first.graph.node}
    for node in second.graph.node:
        while node.name in taken:
            node.name += "_of_module"
    before_module = first.graph.output[0].name
    try:
        joined = onnx.compose.merge_models(first, second, io_map=[(before_module, to_module)])
    except ValueError as e:
        raise ExportError(f"features cannot be put before this graph ({e})") from e
    whole = ir.from_proto(joined)
    # By this name, what quantizes it is no part of the front-end.
    written = next(v for n in whole.graph for v in n.outputs if v.name == before_module)
    _call(whole.graph, written, "features")
    return whole


def _call(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give a value a name."""
    _vacate(graph, name)
    value.name = name


def _vacate(graph: ir.Graph, name: str) -> None:
    """Give what has a name that we need another."""
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(output for node in graph.all_nodes() for output in node.outputs),
    ]
    taken = {value.name for value in values}
    free = f"{name}_of_module"
    while free in taken:
        free += "_"
    for other in values:
        if other.name == name:
            other.name = free
            return


def _cast_from_int64(graph: ir.Graph, given: ir.Value) -> None:
    tape = ir.tape.Tape(graph)
    uses = list(given.uses())
    cast = tape.op("Cast", [given], {"to": ir.DataType.INT32.value})
    cast.name = "tokens_int32"
    for node, index in uses:
        node.replace_input_with(index, cast)
    given.dtype = ir.DataType.INT64
    graph.insert_before(graph[0], tape.nodes)


def _write_logits(graph: ir.Graph, model: OwnModel, has_frames: bool) -> None:
    """One output of that name, (N, T, C)."""
    logits = graph.outputs[0]
    del graph.outputs[1:]
    tape = ir.tape.Tape(graph)
    if logits.dtype not in {None, ir.DataType.FLOAT}:
        logits = graph.outputs[0] = tape.op("Cast", [logits], {"to": ir.DataType.FLOAT})
    if model.gives_probabilities:
        least = tape.initializer(ir.tensor(np.float32(LEAST_PROBABILITY)), name="least_probability")
        logits = graph.outputs[0] = tape.op("Log", [tape.op("Clip", [logits, least])])
    if not has_frames:
        axis = tape.initializer(ir.tensor(np.array([1], np.int64)), name="frame_axis")
        graph.outputs[0] = tape.op("Unsqueeze", [logits, axis])
    elif model.time_first:
        graph.outputs[0] = tape.op("Transpose", [logits], {"perm": [1, 0, 2]})
    graph.extend(tape.nodes)
    written = graph.outputs[0]
    rows, frames = "N" if model.free_batch else 1, "T" if model.spec.writes_text else 1
    _call(graph, written, "logits")
    written.dtype = ir.DataType.FLOAT
    written.shape = ir.Shape([rows, frames, len(model.spec.labels)])


@dataclass(frozen=True)
class _Packed:
    """What stands for a packed sequence while a module is traced: every clip is whole here."""

    x: Tensor
    is_batch_first: bool
    lengths: Any

    def laid_out(self, is_batch_first: bool) -> Tensor:
        """(N, T, ...) or (T, N, ...)."""
        return self.x if is_batch_first == self.is_batch_first else self.x.transpose(0, 1)


def _pack(x: Tensor, lengths: Any, batch_first: bool = False, *_: Any, **__: Any) -> _Packed:
    return _Packed(x, batch_first, lengths)


def _pad(packed: _Packed, batch_first: bool = False, *_: Any, **__: Any) -> tuple[Tensor, Any]:
    return packed.laid_out(batch_first), packed.lengths


def _of_packed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer's forward that takes what stands for a packed sequence, and gives it."""

    def of_packed(layer: nn.RNNBase, x: Any, hx: Any = None) -> Any:
        if not isinstance(x, _Packed):
            return forward(layer, x, hx)
        written, state = forward(layer, x.laid_out(layer.batch_first), hx)
        return _Packed(written, layer.batch_first, x.lengths), state

    return of_packed


@contextmanager
def unpacked() -> Iterator[None]:
    """While it lasts, sequences are packed by leaving them as they are.

    Torch's exporter has no packed sequences. A name is replaced wherever a module has imported it.
    """
    instead: dict[Any, Any] = {
        rnn.pack_padded_sequence: _pack,
        rnn.pad_packed_sequence: _pad,
    }
    found = [
        (module, name, value)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if type(value) is FunctionType and value in instead  # no proxy, which would be asked
    ]
    with ExitStack() as stack:
        for kind in (nn.GRU, nn.LSTM, nn.RNN):
            stack.enter_context(replaced(kind, "forward", _of_packed(kind.forward)))
        for module, name, value in found:
            stack.enter_context(replaced(module, name, instead[value]))
        yield
