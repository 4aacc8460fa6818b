import numpy as np
import pytest

from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.runtime.decode.label import clip_scores, softmax

SPEC = ModelSpec(labels=("silence", "yes", "no"))  # 50 frames a second


def logits_with(frames, **spans):
    """Silence, but for the frames in which a word is held."""
    logits = np.tile(np.float32([4.0, 0.0, 0.0]), (frames, 1))
    for word, (start, end) in spans.items():
        logits[start:end] = 0.0
        logits[start:end, SPEC.labels.index(word)] = 5.0
    return logits


def heard(logits, spec=SPEC):
    return spec.labels[int(clip_scores(spec, logits).argmax())]


def test_a_short_clip_is_read_at_its_end():
    assert heard(logits_with(50, yes=(0, 49))) == "silence"
    assert heard(logits_with(50, yes=(49, 50))) == "yes"
    assert heard(logits_with(1, no=(0, 1))) == "no"


@pytest.mark.parametrize("start", [30, 60, 100, 140])
def test_a_word_is_found_anywhere_in_a_long_clip(start):
    assert heard(logits_with(200, no=(start, start + 40))) == "no"


def test_nothing_is_read_in_the_first_second_of_a_long_clip():
    assert heard(logits_with(150, yes=(0, 40))) == "silence"


def test_silence_stays_silence():
    scores = clip_scores(SPEC, logits_with(200))
    assert SPEC.labels[int(scores.argmax())] == "silence"
    assert scores.sum() == pytest.approx(1.0)


def test_without_a_silence_label_the_surest_reading_counts():
    spec = ModelSpec(labels=("yes", "no"))
    logits = np.tile(np.float32([0.1, 0.0]), (150, 1))
    logits[120:130] = [0.0, 3.0]
    assert heard(logits, spec) == "no"


def test_softmax_does_not_overflow():
    assert softmax(np.array([[1000.0, 0.0]])).tolist() == [[1.0, 0.0]]
