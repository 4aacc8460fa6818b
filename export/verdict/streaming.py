"""A stream against its clip, float and INT8: any cut, any beginning, after another word; events."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.verdict.answers import truth_of
from cnngru_edge.export.verdict.compare import MARGIN, check_labels
from cnngru_edge.export.verdict.hearing import Listener, batches
from cnngru_edge.export.verdict.long_streams import load, word_streams
from cnngru_edge.export.verdict.statistics import drop_verdict
from cnngru_edge.export.verdict.stream_events import Events, event_fields, hear_events
from cnngru_edge.models.errors import CorpusError, InputError, SessionError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.answer import clip_answer
from cnngru_edge.runtime.session import Array, Session

FLOAT_TOLERANCE = 1e-4
"""Largest difference of a logit between stream and clip in float."""
INT8_TOLERANCE = 0.05
"""The same in INT8: a few steps of one hidden unit, of which one moves a logit by up to 0.008.

ONNX Runtime on x86 needs none of it: whatever the cut, the bits are the same. Where a kernel adds
in another order for another shape, as it does for another batch, the hidden state changes by
1e-6, and now and then one that lay at the edge of an INT8 step falls on the other side of it.
"""
REFERENCE, CANDIDATE = "reference", "candidate"
FRESH, CARRIED = "fresh", "carried"

_SEED = 0  # of the order in which the clips come, and of the noise under them


@dataclass(frozen=True)
class StreamingConfig:
    """How the clips are heard; times in milliseconds."""

    chunks_ms: tuple[float, ...] = (20, 40, 80, 160)
    offsets_ms: tuple[float, ...] = (0, 5, 10, 15)  # of silence before a clip
    events: bool = True  # whether they are also heard in a row, every clip once


@dataclass(frozen=True)
class Row:
    """One way for one model to hear all the clips."""

    model: str  # REFERENCE or CANDIDATE
    chunk_ms: float | None  # None: the whole clip in one push
    offset_ms: float
    state: str  # FRESH, or CARRIED: after another clip, without a reset
    right: int  # clips
    accuracy: float
    agreement: float  # share of the clips with the label, or text, of the reference's clip
    max_abs_error: float  # of a logit, to the reference's clip; offset and state as here
    max_abs_clip_error: float  # of a logit, to this model's own clip

    def __str__(self) -> str:
        heard = "clip" if self.chunk_ms is None else f"stream of {self.chunk_ms:g} ms chunks"
        return f"{self.model} {heard}, offset {self.offset_ms:g} ms, {self.state} state"


@dataclass(frozen=True)
class StreamingComparison:
    """Every way for both models to hear the same clips."""

    clips: int
    rows: tuple[Row, ...]
    max_drop: float
    reference_tolerance: float
    candidate_tolerance: float
    events: Events | None = None  # None: no words among the clips, a CTC model, or not asked for

    @property
    def differences(self) -> tuple[str, ...]:
        """The streams that do not answer as their clip, a line each."""
        allowed = {REFERENCE: self.reference_tolerance, CANDIDATE: self.candidate_tolerance}
        return tuple(
            f"{row}: logits differ from those of the clip by up to {row.max_abs_clip_error:.2g}, "
            f"allowed are {allowed[row.model]:g}"
            for row in self.rows
            if row.max_abs_clip_error > allowed[row.model]
        )

    @property
    def losses(self) -> tuple[str, ...]:
        """Where the candidate loses more clips, or words, than `max_drop` allows, a line each."""
        return tuple(line for line, verdict in self._drops() if verdict == "worse")

    @property
    def context_loss(self) -> dict[str, float]:
        """Percentage points lost by a clip that comes after another, by model; the worst row."""
        return {
            model: max(
                100 * (self._fresh(row).right - row.right) / self.clips
                for row in self.rows
                if row.model == model and row.state == CARRIED
            )
            for model in (REFERENCE, CANDIDATE)
        }

    @property
    def verdict(self) -> str:
        """`equal`, `different` (a stream from its clip), `worse` or `not enough data`.

        `equal` if no more is lost on these clips than is allowed, in each row; else as
        `drop_verdict` has it. Whether that holds of others is what a Comparison is for.
        """
        if self.differences:
            return "different"
        verdicts = {verdict for _, verdict in self._drops()}
        return next((v for v in ("worse", "not enough data") if v in verdicts), "equal")

    @property
    def passed(self) -> bool:
        """Whether each stream equals its clip and the candidate is not shown to be worse."""
        return self.verdict not in ("different", "worse")

    def _drops(self) -> Iterator[tuple[str, str]]:
        """Each loss of the candidate, in words, and its verdict."""
        for row in self.rows:
            if row.model != CANDIDATE:
                continue
            clip = self._clip(REFERENCE, row.offset_ms, row.state)
            lost = clip.right - row.right
            yield (
                f"{row}: {row.accuracy:.2%} right, the reference's clip {clip.accuracy:.2%}; "
                f"allowed are {self.max_drop:g} points less",
                drop_verdict(lost, self.clips, self.max_drop),
            )
            if row.state == CARRIED:
                by_context = self._fresh(row).right - row.right
                of_reference = self._fresh(clip).right - clip.right
                yield (
                    f"{row}: {100 * by_context / self.clips:.2f} points lost after another clip, "
                    f"by the reference {100 * of_reference / self.clips:.2f}; allowed are "
                    f"{self.max_drop:g} more",
                    drop_verdict(by_context - of_reference, self.clips, self.max_drop),
                )
        if self.events:
            ours, theirs = self.events.candidate, self.events.reference
            yield (
                f"candidate events: {ours.false_rejects:.2%} of {ours.words} words missed, by the "
                f"reference {theirs.false_rejects:.2%}; allowed are {self.max_drop:g} points more",
                self.events.verdict(self.max_drop),
            )

    def _clip(self, model: str, offset_ms: float, state: str) -> Row:
        return self._row(model, None, offset_ms, state)

    def _fresh(self, row: Row) -> Row:
        return self._row(row.model, row.chunk_ms, row.offset_ms, FRESH)

    def _row(self, *key: str | float | None) -> Row:
        return next(r for r in self.rows if (r.model, r.chunk_ms, r.offset_ms, r.state) == key)


def compare_streaming(
    reference: Path,
    candidate: Path,
    clips: Sequence[Clip],
    config: StreamingConfig | None = None,
    *,
    noises: Sequence[Clip] = (),
    max_drop: float = MARGIN,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[StreamingComparison, list[InputError]]:
    """Let both hear every clip in every way; the comparison, and the recordings left out.

    A session of one length takes chunks of that length only, into which a stream cuts longer ones.
    The noises lie under the clips where they are heard in a row.

    Raises:
        SessionError: an artefact cannot be opened or answers NaN, or the two do not fit together.
        CorpusError: no clip can be used, or one has a label that the models do not know.
    """
    with open_session(reference) as a, open_session(candidate) as b:
        check_labels(reference, candidate, a, b)
        first, second = streamable(a.spec), streamable(b.spec)
        if (first.features, first.chunk_length) != (second.features, second.chunk_length):
            raise SessionError(
                f"{candidate}: features or the length of a frame are not those of {reference}; "
                "only forms of one model have the same logits"
            )
        return compare_sessions(
            a, b, clips, config, noises=noises, max_drop=max_drop, progress=progress
        )


def compare_sessions(
    reference: Session,
    candidate: Session,
    clips: Sequence[Clip],
    config: StreamingConfig | None = None,
    *,
    noises: Sequence[Clip] = (),
    max_drop: float = MARGIN,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[StreamingComparison, list[InputError]]:
    """`compare_streaming` of two artefacts that are open."""
    config = config or StreamingConfig()
    spec = streamable(reference.spec)
    truth = truth_of(clips, spec)
    with_events = config.events and bool(spec.words)
    sample_rate = spec.features.sample_rate
    _, background, errors = load(noises if with_events else (), spec)
    rng = np.random.default_rng(_SEED)
    order = rng.permutation(len(clips))
    events = Events()
    tallies: dict[tuple[str, float | None, float, str], _Tally] = {}
    count = 0
    with (
        Listener(REFERENCE, reference, len(clips)) as a,
        Listener(CANDIDATE, candidate, len(clips)) as b,
        ThreadPoolExecutor(1) as worker,
    ):
        for batch in batches(clips, order, sample_rate, errors, progress):
            count += len(batch)
            true = [truth[heard.clip.path] for heard in batch]
            for offset_ms in config.offsets_ms:
                for state in (FRESH, CARRIED):
                    is_fresh = state == FRESH
                    audio = [heard.audio(spec, offset_ms, is_fresh) for heard in batch]
                    theirs = worker.submit(a.listen_all, audio, config.chunks_ms)
                    heard_by = {
                        CANDIDATE: b.listen_all(audio, config.chunks_ms),
                        REFERENCE: theirs.result(),
                    }
                    float_clip = heard_by[REFERENCE][None]
                    expected = _answers(spec, float_clip)
                    for model, ways in heard_by.items():
                        for chunk_ms, logits in ways.items():
                            said = _answers(spec, logits)
                            tally = tallies.setdefault(
                                (model, chunk_ms, offset_ms, state), _Tally()
                            )
                            tally.right += _matches(said, true)
                            tally.agreed += _matches(said, expected)
                            tally.error = max(tally.error, _largest(logits, float_clip))
                            tally.clip_error = max(tally.clip_error, _largest(logits, ways[None]))
            if with_events:
                streams = word_streams(
                    [heard.samples for heard in batch],
                    true,
                    background,
                    sample_rate=sample_rate,
                    seconds=0,
                    rng=rng,
                )
                paths = [str(heard.clip.path) for heard in batch]
                events += hear_events(reference, candidate, streams, paths, worker)
    if not count:
        raise CorpusError("no recordings to compare on: none of the set can be read")
    return StreamingComparison(
        clips=count,
        rows=tuple(
            Row(*key, t.right, t.right / count, t.agreed / count, t.error, t.clip_error)
            for key, t in sorted(tallies.items(), key=_row_order)
        ),
        max_drop=max_drop,
        reference_tolerance=tolerance(reference),
        candidate_tolerance=tolerance(candidate),
        events=events if events.reference.words else None,
    ), errors


def tolerance(session: Session) -> float:
    """By how much the logits of a stream may differ from those of the clip."""
    return FLOAT_TOLERANCE if session.precision.startswith("fp32") else INT8_TOLERANCE


def streaming_json(comparison: StreamingComparison) -> str:
    """A comparison as the one JSON object that `compare --streaming --json` prints."""
    return json.dumps(streaming_fields(comparison), indent=1)


def streaming_fields(comparison: StreamingComparison) -> dict[str, object]:
    """A comparison and what follows from it, for JSON."""
    return (
        {
            "verdict": comparison.verdict,
            "passed": comparison.passed,
            "failures": [*comparison.differences, *comparison.losses],
            "context_loss": comparison.context_loss,
        }
        | asdict(comparison)
        | {"events": comparison.events and event_fields(comparison.events)}
    )


@dataclass
class _Tally:
    right: int = 0
    agreed: int = 0
    error: float = 0.0
    clip_error: float = 0.0


def _row_order(item: tuple[tuple[str, float | None, float, str], _Tally]) -> tuple[object, ...]:
    model, chunk_ms, offset_ms, state = item[0]
    return model == CANDIDATE, state == CARRIED, chunk_ms or 0, offset_ms


def _answers(spec: ModelSpec, logits: Sequence[Array]) -> list[str]:
    return [clip_answer(spec, clip) for clip in logits]


def _matches(said: Sequence[str], expected: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(said, expected, strict=True))


def _largest(logits: Sequence[Array], expected: Sequence[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(logits, expected, strict=True))
