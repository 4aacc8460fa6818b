"""Paired statistics of two models' answers to the same clips; the standard library is enough."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
_MOST_CLIPS = 10_000_000  # nobody has more

EQUAL, WORSE, BETTER, NOT_ENOUGH = "equal", "worse", "better", "not enough data"


@dataclass(frozen=True)
class Pairs:
    """How many clips the two answer right: the 2 x 2 table of paired proportions."""

    both: float
    reference_only: float
    candidate_only: float
    neither: float

    @property
    def clips(self) -> float:
        """All of them."""
        return self.both + self.reference_only + self.candidate_only + self.neither

    @property
    def reference_right(self) -> float:
        """Clips that the reference answers right."""
        return self.both + self.reference_only

    @property
    def candidate_right(self) -> float:
        """Clips that the candidate answers right."""
        return self.both + self.candidate_only

    @property
    def delta(self) -> float:
        """Accuracy of the candidate less that of the reference, as a share."""
        return (self.candidate_only - self.reference_only) / self.clips

    def times(self, factor: float) -> "Pairs":
        """The same proportions of more or fewer clips."""
        counts = (self.both, self.reference_only, self.candidate_only, self.neither)
        return Pairs(*(factor * count for count in counts))


def pairs_of(true: Sequence[str], reference: Sequence[str], candidate: Sequence[str]) -> Pairs:
    """Count the answers of two models against the truth."""
    right = Counter((a == t, b == t) for t, a, b in zip(true, reference, candidate, strict=True))
    return Pairs(right[True, True], right[True, False], right[False, True], right[False, False])


def newcombe_interval(pairs: Pairs, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of `pairs.delta`.

    The score interval of paired proportions, which unlike Wald's and the bootstrap's has a width
    where no clip is answered differently: method 10 of R. G. Newcombe, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", Statistics in
    Medicine 17 (1998).
    """
    n, delta = pairs.clips, pairs.delta
    first, second = pairs.reference_right, pairs.candidate_right
    low1, high1 = (abs(first / n - limit) for limit in wilson_interval(first, n, confidence))
    low2, high2 = (abs(second / n - limit) for limit in wilson_interval(second, n, confidence))
    phi = _correlation(pairs)
    below = math.sqrt(max(low2**2 - 2 * phi * low2 * high1 + high1**2, 0.0))
    above = math.sqrt(max(high2**2 - 2 * phi * high2 * low1 + low1**2, 0.0))
    return delta - below, delta + above


def _correlation(pairs: Pairs) -> float:
    """Newcombe's phi: of the two models' being right, less a continuity correction."""
    product = pairs.both * pairs.neither - pairs.reference_only * pairs.candidate_only
    if product > 0:
        product = max(product - pairs.clips / 2, 0.0)
    first, second = pairs.reference_right, pairs.candidate_right
    margins = first * (pairs.clips - first) * second * (pairs.clips - second)
    return product / math.sqrt(margins) if margins > 0 else 0.0


def wilson_interval(
    successes: float, n: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Score interval of a share (E. B. Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar_exact(reference_only: int, candidate_only: int) -> float:
    """Two-sided p of McNemar's exact test: whether the two differ, by the clips only one has right.

    Q. McNemar, Psychometrika 12 (1947), with the binomial distribution in place of its limit.
    """
    n = reference_only + candidate_only
    tail = sum(math.comb(n, k) for k in range(min(reference_only, candidate_only) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def cohen_kappa(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """Agreement beyond chance (J. Cohen, 1960): 1 is full agreement, 0 what chance gives."""
    n = len(reference)
    observed = sum(a == b for a, b in zip(reference, candidate, strict=True)) / n
    first, second = Counter(reference), Counter(candidate)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def verdict_of(pairs: Pairs, margin: float, confidence: float = CONFIDENCE) -> str:
    """What the interval of the difference says, `margin` in percentage points.

    `equal`: it lies within the margin. `worse`: it lies below it, so that more than the margin is
    lost for sure. `better`: it lies above zero, and not within the margin. `not enough data`: any
    other, which more clips would settle.
    """
    low, high = (100 * limit for limit in newcombe_interval(pairs, confidence))
    if -margin <= low and high <= margin:
        return EQUAL
    return WORSE if high < -margin else BETTER if low > 0 else NOT_ENOUGH


def clips_needed(pairs: Pairs, margin: float, confidence: float = CONFIDENCE) -> int | None:
    """About how many clips would settle it, were they answered in the same proportions.

    None where it is settled, and where it would take more than ten million: the loss is too close
    to the margin.
    """

    def is_settled(clips: int) -> bool:
        return verdict_of(pairs.times(clips / pairs.clips), margin, confidence) != NOT_ENOUGH

    low, high = int(pairs.clips), int(pairs.clips)
    if is_settled(high):
        return None
    while not is_settled(high):
        low, high = high, 2 * high
        if high > _MOST_CLIPS:
            return None
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if is_settled(middle) else (middle, high)
    return high


def drop_verdict(lost: int, clips: int, max_drop: float) -> str:
    """Of two counts of clips whose pairs are not known: what a loss of so many says.

    `equal`: no more was lost than `max_drop` percentage points. `worse`: more, and not by chance.
    `not enough data`: more, but of so few clips that a candidate which really loses `max_drop`
    would often do so too (exact binomial test, one-sided, 5 %).
    """
    share = max_drop / 100
    if lost <= share * clips:
        return EQUAL
    return NOT_ENOUGH if _binomial_tail(lost, clips, share) > 1 - CONFIDENCE else WORSE


def _binomial_tail(least: int, n: int, share: float) -> float:
    """Probability of at least so many successes in n."""
    if share <= 0:
        return 0.0 if least > 0 else 1.0

    def probability(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))

    return 1 - math.fsum(probability(k) for k in range(least)) if share < 1 else 1.0
