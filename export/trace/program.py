"""A model as a program of `torch.export`: what torch has in place of TorchScript."""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from cnngru_edge.export.trace.free_length import of_any_length
from cnngru_edge.export.trace.own import unpacked
from cnngru_edge.export.trace.tracer import replaced
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import EdgeError, ExportError, first_line
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import fixed_length_of
from cnngru_edge.runtime.backends.torchscript import quiet
from cnngru_edge.runtime.inputs.read import example_input

SINCE = "2.11"
"""The first torch of those tested that exports a program whose batch and length stay free."""
_ROWS, _CHUNKS = 2, 3
"""Of the example: torch takes a size of one for a constant."""
_KERNELS = (
    torch._C.DispatchKey.CompositeImplicitAutograd,
    torch._C.DispatchKey.Autograd,
)


def has_programs() -> bool:
    """Whether the torch here is new enough."""
    return Version(torch.__version__) >= Version(SINCE)


def export_program(model: CnnGru | WholeModel, path: Path) -> None:
    """Write `model` as `torch.export.load` reads it, with the contract of its TorchScript.

    The spec is in its extra files. Recurrent layers stay one operator each.

    Raises:
        ExportError: the torch here, or the module, cannot be exported so.
    """
    if not has_programs():
        raise ExportError(f"it needs torch {SINCE} or newer, here is {torch.__version__}")
    example, free = _example(model)
    with quiet(), _shapes_only(), torch.no_grad():
        try:
            try:
                program = _exported(model, example, free, any_size=True)
            except Exception:  # torch 2.11 cannot cut features off at a length that is any size
                program = _exported(model, example, free, any_size=False)
            # They are about strides in memory, and would forbid one stream alone, or one frame;
            # what it answers to those the parity gate runs.
            program._guards_code = []
            buffer = io.BytesIO()
            metadata = {METADATA_KEY: model.spec.to_json()}
            torch.export.save(program, buffer, extra_files=metadata)
        except EdgeError:
            raise
        except Exception as e:  # torch.export has no common base, and runs the owner's code
            reason = f"{type(e).__name__}: {first_line(e)}"
            raise ExportError(f"torch.export does not take it ({reason})") from e
    write_file(path, buffer.getvalue())


def _exported(model: nn.Module, example: Any, free: Any, *, any_size: bool) -> Any:
    """The program, for sizes from two on where not any size has to do."""
    config: Any = torch.fx.experimental._config
    with config.patch(backed_size_oblivious=any_size):
        return torch.export.export(model, example, dynamic_shapes=free, strict=False)


def _example(model: CnnGru | WholeModel) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What it is called with, and which axes of that are free."""
    auto = torch.export.Dim.AUTO
    if isinstance(model, CnnGru):
        state = model.initial_state(_ROWS)
        audio = torch.zeros(_ROWS, _CHUNKS * model.spec.chunk_length)
        return (audio, state), ({0: auto, 1: auto}, tuple({0: auto} for _ in state))
    given = torch.from_numpy(example_input(model.spec)[None])
    free: dict[int, Any] = {}
    if not isinstance(model, OwnModel) or model.free_batch:
        given = given.expand(_ROWS, *given.shape[1:]).clone()
        free[0] = auto
    if fixed_length_of(model.spec.input) is None:
        free[given.dim() - 1] = auto
    return (given,), (free,)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """While it lasts, recurrent layers and pools are exported for inputs of any length.

    Torch finds the shapes of a recurrent layer by running all its steps, which takes seconds and
    fixes their number. The shapes alone are enough: the layer stays one operator in the program.
    """
    aten = torch.ops.aten
    shaped: dict[Any, Callable[..., Any]] = {
        aten.gru.input: _like_gru,
        aten.lstm.input: _like_lstm,
        aten.rnn_tanh.input: _like_gru,
        aten.rnn_relu.input: _like_gru,
    }
    with ExitStack() as stack:
        stack.enter_context(unpacked())
        stack.enter_context(of_any_length())
        pool = _pool_of_one_row(nn.functional.max_pool1d)
        stack.enter_context(replaced(nn.functional, "max_pool1d", pool))
        for operator, kernel in shaped.items():
            stack.enter_context(_with_kernel(operator, kernel))
        yield


@contextmanager
def _with_kernel(operator: Any, kernel: Callable[..., Any]) -> Iterator[None]:
    before = dict(operator.py_kernels)
    operator.py_kernels.update(dict.fromkeys(_KERNELS, kernel))
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels.clear()
        operator.py_kernels.update(before)
        operator._dispatch_cache.clear()


def _like_gru(
    x: Tensor,
    state: Tensor,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that a GRU gives."""
    width = state.shape[2] * (2 if is_bidirectional else 1)
    return x.new_empty(x.shape[0], x.shape[1], width), state.new_empty(state.shape)


def _like_lstm(x: Tensor, states: Any, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of an LSTM, whose output is as wide as its hidden state."""
    hidden, cell = states
    output, hidden = _like_gru(x, hidden, *options)
    return output, hidden, cell.new_empty(cell.shape)


def _pool_of_one_row(pool: Callable[..., Any]) -> Callable[..., Any]:
    """`max_pool1d` as a pool over an image of one row, whose length stays free."""

    def pooled(
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            return pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        asked = (kernel_size, stride or kernel_size, padding, dilation)
        rows = [(of_row, _one(size)) for of_row, size in zip((1, 1, 0, 1), asked, strict=True)]
        kernel, steps, edge, gaps = rows
        image = x.unsqueeze(-2)
        return nn.functional.max_pool2d(image, kernel, steps, edge, gaps, ceil_mode).squeeze(-2)

    return pooled


def _one(size: Any) -> int:
    return int(size[0]) if isinstance(size, tuple | list) else int(size)
