"""How alike two models answer: the noise that one adds, and when disagreement is proven."""

import math
from collections.abc import Collection

import numpy as np

from cnngru_edge.runtime.session import Array

FALSE_ALARMS = 0.01
"""The chance of a proof against a model that is just at the limit, at most."""


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of two powers: infinite without noise, -inf with a NaN."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def sqnr_text(sqnr: float | None) -> str:
    """A ratio in dB for people; None, as JSON has it, is infinite."""
    return "no error" if sqnr is None or sqnr == math.inf else f"{sqnr:.1f} dB"


def power(values: Array) -> float:
    """The sum of their squares."""
    return float(np.square(values, dtype=np.float64).sum())


def proves_more(shares: Collection[float], allowed: float) -> bool:
    """Whether these shares, each 0 to 1, are proven to be more than `allowed` on average.

    For independent values with a mean of no more than m, the chance that exp(n KL(average || m))
    ever reaches (n + 1) / a, for any n, is at most a: a likelihood ratio, mixed over all
    alternatives, is a martingale (Ville 1939, Robbins 1970). So one may look after each. With 2 %
    allowed it takes 2 flips of 2, 4 of 12, or 11 of 100. Frames side by side flip together: a
    segment of a stream is one value, the share of its frames.
    """
    count, share = len(shares), sum(shares) / len(shares)
    if share <= allowed or allowed == 0:
        return share > allowed
    divergence = share * math.log(share / allowed)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - allowed))
    return count * divergence >= math.log((count + 1) / FALSE_ALARMS)
