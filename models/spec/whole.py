"""What a model is that takes its input whole: a phrase, an image, or a clip; without its weights.

A model that can stream has a `ModelSpec`. Dimension letters: N batch, S samples, L tokens,
W pixels, T output frames, C labels.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, TypeAlias, get_args

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.spec.stream import BLANK, FeatureSpec, ModelSpec

TEXT, CRNN, OWN = "text", "crnn", "own"
"""The families: intents of phrases, lines of text in images, and modules that are not ours."""

NATURAL, DECIBELS = "natural", "decibels"
"""Logarithms of the mel power."""

LAYOUTS = ("NS", "N1S")
FEATURE_LAYOUTS = ("NTM", "NMT", "N1TM", "N1MT")
"""Axes of what a module takes: batch, one channel, samples; frames, mel bins."""

LABEL, TEXT_ANSWER = "label", "text"
"""What a model answers: one label for the whole input, or a text by CTC."""

_LARGEST = 10**8
"""Of a size: a number from a damaged file may be anything."""

PADDING, UNKNOWN_WORD = "<padding>", "<unknown>"
"""The first two words of every vocabulary."""


@dataclass(frozen=True)
class WholeFeatures(FeatureSpec):
    """Log-mel features or MFCCs of a whole clip, as torchaudio's transforms compute them.

    The fields of `FeatureSpec` are those of `MelSpectrogram`; the rest is what comes after it.
    """

    center: bool = True  # half a frame of reflected audio at both ends
    log: str = NATURAL  # ln(power + log_offset), or DECIBELS: 10 log10(max(power, log_offset))
    top_db: float | None = None  # under the clip's loudest, to which decibels are raised
    n_mfcc: int | None = None  # of an orthonormal DCT over the mel bins; None for log-mel
    mean: float = 0.0  # taken off the features
    std: float = 1.0  # that they are then divided by

    def __post_init__(self) -> None:
        """Refuse features that cannot be computed."""
        _check_types("features", self)
        super().__post_init__()
        if self.log not in (NATURAL, DECIBELS):
            raise SpecError(f"features: log is {NATURAL} or {DECIBELS}, got {self.log!r}")
        if self.top_db is not None and self.log != DECIBELS:
            raise SpecError(f"features: top_db is for log = {DECIBELS!r}")
        if self.n_mfcc is not None and not 1 <= self.n_mfcc <= self.n_mels:
            raise SpecError(f"features: n_mfcc is 1 to n_mels ({self.n_mels}), got {self.n_mfcc}")
        if not self.std > 0:
            raise SpecError(f"features: std is above 0, got {self.std}")
        if self.top_db is not None and self.top_db <= 0:
            raise SpecError(f"features: top_db is above 0, got {self.top_db}")


@dataclass(frozen=True)
class AudioInput:
    """A waveform `audio` (N, S), float32 from -1 to 1."""

    name: ClassVar[str] = "audio"

    sample_rate: int = 16_000  # in Hz
    samples: int | None = None  # of every clip, cut or padded with zeros; None for any length
    least_samples: int = 1  # to which a shorter clip is padded
    features: WholeFeatures | None = None  # that the graph computes first; None: none of ours
    layout: str = "NS"  # of what the module takes: NS or N1S; of features NTM, NMT, N1TM or N1MT

    def __post_init__(self) -> None:
        """Refuse what no clip fits."""
        _check_types("input", self)
        _check_sizes(self.sample_rate)
        _check_lengths(self.samples, self.least_samples)
        layouts = LAYOUTS if self.features is None else FEATURE_LAYOUTS
        if self.layout not in layouts:
            raise SpecError(
                f"input: layout is one of {', '.join(layouts)} here (M mel bins or coefficients, T "
                f"frames, S samples), got {self.layout!r}"
            )
        if self.features and self.features.sample_rate != self.sample_rate:
            raise SpecError(
                f"input: sample_rate is {self.sample_rate}, that of its features "
                f"{self.features.sample_rate}"
            )


@dataclass(frozen=True)
class TokenInput:
    """Token ids `tokens` (N, L), int64: places in the vocabulary."""

    name: ClassVar[str] = "tokens"

    vocabulary: tuple[str, ...]
    tokens: int | None = None  # of every phrase, cut or padded; None for any number
    least_tokens: int = 1  # to which a shorter phrase is padded

    def __post_init__(self) -> None:
        """Refuse a vocabulary that no phrase can be looked up in."""
        _check_types("input", self)
        _check_lengths(self.tokens, self.least_tokens)
        if not all(isinstance(word, str) for word in self.vocabulary):
            raise SpecError("vocabulary: need to be words, in quotes")
        if self.vocabulary[:2] != (PADDING, UNKNOWN_WORD):
            raise SpecError(
                f"vocabulary: the first two words are {PADDING} and {UNKNOWN_WORD}, got "
                f"{list(self.vocabulary[:2])}"
            )
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise SpecError("vocabulary: a word is in it twice")


@dataclass(frozen=True)
class ImageInput:
    """Grey images `image` (N, 1, height, W), float32 from 0, black, to 1, white."""

    name: ClassVar[str] = "image"

    height: int  # pixels
    width: int | None = None  # of every image, cut or padded with its last column; None for any
    least_width: int = 1

    def __post_init__(self) -> None:
        """Refuse what no image fits."""
        _check_types("input", self)
        _check_sizes(self.height)
        _check_lengths(self.width, self.least_width)


Input: TypeAlias = AudioInput | TokenInput | ImageInput

LETTERS = {AudioInput.name: "S", TokenInput.name: "L", ImageInput.name: "W"}
"""Of the dimension of each input that may be free."""

_INPUTS = {kind.name: kind for kind in (AudioInput, TokenInput, ImageInput)}


@dataclass(frozen=True)
class WholeSpec:
    """A model of one input and one output, `logits` (N, T, C); T is 1 where it answers a label."""

    labels: tuple[str, ...]
    input: Input
    answers: str = LABEL  # LABEL or TEXT_ANSWER
    family: str = OWN
    why_whole: str = ""  # why it cannot be a stream, in a clause
    layers: Mapping[str, Any] = field(default_factory=dict)  # what else builds it, by its family

    def __post_init__(self) -> None:
        """Refuse a model that cannot be built."""
        if self.family not in (TEXT, CRNN, OWN):
            raise SpecError(f"family: need one of {TEXT}, {CRNN}, {OWN}, got {self.family!r}")
        if self.answers not in (LABEL, TEXT_ANSWER):
            raise SpecError(f"answers: need {LABEL} or {TEXT_ANSWER}, got {self.answers!r}")
        if not all(isinstance(x, str) and x and x.isprintable() for x in self.labels):
            raise SpecError(f"labels: need to be printable text, got {list(self.labels)}")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise SpecError(f"labels: need at least two, all different, got {list(self.labels)}")
        if self.writes_text and self.labels[0] != BLANK:
            raise SpecError(f"labels: the first of a CTC model is {BLANK}, got {self.labels[0]!r}")
        if self.writes_text and all(len(x) > 1 and x[0] != " " for x in self.labels[1:]):
            raise SpecError(
                "labels: a CTC model has characters, or words with a space before each, got "
                f"{', '.join(self.labels[1:4])}, ..."
            )

    @property
    def writes_text(self) -> bool:
        """Whether its answer is a text by CTC, not one of its labels."""
        return self.answers == TEXT_ANSWER

    def to_json(self) -> str:
        """The spec as one line of JSON, the same for equal specs."""
        raw = asdict(self)
        raw["input"] = {"kind": self.input.name, **raw["input"]}
        return json.dumps(raw, sort_keys=True)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "WholeSpec":
        """Read what `to_json` wrote, or the same from TOML; SpecError names what is wrong."""
        try:
            known = {f.name for f in fields(cls)}
            if unknown := sorted(set(raw) - known):
                raise SpecError(f"model spec: unknown fields {', '.join(unknown)}")
            if not isinstance(raw["labels"], list | tuple):
                raise SpecError(f"labels: need a list, got {raw['labels']!r}")
            return cls(
                **{
                    **raw,
                    "labels": tuple(raw["labels"]),
                    "input": _input(raw["input"]),
                }
            )
        except KeyError as e:
            raise SpecError(f"model spec: {e.args[0]} is missing") from e
        except (TypeError, ValueError, AttributeError) as e:
            raise SpecError(f"model spec: {type(e).__name__}: {e}") from e


Spec: TypeAlias = ModelSpec | WholeSpec


def read_spec(text: str) -> Spec:
    """The spec in an artefact or checkpoint, of either kind.

    Raises:
        SpecError: names what does not fit.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as e:
        raise SpecError(f"model spec: not JSON ({e})") from e
    if isinstance(raw, dict) and raw.get("family") in (TEXT, CRNN, OWN):
        return WholeSpec.from_dict(raw)
    return ModelSpec.from_json(text)


