"""The float forms of one model give the same numbers, on real inputs, or the export stops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cnngru_edge.export.trace.own_onnx import OnnxModel
from cnngru_edge.models.errors import ParityError, SessionError
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.checks import has_cells
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.whole import WholeSpec, fixed_length_of
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.torchscript import TorchSession
from cnngru_edge.runtime.inputs.audio import pad_to_multiple
from cnngru_edge.runtime.inputs.read import fitted
from cnngru_edge.runtime.session import Array, Session, initial_state

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far an artefact is from the model in torch, over all clips."""

    path: Path
    tensor: str  # the one that differs most
    max_abs_error: float


def check_parity(model: CnnGru | WholeModel, artefact: Path, clips: Sequence[Array]) -> Parity:
    """Compare logits and every state: clips alone and as a batch, each stream in two chunks.

    Raises:
        ParityError: a tensor differs by more than TOLERANCE.
    """
    errors: dict[str, float] = {}
    # A program was written a moment ago, by this process; no other may be opened.
    is_program = artefact.suffix == ".pt2"
    opened = TorchSession(artefact) if is_program else open_session(artefact)
    with opened as session, torch.inference_mode():
        try:
            for expected, found in _outputs(model, session, clips):
                for name, value in expected.items():
                    error = _largest(found[name], value)
                    errors[name] = float(np.maximum(errors.get(name, 0.0), error))
        except SessionError as e:  # a trace of one length may not run on another
            raise ParityError(f"{artefact.name}: {e}{_advice(model)}") from e
    # Unlike max(), numpy lets a NaN through, here and above; and no comparison with one holds.
    tensor = list(errors)[int(np.argmax(list(errors.values())))]
    if not errors[tensor] <= TOLERANCE:
        raise ParityError(
            f"{artefact.name}: tensor {tensor!r} differs from torch by {errors[tensor]:.3g}, "
            f"allowed are {TOLERANCE:g}{_advice(model)}"
        )
    return Parity(artefact, tensor, errors[tensor])


def _advice(model: CnnGru | WholeModel) -> str:
    """What may be the matter with a module that is not ours."""
    if not isinstance(model, OwnModel) or isinstance(model, OnnxModel):
        return ""
    if has_cells(model) and fixed_length_of(model.spec.input) is None:
        return (
            "; its cells are called in a loop over frames in Python, so the graph is for one "
            "length: give that under [input] of the spec"
        )
    return "; forward does in Python what depends on its input, which cannot be traced"


def _largest(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max(initial=0))


def _outputs(
    model: CnnGru | WholeModel, session: Session, clips: Sequence[Array]
) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """What torch and the artefact give, for each case."""
    if isinstance(model, WholeModel):
        for given in _whole_cases(model, clips):
            expected = model.eval()(torch.from_numpy(given)).numpy()
            yield {"logits": expected}, session.run({model.spec.input.name: given})
        return
    chunk = model.spec.chunk_length
    for audio in _cases([pad_to_multiple(clip, chunk) for clip in clips]):
        yield _torch_outputs(model, audio), _session_outputs(session, audio)


def _cases(clips: Sequence[Array]) -> list[Array]:
    """Each clip alone, and all of them as one batch."""
    length = min(clip.shape[-1] for clip in clips)
    return [*(clip[None] for clip in clips), np.stack([clip[..., :length] for clip in clips])]


def _whole_cases(model: WholeModel, clips: Sequence[Array]) -> list[Array]:
    """The same, and a part of the first: recordings are often all of one length."""
    part = clips[0][..., : 1 + clips[0].shape[-1] * 5 // 8]
    inputs = [fitted(model.spec, clip) for clip in (part, *clips)]
    if isinstance(model, OwnModel) and not model.free_batch:
        return [given[None] for given in inputs]
    return [inputs[0][None], *_cases(inputs[1:])]


def _torch_outputs(model: CnnGru, audio: Array) -> dict[str, Array]:
    logits, state = model(torch.from_numpy(audio), model.initial_state(len(audio)))
    names = ["logits", *(s.next_name for s in model.spec.state)]
    return {n: v.numpy() for n, v in zip(names, (logits, *state), strict=True)}


def _session_outputs(session: Session, audio: Array) -> dict[str, Array]:
    """In two chunks of unequal length, so that what is carried is put to the test as well."""
    spec = session.spec
    assert not isinstance(spec, WholeSpec)
    cut = audio.shape[1] // spec.chunk_length // 3 * spec.chunk_length
    state = initial_state(spec, len(audio))
    logits = []
    outputs: dict[str, Array] = {}
    for part in (audio[:, :cut], audio[:, cut:]):
        if part.shape[1]:
            outputs = session.run({"audio": part, **state})
            state = {s.name: outputs[s.next_name] for s in spec.state}
            logits.append(outputs["logits"])
    return outputs | {"logits": np.concatenate(logits, axis=1)}
