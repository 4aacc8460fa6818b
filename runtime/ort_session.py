"""ONNX files in ONNX Runtime."""

from pathlib import Path
from types import TracebackType
from typing import Any

import onnxruntime

from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.session import (
    PRECISION_KEY,
    TARGET_KEY,
    Array,
    Feed,
    HostStreams,
    TensorInfo,
    spec_of,
)

_PROVIDER = "CPUExecutionProvider"
DISABLED_OPTIMIZERS = {"WeightBiasQuantization"}
"""It quantizes the float bias of a graph for TensorRT, in FP16 to a scale that underflows."""


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
            reason = str(e).strip().splitlines()[-1]
            raise SessionError(f"{path}: ONNX Runtime does not open it ({reason})") from e
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.spec = spec_of(path, self.metadata)
        self.inputs = _infos(self._session.get_inputs())
        self.outputs = _infos(self._session.get_outputs())
        expected = ["audio", *(state.name for state in self.spec.state)]
        if [i.name for i in self.inputs] != expected:
            raise SessionError(
                f"{path}: inputs are {[i.name for i in self.inputs]}, its spec asks for {expected}"
            )
        rows, samples = self.inputs[0].shape
        self.max_batch = rows if isinstance(rows, int) else None
        self.max_samples = samples if isinstance(samples, int) else None
        self.backend = f"onnxruntime {onnxruntime.__version__}"
        self.device = f"cpu ({', '.join(self._session.get_providers())})"
        self.precision = self.metadata.get(PRECISION_KEY, "fp32")
        if self.metadata.get(TARGET_KEY, "cpu") != "cpu":
            self.precision += " (simulated)"  # its Q/DQ pairs around operators in float

    def streams(self, batch: int) -> HostStreams:
        """`batch` new streams, which begin with the initial state."""
        return HostStreams(self, batch)

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for a feed of all inputs, both by name."""
        names = [output.name for output in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feed)), strict=True))

    def __enter__(self) -> "OrtSession":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._session


def _infos(values: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(v.name, v.type.removeprefix("tensor(").removesuffix(")"), tuple(v.shape))
        for v in values
    )
