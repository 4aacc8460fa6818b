"""What a model is, without its weights: features, layers, labels and the state it carries.

Dimension letters used throughout the project: N batch, S samples, T output frames, M mel bins,
F frequency bins of a convolution, H hidden units, C classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cnngru_edge.models.errors import SpecError

METADATA_KEY = "cnngru_edge.spec"
"""Where the spec stands in safetensors metadata, ONNX metadata_props and TorchScript files."""

UNKNOWN = "unknown"
SILENCE = "silence"

KWS, CTC = "kws", "ctc"
"""The families: one label for a recording, or a text by CTC (Graves et al. 2006)."""

BLANK = "<blank>"
"""The first label of a CTC model: nothing more in this frame."""

ALPHABET = (BLANK, " ", "'", *"abcdefghijklmnopqrstuvwxyz")
"""The labels of a CTC model for English, in characters; those in words are like ` yes`."""


@dataclass(frozen=True)
class FeatureSpec:
    """Log-mel filterbank; lengths in samples, frequencies in Hz, as in torchaudio."""

    sample_rate: int = 16_000
    n_fft: int = 512
    win_length: int = 480
    hop_length: int = 160
    n_mels: int = 40
    f_min: float = 20.0
    f_max: float = 7_600.0
    log_offset: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a filterbank that cannot be computed."""
        if not 0 < self.hop_length <= self.win_length <= self.n_fft:
            raise SpecError(
                f"features: need 0 < hop_length <= win_length <= n_fft, got {self.hop_length}, "
                f"{self.win_length}, {self.n_fft}"
            )
        if self.n_fft % 4:
            raise SpecError(f"features: n_fft must be a multiple of 4, got {self.n_fft}")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise SpecError(
                f"features: need 0 <= f_min < f_max <= {self.sample_rate / 2:g} Hz, got "
                f"{self.f_min:g}, {self.f_max:g}"
            )
        if self.n_mels < 1 or self.log_offset <= 0:
            raise SpecError("features: n_mels and log_offset must be positive")

    @property
    def tail_length(self) -> int:
        """Samples of the past that the first frame of a chunk needs."""
        return self.n_fft - self.hop_length


