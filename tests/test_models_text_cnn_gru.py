import dataclasses

import numpy as np
import pytest
import torch
from conftest import exported_to_onnx, traced

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.crnn import Crnn
from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru
from cnngru_edge.models.spec.whole import ImageInput, read_spec

SIZES = [(1, 1), (1, 2), (3, 7), (2, 8)]  # N, L


def phrases(n, length):
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("size", SIZES)
def test_a_phrase_of_any_length_has_one_row_of_logits(tiny_text, size):
    assert tiny_text(phrases(*size)).shape == (size[0], 1, 3)


def test_phrases_of_a_batch_do_not_touch_each_other(tiny_text):
    tokens = phrases(3, 6)
    alone = tiny_text(tokens[1:2])
    torch.testing.assert_close(tiny_text(tokens)[1:2], alone, rtol=0, atol=1e-6)


def test_every_word_counts(tiny_text):
    tokens = phrases(1, 7)
    before = tiny_text(tokens)
    for place in range(7):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        assert not torch.equal(tiny_text(changed), before), place


def test_torchscript_and_onnx_answer_phrases_of_other_sizes(tiny_text):
    model = tiny_text.for_export()
    script = traced(model, phrases(1, 5))
    session = exported_to_onnx(model, phrases(1, 5), {0: "N", 1: "L"})
    for size in SIZES:
        tokens = phrases(*size)
        with torch.inference_mode():
            expected = tiny_text(tokens).numpy()
            np.testing.assert_allclose(script(tokens), expected, atol=1e-5)
        (found,) = session.run(None, {"x": tokens.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_spec_survives_json_and_says_why_it_is_no_stream(tiny_text):
    spec = read_spec(tiny_text.spec.to_json())
    assert spec == tiny_text.spec
    assert spec.why_whole == "its GRU is bidirectional: it reads the phrase from the end as well"
    assert TextCnnGru(spec).state_dict().keys() == tiny_text.state_dict().keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"hidden_size": None}, "layers: hidden_size needs whole numbers from 1, got None"),
        ({"hidden_size": 0}, "layers: hidden_size needs whole numbers from 1, got 0"),
        ({"channels": True}, "layers: channels needs whole numbers from 1, got True"),
        ({"kernel_sizes": 3}, "layers: kernel_sizes are a list of whole numbers from 1, got 3"),
        ({"kernel_sizes": []}, r"layers: kernel_sizes are a list .* from 1, got \[\]"),
        ({"kernel_sizes": [3, 4]}, "layers: kernel_sizes need to be odd, got 4"),
        ({"depth": 2}, "layers: unknown depth, expected embedding_size, kernel_sizes, channels, "),
    ],
)
def test_wrong_layers_are_named(tiny_text, layers, message):
    spec = dataclasses.replace(tiny_text.spec, layers={**tiny_text.spec.layers, **layers})
    with pytest.raises(SpecError, match=message):
        TextCnnGru(spec)


def test_a_missing_layer_is_named(tiny_text):
    layers = {k: v for k, v in tiny_text.spec.layers.items() if k != "channels"}
    with pytest.raises(SpecError, match="layers: channels is missing"):
        TextCnnGru(dataclasses.replace(tiny_text.spec, layers=layers))


def test_other_families_and_inputs_are_refused(tiny_text, tiny_crnn):
    with pytest.raises(SpecError, match="family: this model is of 'text', got 'crnn'"):
        TextCnnGru(tiny_crnn.spec)
    with pytest.raises(SpecError, match="family: this model is of 'crnn', got 'text'"):
        Crnn(tiny_text.spec)
    with pytest.raises(SpecError, match="a text model takes tokens and answers a label"):
        TextCnnGru(dataclasses.replace(tiny_text.spec, input=ImageInput(8)))
