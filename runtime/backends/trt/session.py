"""Engines in TensorRT and TensorRT-RTX. No torch, no PyCUDA, no CuPy: numpy and cuda-bindings.

How an enqueue works: https://docs.nvidia.com/deeplearning/tensorrt/latest (Performing Inference).
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.whole import WholeSpec, streamable
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.backends.trt.cuda import Cuda, CudaError, Gpu, Graph, SharedBuffer
from cnngru_edge.runtime.backends.trt.engine_file import RTX_CAPABILITIES, Manifest, read_engine
from cnngru_edge.runtime.backends.trt.whole import TrtWhole
from cnngru_edge.runtime.session import Array, Feed

_FLOAT = np.dtype(np.float32)
_GRAPH_ERROR = 1e-3  # the same kernels: any difference is more than this, or none


class GraphFallback(RuntimeWarning):
    """An engine runs without a CUDA graph though it was to run with one."""


class TrtSession:
    """A `.engine` on the first GPU.

    Args:
        path: the engine; its manifest is beside it.
        cuda_graph: capture the work once and launch it as a whole from then on.

    Raises:
        SessionError: not the engine of its manifest, of another version or for another GPU.
        BackendMissing: no GPU, no driver, or a library that is not installed.
    """

    def __init__(self, path: Path, *, cuda_graph: bool = True) -> None:
        data, manifest = read_engine(path)
        self.cuda = Cuda()  # before TensorRT: 8.6 crashes without a driver
        trt = trt_library.load(manifest.builder.library)
        _check_version(path, manifest, trt.__version__)
        _check_gpu(path, manifest, self.cuda.gpu)
        self.manifest = manifest
        self._trt = trt
        self.log = trt_library.logger(trt)
        self.log.start()
        self._runtime = trt_library.create(trt, "Runtime", self.log)
        self._runtime.engine_host_code_allowed = False
        with trt_library.stops_held_back():
            self.engine = self._runtime.deserialize_cuda_engine(data)
        self.backend = f"{manifest.builder.library} {trt.__version__}"
        if self.engine is None:
            raise SessionError(f"{path}: {self.failure('does not open this engine')}")
        self.stream = self.cuda.stream()
        self._streams: list[TrtStreams] = []  # all there are,
        self._idle: list[TrtStreams] = []  # and those that nobody uses now
        self._whole: TrtWhole | None = None  # of a model that takes its input whole
        self.cuda_graph = cuda_graph
        self.metadata, self.spec = manifest.metadata, manifest.spec
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self.max_batch: int | None = manifest.max_batch
        self.max_samples: int | None = manifest.max_samples
        self.device = f"{self.cuda.gpu.name} (compute capability {self.cuda.gpu.capability})"
        self.precision = manifest.precision

    def streams(self, batch: int) -> "TrtStreams":
        """`batch` new streams, which begin with the initial state; it stays on the GPU."""
        for streams in self._idle:
            if streams.batch == batch:
                self._idle.remove(streams)
                streams.reset()
                return streams
        self._streams.append(TrtStreams(self, batch))
        return self._streams[-1]

    def run(self, feed: Feed) -> dict[str, Array]:
        """All outputs for a feed of all inputs, both by name."""
        if isinstance(self.spec, WholeSpec):
            self._whole = self._whole or TrtWhole(self, self.spec)
            return {"logits": self._whole.run(feed[self.spec.input.name])}
        streams = self.streams(len(feed["audio"]))
        try:
            streams.write_state(feed)
            outputs = {"logits": streams.advance(feed["audio"])}
            states = streams.state
        finally:
            streams.close()
        return outputs | {s.next_name: states[s.name] for s in self.spec.state}

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """In which the engine takes an input: 8.6 has made 32-bit integers of token ids."""
        found: np.dtype[Any] = np.dtype(self._trt.nptype(self.engine.get_tensor_dtype(name)))
        return found

    def new_context(self) -> Any:
        """Another execution context of the engine, with shapes and addresses of its own."""
        self.log.start()
        context = self.engine.create_execution_context()
        if context is None:
            raise self.failure("makes no execution context")
        # Built with all details for the receipt; their ranges would cost time at each enqueue.
        context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
        return context

    def failure(self, what: str) -> SessionError:
        """An error with what the library said last."""
        return SessionError(f"{self.backend} {what}: {trt_library.explain(self.log.lines)}")

    def release(self, streams: "TrtStreams") -> None:
        """Keep what streams that are closed hold, for the next of as many."""
        if streams not in self._idle:
            self._idle.append(streams)

    def __enter__(self) -> "TrtSession":
        return self

    def __exit__(self, *error: object) -> None:
        # On a device that has failed every call fails: what failed first is to be told.
        with suppress(*([CudaError] if any(error) else [])), ExitStack() as held:
            held.callback(self.cuda.destroy_stream, self.stream)
            for streams in self._streams:
                held.callback(streams.free)
            if self._whole is not None:
                held.callback(self._whole.free)
        # In this order: destroying a runtime before its engine is undefined.
        del self.engine, self._runtime


class TrtStreams:
    """Streams as the rows of one batch, with their states on the GPU.

    There are two buffers for each state. A step reads one and writes the other, and the next step
    the other way round, so that no state is ever copied.
    """

    def __init__(self, session: TrtSession, batch: int) -> None:
        self._session, self._cuda, self._stream = session, session.cuda, session.stream
        self._spec = streamable(session.spec)
        self.batch = batch
        self._samples = 0  # of a row in the latest step
        self._steps = 0  # of that length
        self._side = 0  # which buffer of each state holds the latest
        self._graphs: dict[int, Graph] = {}  # by side
        self._context = session.new_context()
        chunk, most = self._spec.chunk_length, session.manifest.max_samples
        labels = len(self._spec.labels)
        self._sizes = {
            state.name: batch * math.prod(state.shape) * _FLOAT.itemsize
            for state in self._spec.state
        }
        with ExitStack() as held:

            def shared(count: int) -> SharedBuffer:
                buffer = SharedBuffer(self._cuda, count * _FLOAT.itemsize)
                return held.enter_context(closing(buffer))

            def device(size: int) -> int:
                address = self._cuda.allocate(size)
                held.callback(self._cuda.free, address)
                return address

            self.audio = shared(batch * most)
            self.logits = shared(batch * most // chunk * labels)
            self._buffers = {name: (device(n), device(n)) for name, n in self._sizes.items()}
            self._held = held.pop_all()

    def advance(self, audio: Array) -> Array:
        """Logits (N, T, C) of the next (N, S) samples of all of them."""
        self.write_audio(audio)
        self.upload()
        self.compute()
        self.download()
        self._cuda.synchronize(self._stream)
        return self._read_logits()

    def write_audio(self, audio: Array) -> None:
        """Put (N, S) samples where the next upload takes them from."""
        rows, samples = audio.shape
        if rows != self.batch or samples % self._spec.chunk_length:
            raise SessionError(
                f"this session takes {self.batch} rows of whole chunks, and not {rows} of {samples}"
            )
        self._set_length(samples)
        self.audio.host.view(_FLOAT)[: audio.size] = audio.ravel()

    def upload(self) -> None:
        """Host to device."""
        self.audio.to_device(self.batch * self._samples * _FLOAT.itemsize, self._stream)

    def download(self) -> None:
        """Device to host."""
        self.logits.to_host(math.prod(self._logits_shape) * _FLOAT.itemsize, self._stream)

    def compute(self) -> None:
        """Put a step on the stream, and make its states the current ones."""
        if graph := self._graphs.get(self._side):
            graph.launch(self._stream)
        else:
            self._enqueue()
            if self._session.cuda_graph and self._steps:  # the first was the warm-up
                self._capture()
        self._steps += 1
        self._side = 1 - self._side

    @property
    def has_graph(self) -> bool:
        """Whether all further steps of this length are launched as a CUDA graph."""
        return len(self._graphs) == 2

    @property
    def state(self) -> dict[str, Array]:
        """A copy of the states (N, ...) that the next chunk starts from, by input name."""
        return self._read_states(self._side)

    def write_state(self, feed: Feed) -> None:
        """Go on from these states (N, ...)."""
        for name, size in self._sizes.items():
            value = np.ascontiguousarray(feed[name], _FLOAT)
            if value.nbytes != size:
                raise SessionError(f"{name} is of shape {value.shape}, not of {self.batch} rows")
            self._cuda.copy(self._buffers[name][self._side], value.ctypes.data, size, self._stream)
            self._cuda.synchronize(self._stream)  # before the host's copy may go

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let these rows, or all, start anew."""
        for name, size in self._sizes.items():
            address, row = self._buffers[name][self._side], size // self.batch
            if rows is None:
                self._cuda.zero(address, size, self._stream)
            else:
                for index in rows:
                    start = address + range(self.batch)[index] * row
                    self._cuda.zero(start, row, self._stream)

    def close(self) -> None:
        """Give back what they hold, to the session."""
        self._session.release(self)

    def free(self) -> None:
        """Give back what they hold, to CUDA."""
        with self._held:
            self._drop_graphs()
        del self._context

    @property
    def _logits_shape(self) -> tuple[int, int, int]:
        spec = self._spec
        return self.batch, self._samples // spec.chunk_length, len(spec.labels)

    def _read_logits(self) -> Array:
        shape = self._logits_shape
        return self.logits.host.view(_FLOAT)[: math.prod(shape)].reshape(shape).copy()

    def _set_length(self, samples: int) -> None:
        """Shapes of the context; a graph holds for just these."""
        if samples == self._samples:
            return
        self._drop_graphs()
        self._samples = self._steps = 0
        shapes = {s.name: (self.batch, *s.shape) for s in self._spec.state}
        self._session.log.start()
        for name, shape in {"audio": (self.batch, samples), **shapes}.items():
            if not self._context.set_input_shape(name, shape):
                raise self._session.failure(f"does not take {name} of shape {shape}")
        self._samples = samples

    def _drop_graphs(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()

    def _enqueue(self) -> None:
        addresses = {"audio": self.audio.device, "logits": self.logits.device}
        for state in self._spec.state:
            pair = self._buffers[state.name]
            addresses[state.name] = pair[self._side]
            addresses[state.next_name] = pair[1 - self._side]
        self._session.log.start()
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._session.failure(f"has no tensor {name}")
        self._execute()

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._session.failure("does not run the engine")

    def _capture(self) -> None:
        """Make a graph of the step that was just put on the stream, if it gives the same."""
        expected = self._outcome()
        try:
            graph = self._cuda.capture(self._stream, self._execute)
            self._graphs[self._side] = graph
            graph.launch(self._stream)
            found = self._outcome()
        except SessionError as e:
            self._fall_back(str(e))
            return
        for name, value in expected.items():
            if not np.allclose(value, found[name], rtol=0, atol=_GRAPH_ERROR, equal_nan=True):
                error = float(np.abs(value - found[name]).max())
                self._fall_back(f"with one, {name} is off by {error:.2g}")
                return

    def _fall_back(self, reason: str) -> None:
        self._session.cuda_graph = False
        self._drop_graphs()
        self._enqueue()  # again: what the graph wrote is not to be used
        message = f"the engine runs without a CUDA graph, which is slower: {reason}"
        warnings.warn(GraphFallback(message), stacklevel=5)

    def _outcome(self) -> dict[str, Array]:
        """What a step wrote: the logits and the next states."""
        self.download()
        states = self._read_states(1 - self._side)  # and waits
        return {"logits": self._read_logits(), **states}

    def _read_states(self, side: int) -> dict[str, Array]:
        found = {}
        for state in self._spec.state:
            value = np.empty((self.batch, *state.shape), _FLOAT)
            address = self._buffers[state.name][side]
            self._cuda.copy(value.ctypes.data, address, value.nbytes, self._stream)
            found[state.name] = value
        self._cuda.synchronize(self._stream)
        return found


def _check_version(path: Path, manifest: Manifest, found: str) -> None:
    if found != manifest.builder.version:
        raise SessionError(
            f"{path}: built by {manifest.builder.name}, and here is {found}; an engine runs in the "
            f"version that built it: run '{manifest.command(path)}' here"
        )


def _check_gpu(path: Path, manifest: Manifest, gpu: Gpu) -> None:
    builder, here = manifest.builder, gpu.capability
    if here in builder.capabilities and builder.gpu in (None, gpu.model):
        return
    step = f"run '{manifest.command(path)}' here"
    if builder.library == "tensorrt_rtx":
        step = f"run '{manifest.command(path)} --capability {here}'"
        if here not in RTX_CAPABILITIES:
            step = "TensorRT-RTX has no kernels for that, build it with TensorRT"
    raise SessionError(
        f"{path}: built for {builder.gpu or 'GPUs'} of compute capability "
        f"{', '.join(builder.capabilities)}, and here is {gpu.model} of {here}: {step}"
    )
