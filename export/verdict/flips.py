"""The clips that two models answer differently, to listen to."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cnngru_edge.export.verdict.answers import CLEAN, Conditions, check_conditions
from cnngru_edge.export.verdict.compare import Comparison
from cnngru_edge.models.atomic import file_sha256, staged
from cnngru_edge.models.errors import AudioError, SessionError
from cnngru_edge.runtime.inputs.audio import Recording, read_audio, write_wav

_UNSAFE = re.compile(r"[^\w.-]")  # in a file's name
_NAMED = 30  # characters of a text in it


def hear_again(
    comparison: Comparison, root: Path, conditions: Conditions
) -> Callable[[str, str], Recording]:
    """Gives a clip of a comparison, by path and condition, as it was answered.

    At the model's rate, and in noise if that is the condition. What it gives raises AudioError for
    a clip that is not there, or not as it was: the answers came from elsewhere.

    Raises:
        SessionError: the answers were to clips in other noise.
    """
    check_conditions(
        comparison.candidate.path,
        tuple(condition.condition for condition in comparison.conditions),
        comparison.conditions_sha256,
        conditions,
    )
    hashes = {flip.path: flip.sha256 for flip in comparison.flips}

    def hear(path: str, condition: str) -> Recording:
        if comparison.sample_rate is None:
            raise AudioError(f"{path}: no recording")
        source = root / path
        recording = read_audio(source, comparison.sample_rate)
        sha256 = file_sha256(source)
        if sha256 != hashes.get(path, sha256):
            raise AudioError(f"{source}: another recording than the one that was answered")
        if condition == CLEAN:
            return recording
        heard = list(conditions.heard(recording.samples, sha256, recording.sample_rate))
        return replace(recording, samples=heard[conditions.names.index(condition)])

    return hear


def check_unused(folder: Path) -> None:
    """Refuse to add to what is in a folder: it would be of another comparison."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SessionError(f"{folder}: is there and not empty; give another folder")


def save_flips(
    comparison: Comparison, root: Path, folder: Path, conditions: Conditions | None = None
) -> None:
    """Put the clips that flipped into a new folder, to listen to, as they were answered.

    16-bit WAV, named by number, condition, truth and both answers.

    Raises:
        SessionError: the folder is not empty, or as `hear_again`.
        AudioError: as `hear_again`.
    """
    if comparison.sample_rate is None:
        raise SessionError("this model hears no recordings, so there are none to listen to")
    check_unused(folder)
    hear = hear_again(comparison, root, conditions or Conditions())
    with staged(folder) as stage:
        for number, flip in enumerate(comparison.flips, start=1):
            samples = hear(flip.path, flip.condition).samples
            said = (flip.condition, flip.true, flip.reference, flip.candidate)
            name = "_".join((f"{number:03}", *(s[:_NAMED] for s in said), Path(flip.path).stem))
            target = stage / f"{_UNSAFE.sub('-', name)}.wav"
            write_wav(target, samples, comparison.sample_rate)