@dataclass(frozen=True)
class ConvSpec:
    """A Conv2d block (convolution, batch norm, ReLU) over (time, frequency).

    Time is causal: `context` frames of the past are carried instead of padded. Frequency is padded
    by half a kernel on both sides.
    """

    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """Refuse a block that cannot stream."""
        if len(self.kernel_size) != 2 or len(self.stride) != 2:
            raise SpecError(f"convolution: sizes must be pairs, got {self}")
        if self.out_channels < 1 or min(self.kernel_size) < 1 or min(self.stride) < 1:
            raise SpecError(f"convolution: sizes must be positive, got {self}")
        if self.kernel_size[0] < self.stride[0]:
            raise SpecError(
                f"convolution: a time kernel of {self.kernel_size[0]} with stride {self.stride[0]} "
                "skips frames; make the kernel at least as long as the stride"
            )

    @property
    def context(self) -> int:
        """Frames of the past that the block carries from chunk to chunk."""
        return self.kernel_size[0] - self.stride[0]

    def out_bins(self, bins: int) -> int:
        """Frequency bins out, for `bins` in."""
        return (bins + 2 * (self.kernel_size[1] // 2) - self.kernel_size[1]) // self.stride[1] + 1


@dataclass(frozen=True)
class StateSpec:
    """One tensor that is carried in time; its shape is (N, *shape), float32, zero at first."""

    name: str
    shape: tuple[int, ...]

    @property
    def next_name(self) -> str:
        """The output that holds the value for the next chunk."""
        return f"{self.name}_next"


@dataclass(frozen=True)
class DecisionSpec:
    """When the probabilities of a stream make an event."""

    smoothing_s: float = 0.2  # over which each label's probability is averaged
    threshold: float = 0.9  # that the average has to reach
    thresholds: tuple[tuple[str, float], ...] = ()  # (label, its own), for labels that need another
    release: float = 0.4  # below which it has to fall before the same label can be an event again
    refractory_s: float = 0.5  # after an event, in which there is no other

    def __post_init__(self) -> None:
        """Refuse what can make no events, or one at every frame."""
        for label, threshold in (("threshold", self.threshold), *self.thresholds):
            if not 0 < self.release <= threshold <= 1:
                raise SpecError(
                    f"decision: need 0 < release <= threshold <= 1, got release {self.release}, "
                    f"{label} {threshold}"
                )
        named = [label for label, _ in self.thresholds]
        if len(set(named)) != len(named):
            raise SpecError(f"decision: a label has two thresholds, got {named}")
        if not (0 <= self.smoothing_s <= 10 and 0 <= self.refractory_s <= 10):
            raise SpecError("decision: smoothing_s and refractory_s are 0 to 10 seconds")

    def threshold_of(self, label: str) -> float:
        """What the average of this label's probability has to reach."""
        return dict(self.thresholds).get(label, self.threshold)

    @property
    def summary(self) -> str:
        """In words."""
        own = "".join(f", {label} {threshold:g}" for label, threshold in self.thresholds)
        return (
            f"smoothing {self.smoothing_s:g} s, threshold {self.threshold:g}{own}, release "
            f"{self.release:g}, refractory {self.refractory_s:g} s"
        )


@dataclass(frozen=True)
class EndpointSpec:
    """When the text of a stream is final."""

    silence_s: float = 1.0  # of blanks and spaces after a character; see benchmarks/endpoints.py
    longest_s: float = 20.0  # of a text: from there on a space ends it, and at twice that anything

    def __post_init__(self) -> None:
        """Refuse what ends inside a word, or never."""
        if not 0 < self.silence_s <= 10:
            raise SpecError(f"endpoint: silence_s is above 0 to 10 seconds, got {self.silence_s}")
        if not self.silence_s <= self.longest_s <= 600:
            raise SpecError(
                f"endpoint: longest_s is {self.silence_s:g} (silence_s) to 600 seconds, got "
                f"{self.longest_s}"
            )


_SHOWN = 20  # words in a message

MAX_LAYERS = 64
"""No CNN-GRU has more; a number from a damaged file may be anything."""


@dataclass(frozen=True)
class ModelSpec:
    """A CNN-GRU over log-mel features: Conv2d blocks, GRU layers, a linear head on every frame."""

    labels: tuple[str, ...]
    features: FeatureSpec = field(default_factory=FeatureSpec)
    convs: tuple[ConvSpec, ...] = (
        ConvSpec(32, (5, 5), (2, 2)),
        ConvSpec(48, (3, 3), (1, 2)),
        ConvSpec(64, (3, 3), (1, 1)),
        ConvSpec(64, (3, 3), (1, 2)),
    )
    hidden_size: int = 128
    num_layers: int = 1
    decision: DecisionSpec = field(default_factory=DecisionSpec)  # of a keyword model
    family: str = KWS
    endpoint: EndpointSpec = field(default_factory=EndpointSpec)  # of a CTC model

    def __post_init__(self) -> None:
        """Refuse a model that cannot be built."""
        if not all(isinstance(label, str) and label.isprintable() for label in self.labels):
            raise SpecError(f"labels: need to be printable text, got {list(self.labels)}")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise SpecError(f"labels: need at least two, all different, got {list(self.labels)}")
        if not self.convs or self.hidden_size < 1 or self.num_layers < 1:
            raise SpecError("a CNN-GRU needs at least one convolution, GRU layer and hidden unit")
        if self.num_layers > MAX_LAYERS:
            raise SpecError(f"num_layers: at most {MAX_LAYERS}, got {self.num_layers}")
        if self.family not in (KWS, CTC):
            raise SpecError(f"family: need {KWS} or {CTC}, got {self.family!r}")
        if self.family == CTC:
            _check_alphabet(self.labels)
        named = {label for label, _ in self.decision.thresholds}
        if strange := sorted(named - set(self.words)):
            raise SpecError(
                f"decision: thresholds for {', '.join(strange)}, and the words of this model are "
                f"{', '.join(self.words)}"
            )

    @property
    def writes_text(self) -> bool:
        """Whether its answer is a text by CTC, not one of its labels."""
        return self.family == CTC

    @property
    def words(self) -> tuple[str, ...]:
        """The labels that can be events: all but `unknown` and `silence`; none of a CTC model."""
        if self.family == CTC:
            return ()
        return tuple(label for label in self.labels if label not in {SILENCE, UNKNOWN})

    @property
    def chunk_length(self) -> int:
        """Samples in one output frame: audio comes in multiples of it."""
        length = self.features.hop_length
        for conv in self.convs:
            length *= conv.stride[0]
        return length

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(channels, frequency bins) before each convolution, and after the last."""
        shapes = [(1, self.features.n_mels)]
        for conv in self.convs:
            shapes.append((conv.out_channels, conv.out_bins(shapes[-1][1])))
        return tuple(shapes)

    @property
    def weights(self) -> int:
        """Weights of convolutions, GRUs and head; biases are not counted."""
        count = self.hidden_size * len(self.labels)
        for conv, (channels, _) in zip(self.convs, self.conv_shapes[:-1], strict=True):
            count += conv.out_channels * channels * conv.kernel_size[0] * conv.kernel_size[1]
        for layer in range(self.num_layers):
            inputs = self.hidden_size if layer else self.gru_input_size
            count += 3 * self.hidden_size * (inputs + self.hidden_size)
        return count

    @property
    def gru_input_size(self) -> int:
        """Width of what the first GRU layer reads."""
        channels, bins = self.conv_shapes[-1]
        return channels * bins

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """What is carried from chunk to chunk: audio tail, convolution contexts, GRU hidden."""
        return (
            StateSpec("audio_tail", (self.features.tail_length,)),
            *(
                StateSpec(f"conv{i}_context", (channels, conv.context, bins))
                for i, conv in enumerate(self.convs)
                for channels, bins in [self.conv_shapes[i]]
                if conv.context
            ),
            *(StateSpec(f"gru{i}_hidden", (self.hidden_size,)) for i in range(self.num_layers)),
        )

    def to_json(self) -> str:
        """The spec as one line of JSON, the same for equal specs."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Read what `to_json` wrote; SpecError names what does not fit."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise SpecError(f"model spec: not JSON ({e})") from e
        if not isinstance(raw, dict):
            raise SpecError(f"model spec: expected an object, got {type(raw).__name__}")
        try:
            spec = cls(
                **_only(cls, raw)
                | {
                    "labels": tuple(raw["labels"]),
                    "features": FeatureSpec(**_only(FeatureSpec, raw["features"])),
                    "convs": tuple(_conv(conv) for conv in raw["convs"]),
                    "decision": _decision(raw.get("decision", {})),
                    "endpoint": EndpointSpec(**_only(EndpointSpec, raw.get("endpoint", {}))),
                }
            )
        except (KeyError, TypeError, ValueError) as e:
            raise SpecError(f"model spec: {type(e).__name__}: {e}") from e
        return spec


def _check_alphabet(labels: tuple[str, ...]) -> None:
    if labels[0] != BLANK:
        raise SpecError(f"labels: the first of a CTC model is {BLANK}, got {labels[0]!r}")
    longer = [label for label in labels[1:] if len(label) != 1]
    if longer and not is_of_words(labels):
        raise SpecError(
            "labels: a CTC model has single characters, or words with a space before each, got "
            f"{', '.join(longer)}"
        )


def is_of_words(labels: Sequence[str]) -> bool:
    """Whether each label of a CTC model but the blank is a word, with a space before it."""
    return all(len(x) > 1 and x[0] == " " and " " not in x[1:] for x in labels[1:])


def spelled(labels: Sequence[str], text: str) -> list[str]:
    """The labels with which a CTC model with such labels writes a text."""
    return [f" {word}" for word in text.split()] if is_of_words(labels) else list(text)


def known_text(labels: Sequence[str]) -> str:
    """For people: what a CTC model can write."""
    if not is_of_words(labels):
        characters = "".join(sorted(x for x in labels[1:] if len(x) == 1))
        return f"the characters of this model are {characters!r}"
    words = [label.strip() for label in labels[1:]]
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return f"the words of this model are {', '.join(words[:_SHOWN])}{more}"


def _only(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(raw) - known):
        raise SpecError(f"model spec: unknown {cls.__name__} fields {unknown}")
    return raw


def _conv(raw: dict[str, Any]) -> ConvSpec:
    pairs = {k: tuple(raw[k]) for k in ("kernel_size", "stride")}
    return ConvSpec(**_only(ConvSpec, raw) | pairs)


def _decision(raw: dict[str, Any]) -> DecisionSpec:
    raw = dict(raw)
    thresholds = tuple((str(label), float(value)) for label, value in raw.get("thresholds", ()))
    return DecisionSpec(**_only(DecisionSpec, raw) | {"thresholds": thresholds})
