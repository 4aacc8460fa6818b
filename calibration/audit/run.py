"""Is this audio fit to calibrate with? What is wrong with it, with which clips, and what to do."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from rich.console import Console

from cnngru_edge.calibration.audit import findings
from cnngru_edge.calibration.audit.findings import Finding, Heard, Severity
from cnngru_edge.calibration.audit.soundness import listen
from cnngru_edge.calibration.corpus.read import EVAL, Corpus, calibration_clips
from cnngru_edge.calibration.ranges.choose import MIN_CLIPS, Ranges, Subset
from cnngru_edge.models.errors import AudioError
from cnngru_edge.models.spec.stream import FeatureSpec

_SEVERITIES: tuple[Severity, ...] = get_args(Severity)

STABLE = 0.1
"""Share by which a scale may still move: one a tenth too large costs 0.8 dB of SQNR."""

_CLIPS_SHOWN = 5


@dataclass(frozen=True)
class Audit:
    """What was found, errors first."""

    clips: int  # that could be read
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Nothing should be calibrated with this."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def summary(self) -> str:
        """In one line."""
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(
            f"{counts[severity]} {severity}{'s' if counts[severity] > 1 else ''}"
            for severity in ("error", "warning")
            if counts[severity]
        )
        return (
            f"{self.clips} recordings, {self.seconds:,.0f} s: "
            f"{'not fit' if self.refused else 'fit'} to calibrate with{found and f'; {found}'}"
        )

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        return asdict(self) | {"refused": self.refused}


def audit(
    corpus: Corpus,
    *,
    least: int = MIN_CLIPS,
    sample_rate: int = FeatureSpec.sample_rate,
    progress: Callable[[int], None] = lambda clips: None,
) -> Audit:
    """Listen to the clips that calibrate, and to those that evaluate, one at a time.

    Args:
        corpus: from `find_recordings`; that of `read_corpus` has no speaker in two sets any more.
        least: clips that a calibration needs, see `calibration_clips`.
        sample_rate: of the model, in Hz.
        progress: called with the number of clips that are newly done.
    """
    heard: list[Heard] = []
    errors: dict[str, AudioError] = {}
    for clip in (*calibration_clips(corpus, least), *corpus.of(EVAL)):
        name = findings.name_in(corpus, clip.path)
        try:
            heard.append(Heard(clip, name, listen(clip.path)))
        except AudioError as e:
            errors[name] = e
        progress(1)
    found = [*findings.unreadable(errors, len(heard)), *findings.too_few(heard, least)]
    if heard:
        found += findings.of_all(corpus, heard, sample_rate)
    return Audit(len(heard), sum(h.sound.duration_s for h in heard), _ordered(found))


def with_scales(audit: Audit, ranges: Ranges) -> Audit:
    """The audit, and whether the scales of a graph that its clips calibrated are stable."""
    return replace(audit, findings=_ordered([*audit.findings, _scales(ranges)]))


def print_audit(audit: Audit, console: Console) -> None:
    """What was found, for people: of long lists of clips the first."""

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    say(audit.summary)
    for finding in audit.findings:
        say(f"{finding.severity}: {finding.check}: {finding.text}")
        if finding.clips:
            more = len(finding.clips) - _CLIPS_SHOWN
            rest = f" and {more} more; --json lists them all" if more > 0 else ""
            say(f"    {', '.join(finding.clips[:_CLIPS_SHOWN])}{rest}")
        if finding.advice:
            say(f"    -> {finding.advice}")


def _ordered(found: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _scales(ranges: Ranges) -> Finding:
    """Whether they would still move with more clips, and how many are enough."""
    if not ranges.convergence:
        return Finding("scales", "note", "too few recordings to tell whether the scales are stable")
    half = ranges.convergence[-1]
    if moved := _moved(half, ranges):
        most = ", ".join(f"{name} by {share:.0%}" for name, share in moved.items())
        return Finding(
            "scales",
            "warning",
            f"{len(moved)} of {len(ranges.tensors)} scales moved by more than {STABLE:.0%} from "
            f"{half.clips} to {ranges.clips} recordings: {most}; more than {ranges.clips} are "
            "needed",
            "add recordings, of other speakers and rooms; minmax takes the most, for it follows "
            "the loudest sample",
        )
    enough = half.clips
    for subset in reversed(ranges.convergence):
        if _moved(subset, ranges):
            break
        enough = subset.clips
    return Finding(
        "scales",
        "note",
        f"{enough} recordings are enough for scales within {STABLE:.0%} of those of all "
        f"{ranges.clips}",
    )


def _moved(subset: Subset, ranges: Ranges) -> dict[str, float]:
    """Tensors whose scale is further than STABLE from the whole's, the furthest first."""
    moves = {
        name: abs(subset.tensors[name] / tensor.amax - 1)
        for name, tensor in ranges.tensors.items()
        if tensor.amax
    }
    return {n: m for n, m in sorted(moves.items(), key=lambda move: -move[1]) if m > STABLE}
