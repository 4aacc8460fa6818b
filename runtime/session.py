"""One door to every artefact: `open_session(path)`, whatever backend the file needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.errors import SessionError, SpecError
from cnngru_edge.models.spec.stream import METADATA_KEY, ModelSpec
from cnngru_edge.models.spec.whole import Spec, read_spec, streamable

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

PRECISION_KEY = "cnngru_edge.precision"
"""Metadata beside the spec: fp32 or int8."""
TARGET_KEY = "cnngru_edge.target"
"""Metadata beside the spec: what an INT8 graph was quantized for; cpu, tensorrt, tensorrt-fp16."""
SOURCE_KEY = "cnngru_edge.source_sha256"
"""Metadata beside the spec: the sha256 of the file that an artefact was made from."""

CLIP_SAMPLES_KEY = "cnngru_edge.clip_samples"
"""Metadata beside the spec: the shortest, median and longest clip that it was calibrated with."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output; a dimension that is free has a letter."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Streams(Protocol):
    """Streams side by side as rows of one batch, each with its own state, wherever that is kept."""

    @property
    def state(self) -> dict[str, Array]:
        """A copy of the states (N, ...) that the next chunk starts from, by input name."""
        ...

    def advance(self, audio: Array) -> Array:
        """Logits (N, T, C) of the next (N, S) samples of all of them."""
        ...

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        ...

    def close(self) -> None:
        """Give back what they hold."""
        ...


class Session(Protocol):
    """An artefact, opened. Not thread-safe; keep one for each thread."""

    metadata: dict[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    backend: str  # library and version
    device: str  # where it really runs
    precision: str  # what its weights really are
    max_batch: int | None  # rows at a time; None for any number
    max_samples: int | None  # of a row at a time; of a phrase tokens, of an image columns

    @property
    def spec(self) -> Spec:
        """What the model is."""
        ...

    def streams(self, batch: int) -> Streams:
        """`batch` new streams, which begin with the initial state."""
        ...

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for a feed of all inputs, both by name."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...


class HostStreams:
    """Streams whose states are kept on the host, between runs of a session."""

    def __init__(self, session: Session, batch: int) -> None:
        self._session, self._spec = session, streamable(session.spec)
        self.state = initial_state(self._spec, batch)

    def advance(self, audio: Array) -> Array:
        """Logits (N, T, C) of the next (N, S) samples of all of them."""
        outputs = self._session.run({"audio": audio, **self.state})
        self.state = {s.name: outputs[s.next_name] for s in self._spec.state}
        return outputs["logits"]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        for name, value in self.state.items():
            self.state[name] = value.copy()  # what a session returned may be its own
            self.state[name][slice(None) if rows is None else list(rows)] = 0

    def close(self) -> None:
        """Nothing to give back."""


def spec_of(path: Path, metadata: Mapping[str, str]) -> Spec:
    """The spec in an artefact's metadata, or the reason why it is not one of ours."""
    if METADATA_KEY not in metadata:
        raise SessionError(
            f"{path}: no model spec inside (metadata {METADATA_KEY!r}), so it was not written by "
            "cnngru-edge; make one with 'cnngru-edge export'"
        )
    try:
        return read_spec(metadata[METADATA_KEY])
    except SpecError as e:
        raise SessionError(f"{path}: {e}") from e


def input_names(spec: Spec) -> list[str]:
    """What a model's graph is given: its input and, of one that can stream, its state."""
    if isinstance(spec, ModelSpec):
        return ["audio", *(state.name for state in spec.state)]
    return [spec.input.name]


def initial_state(spec: ModelSpec, batch: int) -> dict[str, Array]:
    """The zeros that a stream starts from, by input name."""
    return {state.name: np.zeros((batch, *state.shape), np.float32) for state in spec.state}
