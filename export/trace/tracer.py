"""A module in torch as an ONNX graph."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from packaging.version import Version
from torch import nn

from cnngru_edge.export.normalize.opset import OPSET
from cnngru_edge.models.errors import EdgeError, ExportError, first_line

TESTED = ("2.5", "2.15")
"""The oldest and the newest torch that the tests have run with."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Something else in place of an attribute, while it lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _names_tested_versions() -> Iterator[None]:
    """While it lasts, a failure of a torch newer than those tested says which they are."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as e:  # an exporter that is gone may raise anything
        if Version(torch.__version__).release[:2] <= Version(TESTED[1]).release:
            raise
        raise ExportError(
            f"torch {torch.__version__} cannot export it ({type(e).__name__}: {first_line(e)}); "
            f"tested are torch {TESTED[0]} to {TESTED[1]}: pip install 'torch=={TESTED[1]}.*'"
        ) from e


def traced(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    free: dict[str, dict[int, str]],
) -> ir.Model:
    """Trace a module on an example, with torch's exporter of TorchScript (`dynamo=False`).

    It keeps nn.GRU as one GRU node at opset 17 with any torch. The newer one (`dynamo=True`) needs
    onnxscript too, and does so, with free batch and length, from torch 2.15 and onnxscript 0.7.2;
    before that it fixed the length, and left linear_before_reset out (see `faults`).

    Args:
        module: in evaluation mode.
        example: what it is called with.
        inputs: their names.
        outputs: names of what it gives.
        free: for each name the axes that may have any length, and their letters.

    Raises:
        ExportError: torch fails, and is newer than what is known to do it.
    """
    buffer = io.BytesIO()
    # What it cannot export it prints as a whole graph; the error says as much in a line.
    quiet = replaced(torch._C, "_jit_onnx_log", lambda *_: None)
    with _names_tested_versions(), quiet, warnings.catch_warnings():
        # That this exporter is deprecated is not what a user of ours can mend.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
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
