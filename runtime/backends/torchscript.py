"""TorchScript files, and programs of `torch.export`, in torch on a host."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from cnngru_edge.models.errors import BackendMissing, SessionError, first_line, last_line
from cnngru_edge.models.spec.stream import METADATA_KEY, ModelSpec, StateSpec
from cnngru_edge.models.spec.whole import AudioInput, ImageInput, Spec
from cnngru_edge.runtime.session import Array, Feed, HostStreams, TensorInfo, spec_of

try:
    import torch
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    raise BackendMissing(
        "torch is not installed, which .ts files need: pip install 'cnngru-edge[export]', "
        "or run the .onnx file"
    ) from e


class TorchSession:
    """A `.ts` file on the CPU, or a `.pt2` file of our own making, which has the same contract.

    Never a `.pt2` of somebody else: `torch.export.load` unpickles, and evaluates expressions.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)  # for the whole process: torch has no finer setting
        open_file = _open_program if path.suffix == ".pt2" else _open_torchscript
        try:
            self._module, text = open_file(path)
        except Exception as e:  # torch has no common base for what is no such file
            raise SessionError(f"{path}: torch does not open it ({first_line(e)})") from e
        self.metadata = {METADATA_KEY: text} if text else {}
        self.spec = spec_of(path, self.metadata)
        self.inputs, self.outputs = _infos(self.spec)
        self.max_batch: int | None = None
        self.max_samples: int | None = None
        self.backend = f"torch {torch.__version__}"
        self.device = "cpu"
        self.precision = "fp32"

    def streams(self, batch: int) -> HostStreams:
        """`batch` new streams, which begin with the initial state."""
        return HostStreams(self, batch)

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for a feed of all inputs, both by name."""
        first, *state = (torch.from_numpy(feed[i.name]) for i in self.inputs)
        try:
            with torch.inference_mode():
                if isinstance(self.spec, ModelSpec):
                    logits, state_next = self._module(first, tuple(state))
                    values = (logits, *state_next)
                else:
                    values = (self._module(first),)
        except Exception as e:  # a program raises what Python does
            raise SessionError(f"torch does not run this input ({last_line(e)})") from e
        return {o.name: v.numpy() for o, v in zip(self.outputs, values, strict=True)}

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *error: object) -> None:
        del self._module


def _open_torchscript(path: Path) -> tuple[Any, str]:
    """The module, and the spec that was written into the file, or nothing."""
    extra: dict[str, Any] = {METADATA_KEY: ""}
    with warnings.catch_warnings():
        # TorchScript is what the file is; torch says on every call that it is deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.load`")
        module = torch.jit.load(  # type: ignore[no-untyped-call]
            path, map_location="cpu", _extra_files=extra
        )
    text = extra[METADATA_KEY]
    return module, text.decode() if isinstance(text, bytes) else text  # torch gives bytes


def _open_program(path: Path) -> tuple[Any, str]:
    """The same of a program."""
    extra: dict[str, Any] = {METADATA_KEY: ""}
    with quiet():
        module = torch.export.load(path, extra_files=extra).module()
    return module, extra[METADATA_KEY]


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, torch.export does not say what it guesses; what it cannot do is an error.

    Some of it is logged, some are warnings, and some is printed, a whole program with it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with redirect_stdout(nowhere), redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _infos(spec: Spec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    logits = TensorInfo("logits", "float", ("N", "T", len(spec.labels)))
    if not isinstance(spec, ModelSpec):
        kind = spec.input
        if isinstance(kind, AudioInput):
            return (TensorInfo(kind.name, "float", ("N", kind.samples or "S")),), (logits,)
        if isinstance(kind, ImageInput):
            shape = ("N", 1, kind.height, kind.width or "W")
            return (TensorInfo(kind.name, "float", shape),), (logits,)
        return (TensorInfo(kind.name, "int64", ("N", kind.tokens or "L")),), (logits,)
    states: list[tuple[StateSpec, tuple[int | str, ...]]] = [
        (state, ("N", *state.shape)) for state in spec.state
    ]
    return (
        TensorInfo("audio", "float", ("N", "S")),
        *(TensorInfo(state.name, "float", shape) for state, shape in states),
    ), (logits, *(TensorInfo(state.next_name, "float", shape) for state, shape in states))
