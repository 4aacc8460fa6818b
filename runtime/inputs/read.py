"""From a recording, a phrase or an image to what a model takes, without the batch axis."""

import hashlib
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import BackendMissing, InputError
from cnngru_edge.models.spec.whole import (
    AudioInput,
    ImageInput,
    Spec,
    TokenInput,
    WholeSpec,
    fixed_length_of,
    least_length_of,
)
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import Array


@dataclass(frozen=True)
class Tokens:
    """Token ids as another program found them."""

    ids: tuple[int, ...]

    def __str__(self) -> str:
        """As they were given."""
        return " ".join(map(str, self.ids))


Source: TypeAlias = Path | str | Tokens
"""A file, a phrase itself, or its token ids."""

_USUAL_TOKENS = 8
_USUAL_ASPECT = 4  # width of a line to its height
_OF_WORDS = frozenset("LMN")
"""First letters of the Unicode categories that words are made of: letters, marks, numbers."""


def read_input(spec: Spec, source: Source) -> Array:
    """Audio (S,) at the model's rate, token ids (L,) or a grey image (1, H, W), as it is.

    Raises:
        InputError: it cannot be read, or not by this model.
    """
    if not isinstance(spec, WholeSpec):
        return read_audio(_file(source, "a recording"), spec.features.sample_rate).samples
    if isinstance(spec.input, AudioInput):
        return read_audio(_file(source, "a recording"), spec.input.sample_rate).samples
    if isinstance(spec.input, ImageInput):
        return read_image(_file(source, "an image"), spec.input)
    if isinstance(source, Path):
        raise InputError(f"{source}: this model reads phrases, not files; give --text")
    if isinstance(source, Tokens):
        return check_tokens(source.ids, spec.input)
    return tokens_of(source, spec.input)


def example_input(spec: WholeSpec, seconds: float = 1.0) -> Array:
    """Something of a usual length, to trace and to measure with; noise, and no padding."""
    kind, rng = spec.input, np.random.default_rng(0)
    if isinstance(kind, AudioInput):
        length = kind.samples or max(kind.least_samples, round(seconds * kind.sample_rate))
        return 0.1 * rng.standard_normal(length, np.float32)
    if isinstance(kind, TokenInput):
        length = kind.tokens or max(kind.least_tokens, _USUAL_TOKENS)
        return rng.integers(1, len(kind.vocabulary), length, np.int64)
    width = kind.width or max(kind.least_width, _USUAL_ASPECT * kind.height)
    return rng.random((1, kind.height, width), np.float32)


def source_sha256(source: Source) -> str:
    """Of a file's bytes, or of a phrase."""
    if isinstance(source, Path):
        return file_sha256(source)
    return hashlib.sha256(str(source).encode()).hexdigest()


def words_of(phrase: str) -> list[str]:
    """The words of a phrase in lower case, without punctuation."""
    text = unicodedata.normalize("NFC", phrase.lower())
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] in _OF_WORDS else " " for c in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'"))]


def tokens_of(phrase: str, spec: TokenInput) -> Array:
    """Token ids (L,) of a phrase; a word that is not in the vocabulary has the id 1.

    Raises:
        InputError: no word in it.
    """
    if any(unicodedata.category(character) == "Cs" for character in phrase):
        raise InputError(f"{phrase!a}: not text in UTF-8")
    words = words_of(phrase)
    if not words:
        raise InputError(f"{phrase!r}: no word in it")
    ids = {word: i for i, word in enumerate(spec.vocabulary)}
    return np.array([ids.get(word, 1) for word in words], np.int64)


def check_tokens(ids: Sequence[int], spec: TokenInput) -> Array:
    """Token ids (L,) as they were given.

    Raises:
        InputError: none, or one that is not in the vocabulary.
    """
    if not ids:
        raise InputError("no token given")
    last = len(spec.vocabulary) - 1
    for token in ids:
        if not 0 <= token <= last:
            raise InputError(f"token {token} is out of range: this model knows 0 to {last}")
    return np.array(ids, np.int64)


def read_image(path: Path, spec: ImageInput) -> Array:
    """A grey image (1, H, W), 0 black to 1 white; transparency is laid on white.

    Raises:
        InputError: no image, or of another height.
        BackendMissing: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        if e.name != "PIL":
            raise
        raise BackendMissing(
            "Pillow is not installed, which images need: pip install 'cnngru-edge[image]'"
        ) from e
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.height != spec.height:
                    raise InputError(
                        f"{path}: {image.height} pixels high, this model reads lines {spec.height} "
                        "pixels high; crop the line and scale it to that"
                    )
                if image.mode in {"I", "F"}:
                    raise InputError(f"{path}: 32 bits a pixel; save it with 8 or 16")
                if image.mode.startswith("I;16"):
                    return np.asarray(image, np.float32)[None] / 65_535
                rgba = image.convert("RGBA")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as e:
        raise InputError(f"{path}: not an image that can be read") from e
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("L"), np.float32)[None] / 255


def fitted(spec: WholeSpec, given: Array) -> Array:
    """An input of the length that the model takes: cut, or padded at its end."""
    fixed, length = fixed_length_of(spec.input), given.shape[-1]
    given = given[..., : fixed or length]
    missing = max(0, (fixed or least_length_of(spec.input)) - length)
    if not missing:
        return given
    pads = [(0, 0)] * (given.ndim - 1) + [(0, missing)]
    return np.pad(given, pads, mode="edge" if isinstance(spec.input, ImageInput) else "constant")


def _file(source: Source, what: str) -> Path:
    if not isinstance(source, Path):
        raise InputError(f"{str(source)!r}: this model reads {what}, not a phrase")
    return source
