"""A live or long stream of audio in, events out."""

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr

from cnngru_edge.models.errors import AudioError
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.answer import Said, Transcriber
from cnngru_edge.runtime.decode.ctc import DecodeConfig, Word
from cnngru_edge.runtime.decode.events import Detection, Detector
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.session import Session
from cnngru_edge.runtime.stream import FLUSH_S, Stream, fixed_length

PARTIAL, FINAL = "partial", "final"

_LOSSES = 1000  # more than there are while a text grows

if TYPE_CHECKING:
    from cnngru_edge.runtime.check.shadow import CheckedStream, Shadow


@dataclass(frozen=True)
class Event:
    """A word in a stream of audio."""

    time: float  # s from the start of the stream to where it was sure, about the word's end
    label: str
    score: float
    latency_ms: float  # from the audio that completed it to this event


@dataclass(frozen=True)
class TextEvent:
    """A text in a stream of audio: as far as it is known, and when it has ended."""

    type: str  # PARTIAL or FINAL
    text: str
    start: float  # s from the start of the stream
    end: float
    words: tuple[Word, ...]  # the same of each
    latency_ms: float  # from the audio that completed it to this event


class StreamSession:
    """One stream of audio through a session: pieces of any length in, events out.

    Several may share a session, each with its own state. A session is for one thread, and so are
    all of its streams.

    A keyword model gives an Event for each word. A CTC model gives TextEvents: after each push the
    text that is still growing, if it has changed, and each text that has ended.

    Args:
        source: an open artefact, or the path of one, which is then opened and closed with this.
        sample_rate: of the audio, in Hz; another than the model's is resampled as a stream, without
            seams between the pieces. None for the model's.
        shadow: checks a share of the stream.
        decode: how a CTC model's texts are searched for.
    """

    def __init__(
        self,
        source: Session | Path,
        sample_rate: int | None = None,
        shadow: "Shadow | None" = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        with ExitStack() as held:
            session = source
            if isinstance(session, Path):
                session = held.enter_context(open_session(session))
            self._checked: CheckedStream | None = None
            if shadow is not None:
                self._checked = shadow.stream(session)
            self._stream = held.enter_context(self._checked or Stream(session))
            self._held = held.pop_all()
        spec = streamable(session.spec)
        rate = spec.features.sample_rate
        self._hearer = Transcriber(spec, decode) if spec.writes_text else Detector(spec)
        self._length = fixed_length(session) or spec.chunk_length
        self._rates = (sample_rate or rate, rate)
        self._flush = np.zeros(round(FLUSH_S * rate), np.float32)
        self.reset()

    @property
    def factor(self) -> float:
        """Real-time factor: what the audio so far took to its length; above 1 it falls behind."""
        return self.compute_s / self.pushed_s if self.pushed_s else 0.0

    def reset(self) -> None:
        """Begin another stream."""
        self._stream.reset()
        self._hearer.reset()
        self._rest = np.zeros(0, np.float32)
        source, rate = self._rates
        self._resampler = (
            soxr.ResampleStream(source, rate, 1, dtype="float32") if source != rate else None
        )
        # From where in what was pushed on; all that is missing by then. Those before are forgotten.
        self._losses = deque([(0.0, 0.0)], maxlen=_LOSSES)
        self.pushed_s = 0.0  # of audio
        self.compute_s = 0.0  # what that took

    def push(self, samples: Samples) -> list[Event | TextEvent]:
        """The events in the next samples (S,), of any length; what is not a chunk yet waits.

        Raises:
            AudioError: samples that are NaN or infinite.
        """
        if samples.ndim != 1:
            raise AudioError(f"expected samples of shape (S,), got {samples.shape}")
        if not np.isfinite(samples).all():
            raise AudioError(f"a sample after {self.pushed_s:.2f} s is NaN or infinite")
        self.pushed_s += len(samples) / self._rates[0]
        return self._run(samples, is_last=False)

    def lose(self, seconds: float) -> None:
        """Say that so much audio is missing here, so that the times of events stay right."""
        self._losses.append((self.pushed_s, self._losses[-1][1] + seconds))
        if self._checked is not None:
            self._checked.lost_s += seconds

    def flush(self) -> list[Event | TextEvent]:
        """The events in what is left when a stream has ended, heard out with a little silence."""
        events = self._run(np.zeros(0, np.float32), is_last=True)
        self._rest = pad_to_multiple(np.concatenate([self._rest, self._flush]), self._length)
        events += self._run(np.zeros(0, np.float32), is_last=False, resample=False)
        if isinstance(self._hearer, Transcriber):
            events += [self._event(said, 0.0) for said in self._hearer.end()]
        return events

    def _run(
        self, samples: Samples, *, is_last: bool, resample: bool = True
    ) -> list[Event | TextEvent]:
        start = time.perf_counter()
        if self._resampler is not None and resample:
            samples = self._resampler.resample_chunk(samples.astype(np.float32), last=is_last)
        audio = np.concatenate([self._rest, samples])
        whole = len(audio) // self._length * self._length
        self._rest = audio[whole:]
        if not whole:
            return []
        logits = self._stream.push(audio[None, :whole].astype(np.float32))[0]
        found = self._hearer.push(logits)
        self.compute_s += (seconds := time.perf_counter() - start)
        latency_ms = round(1000 * seconds, 3)
        return [self._event(one, latency_ms) for one in found]

    def _event(self, found: Detection | Said, latency_ms: float) -> Event | TextEvent:
        if isinstance(found, Detection):
            time_s = self._time(found.time)
            return Event(time_s, found.label, round(found.score, 4), latency_ms)
        heard = self.pushed_s  # what comes out of the silence behind it was said before that
        words = tuple(
            replace(
                word, start=self._time(min(word.start, heard)), end=self._time(min(word.end, heard))
            )
            for word in found.transcript.words
        )
        return TextEvent(
            FINAL if found.is_final else PARTIAL,
            found.transcript.text,
            words[0].start,
            words[-1].end,
            words,
            latency_ms,
        )

    def _time(self, seconds: float) -> float:
        """Where in the stream this is, of what was pushed: with what was missing before it."""
        latest = reversed(self._losses)
        lost = next((total for start, total in latest if start <= seconds), self._losses[0][1])
        return round(seconds + lost, 3)

    def close(self) -> None:
        """Give back what the session holds for it."""
        self._held.close()

    def __enter__(self) -> "StreamSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
