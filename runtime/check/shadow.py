"""The float model in the background: it hears a share of what a session hears, and compares."""

import io
import math
import os
import queue
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import EdgeError, SessionError
from cnngru_edge.models.spec.stream import CTC, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.agreement import power, proves_more, sqnr_db
from cnngru_edge.runtime.decode.answer import clip_answer
from cnngru_edge.runtime.inputs.audio import Samples, write_wav
from cnngru_edge.runtime.session import Array, HostStreams, Session
from cnngru_edge.runtime.stream import Stream, clip_logits

MAX_FLIPS = 100
"""Files in a folder of flips: a device must not fill its disk with them."""

_SEGMENT_S = 1.0  # of a stream: a word with its surroundings, and a few ms of the reference's time
_WAITING = 4  # clips or segments, with the one that is being checked
_LATEST = 1000  # clips or segments that the limit of agreement is about
_NICE = 10
# Not 19: on a core that others keep busy a check then takes about six times as long. The stream's
# steps were no different with 0, 10 and 19.


@dataclass(frozen=True)
class ShadowConfig:
    """How much is checked, and what is too much of a difference.

    The limits leave room below what an intact INT8 model does. On 1,183 clips of Speech Commands
    and 2,400 segments of words, noise and continuous speech, that of the keyword model agreed on
    99.5 % of the clips and 99.3 to 99.7 % of the frames, and the worst of them all had 12 dB; heard
    with eight times the gain, and clipped, 98.5 % and 6 dB. A model whose logits are doubled has
    0 dB.

    A text of several words has one that differs too often to be a measure: of a CTC model clips
    count by frames too. On 562 strings of words its INT8 model agreed on 97 % of the texts, on
    99.7 % of the frames, and the worst second had 16 dB; with eight times the gain 98.2 % of the
    frames, and 12 dB.
    """

    reference: Path  # the float artefact
    share: float = 0.05  # of the clips, or of the audio of a stream
    min_agreement: float = 0.98  # share with the same label of the clips, or frames; see above
    min_sqnr_db: float = 6.0  # of the logits of each clip or segment
    flips: Path | None = None  # folder for the audio of what goes wrong