def streamable(spec: Spec) -> ModelSpec:
    """The spec of a model that can be a stream.

    Raises:
        SpecError: it takes its input whole; says why.
    """
    if isinstance(spec, WholeSpec):
        raise SpecError(f"this model cannot be a stream: {spec.why_whole}")
    return spec


def fixed_length_of(kind: Input) -> int | None:
    """Samples, tokens or columns of every input; None where it may have any number."""
    if isinstance(kind, AudioInput):
        return kind.samples
    return kind.tokens if isinstance(kind, TokenInput) else kind.width


def least_length_of(kind: Input) -> int:
    """To how many samples, tokens or columns a shorter input is padded."""
    if isinstance(kind, AudioInput):
        features = kind.features
        if features is None:
            return kind.least_samples
        frame = features.n_fft // 2 + 1 if features.center else features.n_fft
        return max(kind.least_samples, frame)
    return kind.least_tokens if isinstance(kind, TokenInput) else kind.least_width


def sample_rate_of(spec: Spec) -> int | None:
    """Of the audio that a model takes, in Hz; None for one that takes no audio."""
    if isinstance(spec, ModelSpec):
        return spec.features.sample_rate
    return spec.input.sample_rate if isinstance(spec.input, AudioInput) else None


def _input(raw: Mapping[str, Any]) -> Input:
    if not isinstance(raw, Mapping):
        raise SpecError(f"input: need a table, [input], got {raw!r}")
    kinds = ", ".join(_INPUTS)
    kind = raw.get("kind")
    if kind not in _INPUTS:
        raise SpecError(f"input: kind is one of {kinds}, got {kind!r}")
    given = {name: value for name, value in raw.items() if name != "kind"}
    if unknown := sorted(set(given) - {f.name for f in fields(_INPUTS[kind])}):
        raise SpecError(f"input: unknown fields {', '.join(unknown)}")
    if kind == AudioInput.name and given.get("features") is not None:
        if not isinstance(given["features"], Mapping):
            raise SpecError(f"features: need a table, [input.features], got {given['features']!r}")
        rate = {"sample_rate": given.get("sample_rate", FeatureSpec.sample_rate)}
        given["features"] = WholeFeatures(**{**rate, **given["features"]})
    if kind == TokenInput.name:
        given["vocabulary"] = tuple(given["vocabulary"])
    found: Input = _INPUTS[kind](**given)
    return found


def _check_types(name: str, spec: Any) -> None:
    """Refuse a field of a dataclass that is not of its type: TOML and JSON may hold anything."""
    for one in fields(spec):
        value = getattr(spec, one.name)
        kinds = get_args(one.type) or (one.type,)
        is_plain = {int, float, bool, str} >= set(kinds) - {NoneType}
        if not is_plain or (value is None and NoneType in kinds):
            continue
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join(k.__name__ for k in kinds if k is not NoneType)
            raise SpecError(f"{name}: {one.name} is of type {wanted}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"{name}: {one.name} is {value}")


def _check_sizes(*sizes: int) -> None:
    for size in sizes:
        if not 1 <= size <= _LARGEST:
            raise SpecError(f"input: sizes are whole numbers from 1 to {_LARGEST}, got {size!r}")


def _check_lengths(fixed: int | None, least: int) -> None:
    _check_sizes(least, *([fixed] if fixed is not None else []))
    if fixed is not None and fixed < least:
        raise SpecError(f"input: of {fixed} and of at least {least} cannot both be")
