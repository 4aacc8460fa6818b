"""The calls on CUDA, against a simulated device; see simulated_gpu for what that can show."""

import sys

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from simulated_cuda import SimulatedCuda

from cnngru_edge.models.errors import BackendMissing, SessionError
from cnngru_edge.runtime.backends.trt.cuda import Cuda, CudaError, SharedBuffer


@pytest.fixture
def simulate(monkeypatch):
    """Let the adapter find a simulated device; the simulation."""

    def install(**device):
        simulated = SimulatedCuda(**device)
        monkeypatch.setattr("cuda.bindings.runtime", simulated)
        return simulated

    return install


def host_copy(cuda, address, size, stream):
    """What device memory holds, by way of a copy that was waited for."""
    found = np.empty(size, np.uint8)
    cuda.copy(found.ctypes.data, address, size, stream)
    cuda.synchronize(stream)
    return found


@pytest.mark.parametrize("integrated", [True, False])
def test_a_gpu_is_what_cuda_says_of_it(simulate, integrated):
    simulate(name="Orin", capability=(8, 7), integrated=integrated, driver=12060, runtime=12090)
    gpu = Cuda().gpu
    assert (gpu.name, gpu.capability, gpu.driver) == ("Orin", "8.7", "12.6")
    assert gpu.integrated is integrated
    assert gpu.memory_bytes == 8 << 30


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            {"driver": 0},
            "no NVIDIA driver is installed here, or not one that this process can reach (in a "
            "container: was it started with --runtime nvidia or --gpus all?)",
        ),
        (
            {"driver": 12060, "runtime": 13050},
            "the NVIDIA driver runs CUDA up to 12.6, and cuda-bindings is for 13.5: pip install "
            "'cuda-bindings<13'",
        ),
        ({"devices": 0}, "CUDA finds no GPU here (is CUDA_VISIBLE_DEVICES set?)"),
    ],
    ids=["no-driver", "old-driver", "no-device"],
)
def test_why_there_is_no_gpu_is_said(simulate, device, message):
    simulate(**device)
    with pytest.raises(BackendMissing) as error:
        Cuda()
    assert str(error.value) == message


def test_another_error_at_the_start_is_said_in_cudas_words(simulate):
    simulate().fail("cudaGetDeviceCount", error="cudaErrorUnknown")
    with pytest.raises(BackendMissing, match=r"^CUDA does not start: .+ \(CUDA error 999\)$"):
        Cuda()


def test_without_cuda_bindings_the_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(
        BackendMissing,
        match=r"^cuda-bindings cannot be imported \(.+\): pip install 'cuda-bindings<13' for CUDA "
        r"12 \(JetPack 6\), 'cuda-bindings<14' for CUDA 13$",
    ):
        Cuda()


def test_cuda_bindings_are_found_by_their_old_name(monkeypatch):
    simulated = SimulatedCuda(name="old")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", simulated)
    monkeypatch.setattr("cuda.cudart", simulated, raising=False)
    assert Cuda().gpu.name == "old"


def test_an_error_has_the_calls_name_and_cudas_words(simulate):
    simulated = simulate()
    cuda = Cuda()
    simulated.fail("cudaMalloc", error="cudaErrorMemoryAllocation")
    with pytest.raises(CudaError, match=r"^cudaMalloc: out of memory \(CUDA error 2\)$"):
        cuda.allocate(8)
    assert not int(simulated.cudaGetLastError()[0])  # or the next call would tell it again


def test_free_memory_is_asked_of_the_device(simulate):
    simulate(free_bytes=123 << 20)
    assert Cuda().free_bytes() == 123 << 20


def test_memory_is_zero_before_any_stream_sees_it(simulate):
    """A stream of ours does not wait for the default one, on which cudaMemset is asynchronous."""
    simulated = simulate()
    cuda = Cuda()
    stream, address = cuda.stream(), cuda.allocate(16)
    assert not host_copy(cuda, address, 16, stream).any()
    cuda.free(address)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


@pytest.mark.parametrize("failing", ["cudaMemset", "cudaStreamSynchronize"])
def test_memory_that_cannot_be_zeroed_is_given_back(simulate, failing):
    simulated = simulate()
    cuda = Cuda()
    simulated.fail(failing)
    with pytest.raises(CudaError, match=failing):
        cuda.allocate(16)
    assert simulated.leaks() == []


def test_a_stream_works_in_order_and_when_it_is_waited_for(simulate):
    simulate()
    cuda = Cuda()
    stream, address = cuda.stream(), cuda.allocate(4)
    ones, found = np.ones(4, np.uint8), np.full(4, 7, np.uint8)
    cuda.copy(address, ones.ctypes.data, 4, stream)
    cuda.zero(address + 1, 2, stream)
    cuda.copy(found.ctypes.data, address, 4, stream)
    assert (found == 7).all()
    cuda.synchronize(stream)
    assert found.tolist() == [1, 0, 0, 1]


def test_a_graph_is_what_was_captured_and_not_run(simulate):
    simulated = simulate()
    cuda = Cuda()
    stream, address = cuda.stream(), cuda.allocate(4)
    ones = np.ones(4, np.uint8)
    graph = cuda.capture(stream, lambda: cuda.copy(address, ones.ctypes.data, 4, stream))
    assert not host_copy(cuda, address, 4, stream).any()
    for _ in range(2):
        ones += 1
        graph.launch(stream)
        assert (host_copy(cuda, address, 4, stream) == ones).all()
    graph.close()
    cuda.free(address)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


