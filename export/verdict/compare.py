"""Two artefacts on the same labelled recordings: a verdict, its reasons, the clips that flipped."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.verdict.answers import (
    RESULTS_SUFFIX,
    Answered,
    Artefact,
    Conditions,
    Results,
    answer_clips,
    check_conditions,
)
from cnngru_edge.export.verdict.error_rate import ErrorRates, Heard, error_rates
from cnngru_edge.export.verdict.statistics import (
    BETTER,
    CONFIDENCE,
    EQUAL,
    NOT_ENOUGH,
    WORSE,
    Pairs,
    clips_needed,
    cohen_kappa,
    mcnemar_exact,
    newcombe_interval,
    pairs_of,
    verdict_of,
)
from cnngru_edge.models.errors import CorpusError, InputError, SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.session import Session

MARGIN = 0.5
"""Percentage points of accuracy, or of WER, within which two models count as equal."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Flip:
    """A clip that the two models answer differently."""

    path: str
    sha256: str  # of the file
    condition: str
    true: str
    reference: str
    candidate: str
    reference_margin: float  # best probability less the second; of a text its score
    candidate_margin: float


@dataclass(frozen=True)
class Condition:
    """Both models on all clips in one condition; differences in percentage points."""

    condition: str
    clips: int
    reference_accuracy: float
    candidate_accuracy: float
    delta: float  # candidate less reference
    delta_ci: Interval
    confidence: float
    mcnemar_p: float
    kappa: float
    agreement: float
    verdict: str
    clips_needed: int | None


@dataclass(frozen=True)
class Group:
    """The clips of one class or speaker, clean."""

    group: str
    clips: int
    reference_accuracy: float
    candidate_accuracy: float
    delta: float
    delta_ci95: Interval
    flips: int


@dataclass(frozen=True)
class Comparison:
    """Accuracies as shares of the clips, differences in percentage points.

    Of the clean clips, but for `conditions`. Where there are several, each has an interval of a
    confidence that makes all of them together hold at 95 % (Bonferroni).

    Of CTC models the answers are texts, right if all of it is. Verdicts are then by WER: see
    `error_rates`. There are no classes and no confusions.
    """

    reference: Artefact
    candidate: Artefact
    labels: tuple[str, ...]
    sample_rate: int | None  # None where no recordings were heard
    clips: int
    left_out: int  # that only one of the two has heard
    margin: float
    conditions_sha256: str
    delta_ci95: Interval
    conditions: tuple[Condition, ...]
    by_class: tuple[Group, ...]
    by_speaker: tuple[Group, ...]  # those who lose most first
    confusion: Mapping[str, list[list[int]]]  # reference, candidate: rows truth, columns answer
    flips: tuple[Flip, ...]
    error_rates: ErrorRates | None = None  # None where the answers are labels

    @property
    def clean(self) -> Condition:
        """The condition without noise."""
        return self.conditions[0]

    @property
    def verdict(self) -> str:
        """`equal`, `better`, `worse` or `not enough data`: the gravest of the conditions."""
        verdicts = {condition.verdict for condition in self.conditions}
        return next(v for v in (WORSE, NOT_ENOUGH, BETTER, EQUAL) if v in verdicts)

    @property
    def passed(self) -> bool:
        """Whether the candidate is proven to be no worse than the margin allows."""
        return self.verdict in {EQUAL, BETTER}

    @property
    def clips_needed(self) -> int | None:
        """About how many clips would settle what is not settled."""
        return max((c.clips_needed for c in self.conditions if c.clips_needed), default=None)

    @property
    def change(self) -> str:
        """What the verdict of the clean clips rests on: the difference and its interval."""
        if self.error_rates is None:
            return f"{interval_text(self.clean.delta, self.delta_ci95)} points (95 %)"
        delta = self.error_rates.conditions[0].rates.delta
        return f"{interval_text(delta, self.error_rates.delta_ci95)} points of WER (95 %)"

    @property
    def summary(self) -> str:
        """The verdict and its reason, in a line."""
        first, second, what = self.clean.reference_accuracy, self.clean.candidate_accuracy, ""
        if self.error_rates:
            rates = self.error_rates.conditions[0].rates
            first, second, what = rates.reference_wer, rates.candidate_wer, "WER of "
        line = (
            f"{self.clips} clips: {what}reference {first:.2%}, candidate {second:.2%}, "
            f"{self.change}, agreement {self.clean.agreement:.2%}: {self.verdict}"
        )
        if self.verdict == NOT_ENOUGH:
            needed = f"about {self.clips_needed:,}" if self.clips_needed else "more than 10 million"
            line += f" for a margin of {self.margin:g}; {needed} clips would be enough"
        return line


