"""The models that read phrases and images, on the demos that come with them."""

import needs_torchaudio  # noqa: F401
import pytest
import torch

from cnngru_edge.calibration.corpus.phrases import _INTENTS
from cnngru_edge.calibration.corpus.read import (
    DEMO,
    DEMO_DIGITS,
    DEMO_PHRASES,
    demo_for,
    read_corpus,
)
from cnngru_edge.export.training.whole import answers, load_examples
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.nets.crnn import DIGITS


@pytest.mark.parametrize(
    ("name", "demo", "labels"),
    [
        ("intent", DEMO_PHRASES, tuple(sorted(_INTENTS))),
        ("digits", DEMO_DIGITS, DIGITS),
    ],
)
def test_it_answers_most_of_its_demo_right(name, demo, labels):
    path = PRETRAINED / f"{name}.safetensors"
    assert path.stat().st_size < 1_000_000
    model = load_checkpoint(path)
    assert model.spec.labels == labels
    assert demo_for(model.spec) == demo
    examples, errors = load_examples(read_corpus(demo).of("eval"), model.spec)
    assert errors == []
    right = 0
    for example in examples:
        with torch.inference_mode():
            found = answers(model.spec, model(torch.from_numpy(example.given)[None]))
        right += found == [example.expected]
    assert 0.85 < right / len(examples) < 1


@pytest.mark.parametrize("demo", [DEMO_PHRASES, DEMO_DIGITS])
def test_a_demo_has_enough_to_calibrate_with(demo):
    corpus = read_corpus(demo)
    assert len(corpus.of("calib")) == len(corpus.of("eval")) >= 100
    assert corpus.of("train") == ()


def test_a_model_that_hears_has_the_clips(kws12):
    assert demo_for(kws12.spec) == DEMO
