"""A float ONNX file from another exporter, as a graph that takes what our graphs take."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError, last_line
from cnngru_edge.models.own.wrapper import OwnModel, OwnSpec
from cnngru_edge.models.spec.whole import WholeSpec

_ANSWERS = {"tensor(double)", "tensor(float)", "tensor(float16)"}
_TYPES = {"tensor(float)", "tensor(int32)", "tensor(int64)"}


class OnnxModule(nn.Module):
    """The original file in ONNX Runtime, to be called as a module is that was loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if not path.is_file():
            raise SpecError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; warnings are about what it optimizes
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # its exceptions have no common base but this
            raise SpecError(f"{path}: ONNX Runtime does not open it ({last_line(e)})") from e
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs) or "none"
            raise SpecError(f"{path}: expected one input, it has {names}")
        self._input = inputs[0]
        if self._input.type not in _TYPES:
            kind = self._input.type.removeprefix("tensor(").removesuffix(")")
            raise SpecError(
                f"{path}: its input {self._input.name} is {kind}, expected float32, or integers "
                "for tokens; export the model in float32"
            )
        rows = self._input.shape[0] if self._input.shape else 1
        if isinstance(rows, int) and rows != 1:
            raise SpecError(
                f"{path}: its input {self._input.name} takes {rows} at a time; export it for one, "
                "or with a free batch axis"
            )
        answer = self._session.get_outputs()[0]
        if answer.type not in _ANSWERS:
            kind = answer.type.removeprefix("tensor(").removesuffix(")")
            raise SpecError(
                f"{path}: its first output {answer.name} is {kind}, expected logits in float32"
            )

    @property
    def takes_any_batch(self) -> bool:
        """Whether the first axis of its input is free."""
        return bool(self._input.shape) and not isinstance(self._input.shape[0], int)

    def forward(self, x: Tensor) -> Tensor:
        """Its first output, in float32."""
        given, shape = x.numpy(), self._input.shape
        wrong = len(shape) != given.ndim or any(
            isinstance(size, int) and size != found
            for size, found in zip(shape, given.shape, strict=False)
        )
        if wrong:
            sizes = ", ".join(str(size) for size in shape)
            raise ValueError(f"{self._input.name} of the file is ({sizes})")
        if self._input.type == "tensor(int32)":
            given = given.astype(np.int32)
        answers = self._session.run(None, {self._input.name: given})
        return torch.from_numpy(answers[0]).float()


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
