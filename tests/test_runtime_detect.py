import json

import numpy as np
import pytest

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.spec.stream import DecisionSpec, ModelSpec
from cnngru_edge.runtime.decode.events import Detector

LABELS = ("silence", "unknown", "yes", "no")
FRAME_S = 0.02


def detector(**decision):
    return Detector(ModelSpec(LABELS, decision=DecisionSpec(**decision)))


def frames(*said):
    """Logits of (label, seconds) in a row: the label has a probability of 0.97."""
    rows = []
    for label, seconds in said:
        row = np.zeros(len(LABELS), np.float32)
        row[LABELS.index(label)] = 4.58
        rows += [row] * round(seconds / FRAME_S)
    return np.array(rows)


def labels(found):
    return [detection.label for detection in found]


def test_a_word_is_one_detection_however_long_it_is_held():
    found = detector().push(frames(("silence", 1), ("yes", 0.8), ("silence", 1)))
    assert labels(found) == ["yes"]
    assert found[0].score >= 0.9
    # Ten frames of 0.97 among ten: on the tenth frame, or as soon as the average is there.
    assert found[0].time == pytest.approx(1.2, abs=0.03)


def test_the_same_word_again_is_another_detection():
    said = [("silence", 1), ("yes", 0.6), ("silence", 0.4), ("yes", 0.6)]
    assert labels(detector().push(frames(*said))) == ["yes", "yes"]


def test_another_word_follows_after_the_refractory_time():
    said = [("silence", 1), ("yes", 0.4), ("no", 1)]
    assert labels(detector().push(frames(*said))) == ["yes", "no"]
    soon, late = (detector(refractory_s=s).push(frames(*said))[1].time for s in (0, 0.9))
    assert late == pytest.approx(1.2 + 0.9, abs=0.04)
    assert soon < late


def test_unknown_and_silence_are_no_words():
    assert detector().push(frames(("silence", 2), ("unknown", 2))) == []


def test_a_flash_is_smoothed_away():
    said = [("silence", 1), ("yes", 0.1), ("silence", 1)]
    assert detector().push(frames(*said)) == []
    assert labels(detector(smoothing_s=0.04).push(frames(*said))) == ["yes"]


def test_nothing_is_sure_in_the_first_frames():
    assert detector().push(frames(("yes", 0.1))) == []


def test_a_label_may_have_a_threshold_of_its_own():
    said = [("silence", 1), ("yes", 0.6), ("silence", 1), ("no", 0.6), ("silence", 1)]
    assert labels(detector().push(frames(*said))) == ["yes", "no"]
    assert labels(detector(thresholds=(("yes", 0.99),)).push(frames(*said))) == ["no"]
    own = detector(threshold=0.99, thresholds=(("yes", 0.5),))
    (found,) = own.push(frames(*said))
    assert found.label == "yes"
    assert 0.5 <= found.score < 0.6  # as soon as it is there


def test_however_the_frames_come_the_detections_are_the_same():
    logits = frames(("silence", 0.5), ("yes", 0.5), ("unknown", 0.5), ("no", 0.5), ("silence", 1))
    whole, other = detector(), detector()
    expected = whole.push(logits)
    found = [d for i in range(0, len(logits), 3) for d in other.push(logits[i : i + 3])]
    assert found == expected
    assert labels(found) == ["yes", "no"]


def test_a_reset_begins_at_zero():
    one = detector()
    logits = frames(("silence", 0.5), ("yes", 0.5))
    expected = one.push(logits)
    one.reset()
    assert one.push(logits) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 1.1},
        {"threshold": 0.3},
        {"release": 0},
        {"smoothing_s": -1},
        {"refractory_s": 1e9},
        {"thresholds": (("yes", 1.1),)},
        {"thresholds": (("yes", 0.3),)},  # below the release
        {"thresholds": (("yes", float("nan")),)},
        {"thresholds": (("yes", 0.9), ("yes", 0.8))},
    ],
)
def test_a_decision_that_cannot_be_is_refused(change):
    with pytest.raises(SpecError, match="decision: "):
        DecisionSpec(**change)


def test_a_spec_carries_its_decision():
    spec = ModelSpec(LABELS, decision=DecisionSpec(threshold=0.8))
    assert ModelSpec.from_json(spec.to_json()) == spec
    older = spec.to_json().replace('"decision"', '"x"')
    with pytest.raises(SpecError, match="unknown ModelSpec fields"):
        ModelSpec.from_json(older)


def test_a_spec_carries_the_thresholds_of_its_labels():
    decision = DecisionSpec(thresholds=(("yes", 0.8), ("no", 0.95)))
    spec = ModelSpec(LABELS, decision=decision)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert [decision.threshold_of(label) for label in spec.labels] == [0.9, 0.9, 0.8, 0.95]
    assert hash(spec)


def test_a_spec_of_before_has_one_threshold():
    spec = ModelSpec(LABELS)
    older = json.loads(spec.to_json())
    del older["decision"]["thresholds"]
    assert ModelSpec.from_json(json.dumps(older)) == spec


@pytest.mark.parametrize("label", ["maybe", "unknown", "silence"])
def test_a_threshold_is_for_a_word_of_the_model(label):
    with pytest.raises(SpecError, match=f"thresholds for {label}, .* words .* are yes, no"):
        ModelSpec(LABELS, decision=DecisionSpec(thresholds=((label, 0.9),)))


@pytest.mark.parametrize("decision", [5, [1], {"thresholds": 5}, {"thresholds": [["yes"]]}])
def test_a_damaged_decision_is_refused(decision):
    text = json.dumps(json.loads(ModelSpec(LABELS).to_json()) | {"decision": decision})
    with pytest.raises(SpecError, match="model spec: "):
        ModelSpec.from_json(text)