@dataclass(frozen=True)
class ShadowSummary:
    """What a shadow has found so far."""

    checked: int  # clips, or segments of a stream
    missed: int  # that were due, and not checked because the reference was busy
    agreement: float | None  # share of the clips or frames with the same label; None without any
    sqnr_db: float | None  # over all logits
    lowest_sqnr_db: float | None  # of a clip or segment
    flips: int  # files kept
    alarms: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no limit was crossed."""
        return not self.alarms

    @property
    def text(self) -> str:
        """One line for people."""
        line = f"shadow: {self.checked} checked, {self.missed} missed because it was busy"
        if self.agreement is not None:
            line += (
                f"; agreement {self.agreement:.1%}, SQNR {self.sqnr_db:.1f} dB, lowest "
                f"{self.lowest_sqnr_db:.1f} dB"
            )
        if self.missed > self.checked:
            line += "; most of what was due was missed: take a smaller share, or another machine"
        if self.flips:
            line += f"; {self.flips} files kept"
        return line if self.passed else f"{line}; failed"


@dataclass(frozen=True)
class _Sample:
    where: str
    audio: Sequence[Samples]  # pieces (N, S), in a row
    logits: Sequence[Array]  # of the session that is checked, (N, T, C) for each piece
    state: dict[str, Array] | None  # that it began with; None for a clip


class Shadow:
    """A float model that checks a share of what another session answers, in its own thread.

    What it is given it takes or, while it is busy, does not: nobody waits for it. It has a lower
    priority where the system has one for each thread (Linux). A clip is heard anew. A segment of a
    stream, about a second of it, begins with the state that the other session had there, so that
    what it says is about this second.

    Args:
        spec: of the session that is checked.
        config: by what, how much of it is checked, and the limits.
        warn: is called, in the thread, with one line when a limit is first crossed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: ShadowConfig,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._spec, self.config, self._warn = spec, config, warn
        self._clips, self._next_clip = 0, 0.0
        self._samples: queue.SimpleQueue[_Sample | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(_WAITING)
        self._opened: Future[None] = Future()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._lock = threading.Lock()  # for all that follows
        self._checked = self._missed = self._flips = 0
        self._flipped = 0.0  # clips and parts of segments
        self._signal = self._noise = 0.0
        self._lowest = math.inf
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._alarms: dict[str, str] = {}

    def check_clip(self, name: str, samples: Samples, logits: Array) -> None:
        """Check the logits (T, C) of a clip (S,), if it is its turn."""
        if self._clips >= self._next_clip:
            self._next_clip += 1 / self.config.share
            self._offer(_Sample(name, [samples[None]], [logits[None]], None))
        self._clips += 1

    def stream(self, session: Session, batch: int = 1) -> "CheckedStream":
        """`batch` streams side by side through a session, of which a share is checked."""
        return CheckedStream(self, session, batch)

    @property
    def summary(self) -> ShadowSummary:
        """What it has found so far; all of it, once it is closed."""
        with self._lock:
            is_any = self._checked > 0
            return ShadowSummary(
                self._checked,
                self._missed,
                1 - self._flipped / self._checked if is_any else None,
                sqnr_db(self._signal, self._noise) if is_any else None,
                self._lowest if is_any else None,
                self._flips,
                tuple(self._alarms.values()),
            )

    def close(self) -> None:
        """Check what it has taken, and end."""
        self._samples.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Shadow":
        self._thread.start()
        try:
            self._opened.result()
            if self.config.flips is not None:
                self.config.flips.mkdir(parents=True, exist_ok=True)
        except Exception:
            self._samples.put(None)
            self._thread.join()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _offer(self, sample: _Sample) -> None:
        if self._free.acquire(blocking=False):
            self._samples.put(sample)
        else:
            with self._lock:
                self._missed += len(sample.audio[0])

    def _work(self) -> None:
        _be_nice()
        try:
            with open_session(self.config.reference) as session:
                if session.spec != self._spec:
                    raise SessionError(
                        f"{self.config.reference}: of another model than the one that it is to "
                        "check; give its own float one"
                    )
                self._opened.set_result(None)
                while (sample := self._samples.get()) is not None:
                    self._check(session, sample)
                    self._free.release()
        except Exception as e:  # of this thread: for the one that opens or closes it
            if self._opened.done():
                self._error = e
            else:
                self._opened.set_exception(e)

    def _check(self, reference: Session, sample: _Sample) -> None:
        audio, logits = np.concatenate(sample.audio, 1), np.concatenate(sample.logits, 1)
        for row in range(len(audio)):
            where = sample.where if len(audio) == 1 else f"{sample.where} of stream {row}"
            state = sample.state and {k: v[row : row + 1] for k, v in sample.state.items()}
            try:
                self._check_row(reference, where, audio[row], logits[row], state)
            except (EdgeError, OSError) as e:
                self._alarm("failed", f"{where}: not checked fully ({e})")

    def _check_row(
        self,
        reference: Session,
        where: str,
        audio: Samples,
        found: Array,
        state: dict[str, Array] | None,
    ) -> None:
        if state is None:
            expected = clip_logits(reference, audio)
        else:
            expected = _segment_logits(reference, audio, state)
        labels = [x.argmax(-1) for x in (expected, found)]
        differs = labels[0] != labels[1]
        share = float(differs.mean())
        if state is None or self._spec.family == CTC:
            said = [clip_answer(self._spec, x) for x in (expected, found)]
        else:
            said = [self._spec.labels[x[differs.argmax()]] for x in labels]
        is_flip = said[0] != said[1]
        if state is None and self._spec.family != CTC:
            share = float(is_flip)
        signal, noise = power(expected), power(expected - found)
        sqnr = sqnr_db(signal, noise)
        with self._lock:
            self._checked += 1
            self._flipped += share
            self._latest.append(share)
            self._signal += signal
            self._noise += noise
            self._lowest = min(self._lowest, sqnr)
        self._judge(where, sqnr)
        if is_flip or sqnr < self.config.min_sqnr_db:
            self._keep(where, audio, *said)

    def _judge(self, where: str, sqnr: float) -> None:
        config = self.config
        name = config.reference.name
        if sqnr < config.min_sqnr_db:
            self._alarm(
                "sqnr",
                f"{where}: SQNR of {sqnr:.1f} dB to {name}, expected {config.min_sqnr_db:g} dB or "
                "more",
            )
        if proves_more(self._latest, 1 - config.min_agreement):
            agreement = 1 - sum(self._latest) / len(self._latest)
            self._alarm(
                "agreement",
                f"{where}: {agreement:.1%} agreement with {name} over the latest "
                f"{len(self._latest)} checked, expected {config.min_agreement:.1%} or more",
            )

    def _alarm(self, kind: str, line: str) -> None:
        with self._lock:
            is_first = kind not in self._alarms
            self._alarms.setdefault(kind, line)
        if is_first:
            self._warn(line)

    def _keep(self, where: str, audio: Samples, expected: str, found: str) -> None:
        """Write what went wrong as WAV, named by where it was and what the two answered."""
        folder = self.config.flips
        if folder is None or len(list(folder.glob("*.wav"))) >= MAX_FLIPS:
            return
        stem = "_".join(
            re.sub(r"[^\w.-]+", "-", part)[-80:]
            for part in (where, f"float-{expected}", f"here-{found}")
        )
        path, count = folder / f"{stem}.wav", 1
        while path.exists():
            count += 1
            path = folder / f"{stem}_{count}.wav"
        data = io.BytesIO()
        write_wav(data, audio, self._spec.features.sample_rate)
        write_file(path, data.getvalue())
        with self._lock:
            self._flips += 1


class CheckedStream(Stream):
    """Streams side by side of which a shadow checks a share, in segments of about a second.

    A segment is as many whole pushes. What it costs is a copy of the state where it begins, and of
    the audio and the logits of its pushes.
    """

    def __init__(self, shadow: Shadow, session: Session, batch: int = 1) -> None:
        super().__init__(session, batch)
        self._shadow = shadow
        self._frame_s = self.spec.chunk_length / self.spec.features.sample_rate
        self.lost_s = 0.0  # of audio that is missing in the stream: for the times that are told
        self._frames = self._first = 0
        self._next_frame = 0.0  # a segment begins with the first push from there on
        self._state: dict[str, Array] | None = None
        self._audio: list[Samples] = []
        self._logits: list[Array] = []

    def push(self, audio: Samples) -> Array:
        """Logits (N, S / chunk_length, C) of the next (N, S) samples, as those of any Stream."""
        if self._state is None and self._frames >= self._next_frame:
            self._state, self._first = self.state, self._frames
        logits = super().push(audio)
        self._frames += logits.shape[1]
        if self._state is not None:
            self._audio.append(audio.copy())  # both are the caller's to change
            self._logits.append(logits.copy())
            if (self._frames - self._first) * self._frame_s >= _SEGMENT_S:
                self._end_segment()
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        self._end_segment()
        super().reset(rows)
        if rows is None:
            self._frames, self._next_frame, self.lost_s = 0, 0.0, 0.0

    def close(self) -> None:
        """Give back what the session holds for these streams."""
        self._end_segment()
        super().close()

    def _end_segment(self) -> None:
        if self._logits:
            self._next_frame += (self._frames - self._first) / self._shadow.config.share
            where = f"{self._first * self._frame_s + self.lost_s:.2f} s"
            self._shadow._offer(_Sample(where, self._audio, self._logits, self._state))
        self._state, self._audio, self._logits = None, [], []


def _segment_logits(session: Session, audio: Samples, state: dict[str, Array]) -> Array:
    """Logits (T, C) of the samples (S,) that come after a state."""
    streams = HostStreams(session, 1)
    streams.state = state
    most = session.max_samples or len(audio)
    pieces = [streams.advance(audio[None, i : i + most]) for i in range(0, len(audio), most)]
    logits: Array = np.concatenate(pieces, axis=1)[0]
    return logits


def _be_nice() -> None:
    if sys.platform == "linux":  # where each thread has a priority of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
