"""Word and character error rates, and whether a model makes more errors than another.

An error is a word, or character, that was replaced, left out or put in; the rate is their number
over that of the truth's words. Alignments are jiwer's.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cnngru_edge.export.verdict.statistics import BETTER, CONFIDENCE, EQUAL, NOT_ENOUGH, WORSE
from cnngru_edge.models.errors import BackendMissing

if TYPE_CHECKING:
    from jiwer import CharacterOutput, WordOutput

SUBSTITUTION, DELETION, INSERTION = "substitution", "deletion", "insertion"

Interval = tuple[float, float]
Counts = npt.NDArray[np.int64]

_KINDS = {"substitute": SUBSTITUTION, "delete": DELETION, "insert": INSERTION}
_RESAMPLES = 10_000
_TOGETHER = 4_000_000  # clips drawn at a time
_SEED = 0
_MOST_CLIPS = 10_000_000


@dataclass(frozen=True)
class Edit:
    """A word or character that is not as it should be."""

    kind: str  # SUBSTITUTION, DELETION or INSERTION
    true: str  # "" of an insertion
    said: str  # "" of a deletion

    def __str__(self) -> str:
        return {SUBSTITUTION: f"{self.true}>{self.said}", DELETION: f"-{self.true}"}.get(
            self.kind, f"+{self.said}"
        )


@dataclass(frozen=True)
class Errors:
    """How many words or characters are not as they should be, of how many."""

    length: int  # of the truth
    substitutions: int
    deletions: int
    insertions: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each word or character of the truth; can be above 1."""
        return self.total / max(1, self.length)


@dataclass(frozen=True)
class Aligned:
    """A text beside the truth."""

    words: Errors
    characters: Errors
    edits: tuple[Edit, ...]  # of words, in their order


@dataclass(frozen=True)
class Rates:
    """Both models on the same clips; rates as shares, differences in percentage points.

    A difference is the candidate's less the reference's: above zero it makes more errors.
    """

    clips: int
    reference_wer: float
    candidate_wer: float
    delta: float  # of the WER
    delta_ci: Interval
    reference_cer: float
    candidate_cer: float
    delta_cer: float
    delta_cer_ci: Interval
    confidence: float
    reference_words: Errors
    candidate_words: Errors


@dataclass(frozen=True)
class ConditionRates:
    """The same in one condition, and what it means."""

    condition: str
    rates: Rates
    verdict: str
    clips_needed: int | None


@dataclass(frozen=True)
class SpeakerRates:
    """The same of one speaker, clean."""

    speaker: str
    rates: Rates


@dataclass(frozen=True)
class FlipEdits:
    """What both models get wrong in a clip of which they write different texts."""

    path: str
    condition: str
    reference: tuple[Edit, ...]
    candidate: tuple[Edit, ...]


@dataclass(frozen=True)
class Heard:
    """A clip, and what both models wrote of it in each condition."""

    path: str
    speaker: str
    true: str
    reference: tuple[str, ...]
    candidate: tuple[str, ...]


@dataclass(frozen=True)
class ErrorRates:
    """What two models write, judged."""

    delta_ci95: Interval  # of the WER of the clean clips
    conditions: tuple[ConditionRates, ...]
    by_speaker: tuple[SpeakerRates, ...]  # those who lose most first
    flips: tuple[FlipEdits, ...]


def error_rates(
    conditions: Sequence[str], clips: Sequence[Heard], *, margin: float, confidence: float
) -> ErrorRates:
    """What two models write in each condition, the clean one first, beside the truth.

    Args:
        conditions: their names.
        clips: all of them.
        margin: percentage points of WER within which the two count as equal.
        confidence: of the interval of each condition.

    Raises:
        BackendMissing: jiwer is not installed.
    """
    true = [clip.true for clip in clips]
    found: list[ConditionRates] = []
    flips: list[FlipEdits] = []
    for i, name in enumerate(conditions):
        sides = [clip.reference[i] for clip in clips], [clip.candidate[i] for clip in clips]
        reference, candidate = (align(true, texts) for texts in sides)
        rates = compare_rates(reference, candidate, confidence)
        verdict = rate_verdict(rates.delta_ci, margin)
        found.append(ConditionRates(name, rates, verdict, clips_needed(rates, margin)))
        flips += [
            FlipEdits(clip.path, name, a.edits, b.edits)
            for clip, a, b in zip(clips, reference, candidate, strict=True)
            if clip.reference[i] != clip.candidate[i]
        ]
        if i == 0:
            clean = compare_rates(reference, candidate).delta_ci
            speakers = _by_speaker([clip.speaker for clip in clips], reference, candidate)
    return ErrorRates(clean, tuple(found), speakers, tuple(flips))


def align(true: Sequence[str], said: Sequence[str]) -> list[Aligned]:
    """Each text beside the truth.

    Raises:
        BackendMissing: jiwer is not installed.
    """
    try:
        from jiwer import process_characters, process_words
    except ModuleNotFoundError as e:
        if e.name != "jiwer":
            raise
        raise BackendMissing(
            "jiwer is not installed: pip install jiwer; or keep the answers of this machine with "
            "--save-results, and compare them where it is"
        ) from e
    words = _edits(process_words(list(true), list(said)))
    characters = _edits(process_characters(list(true), list(said)))
    return [
        Aligned(_errors(of_words, len(t.split())), _errors(of_characters, len(t)), of_words)
        for t, of_words, of_characters in zip(true, words, characters, strict=True)
    ]


