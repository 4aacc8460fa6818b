"""TorchScript of a model: the float reference that needs no Python classes."""

import warnings
from pathlib import Path
from typing import Any

import torch

from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import ExportError, first_line
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.runtime.inputs.read import example_input


def export_torchscript(model: CnnGru | WholeModel, path: Path) -> None:
    """Write `model` traced, with the contract `logits, state_next = module(audio, state)`.

    One that takes its input whole has `logits = module(input)`.

    Batch and length stay free: nothing in the model depends on them but through tensor operations,
    and the parity gate runs other shapes than the traced ones.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is what this artefact is; torch says on every call that it is deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
        # nn.GRU checks the input's rank in Python.
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        if isinstance(model, OwnModel):
            # Whether the trace is right is seen when it answers as the module does.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        try:
            module = torch.jit.trace(  # type: ignore[no-untyped-call]
                model, example_inputs(model), check_trace=False
            )
        except Exception as e:  # whatever a module that is not ours raises
            if not isinstance(model, OwnModel):
                raise
            raise not_traced(e) from e
        metadata = {METADATA_KEY: model.spec.to_json()}
        write_file(path, module.save_to_buffer(_extra_files=metadata))


def not_traced(error: Exception) -> ExportError:
    """What a user is told of a module that is not ours and cannot be traced."""
    reason = first_line(error).partition(" Please feel free")[0].partition("  [Caused by")[0]
    return ExportError(
        f"this module cannot be traced ({type(error).__name__}: {reason}); give one length under "
        "[input] of the spec if it needs one, and what is computed of audio under "
        "[input.features]; forward may use tensors only"
    )


def example_inputs(model: CnnGru | WholeModel) -> tuple[Any, ...]:
    """Half a second of silence for one stream, or one whole input, to trace with."""
    if isinstance(model, WholeModel):
        return (torch.from_numpy(example_input(model.spec)[None]),)
    length = model.spec.chunk_length * max(
        1, model.spec.features.sample_rate // 2 // model.spec.chunk_length
    )
    return torch.zeros(1, length), model.initial_state(1)