@pytest.mark.parametrize(
    "stop", [SessionError("refused"), KeyboardInterrupt()], ids=["error", "^C"]
)
@pytest.mark.parametrize("is_invalid", [True, False])
def test_what_fails_in_a_capture_ends_it(simulate, stop, is_invalid):
    simulated = simulate()
    cuda = Cuda()
    stream, address = cuda.stream(), cuda.allocate(4)

    def work():
        cuda.zero(address, 4, stream)
        if is_invalid:
            with pytest.raises(CudaError, match="capturing"):
                cuda.synchronize(stream)
        raise stop

    with pytest.raises(type(stop)):
        cuda.capture(stream, work)
    assert not int(simulated.cudaGetLastError()[0])
    assert not host_copy(cuda, address, 4, stream).any()  # the stream is usable
    cuda.free(address)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


def test_a_wait_in_a_capture_is_an_error(simulate):
    simulated = simulate()
    cuda = Cuda()
    stream = cuda.stream()
    with pytest.raises(CudaError, match=r"cudaStreamSynchronize: operation not permitted"):
        cuda.capture(stream, lambda: cuda.synchronize(stream))
    cuda.synchronize(stream)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


@pytest.mark.parametrize(
    "failing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_a_graph_that_cannot_be_made_leaves_nothing(simulate, failing):
    simulated = simulate()
    cuda = Cuda()
    stream = cuda.stream()
    simulated.fail(failing)
    with pytest.raises(CudaError, match=failing):
        cuda.capture(stream, lambda: None)
    cuda.synchronize(stream)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


def test_marks_keep_the_time(simulate):
    simulated = simulate()
    cuda = Cuda()
    stream, marks = cuda.stream(), [cuda.event() for _ in range(2)]
    for mark in marks:
        cuda.record(mark, stream)
    with pytest.raises(CudaError, match="not ready"):
        cuda.elapsed_ms(*marks)
    cuda.synchronize(stream)
    assert cuda.elapsed_ms(*marks) > 0
    for mark in marks:
        cuda.destroy_event(mark)
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


@pytest.mark.parametrize("integrated", [True, False])
def test_a_buffer_is_shared_by_copies_or_by_being_one(simulate, integrated):
    simulated = simulate(integrated=integrated)
    cuda = Cuda()
    stream, buffer = cuda.stream(), SharedBuffer(cuda, 8)
    assert buffer.host.shape == (8,)
    assert not buffer.host.any()
    buffer.host[:] = range(8)
    buffer.to_device(6, stream)
    cuda.synchronize(stream)
    seen = np.frombuffer(simulated.read(buffer.device, 8), np.uint8)
    assert seen.tolist() == [*range(6), *([6, 7] if integrated else [0, 0])]
    simulated.write(buffer.device, bytes(range(10, 18)))
    buffer.to_host(2, stream)
    cuda.synchronize(stream)
    assert buffer.host[:3].tolist() == [10, 11, 12 if integrated else 2]
    copies = [] if integrated else [("pinned", "device", 6), ("device", "pinned", 2)]
    assert simulated.copies == copies
    buffer.close()
    assert buffer.host.size == 0
    cuda.destroy_stream(stream)
    assert simulated.leaks() == []


@pytest.mark.parametrize(
    ("integrated", "failing"),
    [(True, "cudaHostGetDevicePointer"), (False, "cudaMalloc"), (False, "cudaHostAlloc")],
)
def test_half_a_buffer_is_given_back(simulate, integrated, failing):
    simulated = simulate(integrated=integrated)
    cuda = Cuda()
    simulated.fail(failing)
    with pytest.raises(CudaError, match=failing):
        SharedBuffer(cuda, 8)
    assert simulated.leaks() == []


def test_the_simulation_fails_a_test_that_breaks_cudas_rules(simulate):
    simulate()
    cuda = Cuda()
    stream, address = cuda.stream(), cuda.allocate(8)
    pinned, host = SharedBuffer(cuda, 8), np.zeros(16, np.uint8)
    with pytest.raises(AssertionError, match="out of bounds of 8 bytes"):
        cuda.copy(address, host.ctypes.data, 9, stream)
    with pytest.raises(AssertionError, match="a copy from pinned to pageable memory"):
        cuda.copy(host.ctypes.data, pinned._host, 8, stream)
    with pytest.raises(AssertionError, match="pinned memory, expected device"):
        cuda.zero(pinned._host, 8, stream)
    with pytest.raises(AssertionError, match="is no memory of CUDA's"):
        cuda.free(host.ctypes.data)
    with pytest.raises(AssertionError, match="not the start of an allocation"):
        cuda.free(address + 1)
    cuda.free(address)
    with pytest.raises(AssertionError, match="device memory is used that was freed"):
        cuda.zero(address, 8, stream)
    with pytest.raises(AssertionError, match="no such stream"):
        cuda.synchronize(stream + 1)
    with pytest.raises(NotImplementedError, match="cudaMallocManaged is not simulated"):
        cuda._call("cudaMallocManaged", 8)
