import dataclasses
import json

import pytest
from conftest import TINY_SPEC

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.spec.stream import (
    ALPHABET,
    CTC,
    KWS,
    ConvSpec,
    EndpointSpec,
    ModelSpec,
    is_of_words,
    known_text,
    spelled,
)

DEFAULT = ModelSpec(labels=("yes", "no"))
TEXT = ModelSpec(ALPHABET, family=CTC, endpoint=EndpointSpec(1.5))


@pytest.mark.parametrize("spec", [DEFAULT, TINY_SPEC, TEXT], ids=["default", "tiny", "ctc"])
def test_json_gives_the_same_spec(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_sizes_follow_from_the_layers():
    assert DEFAULT.chunk_length == 320  # 20 ms: a hop of 10 ms, one time stride of 2
    assert DEFAULT.conv_shapes == ((1, 40), (32, 20), (48, 10), (64, 10), (64, 5))
    assert DEFAULT.gru_input_size == 320
    assert [(s.name, s.shape) for s in DEFAULT.state] == [
        ("audio_tail", (352,)),
        ("conv0_context", (1, 3, 40)),
        ("conv1_context", (32, 2, 20)),
        ("conv2_context", (48, 2, 10)),
        ("conv3_context", (64, 2, 10)),
        ("gru0_hidden", (128,)),
    ]


def test_a_convolution_without_context_carries_nothing():
    spec = dataclasses.replace(TINY_SPEC, convs=(ConvSpec(4, (2, 3), (2, 2)),), num_layers=1)
    assert [s.name for s in spec.state] == ["audio_tail", "gru0_hidden"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["yes", "yes"]}, "labels: need at least two, all different"),
        ({"hidden_size": 0}, "a CNN-GRU needs at least one convolution, GRU layer and hidden unit"),
        ({"heads": 4}, r"unknown ModelSpec fields \['heads'\]"),
        ({"features": {"hop_length": 600}}, "need 0 < hop_length <= win_length <= n_fft"),
        ({"features": {"f_max": 9000}}, "need 0 <= f_min < f_max <= 8000 Hz, got 20, 9000"),
        ({"features": {"n_fft": 514}}, "n_fft must be a multiple of 4, got 514"),
        ({"convs": [{"out_channels": 4, "kernel_size": [1, 3], "stride": [2, 1]}]}, "skips frames"),
        ({"convs": []}, "at least one convolution"),
        ({"labels": None}, "TypeError"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(change, message):
    text = json.dumps(json.loads(DEFAULT.to_json()) | change)
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_json(text)


def test_a_spec_from_before_there_were_families_is_of_a_keyword_model():
    raw = json.loads(DEFAULT.to_json())
    del raw["family"], raw["endpoint"]
    spec = ModelSpec.from_json(json.dumps(raw))
    assert spec == DEFAULT
    assert spec.family == KWS


def test_a_ctc_model_has_characters_and_no_words():
    assert TEXT.words == ()
    assert len(TEXT.labels) == 29
    assert TEXT.labels[:4] == ("<blank>", " ", "'", "a")


def test_labels_that_are_words_have_a_space_before_them():
    words = ("<blank>", " no", " yes")
    assert is_of_words(ModelSpec(words, family=CTC).labels)
    assert not is_of_words(TEXT.labels)
    assert not is_of_words(("<blank>", " ", "a"))
    assert spelled(words, "yes no yes") == [" yes", " no", " yes"]
    assert spelled(TEXT.labels, "a b") == ["a", " ", "b"]
    assert known_text(words) == "the words of this model are no, yes"
    many = ("<blank>", *(f" w{i}" for i in range(23)))
    assert known_text(many).endswith(", w19 and 3 more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "rnnt"}, "family: need kws or ctc, got 'rnnt'"),
        ({"labels": ["a", "<blank>"]}, "the first of a CTC model is <blank>, got 'a'"),
        ({"labels": ["<blank>", "a", "yes"]}, "has single characters, or words .+, got yes"),
        ({"labels": ["<blank>", " a", " yes", "no"]}, "has single characters, or words .+ got  a"),
        ({"labels": ["<blank>", " yes", " no no"]}, "or words with a space before each, got  yes"),
        ({"endpoint": {"silence_s": 0}}, "endpoint: silence_s is above 0 to 10 seconds, got 0"),
        ({"endpoint": {"longest_s": 0.5}}, "endpoint: longest_s is 1 .silence_s. to 600 seconds"),
        ({"endpoint": {"silence": 1}}, r"unknown EndpointSpec fields \['silence'\]"),
        ({"decision": {"thresholds": [["a", 0.5]]}}, "thresholds for a, and the words"),
    ],
)
def test_a_ctc_model_that_cannot_be_built_is_refused(change, message):
    text = json.dumps(json.loads(TEXT.to_json()) | change)
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_json(text)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "nonsense"])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(SpecError, match="model spec: "):
        ModelSpec.from_json(text)


def test_weights_are_counted_as_in_the_model(kws12, tiny):
    for model in (kws12, tiny):
        layers = [*(block.conv for block in model.convs), *model.grus, model.head]
        assert model.spec.weights == sum(
            p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1
        )
