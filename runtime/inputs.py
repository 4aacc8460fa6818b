"""From a recording, a phrase or an image to what a model takes, without the batch axis."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import BackendMissing, InputError
from cnngru_edge.models.whole_spec import (
    AudioInput,
    ImageInput,
    Spec,
    TokenInput,
    WholeSpec,
)
from cnngru_edge.runtime.audio import read_audio
from cnngru_edge.runtime.session import Array

Source: TypeAlias = Path | str
"""A file, or a phrase itself."""

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


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
    return tokens_of(source, spec.input)


def source_sha256(source: Source) -> str:
    """Of a file's bytes, or of a phrase."""
    if isinstance(source, Path):
        return file_sha256(source)
    return hashlib.sha256(source.encode()).hexdigest()


def words_of(phrase: str) -> list[str]:
    """The words of a phrase in lower case, without punctuation."""
    return _WORD.findall(phrase.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def tokens_of(phrase: str, spec: TokenInput) -> Array:
    """Token ids (L,) of a phrase; a word that is not in the vocabulary has the id 1.

    Raises:
        InputError: no word in it.
    """
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
    except ImportError as e:
        raise BackendMissing(
            "Pillow is not installed, which images need: pip install 'cnngru-edge[image]'"
        ) from e
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: not an image that can be read") from e
    white = Image.new("RGBA", rgba.size, "white")
    grey = np.asarray(Image.alpha_composite(white, rgba).convert("L"), np.float32) / 255
    if grey.shape[0] != spec.height:
        raise InputError(
            f"{path}: {grey.shape[0]} pixels high, this model reads lines {spec.height} pixels "
            "high; crop the line and scale it to that"
        )
    return grey[None]


def fitted(spec: WholeSpec, given: Array) -> Array:
    """An input of the length that the model takes: cut, or padded at its end."""
    kind = spec.input
    if isinstance(kind, AudioInput):
        fixed, least = kind.samples, kind.least_samples
    elif isinstance(kind, TokenInput):
        fixed, least = kind.tokens, kind.least_tokens
    else:
        fixed, least = kind.width, kind.least_width
    length = given.shape[-1]
    given = given[..., : fixed or length]
    missing = max(0, (fixed or least) - length)
    if not missing:
        return given
    pads = [(0, 0)] * (given.ndim - 1) + [(0, missing)]
    return np.pad(given, pads, mode="edge" if isinstance(kind, ImageInput) else "constant")


def _file(source: Source, what: str) -> Path:
    if isinstance(source, str):
        raise InputError(f"{source!r}: this model reads {what}, not a phrase")
    return source
