"""Two artefacts on the same labelled recordings: accuracies, agreement, the clips that flipped."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cnngru_edge.calibration.corpus import Clip, match_labels
from cnngru_edge.models.errors import AudioError, CorpusError, SessionError
from cnngru_edge.runtime.audio import Samples, read_audio
from cnngru_edge.runtime.decode import clip_scores
from cnngru_edge.runtime.session import Session, open_session
from cnngru_edge.runtime.stream import clip_logits

MAX_DROP = 0.5
"""Percentage points of accuracy that quantization may cost."""

_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Flip:
    """A clip that the two models answer differently."""

    path: str
    true: str
    reference: str
    candidate: str


@dataclass(frozen=True)
class Comparison:
    """Accuracies as shares of the clips, delta in percentage points."""

    clips: int
    reference_accuracy: float
    candidate_accuracy: float
    delta: float
    agreement: float
    flips: tuple[Flip, ...]
    max_drop: float

    @property
    def verdict(self) -> str:
        """`equal`, `worse` or `not enough data`: see `drop_verdict`."""
        return drop_verdict(round(-self.delta / 100 * self.clips), self.clips, self.max_drop)

    @property
    def passed(self) -> bool:
        """Whether the candidate is not shown to be worse."""
        return self.verdict != "worse"


def compare(
    reference: Path,
    candidate: Path,
    clips: Sequence[Clip],
    *,
    max_drop: float = MAX_DROP,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[Comparison, list[AudioError]]:
    """Let both answer every clip; the comparison, and the recordings left out.

    Raises:
        SessionError: an artefact cannot be opened, or the two have different labels.
        CorpusError: no clip can be used, or one has a label that the models do not know.
    """
    answers: list[tuple[str, str, str]] = []  # true, reference, candidate
    paths, errors = [], []
    with open_session(reference) as a, open_session(candidate) as b:
        check_labels(reference, candidate, a, b)
        truth = match_labels(clips, a.spec.labels)
        for clip in clips:
            try:
                samples = read_audio(clip.path, a.spec.features.sample_rate).samples
            except AudioError as e:
                errors.append(e)
            else:
                answers.append((truth[clip.path], answer(a, samples), answer(b, samples)))
                paths.append(str(clip.path))
            progress(1)
    if not answers:
        raise CorpusError("no recordings to compare on: none of the set can be read")
    true, first, second = (np.array(column) for column in zip(*answers, strict=True))
    flips = tuple(Flip(paths[i], *answers[i]) for i in np.flatnonzero(first != second))
    right_first, right_second = int((first == true).sum()), int((second == true).sum())
    return Comparison(
        clips=len(answers),
        reference_accuracy=right_first / len(answers),
        candidate_accuracy=right_second / len(answers),
        delta=100 * (right_second - right_first) / len(answers),
        agreement=1 - len(flips) / len(answers),
        flips=flips,
        max_drop=max_drop,
    ), errors


def drop_verdict(lost: int, clips: int, max_drop: float) -> str:
    """`equal`: no more was lost than `max_drop`; `worse`: more, and not by chance.

    `not enough data`: more, but of so few clips that a candidate which really loses `max_drop`
    would often do so too (exact binomial test, one-sided, 5 %).
    """
    if lost <= max_drop / 100 * clips:
        return "equal"
    from scipy.stats import binom  # not on a device, which can compare all the same

    chance = binom.sf(lost - 1, clips, max_drop / 100)
    return "not enough data" if chance > _SIGNIFICANCE else "worse"


def check_labels(reference: Path, candidate: Path, a: Session, b: Session) -> None:
    """Refuse two models whose labels are not the same, in the same order."""
    if a.spec.labels != b.spec.labels:
        raise SessionError(
            f"{candidate}: labels are {', '.join(b.spec.labels)}; those of {reference} are "
            f"{', '.join(a.spec.labels)}"
        )


def comparison_json(comparison: Comparison) -> str:
    """A comparison as the one JSON object that `compare --json` prints."""
    verdict = {"verdict": comparison.verdict, "passed": comparison.passed}
    return json.dumps(asdict(comparison) | verdict, indent=1)


def answer(session: Session, samples: Samples) -> str:
    """The label that a model gives a clip."""
    scores = clip_scores(session.spec, clip_logits(session, samples))
    return session.spec.labels[int(scores.argmax())]
