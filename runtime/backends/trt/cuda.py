"""The CUDA runtime, by way of cuda-bindings: memory, streams, graphs and events, each call checked.

Names and semantics are those of the CUDA Runtime API:
https://docs.nvidia.com/cuda/cuda-runtime-api
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.errors import BackendMissing, SessionError

Bytes = npt.NDArray[np.uint8]

_NO_DRIVER, _NO_DEVICE = "cudaErrorInsufficientDriver", "cudaErrorNoDevice"
_DEFAULT_STREAM = 0


@dataclass(frozen=True)
class Gpu:
    """What CUDA says of the first device, the one that is used."""

    name: str
    capability: str  # compute capability, as 8.7
    driver: str  # the newest CUDA that the driver can run, as 12.6
    integrated: bool  # has no memory of its own, as on a Jetson
    memory_bytes: int
    multiprocessors: int

    @property
    def model(self) -> str:
        """What tells apart GPUs of one name: every Jetson Orin is called just that."""
        return f"{self.name} ({self.multiprocessors} multiprocessors)"


class CudaError(SessionError):
    """A CUDA call failed."""


class Cuda:
    """The first CUDA device, and the calls on it that a session needs.

    Raises:
        BackendMissing: no cuda-bindings, no driver or no GPU; the message says what to do.
    """

    def __init__(self) -> None:
        self._library = _import()
        self.gpu = self._probe()
        self._call("cudaSetDevice", 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a call, or a CudaError with the runtime's own words."""
        status, *values = getattr(self._library, name)(*arguments)
        if int(status):
            self._library.cudaGetLastError()  # it would come up again at a later call
            _, text = self._library.cudaGetErrorString(status)
            raise CudaError(f"{name}: {text.decode()} (CUDA error {int(status)})")
        return values[0] if len(values) == 1 else tuple(values)

    def _probe(self) -> Gpu:
        _, driver = self._library.cudaDriverGetVersion()
        status, count = self._library.cudaGetDeviceCount()
        if int(status) or not count:
            raise BackendMissing(self._why_no_device(status, driver or 0))
        properties = self._call("cudaGetDeviceProperties", 0)
        return Gpu(
            name=properties.name.rstrip(b"\0").decode(),
            capability=f"{properties.major}.{properties.minor}",
            driver=_version(driver),
            integrated=bool(properties.integrated and properties.canMapHostMemory),
            memory_bytes=properties.totalGlobalMem,
            multiprocessors=properties.multiProcessorCount,
        )

    def _why_no_device(self, status: Any, driver: int) -> str:
        if not int(status) or status.name == _NO_DEVICE:
            return "CUDA finds no GPU here (is CUDA_VISIBLE_DEVICES set?)"
        _, text = self._library.cudaGetErrorString(status)
        _, runtime = self._library.cudaRuntimeGetVersion()
        if status.name != _NO_DRIVER:
            return f"CUDA does not start: {text.decode()} (CUDA error {int(status)})"
        if not driver:
            return (
                "no NVIDIA driver is installed here, or not one that this process can reach (in a "
                "container: was it started with --runtime nvidia or --gpus all?)"
            )
        return (
            f"the NVIDIA driver runs CUDA up to {_version(driver)}, and cuda-bindings is for "
            f"{_version(runtime)}: pip install 'cuda-bindings<{driver // 1000 + 1}'"
        )

    def free_bytes(self) -> int:
        """Device memory that nothing uses."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int) -> int:
        """Address of so many bytes of device memory, zeroed."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        try:
            self._call("cudaMemset", address, 0, max(size, 1))
            self.synchronize(_DEFAULT_STREAM)  # for which a stream of ours does not wait
        except CudaError:
            self.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._library.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all that was put on a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        """Set device memory to zero, in the stream's order."""
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy in the stream's order; CUDA sees from the addresses in which direction."""
        kind = self._library.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def capture(self, stream: int, work: Callable[[], None]) -> "Graph":
        """A graph of what `work` puts on a stream; nothing of it is run.

        Raises:
            CudaError: something in it cannot be captured. The stream is usable afterwards.
        """
        mode = self._library.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            # Ends it, also one that has become invalid, which gives no graph.
            status, graph = self._library.cudaStreamEndCapture(stream)
            if int(status):
                self._library.cudaGetLastError()
            else:
                self._call("cudaGraphDestroy", graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        return Graph(self, graph)

    def event(self) -> Any:
        """A mark to put on a stream, that keeps the time."""
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        """Put a mark on a stream."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks that the device has passed."""
        return float(self._call("cudaEventElapsedTime", start, end))

    def destroy_event(self, event: Any) -> None:
        """Give a mark back."""
        self._call("cudaEventDestroy", event)


class Graph:
    """Captured work, launched as one."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self._cuda = cuda
        try:
            self._executable = cuda._call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda._call("cudaGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Put the work on a stream."""
        self._cuda._call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Give it back."""
        self._cuda._call("cudaGraphExecDestroy", self._executable)


class SharedBuffer:
    """Memory of a fixed size that the host and the GPU both reach.

    On a GPU with memory of its own: pinned host memory, a device buffer, and copies between them.
    On an integrated one (Jetson): the one memory there is, mapped into both, and nothing is copied.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size = cuda, size
        library = cuda._library
        flags = library.cudaHostAllocMapped if cuda.gpu.integrated else library.cudaHostAllocDefault
        self._host = int(cuda._call("cudaHostAlloc", max(size, 1), flags))
        memory = (ctypes.c_uint8 * size).from_address(self._host)
        self.host: Bytes = np.ctypeslib.as_array(memory)
        self.host[:] = 0
        try:
            if cuda.gpu.integrated:
                self.device = int(cuda._call("cudaHostGetDevicePointer", self._host, 0))
            else:
                self.device = cuda.allocate(size)
        except CudaError:
            cuda._call("cudaFreeHost", self._host)
            raise

    def to_device(self, size: int, stream: int) -> None:
        """Let the GPU see the first `size` bytes that the host wrote."""
        if not self._cuda.gpu.integrated:
            self._cuda.copy(self.device, self._host, size, stream)

    def to_host(self, size: int, stream: int) -> None:
        """Let the host see the first `size` bytes that the GPU wrote, once the stream is done."""
        if not self._cuda.gpu.integrated:
            self._cuda.copy(self._host, self.device, size, stream)

    def close(self) -> None:
        """Give it back; `host` is empty from now on."""
        self.host = np.empty(0, np.uint8)
        if not self._cuda.gpu.integrated:
            self._cuda.free(self.device)
        self._cuda._call("cudaFreeHost", self._host)


def _import() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as e:
        try:
            from cuda import cudart as runtime  # its name before 12.6.1
        except ImportError:
            raise BackendMissing(
                f"cuda-bindings cannot be imported ({e}): pip install 'cuda-bindings<13' for CUDA "
                "12 (JetPack 6), 'cuda-bindings<14' for CUDA 13"
            ) from e
    return runtime


def _version(number: int) -> str:
    """The version that CUDA writes as 1000 * major + 10 * minor."""
    return f"{number // 1000}.{number % 1000 // 10}"