def compare_rates(
    reference: Sequence[Aligned], candidate: Sequence[Aligned], confidence: float = CONFIDENCE
) -> Rates:
    """Both models on the same clips."""
    words = [one.words for one in reference], [one.words for one in candidate]
    characters = [one.characters for one in reference], [one.characters for one in candidate]
    of_words, of_characters = _sums(words), _sums(characters)
    first, second = of_words
    return Rates(
        clips=len(reference),
        reference_wer=first.rate,
        candidate_wer=second.rate,
        delta=_delta(*of_words),
        delta_ci=_interval(*words, confidence),
        reference_cer=of_characters[0].rate,
        candidate_cer=of_characters[1].rate,
        delta_cer=_delta(*of_characters),
        delta_cer_ci=_interval(*characters, confidence),
        confidence=confidence,
        reference_words=first,
        candidate_words=second,
    )


def rate_verdict(interval: Interval, margin: float) -> str:
    """What the interval of a difference in error rate says, both in percentage points.

    `equal`: it lies within the margin. `worse`: it lies above it, so that more than the margin is
    lost for sure. `better`: it lies below zero, and not within the margin. `not enough data`: any
    other, which more clips would settle.
    """
    low, high = interval
    if -margin <= low and high <= margin:
        return EQUAL
    return WORSE if low > margin else BETTER if high < 0 else NOT_ENOUGH


def clips_needed(rates: Rates, margin: float) -> int | None:
    """About how many clips of the same kind would settle it.

    The width of the interval falls with the square root of their number. None where it is settled,
    and where it would take more than ten million: the loss is too close to the margin.
    """
    delta, (low, high) = rates.delta, rates.delta_ci
    if rate_verdict(rates.delta_ci, margin) != NOT_ENOUGH:
        return None
    below, above = max(delta - low, 1e-9), max(high - delta, 1e-9)
    shrunk = max(  # to be equal, worse or better
        min((margin - delta) / above, (margin + delta) / below),
        (delta - margin) / below,
        -delta / above,
    )
    needed = math.ceil(rates.clips / shrunk**2) if shrunk > 0 else _MOST_CLIPS
    return needed if needed < _MOST_CLIPS else None


def bootstrap_interval(
    errors: Counts, lengths: Counts, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Confidence interval of the sum of `errors` over that of `lengths`, resampled by clip.

    A paired bootstrap: M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR
    performance evaluation", ICASSP 2004. Two clips more are drawn from, of which one has an error
    more and one an error less: of few clips that do not differ, the interval had no width without.

    Args:
        errors: (N,), of the candidate less those of the reference.
        lengths: (N,), of the truth.
        confidence: share of the resamples within it.
    """
    errors = np.append(errors, [1, -1])
    mean = max(1.0, float(lengths.mean()))
    sizes = np.append(lengths, [mean, mean])
    rng = np.random.default_rng(_SEED)
    count = len(errors)
    step = max(1, _TOGETHER // count)
    found = []
    for start in range(0, _RESAMPLES, step):
        drawn = rng.integers(count, size=(min(step, _RESAMPLES - start), count))
        found.append(errors[drawn].sum(1) / np.maximum(sizes[drawn].sum(1), 1))
    outside = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [outside, 1 - outside])
    return float(low), float(high)


def _by_speaker(
    speakers: Sequence[str], reference: Sequence[Aligned], candidate: Sequence[Aligned]
) -> tuple[SpeakerRates, ...]:
    """The clips of each speaker, those who lose most first; unknown speakers are left out."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, speaker in enumerate(speakers):
        if speaker:
            members[speaker].append(i)
    found = [
        SpeakerRates(
            speaker, compare_rates([reference[i] for i in inside], [candidate[i] for i in inside])
        )
        for speaker, inside in members.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.rates.delta))


def _edits(output: "WordOutput | CharacterOutput") -> list[tuple[Edit, ...]]:
    found = []
    texts = zip(output.references, output.hypotheses, output.alignments, strict=True)
    for true, said, chunks in texts:
        edits: list[Edit] = []
        for chunk in chunks:
            if chunk.type == "equal":
                continue
            before = true[chunk.ref_start_idx : chunk.ref_end_idx]
            after = said[chunk.hyp_start_idx : chunk.hyp_end_idx]
            size = max(len(before), len(after))  # one of them may be empty
            before, after = ([*part, *[""] * (size - len(part))] for part in (before, after))
            kind = _KINDS[chunk.type]
            edits += [Edit(kind, a, b) for a, b in zip(before, after, strict=True)]
        found.append(tuple(edits))
    return found


def _errors(edits: Sequence[Edit], length: int) -> Errors:
    kinds = [edit.kind for edit in edits]
    return Errors(length, *(kinds.count(kind) for kind in (SUBSTITUTION, DELETION, INSERTION)))


def _sums(sides: Sequence[Sequence[Errors]]) -> tuple[Errors, Errors]:
    names = ("length", "substitutions", "deletions", "insertions")
    first, second = (
        Errors(*(sum(getattr(one, name) for one in side) for name in names)) for side in sides
    )
    return first, second


def _delta(reference: Errors, candidate: Errors) -> float:
    return 100 * (candidate.total - reference.total) / max(1, reference.length)


def _interval(
    reference: Sequence[Errors], candidate: Sequence[Errors], confidence: float
) -> Interval:
    more = [b.total - a.total for a, b in zip(reference, candidate, strict=True)]
    lengths = np.array([one.length for one in reference])
    low, high = bootstrap_interval(np.array(more), lengths, confidence)
    return 100 * low, 100 * high
