import dataclasses

import numpy as np
import pytest
import torch
from conftest import exported_to_onnx, traced

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.crnn import DIGITS, Crnn, crnn_spec
from cnngru_edge.models.spec.whole import TokenInput, read_spec

SIZES = [(1, 4), (1, 7), (3, 41), (2, 64)]  # N, W


def lines(n, width, height=8):
    generator = torch.Generator().manual_seed(width)
    return torch.rand(n, 1, height, width, generator=generator)


@pytest.mark.parametrize("size", SIZES)
def test_every_four_pixels_are_a_column(tiny_crnn, size):
    assert tiny_crnn(lines(*size)).shape == (size[0], size[1] // 4, 11)


def test_the_usual_one_reads_lines_of_32_pixels():
    model = Crnn(crnn_spec()).eval()
    assert model(lines(2, 130, 32)).shape == (2, 32, len(DIGITS))
    assert model.spec.input.least_width == 4


def test_lines_of_a_batch_do_not_touch_each_other(tiny_crnn):
    images = lines(3, 20)
    alone = tiny_crnn(images[1:2])
    torch.testing.assert_close(tiny_crnn(images)[1:2], alone, rtol=0, atol=1e-6)


def test_each_column_reads_the_whole_line(tiny_crnn):
    image = lines(1, 40)
    before = tiny_crnn(image)
    for changed_columns in (slice(0, 4), slice(36, 40)):
        changed = image.clone()
        changed[..., changed_columns] = 0
        assert (tiny_crnn(changed) != before).any(2).all()


def test_torchscript_and_onnx_read_lines_of_other_sizes(tiny_crnn):
    model = tiny_crnn.for_export()
    assert not any("norm" in name for name in model.state_dict())
    script = traced(model, lines(1, 24))
    session = exported_to_onnx(model, lines(1, 24), {0: "N", 3: "W"})
    for size in SIZES:
        image = lines(*size)
        with torch.inference_mode():
            expected = tiny_crnn(image).numpy()
            np.testing.assert_allclose(script(image), expected, atol=1e-5)
        (found,) = session.run(None, {"x": image.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_spec_survives_json_and_says_why_it_is_no_stream(tiny_crnn):
    spec = read_spec(tiny_crnn.spec.to_json())
    assert spec == tiny_crnn.spec
    assert spec.why_whole == "its GRU is bidirectional: it reads the line from the right as well"
    assert Crnn(spec).state_dict().keys() == tiny_crnn.state_dict().keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"num_layers": 1.5}, "layers: num_layers needs whole numbers from 1, got 1.5"),
        ({"channels": [4, 6]}, "layers: 2 channels for 3 pools"),
        ({"pools": [2, 2, 2]}, r"layers: pools are a list of pairs .*, got \[2, 2, 2\]"),
        ({"pools": [[2, 2]] * 2 + [[1, 1]]}, "layers: pools leave 2 of 8 rows, expected 1"),
        ({"pools": [[2, 2]] * 3}, "layers: pools make a column of 8 pixels, at most 4"),
    ],
)
def test_wrong_layers_are_named(tiny_crnn, layers, message):
    spec = dataclasses.replace(tiny_crnn.spec, layers={**tiny_crnn.spec.layers, **layers})
    with pytest.raises(SpecError, match=message):
        Crnn(spec)


def test_an_image_without_a_column_cannot_be_asked_for(tiny_crnn):
    narrow = dataclasses.replace(tiny_crnn.spec.input, least_width=3)
    with pytest.raises(SpecError, match="least_width is 3, and a column takes 4 pixels"):
        Crnn(dataclasses.replace(tiny_crnn.spec, input=narrow))


def test_other_inputs_are_refused(tiny_crnn):
    tokens = TokenInput(("<padding>", "<unknown>"))
    with pytest.raises(SpecError, match="a CRNN takes images and answers a text"):
        Crnn(dataclasses.replace(tiny_crnn.spec, input=tokens))
