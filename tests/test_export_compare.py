import json

import pytest

from cnngru_edge.export.compare import Comparison, comparison_json


def comparison(clips, lost, max_drop=0.5):
    return Comparison(clips, 0.95, 0.95 - lost / clips, -100 * lost / clips, 0.9, (), max_drop)


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
def test_a_verdict_needs_a_loss_that_is_no_chance(clips, lost, verdict):
    found = comparison(clips, lost)
    assert found.verdict == verdict
    assert found.passed == (verdict != "worse")


def test_more_may_be_lost_where_it_is_allowed():
    assert comparison(1000, 30).verdict == "worse"
    assert comparison(1000, 30, max_drop=3.0).verdict == "equal"


def test_json_has_the_verdict():
    fields = json.loads(comparison_json(comparison(240, 10)))
    assert (fields["verdict"], fields["passed"]) == ("worse", False)
    assert fields["clips"] == 240
