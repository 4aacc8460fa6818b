import numpy as np
import pytest
from scipy import stats

from cnngru_edge.export.verdict.statistics import (
    Pairs,
    clips_needed,
    cohen_kappa,
    drop_verdict,
    mcnemar_exact,
    newcombe_interval,
    pairs_of,
    verdict_of,
    wilson_interval,
)


def test_pairs_are_counted():
    true = ["a", "a", "b", "b", "c"]
    pairs = pairs_of(true, ["a", "a", "b", "c", "a"], ["a", "b", "c", "b", "b"])
    assert pairs == Pairs(both=1, reference_only=2, candidate_only=1, neither=1)
    assert (pairs.reference_right, pairs.candidate_right, pairs.clips) == (3, 2, 5)
    assert pairs.delta == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("pairs", "interval"),
    [
        # Airway hyper-responsiveness before and after (Bentur et al. 2009), as published by
        # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), table VI.
        (Pairs(1, 1, 7, 12), (0.026, 0.507)),
        # Table 6.2 of Altman, Machin, Bryant and Gardner, Statistics with Confidence (2000).
        (Pairs(14, 5, 0, 22), (-0.226, -0.011)),
    ],
)
def test_newcombes_interval_is_the_published_one(pairs, interval):
    assert newcombe_interval(pairs) == pytest.approx(interval, abs=5e-4)


def test_newcombes_interval_holds_the_truth_as_often_as_it_says(rng):
    proportions = np.array([0.93, 0.02, 0.012, 0.038])
    delta = proportions[2] - proportions[1]
    intervals = [
        newcombe_interval(Pairs(*counts)) for counts in rng.multinomial(600, proportions, 2000)
    ]
    held = np.mean([low <= delta <= high for low, high in intervals])
    assert 0.94 <= held <= 0.99


def test_clips_without_a_difference_prove_only_so_much():
    low, high = newcombe_interval(Pairs(100, 0, 0, 0))
    assert (-low, high) == pytest.approx((0.037, 0.037), abs=1e-3)  # Wilson's limit for 100 of 100


@pytest.mark.parametrize(("right", "clips"), [(0, 10), (10, 10), (7, 9), (950, 1000)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_wilsons_interval_is_that_of_scipy(right, clips, confidence):
    expected = stats.binomtest(right, clips).proportion_ci(confidence, "wilson")
    assert wilson_interval(right, clips, confidence) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 3), (3, 5), (60, 20), (900, 1100)])
def test_mcnemars_exact_test_is_a_binomial_one(b, c):
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


def test_kappa_of_a_worked_example():
    # Two raters, 50 proposals: 20 both yes, 5 and 10 apart, 15 both no.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["a"], ["a"]) == 1  # chance agrees as well


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        (Pairs(9_600, 10, 8, 382), "equal"),
        (Pairs(1_138, 3, 2, 40), "not enough data"),  # a few clips of a thousand
        (Pairs(226, 2, 2, 10), "not enough data"),
        (Pairs(900, 40, 5, 55), "worse"),
        (Pairs(900, 5, 40, 55), "better"),
        (Pairs(96_000, 150, 50, 3_800), "equal"),  # surely a loss, and surely of less than 0.5
        (Pairs(3_700, 14, 2, 284), "not enough data"),  # surely a loss, of less or more than 0.5
        (Pairs(7_400, 80, 2, 518), "worse"),
        (Pairs(5, 5, 0, 0), "worse"),
        (Pairs(10, 0, 0, 0), "not enough data"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_margin(pairs, verdict):
    assert verdict_of(pairs, 0.5) == verdict


def test_a_wider_margin_accepts_more():
    pairs = Pairs(900, 40, 5, 55)
    assert verdict_of(pairs, 6.0) == "equal"


@pytest.mark.parametrize(
    "pairs", [Pairs(1_138, 3, 2, 40), Pairs(226, 2, 2, 10), Pairs(40, 0, 1, 2)]
)
def test_so_many_clips_are_enough_and_fewer_are_not(pairs):
    needed = clips_needed(pairs, 0.5)
    assert needed > pairs.clips
    assert verdict_of(pairs.times(needed / pairs.clips), 0.5) != "not enough data"
    assert verdict_of(pairs.times(0.98 * needed / pairs.clips), 0.5) == "not enough data"


def test_what_is_settled_needs_no_more_clips():
    assert clips_needed(Pairs(9_600, 10, 8, 382), 0.5) is None


def test_a_difference_at_the_margin_is_never_settled():
    assert clips_needed(Pairs(940, 7, 2, 51), 0.5) is None  # five of a thousand
    assert clips_needed(Pairs(10, 0, 0, 0), 1e-6) is None


@pytest.mark.parametrize(
    ("clips", "lost", "verdict"),
    [
        (1000, 0, "equal"),
        (1000, -20, "equal"),  # better
        (1000, 5, "equal"),  # 0.5 points
        (1000, 6, "not enough data"),
        (1000, 10, "worse"),
        (240, 2, "not enough data"),
        (240, 4, "worse"),
        (10, 2, "worse"),  # one in two hundred cannot be two in ten
        (20_000, 150, "worse"),  # 0.75 points, on so many clips
    ],
)
def test_a_drop_that_is_no_chance_is_worse(clips, lost, verdict):
    assert drop_verdict(lost, clips, 0.5) == verdict
    assert drop_verdict(lost, clips, 100) == "equal"
    if lost > 0.005 * clips:
        is_chance = stats.binom.sf(lost - 1, clips, 0.005) > 0.05
        assert is_chance == (verdict == "not enough data")


def test_where_nothing_may_be_lost_one_clip_is_worse():
    assert drop_verdict(1, 100, 0) == "worse"
    assert drop_verdict(0, 100, 0) == "equal"
