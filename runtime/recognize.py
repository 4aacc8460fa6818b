"""What is said in a recording, how sure, how fast, and whether the float model agrees."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec import CTC
from cnngru_edge.runtime.audio import Recording, read_audio
from cnngru_edge.runtime.ctc import DecodeConfig, Word
from cnngru_edge.runtime.decode import clip_scores
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import clip_logits
from cnngru_edge.runtime.transcribe import clip_transcript

if TYPE_CHECKING:
    from cnngru_edge.runtime.monitor import Shadow


@dataclass(frozen=True)
class Check:
    """What a reference says to the same recording."""

    reference_label: str
    agrees: bool
    max_abs_error: float  # over all logits of all frames


@dataclass(frozen=True)
class Recognition:
    """The answer for one recording."""

    path: str
    label: str
    score: float
    scores: dict[str, float]
    duration_s: float
    latency_ms: float  # of the model, for the whole recording; reading the file not included
    backend: str
    device: str
    precision: str
    check: Check | None
    notes: tuple[str, ...]  # what was done to the recording

    def to_json(self) -> str:
        """One line of JSON."""
        fields = asdict(self)
        del fields["notes"]
        return json.dumps(fields | (fields.pop("check") or {}))

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
    """What a CTC model writes of one recording."""

    path: str
    text: str
    score: float
    words: tuple[Word, ...]
    duration_s: float
    latency_ms: float  # of the model and the search for the text
    backend: str
    device: str
    precision: str
    check: TextCheck | None
    notes: tuple[str, ...]  # what was done to the recording

    def to_json(self) -> str:
        """One line of JSON."""
        fields = asdict(self)
        del fields["notes"]
        return json.dumps(fields | (fields.pop("check") or {}))

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
    path: Path,
    reference: Session | None = None,
    shadow: "Shadow | None" = None,
    decode: DecodeConfig | None = None,
) -> Recognition | Transcription:
    """Run one recording through a session, and through a reference to check it.

    A shadow checks it in the background, if it is its turn. Of a CTC model, the text; `decode` is
    how it is searched for.

    Raises:
        AudioError: the recording cannot be used.
        SessionError: the model answers NaN.
    """
    spec = session.spec
    recording = read_audio(path, spec.features.sample_rate)
    start = time.perf_counter()
    logits = clip_logits(session, recording.samples)
    latency_ms = 1000 * (time.perf_counter() - start)
    if not np.isfinite(logits).all():
        raise SessionError(f"{path}: the model answers NaN; its file is damaged, export it again")
    if shadow is not None:
        shadow.check_clip(str(path), recording.samples, logits)
    if spec.family == CTC:
        return _transcription(session, path, recording, logits, latency_ms, reference, decode)
    scores = clip_scores(spec, logits)
    label = spec.labels[int(scores.argmax())]
    check = None
    if reference is not None:
        expected = clip_logits(reference, recording.samples)
        other = reference.spec.labels[int(clip_scores(reference.spec, expected).argmax())]
        check = Check(other, other == label, float(np.abs(logits - expected).max()))
    return Recognition(
        path=str(path),
        label=label,
        score=float(scores.max()),
        scores={name: float(score) for name, score in zip(spec.labels, scores, strict=True)},
        duration_s=recording.duration_s,
        latency_ms=latency_ms,
        backend=session.backend,
        device=session.device,
        precision=session.precision,
        check=check,
        notes=_notes(recording, spec.chunk_length),
    )


def _transcription(
    session: Session,
    path: Path,
    recording: Recording,
    logits: Array,
    model_ms: float,
    reference: Session | None,
    decode: DecodeConfig | None,
) -> Transcription:
    start = time.perf_counter()
    found = clip_transcript(session.spec, logits, decode)
    latency_ms = model_ms + 1000 * (time.perf_counter() - start)
    check = None
    if reference is not None:
        expected = clip_logits(reference, recording.samples)
        text = clip_transcript(reference.spec, expected, decode).text
        check = TextCheck(text, text == found.text, float(np.abs(logits - expected).max()))
    end = recording.duration_s  # what is heard in the silence behind it was said before that
    return Transcription(
        path=str(path),
        text=found.text,
        score=found.score,
        words=tuple(
            replace(word, start=min(word.start, end), end=min(word.end, end))
            for word in found.words
        ),
        duration_s=recording.duration_s,
        latency_ms=latency_ms,
        backend=session.backend,
        device=session.device,
        precision=session.precision,
        check=check,
        notes=_notes(recording, session.spec.chunk_length),
    )


def _notes(recording: Recording, chunk_length: int) -> tuple[str, ...]:
    rate, notes = recording.sample_rate, []
    if recording.source_rate != rate:
        notes.append(f"resampled from {recording.source_rate} to {rate} Hz")
    if recording.source_channels > 1:
        notes.append(f"have {recording.source_channels} channels, of which the first is used")
    if len(recording.samples) < chunk_length:
        notes.append(f"shorter than one chunk of {chunk_length} samples, padded with zeros")
    return tuple(notes)
