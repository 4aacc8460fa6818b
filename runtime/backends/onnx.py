"""ONNX files in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from cnngru_edge.models.errors import SessionError, last_line
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.session import (
    PRECISION_KEY,
    TARGET_KEY,
    Array,
    Feed,
    TensorInfo,
    initial_state,
    input_names,
    spec_of,
)

_PROVIDER = "CPUExecutionProvider"
DISABLED_OPTIMIZERS = {"MatmulTransposeFusion", "WeightBiasQuantization"}
"""The first crashes on a product in FP16 that is not quantized (onnxruntime 1.32) and makes nothing
here faster; the second quantizes the float bias of a graph for TensorRT, in FP16 to a scale that
underflows."""


class OrtSession:
    """A `.onnx` file on the CPU."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors are raised; its warnings are about its own fusions
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=[_PROVIDER], disabled_optimizers=DISABLED_OPTIMIZERS
            )
        except Exception as e:  # its exceptions have no common base but this
            raise SessionError(f"{path}: ONNX Runtime does not open it ({last_line(e)})") from e
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.spec = spec_of(path, self.metadata)
        self.inputs = _infos(self._session.get_inputs())
        self.outputs = _infos(self._session.get_outputs())
        expected = input_names(self.spec)
        if [i.name for i in self.inputs] != expected:
            raise SessionError(
                f"{path}: inputs are {[i.name for i in self.inputs]}, its spec asks for {expected}"
            )
        logits, count = self.outputs[0].shape[-1], len(self.spec.labels)
        if isinstance(logits, int) and logits != count:
            raise SessionError(f"{path}: {logits} logits, its spec has {count} labels")
        rows, *_, length = self.inputs[0].shape
        self.max_batch = rows if isinstance(rows, int) else None
        self.max_samples = length if isinstance(length, int) else None
        self.backend = f"onnxruntime {onnxruntime.__version__}"
        self.device = f"cpu ({', '.join(self._session.get_providers())})"
        self.precision = self.metadata.get(PRECISION_KEY, "fp32")
        if self.metadata.get(TARGET_KEY, "cpu") != "cpu":
            self.precision += " (simulated)"  # its Q/DQ pairs around operators in float

    def streams(self, batch: int) -> "OrtStreams":
        """`batch` new streams, which begin with the initial state."""
        return OrtStreams(self, self._session, batch)

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for a feed of all inputs, both by name."""
        names = [output.name for output in self.outputs]
        given = dict(feed)
        if self.inputs[0].dtype == "int32":  # token ids of a graph for TensorRT 8.6
            given = {name: value.astype(np.int32) for name, value in feed.items()}
        try:
            values = self._session.run(names, given)
        except Exception as e:  # its exceptions have no common base but this
            raise SessionError(f"ONNX Runtime does not run this input ({last_line(e)})") from e
        return dict(zip(names, values, strict=True))

    def __enter__(self) -> "OrtSession":
        return self

    def __exit__(self, *error: object) -> None:
        del self._session


class OrtStreams:
    """Streams whose inputs and outputs are bound to memory that stays.

    There are two buffers for each state, which a step reads and writes and the next one the other
    way round: nothing is allocated for it in a step, and a state is never copied.
    """

    def __init__(
        self, session: OrtSession, runtime: onnxruntime.InferenceSession, batch: int
    ) -> None:
        self._runtime, self._spec, self._batch = runtime, streamable(session.spec), batch
        first, second = initial_state(self._spec, batch), initial_state(self._spec, batch)
        self._states = (first, second)
        self._side = 0  # of the states that the next step starts from
        self._audio = np.zeros((batch, 0), np.float32)

    @property
    def state(self) -> dict[str, Array]:
        """A copy of the states (N, ...) that the next chunk starts from, by input name."""
        return {name: value.copy() for name, value in self._states[self._side].items()}

    def advance(self, audio: Array) -> Array:
        """Logits (N, T, C) of the next (N, S) samples of all of them."""
        if audio.shape != self._audio.shape:
            self._bind(audio.shape)
        self._audio[...] = audio
        try:
            self._runtime.run_with_iobinding(self._bindings[self._side])
        except Exception as e:  # its exceptions have no common base but this
            raise SessionError(f"ONNX Runtime does not run this step ({last_line(e)})") from e
        self._side = 1 - self._side
        return self._logits.copy()

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        for value in self._states[self._side].values():
            value[slice(None) if rows is None else list(rows)] = 0

    def close(self) -> None:
        """Nothing to give back."""

    def _bind(self, shape: tuple[int, ...]) -> None:
        """Memory for audio (N, S) of this shape and its logits, and what reads and writes where."""
        frames = shape[1] // self._spec.chunk_length
        self._audio = np.zeros(shape, np.float32)
        self._logits = np.zeros((self._batch, frames, len(self._spec.labels)), np.float32)
        self._bindings = []
        for side in (0, 1):
            binding = self._runtime.io_binding()
            now, then = self._states[side], self._states[1 - side]
            inputs = {"audio": self._audio, **now}
            outputs = {"logits": self._logits}
            outputs |= {state.next_name: then[state.name] for state in self._spec.state}
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            self._bindings.append(binding)


def _infos(values: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(v.name, v.type.removeprefix("tensor(").removesuffix(")"), tuple(v.shape))
        for v in values
    )
