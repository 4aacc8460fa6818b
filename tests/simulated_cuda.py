"""The CUDA runtime's books, kept by numpy: memory, streams, captures, graphs, events.

It fails a test that breaks CUDA's rules. What it is not, see simulated_gpu: a GPU.
"""

import ctypes
import functools
import types
from dataclasses import dataclass
from itertools import count

from cuda.bindings import runtime as real

POISON = 0xCB  # of device memory that nobody has written


class CudaFault(Exception):
    """A call's error, by its name in cudaError_t."""


def cuda_call(values=0):
    """Make a method answer as cuda-bindings do: the status, then its values or as many None."""

    def decorate(function):
        @functools.wraps(function)
        def call(self, *arguments):
            name = function.__name__
            self.calls.append(name)
            try:
                self._fail_if_asked(name)
                found = function(self, *arguments)
            except CudaFault as e:
                self.last_error = getattr(real.cudaError_t, str(e))
                return (self.last_error, *[None] * values)
            return (real.cudaError_t.cudaSuccess, *(found if values > 1 else [found] * values))

        return call

    return decorate


@dataclass
class Memory:
    """An allocation; when it is freed its bytes stay, so that its address is not given anew."""

    kind: str  # device, pinned, or mapped: pinned and seen by the device
    size: int
    buffer: ctypes.Array
    is_free: bool = False

    @property
    def start(self):
        return ctypes.addressof(self.buffer)


