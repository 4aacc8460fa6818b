"""The float forms of one model give the same numbers, on real recordings, or the export stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.errors import ParityError
from cnngru_edge.runtime.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.session import Array, Session, initial_state, open_session

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far an artefact is from the model in torch, over all clips."""

    path: Path
    tensor: str  # the one that differs most
    max_abs_error: float


def check_parity(model: CnnGru, artefact: Path, clips: Sequence[Samples]) -> Parity:
    """Compare logits and every state: clips alone and as a batch, each in two chunks.

    Raises:
        ParityError: a tensor differs by more than TOLERANCE.
    """
    errors: dict[str, float] = {}
    with open_session(artefact) as session, torch.inference_mode():
        for audio in _cases(clips, model.spec.chunk_length):
            expected = _torch_outputs(model, audio)
            found = _session_outputs(session, audio)
            for name, value in expected.items():
                error = float(np.abs(found[name] - value).max(initial=0))
                errors[name] = float(np.maximum(errors.get(name, 0.0), error))
    # Unlike max(), numpy lets a NaN through, here and above; and no comparison with one holds.
    tensor = list(errors)[int(np.argmax(list(errors.values())))]
    if not errors[tensor] <= TOLERANCE:
        raise ParityError(
            f"{artefact.name}: tensor {tensor!r} differs from torch by {errors[tensor]:.3g}, "
            f"allowed are {TOLERANCE:g}"
        )
    return Parity(artefact, tensor, errors[tensor])


def _cases(clips: Sequence[Samples], chunk: int) -> list[Samples]:
    """Each clip alone, and all of them as one batch."""
    padded = [pad_to_multiple(clip, chunk) for clip in clips]
    length = min(len(clip) for clip in padded)
    return [*(clip[None] for clip in padded), np.stack([clip[:length] for clip in padded])]


def _torch_outputs(model: CnnGru, audio: Samples) -> dict[str, Array]:
    logits, state = model(torch.from_numpy(audio), model.initial_state(len(audio)))
    names = ["logits", *(s.next_name for s in model.spec.state)]
    return {n: v.numpy() for n, v in zip(names, (logits, *state), strict=True)}


def _session_outputs(session: Session, audio: Samples) -> dict[str, Array]:
    """In two chunks of unequal length, so that what is carried is put to the test as well."""
    chunk = session.spec.chunk_length
    cut = audio.shape[1] // chunk // 3 * chunk
    state = initial_state(session.spec, len(audio))
    logits = []
    outputs: dict[str, Array] = {}
    for part in (audio[:, :cut], audio[:, cut:]):
        if part.shape[1]:
            outputs = session.run({"audio": part, **state})
            state = {s.name: outputs[s.next_name] for s in session.spec.state}
            logits.append(outputs["logits"])
    return outputs | {"logits": np.concatenate(logits, axis=1)}
