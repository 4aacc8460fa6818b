"""The events that two models make of the same words in a row, and which words only one finds."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field

from cnngru_edge.export.verdict.long_streams import (
    LongStream,
    Score,
    Word,
    detect,
    find_words,
    score,
    stream_logits,
)
from cnngru_edge.export.verdict.statistics import EQUAL, NOT_ENOUGH, WORSE, Pairs, verdict_of
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.session import Session


@dataclass(frozen=True)
class Events:
    """What both models are worth, and the recordings of the words that only one of them finds."""

    reference: Score = field(default_factory=Score)
    candidate: Score = field(default_factory=Score)
    reference_only: tuple[str, ...] = ()
    candidate_only: tuple[str, ...] = ()

    @property
    def pairs(self) -> Pairs:
        """The words that both find, one, or neither."""
        first, second = len(self.reference_only), len(self.candidate_only)
        neither = self.reference.misses - second
        return Pairs(self.reference.words - neither - first - second, first, second, neither)

    def verdict(self, max_drop: float) -> str:
        """`equal`, unless the candidate misses more words: `worse`, or `not enough data` to tell.

        More than `max_drop` percentage points of the words; surely, by the interval of the paired
        difference.
        """
        if -100 * self.pairs.delta <= max_drop:
            return EQUAL
        return WORSE if verdict_of(self.pairs, max_drop) == WORSE else NOT_ENOUGH

    def __add__(self, other: "Events") -> "Events":
        return Events(
            self.reference + other.reference,
            self.candidate + other.candidate,
            self.reference_only + other.reference_only,
            self.candidate_only + other.candidate_only,
        )

    def __str__(self) -> str:
        return (
            f"{self.reference.words} words in {self.reference.hours:.2f} h of streams: reference "
            f"{_in_words(self.reference)}; candidate {_in_words(self.candidate)} (95 %); found by "
            f"one only: {len(self.reference_only)} by the reference, {len(self.candidate_only)} by "
            "the candidate"
        )


def hear_events(
    reference: Session,
    candidate: Session,
    streams: Sequence[LongStream],
    paths: Sequence[str],
    worker: Executor,
) -> Events:
    """Let both hear the streams, the reference in `worker`.

    Args:
        reference: a session.
        candidate: another, of a model with the same labels.
        streams: words in a row.
        paths: of their clips, by number.
        worker: hears the reference meanwhile.
    """
    theirs = worker.submit(_hear, reference, streams)
    of_candidate, found_by_candidate = _hear(candidate, streams)
    of_reference, found_by_reference = theirs.result()
    reference_only: list[str] = []
    candidate_only: list[str] = []
    for (word, a), (_, b) in zip(found_by_reference, found_by_candidate, strict=True):
        if a != b:
            (reference_only if a else candidate_only).append(paths[word.clip])
    return Events(of_reference, of_candidate, tuple(reference_only), tuple(candidate_only))


def event_fields(events: Events) -> dict[str, object]:
    """Events and what follows from them, for JSON."""
    return asdict(events) | {
        "reference": _score_fields(events.reference),
        "candidate": _score_fields(events.candidate),
    }


def _hear(session: Session, streams: Sequence[LongStream]) -> tuple[Score, list[tuple[Word, bool]]]:
    spec = streamable(session.spec)
    total, words = Score(), []
    for stream, logits in zip(streams, stream_logits(session, streams), strict=True):
        found = detect(spec, logits)
        total += score(found, stream, spec)
        words += find_words(found, stream, spec)
    return total, words


def _score_fields(found: Score) -> dict[str, object]:
    return asdict(found) | {
        name: getattr(found, name)
        for name in (
            "hours",
            "false_accepts_per_hour",
            "false_accepts_interval",
            "false_rejects",
            "false_rejects_interval",
        )
    }


def _in_words(found: Score) -> str:
    accepts_low, accepts_high = found.false_accepts_interval
    rejects_low, rejects_high = (100 * share for share in found.false_rejects_interval)
    return (
        f"{found.false_accepts_per_hour:.1f} false accepts/h ({accepts_low:.1f}-"
        f"{accepts_high:.1f}), {found.false_rejects:.1%} false rejects "
        f"({rejects_low:.1f}-{rejects_high:.1f})"
    )