class SimulatedCuda:
    """Stands in for the module cuda.bindings.runtime; its constants and statuses are the real ones.

    What is put on a stream is done when the stream is waited for, and not before.
    """

    def __init__(
        self,
        name="Orin",
        capability=(8, 7),
        *,
        integrated=False,
        free_bytes=6 << 30,
        driver=13000,
        runtime=13000,
        devices=1,
        multiprocessors=16,
    ):
        self.name, self.capability, self.integrated = name, capability, integrated
        self.free_bytes, self.driver, self.runtime = free_bytes, driver, runtime
        self.devices, self.multiprocessors = devices, multiprocessors
        self.calls = []  # names, in order; also "execute" where TensorRT puts its work on a stream
        self.copies = []  # (from, to, bytes), as they were asked for
        self.last_error = real.cudaError_t.cudaSuccess
        self.probed = False
        self._memory, self._handles, self._clock = [], count(0x1000, 0x10), 0
        self._streams = {0: []}  # what is yet to be done, by stream
        self._alive = {}  # streams, events, graphs: kind by handle
        self._graphs, self._events = {}, {}
        self._capturing, self._recorded, self._invalid = None, [], False
        self._failures = {}

    def __getattr__(self, name):
        value = getattr(real, name)
        if isinstance(value, (int, type)):  # constants, enums
            return value
        raise NotImplementedError(f"{name} is not simulated")

    # What a test asks.

    def fail(self, name, call=1, error="cudaErrorUnknown"):
        """Let a coming call of a function fail, counted from here; `call=None` for all of them."""
        self._failures[name] = (call, error)

    def leaks(self):
        """What was made and not given back."""
        memory = [f"{m.size} bytes of {m.kind} memory" for m in self._memory if not m.is_free]
        return memory + sorted(self._alive.values())

    @property
    def has_driver(self):
        return self.driver >= self.runtime // 1000 * 1000 and self.devices > 0

    # What the simulated TensorRT does.

    @property
    def is_capturing(self):
        return self._capturing is not None

    def invalidate_capture(self):
        self._invalid = True

    def execute(self, stream, work):
        self.calls.append("execute")
        self._put(stream, work)

    def read(self, address, size, kinds=("device", "mapped")):
        self._check(address, size, kinds)
        return ctypes.string_at(address, size)

    def write(self, address, data, kinds=("device", "mapped")):
        self._check(address, len(data), kinds)
        ctypes.memmove(address, data, len(data))

    # The functions of the CUDA runtime.

    @cuda_call(1)
    def cudaDriverGetVersion(self):
        return self.driver

    @cuda_call(1)
    def cudaRuntimeGetVersion(self):
        return self.runtime

    @cuda_call(1)
    def cudaGetDeviceCount(self):
        self.probed = True
        if self.driver < self.runtime // 1000 * 1000:
            raise CudaFault("cudaErrorInsufficientDriver")
        if not self.devices:
            raise CudaFault("cudaErrorNoDevice")
        return self.devices

    @cuda_call(1)
    def cudaGetDeviceProperties(self, device):
        assert device == 0
        major, minor = self.capability
        return types.SimpleNamespace(
            name=self.name.encode().ljust(256, b"\0"),
            major=major,
            minor=minor,
            integrated=int(self.integrated),
            canMapHostMemory=1,
            totalGlobalMem=8 << 30,
            multiProcessorCount=self.multiprocessors,
        )

    @cuda_call()
    def cudaSetDevice(self, device):
        assert device == 0

    def cudaGetLastError(self):
        error, self.last_error = self.last_error, real.cudaError_t.cudaSuccess
        return (error,)

    def cudaGetErrorString(self, error):
        return real.cudaGetErrorString(error)

    @cuda_call(2)
    def cudaMemGetInfo(self):
        return self.free_bytes, 8 << 30

    @cuda_call(1)
    def cudaMalloc(self, size):
        self._not_in_capture()
        return self._allocate("device", size)

    @cuda_call(1)
    def cudaHostAlloc(self, size, flags):
        self._not_in_capture()
        assert flags in {real.cudaHostAllocDefault, real.cudaHostAllocMapped}
        return self._allocate("mapped" if flags == real.cudaHostAllocMapped else "pinned", size)

    @cuda_call(1)
    def cudaHostGetDevicePointer(self, address, flags):
        self._check(address, 1, ("mapped",))
        return address

    @cuda_call()
    def cudaFree(self, address):
        self._free(address, ("device",))

    @cuda_call()
    def cudaFreeHost(self, address):
        self._free(address, ("pinned", "mapped"))

    @cuda_call()
    def cudaMemset(self, address, value, size):
        """Of device memory it is asynchronous, on the default stream ("API synchronization")."""
        self._not_in_capture()
        self._set(address, value, size, 0)

    @cuda_call()
    def cudaMemsetAsync(self, address, value, size, stream):
        self._set(address, value, size, stream)

    @cuda_call()
    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert kind in real.cudaMemcpyKind
        kinds = [self._kind(address, size) for address in (source, to)]
        assert "device" in kinds, f"a copy from {kinds[0]} to {kinds[1]} memory"
        self.copies.append((*kinds, size))

        def work():
            for address in (to, source):
                self._kind(address, size)
            ctypes.memmove(to, source, size)

        self._put(stream, work)

    @cuda_call(1)
    def cudaStreamCreateWithFlags(self, flags):
        assert flags == real.cudaStreamNonBlocking
        handle = self._new("stream")
        self._streams[handle] = []
        return handle

    @cuda_call()
    def cudaStreamDestroy(self, stream):
        self._drain(stream)
        del self._streams[stream]
        self._end(stream, "stream")

    @cuda_call()
    def cudaStreamSynchronize(self, stream):
        if stream == self._capturing:
            self._not_in_capture()
        self._drain(stream)

    @cuda_call()
    def cudaStreamBeginCapture(self, stream, mode):
        assert mode in real.cudaStreamCaptureMode
        assert stream in self._streams
        assert stream != 0, "the default stream cannot be captured"
        assert not self.is_capturing
        self._capturing, self._recorded, self._invalid = stream, [], False

    @cuda_call(1)
    def cudaStreamEndCapture(self, stream):
        assert stream == self._capturing
        self._capturing = None
        if self._invalid:
            raise CudaFault("cudaErrorStreamCaptureInvalidated")
        handle = self._new("graph")
        self._graphs[handle] = self._recorded
        return handle

    @cuda_call(1)
    def cudaGraphInstantiate(self, graph, flags):
        assert self._alive[graph] == "graph"
        handle = self._new("executable graph")
        self._graphs[handle] = self._graphs[graph]
        return handle

    @cuda_call()
    def cudaGraphLaunch(self, executable, stream):
        assert self._alive[executable] == "executable graph"
        for work in self._graphs[executable]:
            self._put(stream, work)

    @cuda_call()
    def cudaGraphDestroy(self, graph):
        self._end(graph, "graph")

    @cuda_call()
    def cudaGraphExecDestroy(self, executable):
        self._end(executable, "executable graph")

    @cuda_call(1)
    def cudaEventCreate(self):
        return self._new("event")

    @cuda_call()
    def cudaEventRecord(self, event, stream):
        assert self._alive[event] == "event"
        self._events[event] = None
        self._put(stream, lambda: self._events.update({event: self._clock}))

    @cuda_call(1)
    def cudaEventElapsedTime(self, start, end):
        times = [self._events[event] for event in (start, end)]
        if None in times:
            raise CudaFault("cudaErrorNotReady")
        return 0.25 * (times[1] - times[0])

    @cuda_call()
    def cudaEventDestroy(self, event):
        self._end(event, "event")

    # How.

    def _fail_if_asked(self, name):
        call, error = self._failures.get(name, (0, ""))
        if call is not None:
            self._failures[name] = (call - 1, error)
        if call is None or call == 1:
            if name == "cudaStreamEndCapture":  # it is over, whatever it gives
                self._capturing = None
            raise CudaFault(error)

    def _new(self, kind):
        handle = next(self._handles)
        self._alive[handle] = kind
        return handle

    def _end(self, handle, kind):
        assert self._alive.pop(handle, None) == kind, f"no such {kind}: {handle:#x}"

    def _allocate(self, kind, size):
        assert size > 0
        memory = Memory(kind, size, (ctypes.c_uint8 * size)())
        ctypes.memset(memory.start, POISON, size)
        self._memory.append(memory)
        return memory.start

    def _free(self, address, kinds):
        """Waits for all that is under way, as cudaFree does."""
        self._not_in_capture()
        for stream in self._streams:
            self._drain(stream)
        memory = self._check(address, 1, kinds)
        assert memory.start == address, f"{address:#x} is not the start of an allocation"
        memory.is_free = True
        ctypes.memset(memory.start, POISON, memory.size)

    def _find(self, address):
        found = (m for m in self._memory if m.start <= address < m.start + m.size)
        return next(found, None)

    def _check(self, address, size, kinds):
        memory = self._find(address)
        assert memory is not None, f"{address:#x} is no memory of CUDA's"
        assert not memory.is_free, f"{memory.kind} memory is used that was freed"
        assert memory.kind in kinds, f"{memory.kind} memory, expected {' or '.join(kinds)}"
        assert address + size <= memory.start + memory.size, f"out of bounds of {memory.size} bytes"
        return memory

    def _kind(self, address, size):
        """Of memory that a copy reads or writes; what is not CUDA's is the host's."""
        if self._find(address) is None:
            return "pageable"
        return self._check(address, size, ("device", "pinned", "mapped")).kind

    def _set(self, address, value, size, stream):
        self._check(address, size, ("device",))
        self._put(stream, lambda: self.write(address, bytes([value]) * size))

    def _put(self, stream, work):
        assert stream in self._streams, f"no such stream: {stream:#x}"
        (self._recorded if stream == self._capturing else self._streams[stream]).append(work)

    def _drain(self, stream):
        assert stream in self._streams, f"no such stream: {stream:#x}"
        queue = self._streams[stream]
        while queue:
            self._clock += 1
            queue.pop(0)()

    def _not_in_capture(self):
        if self.is_capturing:
            self.invalidate_capture()
            raise CudaFault("cudaErrorStreamCaptureUnsupported")
