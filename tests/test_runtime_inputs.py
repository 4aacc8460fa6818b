import numpy as np
import pytest
from PIL import Image

from cnngru_edge.models.errors import InputError
from cnngru_edge.models.spec.whole import (
    AudioInput,
    ImageInput,
    TokenInput,
    WholeFeatures,
    WholeSpec,
    least_length_of,
)
from cnngru_edge.runtime.inputs.read import (
    Tokens,
    example_input,
    fitted,
    read_image,
    read_input,
    source_sha256,
    tokens_of,
    words_of,
)

WORDS = TokenInput(("<padding>", "<unknown>", "turn", "it", "on"))
LINE = ImageInput(4)


def spec(kind):
    return WholeSpec(("a", "b"), kind)


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("Turn it ON, please!", ["turn", "it", "on", "please"]),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t 'quote' me", ["don't", "quote", "me"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 at 7", ["café", "at", "7"]),
        ("e-mail_it", ["e", "mail", "it"]),
    ],
)
def test_words_are_what_is_between_punctuation(phrase, words):
    assert words_of(phrase) == words


def test_a_word_that_is_not_known_has_a_token_of_its_own():
    assert tokens_of("Turn everything on", WORDS).tolist() == [2, 1, 4]
    assert read_input(spec(WORDS), "it").tolist() == [3]
    assert read_input(spec(WORDS), Tokens((4, 0))).tolist() == [4, 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("?!", "'\\?!': no word in it"),
        ("\udcff turn", r"'\\udcff turn': not text in UTF-8"),
        (Tokens((4, 5)), "token 5 is out of range: this model knows 0 to 4"),
        (Tokens((-1,)), "token -1 is out of range"),
        (Tokens(()), "no token given"),
    ],
)
def test_phrases_that_cannot_be_read_are_one_line(source, message):
    with pytest.raises(InputError, match=message):
        read_input(spec(WORDS), source)


def test_an_input_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="this model reads phrases, not files; give --text"):
        read_input(spec(WORDS), tmp_path / "a.wav")
    with pytest.raises(InputError, match="'hello': this model reads an image, not a phrase"):
        read_input(spec(LINE), "hello")
    with pytest.raises(InputError, match="'1 2': this model reads a recording, not a phrase"):
        read_input(spec(AudioInput()), Tokens((1, 2)))


@pytest.fixture
def ramp(tmp_path):
    """A ramp from black to white, saved in some mode."""

    def save(mode, name="ramp.png"):
        grey = np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (4, 1))
        path = tmp_path / name
        if mode == "I;16":
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        else:
            Image.fromarray(grey).convert(mode).save(path)
        return path

    return save


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_an_image_is_grey_from_0_to_1(ramp, mode):
    image = read_image(ramp(mode), LINE)
    assert (image.shape, image.dtype) == ((1, 4, 8), np.float32)
    np.testing.assert_allclose(image[0, 0], np.linspace(0, 1, 8), atol=0.01)


def test_what_is_transparent_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", LINE).min() == 1


def test_images_that_cannot_be_read_are_one_line(ramp, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "none.png", LINE)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text\.png: not an image that can be read"):
        read_image(tmp_path / "text.png", LINE)
    with pytest.raises(InputError, match="4 pixels high, this model reads lines 32 pixels high"):
        read_image(ramp("L"), ImageInput(32))
    with pytest.raises(InputError, match="32 bits a pixel; save it with 8 or 16"):
        read_image(ramp("F", "ramp.tif"), LINE)


def test_what_is_too_long_is_cut_and_what_is_too_short_padded():
    assert fitted(spec(TokenInput(WORDS.vocabulary, tokens=3)), np.array([2, 3, 4, 4])).size == 3
    padded = fitted(spec(TokenInput(WORDS.vocabulary, least_tokens=3)), np.array([2]))
    assert padded.tolist() == [2, 0, 0]
    image = np.ones((1, 4, 2), np.float32)
    assert fitted(spec(ImageInput(4, least_width=5)), image).min() == 1  # its last column again
    audio = fitted(spec(AudioInput(samples=10)), np.ones(4, np.float32))
    assert audio.tolist() == [1] * 4 + [0] * 6


def test_a_clip_is_at_least_a_frame_of_the_features_long():
    centred = WholeFeatures(n_fft=512)
    assert least_length_of(AudioInput(features=centred, layout="NTM")) == 257
    cut = WholeFeatures(n_fft=512, center=False)
    assert least_length_of(AudioInput(features=cut, layout="NTM", least_samples=600)) == 600


@pytest.mark.parametrize("kind", [WORDS, LINE, AudioInput(), AudioInput(samples=99)])
def test_an_example_fits_its_model(kind):
    example = example_input(spec(kind))
    assert fitted(spec(kind), example).shape == example.shape


def test_a_phrase_has_a_hash_as_a_file_has(tmp_path):
    (tmp_path / "a").write_bytes(b"turn it on")
    assert source_sha256("turn it on") == source_sha256(tmp_path / "a")
    assert source_sha256(Tokens((1, 2))) != source_sha256("turn it on")
