"""A module in torch as an ONNX graph."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from cnngru_edge.export.opset import OPSET


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Something else in place of an attribute, while it lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def traced(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    free: dict[str, dict[int, str]],
) -> ir.Model:
    """Trace a module on an example.

    Args:
        module: in evaluation mode.
        example: what it is called with.
        inputs: their names.
        outputs: names of what it gives.
        free: for each name the axes that may have any length, and their letters.
    """
    buffer = io.BytesIO()
    # What it cannot export it prints as a whole graph; the error says as much in a line.
    quiet = replaced(torch._C, "_jit_onnx_log", lambda *_: None)
    with quiet, warnings.catch_warnings():
        # This exporter keeps nn.GRU as one GRU node at opset 17; the newer one does neither.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python")
        warnings.filterwarnings("ignore", message="Exporting a model to ONNX with a batch_size")
        torch.onnx.export(
            module,
            example,
            buffer,  # type: ignore[arg-type]  # a file object works, and is not in its types
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=free,
        )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))
