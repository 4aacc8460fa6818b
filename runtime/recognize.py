"""What a model answers, how sure, how fast, and whether the float model agrees."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, WholeSpec, sample_rate_of
from cnngru_edge.runtime.decode.answer import clip_transcript
from cnngru_edge.runtime.decode.ctc import DecodeConfig, Word
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.inputs.read import Source, fitted, read_input
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import clip_logits

if TYPE_CHECKING:
    from cnngru_edge.runtime.check.shadow import Shadow


@dataclass(frozen=True)
class Check:
    """What a reference says to the same recording."""

    reference_label: str
    agrees: bool
    max_abs_error: float  # over all logits of all frames


@dataclass(frozen=True)
class Recognition:
    """The answer for one recording or phrase."""

    path: str
    label: str
    score: float
    scores: dict[str, float]
    duration_s: float | None  # of a recording
    latency_ms: float  # of the model, for the whole input; reading the file not included
    backend: str
    device: str
    precision: str
    check: Check | None
    notes: tuple[str, ...]  # what was done to the recording

    def to_json(self) -> str:
        """One line of JSON."""
        return _json(asdict(self))

    def to_line(self, path_width: int) -> str:
        """One line for people."""
        answer = f"{self.label:<10} {self.score:6.1%} {self.latency_ms:7.2f} ms"
        line = f"{self.path:<{path_width}}  {answer}"
        if self.check is not None:
            said = "agrees" if self.check.agrees else f"reference: {self.check.reference_label}"
            line += f"  {said} (error {self.check.max_abs_error:.3f})"
        return line


@dataclass(frozen=True)
class TextCheck:
    """What a reference writes of the same recording."""

    reference_text: str
    agrees: bool
    max_abs_error: float  # over all logits of all frames


@dataclass(frozen=True)
class Transcription:
    """What a CTC model writes of one recording or image."""

    path: str
    text: str
    score: float
    words: tuple[Word, ...]
    duration_s: float | None  # of a recording
    latency_ms: float  # of the model and the search for the text
    backend: str
    device: str
    precision: str
    check: TextCheck | None
    notes: tuple[str, ...]  # what was done to the recording

    def to_json(self) -> str:
        """One line of JSON."""
        return _json(asdict(self))

    def to_line(self, path_width: int) -> str:
        """One line for people."""
        line = (
            f"{self.path:<{path_width}}  {self.score:6.1%} {self.latency_ms:7.2f} ms  {self.text}"
        )
        if self.check is not None:
            said = "agrees" if self.check.agrees else f"reference: {self.check.reference_text}"
            line += f"  [{said} (error {self.check.max_abs_error:.3f})]"
        return line


def recognize(
    session: Session,
    source: Source,
    reference: Session | None = None,
    shadow: "Shadow | None" = None,
    decode: DecodeConfig | None = None,
) -> Recognition | Transcription:
    """Run a recording, phrase or image through a session, and through a reference to check it.

    A shadow checks it in the background, if it is its turn. Of a CTC model, the text; `decode` is
    how it is searched for.

    Raises:
        InputError: the input cannot be used.
        SessionError: the model answers NaN.
    """
    spec = session.spec
    given, duration_s, notes = _read(spec, source)
    start = time.perf_counter()
    logits = clip_logits(session, given)
    latency_ms = 1000 * (time.perf_counter() - start)
    if not np.isfinite(logits).all():
        raise SessionError(f"{source}: the model answers NaN; its file is damaged, export it again")
    if shadow is not None:
        shadow.check_clip(str(source), given, logits)
    expected = clip_logits(reference, given) if reference is not None else None
    error = float(np.abs(logits - expected).max()) if expected is not None else 0.0
    if spec.writes_text:
        start = time.perf_counter()
        found = clip_transcript(spec, logits, decode)
        latency_ms += 1000 * (time.perf_counter() - start)
        text_check = None
        if expected is not None:
            text = clip_transcript(spec, expected, decode).text
            text_check = TextCheck(text, text == found.text, error)
        return Transcription(
            path=str(source),
            text=found.text,
            score=found.score,
            words=_within(found.words, duration_s),
            duration_s=duration_s,
            latency_ms=latency_ms,
            backend=session.backend,
            device=session.device,
            precision=session.precision,
            check=text_check,
            notes=notes,
        )
    scores = clip_scores(spec, logits)
    label = spec.labels[int(scores.argmax())]
    check = None
    if expected is not None:
        other = spec.labels[int(clip_scores(spec, expected).argmax())]
        check = Check(other, other == label, error)
    return Recognition(
        path=str(source),
        label=label,
        score=float(scores.max()),
        scores={name: float(score) for name, score in zip(spec.labels, scores, strict=True)},
        duration_s=duration_s,
        latency_ms=latency_ms,
        backend=session.backend,
        device=session.device,
        precision=session.precision,
        check=check,
        notes=notes,
    )


def _json(fields: dict[str, Any]) -> str:
    """What was found and, if it was checked, how that went; notes are for people."""
    del fields["notes"]
    return json.dumps(fields | (fields.pop("check") or {}))


def _within(words: Sequence[Word], duration_s: float | None) -> tuple[Word, ...]:
    """What is heard in the silence behind a recording was said before its end."""
    if duration_s is None:
        return ()  # an image has no time
    return tuple(
        replace(word, start=min(word.start, duration_s), end=min(word.end, duration_s))
        for word in words
    )


def _read(spec: Spec, source: Source) -> tuple[Array, float | None, tuple[str, ...]]:
    """What a model is given, how long it is if it is a recording, and what was done to it."""
    rate = sample_rate_of(spec)
    if rate is None or not isinstance(source, Path):
        given = read_input(spec, source)
        return given, None, _fitting(spec, given)
    recording, notes = read_audio(source, rate), []
    if recording.source_rate != rate:
        notes.append(f"resampled from {recording.source_rate} to {rate} Hz")
    if recording.source_channels > 1:
        notes.append(f"have {recording.source_channels} channels, of which the first is used")
    samples = recording.samples
    if isinstance(spec, ModelSpec) and len(samples) < spec.chunk_length:
        chunk = f"one chunk of {spec.chunk_length} samples"
        notes.append(f"shorter than {chunk}, padded with zeros")
    return samples, recording.duration_s, (*notes, *_fitting(spec, samples))


def _fitting(spec: Spec, given: Array) -> tuple[str, ...]:
    """What is done to an input that is longer or shorter than a model takes."""
    if not isinstance(spec, WholeSpec):
        return ()
    length, taken = given.shape[-1], fitted(spec, given).shape[-1]
    what = {"audio": "samples", "tokens": "tokens", "image": "columns"}[spec.input.name]
    if taken == length:
        return ()
    return (f"{'cut' if taken < length else 'padded'} to the {taken} {what} that the model takes",)