def compare(
    reference: Path,
    candidate: Path,
    root: Path,
    clips: Sequence[Clip],
    *,
    conditions: Conditions | None = None,
    margin: float = MARGIN,
    workers: int = 1,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[Comparison, list[InputError]]:
    """Let both answer every clip; the comparison, and the recordings left out.

    Args:
        reference: an artefact, or a `.json` of results that were saved, here or elsewhere.
        candidate: the same.
        root: the corpus's folder; clips are known by their path from it.
        clips: to answer.
        conditions: how they are heard.
        margin: see MARGIN.
        workers: processes for each artefact.
        progress: called with the number of answers that are newly there; there are two a clip.

    Raises:
        SessionError: an artefact cannot be opened, the two have different labels, or they have not
            heard the same.
        CorpusError: no clip can be used, or one has a label that the models do not know.
    """
    answers, errors = answers_of(
        (reference, candidate),
        root,
        clips,
        conditions or Conditions(),
        workers=workers,
        progress=progress,
    )
    return compare_results(*answers, margin=margin), errors


def answers_of(
    artefacts: Sequence[Path],
    root: Path,
    clips: Sequence[Clip],
    conditions: Conditions,
    *,
    workers: int = 1,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[list[Results], list[InputError]]:
    """The answers of each artefact, and the recordings left out; see `compare`."""
    kept = {path: Results.load(path) for path in artefacts if path.suffix == RESULTS_SUFFIX}
    if any(path not in kept for path in artefacts):  # before the long part
        for path, results in kept.items():
            check_conditions(str(path), results.conditions, results.conditions_sha256, conditions)
    first, *others = [(path, _labels_of(path, kept)) for path in artefacts]
    for path, labels in others:
        if labels != first[1]:
            raise SessionError(_other_labels(str(first[0]), str(path), first[1], labels))
    found: list[Results] = []
    errors: dict[str, InputError] = {}  # each once, though both cannot read it
    for path in artefacts:
        if path in kept:
            found.append(kept[path])
            progress(len(clips))
            continue
        results, more = answer_clips(
            path, root, clips, conditions, workers=workers, progress=progress
        )
        found.append(results)
        errors |= {str(error): error for error in more}
    return found, list(errors.values())


def compare_results(reference: Results, candidate: Results, *, margin: float) -> Comparison:
    """Both models' answers to the clips that both have heard; see `compare`."""
    _check_same(reference, candidate)
    heard = {clip.path: clip for clip in reference.clips}
    both = [(heard[c.path], c) for c in candidate.clips if c.path in heard]
    for a, b in both:
        if (a.sha256, a.true) != (b.sha256, b.true):
            raise CorpusError(
                f"{b.path}: not the recording, or not the label, that {reference.artefact.path} "
                "has answered; compare on the same files"
            )
    if not both:
        raise CorpusError(
            f"{reference.artefact.path} and {candidate.artefact.path} have no clip in common; "
            "compare on the same corpus"
        )
    names = reference.conditions
    confidence = 1 - (1 - CONFIDENCE) / len(names)
    measured = [_condition(name, both, i, margin, confidence) for i, name in enumerate(names)]
    rates = None
    if reference.writes_text:
        heard_texts = [
            Heard(a.path, a.speaker, a.true, *(_answers(one) for one in (a, b))) for a, b in both
        ]
        rates = error_rates(names, heard_texts, margin=margin, confidence=confidence)
        measured = [
            replace(of_texts, verdict=of_words.verdict, clips_needed=of_words.clips_needed)
            for of_texts, of_words in zip(measured, rates.conditions, strict=True)
        ]
    # A text is no class.
    by_class = _groups(both, "true") if rates is None else []
    order = {label: i for i, label in enumerate(reference.labels)}
    return Comparison(
        reference=reference.artefact,
        candidate=candidate.artefact,
        labels=reference.labels,
        sample_rate=reference.sample_rate,
        clips=len(both),
        left_out=len(reference.clips) + len(candidate.clips) - 2 * len(both),
        margin=margin,
        conditions_sha256=reference.conditions_sha256,
        delta_ci95=_points(newcombe_interval(_pairs(both, 0))),
        conditions=tuple(measured),
        by_class=tuple(sorted(by_class, key=lambda group: order[group.group])),
        by_speaker=tuple(
            sorted(_groups(both, "speaker"), key=lambda group: (group.delta, -group.flips))
        ),
        confusion={}
        if rates
        else {
            "reference": _confusion([a for a, _ in both], order),
            "candidate": _confusion([b for _, b in both], order),
        },
        flips=tuple(flip for i, name in enumerate(names) for flip in _flips(both, i, name)),
        error_rates=rates,
    )


def check_labels(reference: Path, candidate: Path, a: Session, b: Session) -> None:
    """Refuse two models whose labels are not the same, in the same order."""
    if a.spec.labels != b.spec.labels:
        raise SessionError(
            _other_labels(str(reference), str(candidate), a.spec.labels, b.spec.labels)
        )


def comparison_fields(comparison: Comparison) -> dict[str, Any]:
    """A comparison as the object that `compare --json` prints."""
    clean = comparison.clean
    first = ("reference_accuracy", "candidate_accuracy", "delta", "mcnemar_p", "kappa", "agreement")
    return {
        "verdict": comparison.verdict,
        "passed": comparison.passed,
        **{name: getattr(clean, name) for name in first},
        "clips_needed": comparison.clips_needed,
        **asdict(comparison),
    }


def comparison_json(comparison: Comparison) -> str:
    """The same as text."""
    return json.dumps(comparison_fields(comparison), indent=1)


def interval_text(delta: float, interval: Interval) -> str:
    """A difference and its interval, as `-0.08 (-0.59 to +0.41)`."""
    return f"{delta:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"


def _check_same(reference: Results, candidate: Results) -> None:
    """Refuse answers that cannot be put side by side."""
    names = reference.artefact.path, candidate.artefact.path
    if reference.labels != candidate.labels:
        raise SessionError(_other_labels(*names, reference.labels, candidate.labels))
    heard = [(r.conditions, r.conditions_sha256) for r in (reference, candidate)]
    if heard[0] != heard[1]:
        raise SessionError(
            f"{names[1]}: answers to clips heard {', '.join(candidate.conditions)}, those of "
            f"{names[0]} {', '.join(reference.conditions)}; give both the same --noise, --snr and "
            "--seed"
        )


def _labels_of(path: Path, kept: Mapping[Path, Results]) -> tuple[str, ...]:
    if path in kept:
        return kept[path].labels
    with open_session(path) as session:
        labels: tuple[str, ...] = session.spec.labels
    return labels


def _other_labels(reference: str, candidate: str, *labels: Sequence[str]) -> str:
    first, second = (", ".join(names) for names in labels)
    return f"{candidate}: labels are {second}; those of {reference} are {first}"


def _answers(clip: Answered) -> tuple[str, ...]:
    return tuple(answer.label for answer in clip.answers)


def _pairs(both: Sequence[tuple[Answered, Answered]], condition: int) -> Pairs:
    return pairs_of(
        [a.true for a, _ in both],
        [a.answers[condition].label for a, _ in both],
        [b.answers[condition].label for _, b in both],
    )


def _condition(
    name: str,
    both: Sequence[tuple[Answered, Answered]],
    number: int,
    margin: float,
    confidence: float,
) -> Condition:
    said = [[one[side].answers[number].label for one in both] for side in (0, 1)]
    pairs = _pairs(both, number)
    return Condition(
        condition=name,
        clips=len(both),
        reference_accuracy=pairs.reference_right / len(both),
        candidate_accuracy=pairs.candidate_right / len(both),
        delta=100 * pairs.delta,
        delta_ci=_points(newcombe_interval(pairs, confidence)),
        confidence=confidence,
        mcnemar_p=mcnemar_exact(int(pairs.reference_only), int(pairs.candidate_only)),
        kappa=cohen_kappa(*said),
        agreement=sum(a == b for a, b in zip(*said, strict=True)) / len(both),
        verdict=verdict_of(pairs, margin, confidence),
        clips_needed=clips_needed(pairs, margin, confidence),
    )


def _groups(both: Sequence[tuple[Answered, Answered]], key: str) -> list[Group]:
    """The clips by class or speaker; those of unknown speakers are in none."""
    members: dict[str, list[tuple[Answered, Answered]]] = defaultdict(list)
    for a, b in both:
        if name := getattr(a, key):
            members[name].append((a, b))
    found = []
    for name, inside in members.items():
        pairs = _pairs(inside, 0)
        found.append(
            Group(
                group=name,
                clips=len(inside),
                reference_accuracy=pairs.reference_right / len(inside),
                candidate_accuracy=pairs.candidate_right / len(inside),
                delta=100 * pairs.delta,
                delta_ci95=_points(newcombe_interval(pairs)),
                flips=sum(a.answers[0].label != b.answers[0].label for a, b in inside),
            )
        )
    return found


def _confusion(clips: Sequence[Answered], order: Mapping[str, int]) -> list[list[int]]:
    counts = np.zeros((len(order), len(order)), int)
    for clip in clips:
        counts[order[clip.true], order[clip.answers[0].label]] += 1
    table: list[list[int]] = counts.tolist()
    return table


def _flips(both: Sequence[tuple[Answered, Answered]], number: int, name: str) -> list[Flip]:
    found = []
    for a, b in both:
        first, second = a.answers[number], b.answers[number]
        if first.label != second.label:
            found.append(
                Flip(
                    a.path,
                    a.sha256,
                    name,
                    a.true,
                    first.label,
                    second.label,
                    first.margin,
                    second.margin,
                )
            )
    return found


def _points(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]
