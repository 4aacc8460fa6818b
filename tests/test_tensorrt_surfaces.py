"""The snapshot of TensorRT's Python names is what the wheels hold, and says what we build on."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import pytest
import tensorrt_surfaces
from tensorrt_surfaces import RTX, VERSIONS, WHEELS, Unavailable, has, load_surfaces

# One column for each of VERSIONS: 8.6.1, 10.3.0, 10.13.3.9, 10.16.1.11, 11.0, 11.4 and RTX 1.7.1.
PRESENT = {
    # How a network is typed.
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": "xxxx---",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "-xxxxxx",
    "BuilderFlag.FP16": "xxxx---",
    "BuilderFlag.INT8": "xxxx---",
    "BuilderFlag.FP8": "xxxx---",
    "BuilderFlag.BF16": "-xxx---",
    "BuilderFlag.INT4": "-xxx---",
    "BuilderFlag.FP4": "--xx---",
    "BuilderFlag.TF32": "xxxxxxx",
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": "xxxx---",
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS": "xxxx---",
    "IBuilderConfig.int8_calibrator": "xxxx---",
    "IBuilderConfig.quantization_flags": "xxxx---",
    "ILayer.precision": "xxxx---",
    "ILayer.set_output_type": "xxxx---",
    "ITensor.dynamic_range": "xxxx---",
    "Builder.platform_has_fast_fp16": "xxxx---",
    "Builder.platform_has_fast_int8": "xxxx---",
    "Builder.platform_has_tf32": "xxxx---",
    "float32": "xxxxxxx",
    "float16": "xxxxxxx",
    "int8": "xxxxxxx",
    # Build.
    "BuilderFlag.VERSION_COMPATIBLE": "xxxxxxx",
    "BuilderFlag.ERROR_ON_TIMING_CACHE_MISS": "-xxxxxx",
    "BuilderFlag.DISABLE_COMPILATION_CACHE": "-xxxxxx",
    "BuilderFlag.EDITABLE_TIMING_CACHE": "--xxxxx",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "------x",
    "HardwareCompatibilityLevel.AMPERE_PLUS": "xxxxxxx",
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": "--xxxxx",
    "MemoryPoolType.WORKSPACE": "xxxxxxx",
    "MemoryPoolType.TACTIC_DRAM": "xxxxxxx",
    "MemoryPoolType.TACTIC_SHARED_MEMORY": "-xxxxxx",
    "ProfilingVerbosity.DETAILED": "xxxxxxx",
    "IBuilderConfig.max_workspace_size": "x------",
    "IBuilderConfig.set_memory_pool_limit": "xxxxxxx",
    "IBuilderConfig.progress_monitor": "-xxxxxx",
    "IProgressMonitor": "-xxxxxx",
    "IBuilderConfig.builder_optimization_level": "xxxxxxx",
    "IBuilderConfig.max_aux_streams": "xxxxxxx",
    "IBuilderConfig.profiling_verbosity": "xxxxxxx",
    "IBuilderConfig.create_timing_cache": "xxxxxxx",
    "IBuilderConfig.get_timing_cache": "xxxxxxx",
    "IBuilderConfig.set_timing_cache": "xxxxxxx",
    "ITimingCache.serialize": "xxxxxxx",
    "IBuilderConfig.set_compute_capability": "------x",
    "ComputeCapability": "------x",
    "Builder.build_engine": "x------",
    "Builder.build_engine_with_config": "--xxxx-",
    "Builder.build_serialized_network": "xxxxxxx",
    "Builder.build_serialized_network_to_stream": "--xxxxx",
    "OnnxParser.parse": "xxxxxxx",
    "OnnxParser.supports_model": "xxxx---",
    "OnnxParser.supports_model_v2": "-xxxxxx",
    "OnnxParser.set_flag": "xxxxxxx",
    "OnnxParserFlag": "xxxxxxx",
    "OnnxParser.load_model_proto": "--xxxxx",
    "OnnxParser.set_builder_config": "---xxxx",
    # Run.
    "Runtime.engine_host_code_allowed": "xxxxxxx",
    "Runtime.load_runtime": "xxxxxxx",
    "Runtime.temporary_directory": "xxxxxxx",
    "Runtime.tempfile_control_flags": "xxxxxxx",
    "Runtime.get_engine_validity": "------x",
    "Runtime.engine_header_size": "------x",
    "IStreamReader": "-xxx---",
    "IStreamReaderV2": "--xxxxx",
    "ICudaEngine.num_bindings": "x------",
    "ICudaEngine.num_io_tensors": "xxxxxxx",
    "ICudaEngine.get_tensor_name": "xxxxxxx",
    "ICudaEngine.get_tensor_mode": "xxxxxxx",
    "ICudaEngine.get_tensor_shape": "xxxxxxx",
    "ICudaEngine.get_tensor_dtype": "xxxxxxx",
    "ICudaEngine.get_tensor_location": "xxxxxxx",
    "ICudaEngine.get_tensor_profile_shape": "xxxxxxx",
    "ICudaEngine.get_tensor_profile_values": "-xxxxxx",
    "ICudaEngine.device_memory_size": "xxxx---",
    "ICudaEngine.device_memory_size_v2": "-xxxxxx",
    "ICudaEngine.create_execution_context": "xxxxxxx",
    "ICudaEngine.create_execution_context_without_device_memory": "xxxx---",
    "ExecutionContextAllocationStrategy.USER_MANAGED": "-xxxxxx",
    "ICudaEngine.create_runtime_config": "--xxxxx",
    "IRuntimeConfig.set_execution_context_allocation_strategy": "--xxxxx",
    "IRuntimeConfig.cuda_graph_strategy": "------x",
    "IRuntimeConfig.create_runtime_cache": "------x",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": "------x",
    "IRuntimeCache": "------x",
    "CudaGraphStrategy": "------x",
    "ICudaEngine.create_engine_inspector": "xxxxxxx",
    "ICudaEngine.get_engine_stat": "---xxxx",
    "EngineInspector.get_engine_information": "xxxxxxx",
    "LayerInformationFormat.JSON": "xxxxxxx",
    "IExecutionContext.execute": "x------",
    "IExecutionContext.execute_v2": "xxxxxxx",
    "IExecutionContext.execute_async_v2": "x------",
    "IExecutionContext.execute_async_v3": "xxxxxxx",
    "IExecutionContext.set_tensor_address": "xxxxxxx",
    "IExecutionContext.set_input_shape": "xxxxxxx",
    "IExecutionContext.infer_shapes": "xxxxxxx",
    "IExecutionContext.set_aux_streams": "xxxxxxx",
    "IExecutionContext.set_optimization_profile_async": "xxxxxxx",
    "IExecutionContext.is_stream_capturable": "------x",
}

# Why flags are never passed as numbers: 1 << 0 is EXPLICIT_BATCH, later STRONGLY_TYPED.
NUMBERS = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (0, 0, 0, 0, None, None, None),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": (None, 1, 1, 1, 0, 0, 0),
    "BuilderFlag.VERSION_COMPATIBLE": (15, 13, 13, 13, 12, 12, 12),
    "BuilderFlag.REFIT": (5, 4, 4, 4, 4, 4, 4),
}

# What a runtime calls; cuda-bindings has followed CUDA 12 and 13 in two lines.
CUDA_WHEELS = ("cuda-bindings==12.9.10", "cuda-bindings==13.5.0")
CUDA_NAMES = [
    "cudaDeviceAttr.cudaDevAttrCanMapHostMemory",
    "cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor",
    "cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor",
    "cudaDeviceAttr.cudaDevAttrIntegrated",
    "cudaDeviceGetAttribute",
    "cudaDriverGetVersion",
    "cudaError_t.cudaErrorInsufficientDriver",
    "cudaError_t.cudaErrorNoDevice",
    "cudaError_t.cudaSuccess",
    "cudaEventCreate",
    "cudaEventDestroy",
    "cudaEventElapsedTime",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaFree",
    "cudaFreeHost",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphInstantiate",
    "cudaGraphInstantiateWithFlags",
    "cudaGraphLaunch",
    "cudaHostAlloc",
    "cudaHostAllocMapped",
    "cudaHostGetDevicePointer",
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaMemcpyAsync",
    "cudaMemcpyKind.cudaMemcpyDeviceToDevice",
    "cudaMemcpyKind.cudaMemcpyDeviceToHost",
    "cudaMemcpyKind.cudaMemcpyHostToDevice",
    "cudaMemsetAsync",
    "cudaRuntimeGetVersion",
    "cudaSetDevice",
    "cudaStreamBeginCapture",
    "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamNonBlocking",
    "cudaStreamSynchronize",
]
_MISSING = """
import json, operator, sys
from cuda.bindings import runtime
missing = []
for name in sys.argv[1:]:
    try:
        operator.attrgetter(name)(runtime)
    except AttributeError:
        missing.append(name)
print(json.dumps([runtime.__file__, missing]))
"""


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def surfaces():
    return load_surfaces()


def download(requirement, folder):
    try:
        return tensorrt_surfaces.download(requirement, folder)
    except Unavailable as reason:
        pytest.skip(str(reason))


def missing_cuda_names(environment=None):
    """The file of the installed cuda.bindings.runtime, and which names it does not have."""
    command = [sys.executable, "-c", _MISSING, *CUDA_NAMES]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def test_snapshot_holds_every_version(surfaces):
    assert tuple(surfaces) == VERSIONS
    assert all(set(surface) == {"names", "classes", "enums"} for surface in surfaces.values())


@pytest.mark.parametrize("version", WHEELS)
def test_snapshot_is_what_the_wheel_holds(version, wheels, surfaces):
    wheel = download(WHEELS[version], wheels)
    try:
        environment = tensorrt_surfaces.unpack(wheel, wheels / version)
    except Unavailable as reason:
        pytest.skip(str(reason))
    read = tensorrt_surfaces.read_surface("tensorrt", environment)
    assert read == {"version": version, **surfaces[version]}


def test_snapshot_is_what_is_installed_of_rtx(surfaces):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    read = tensorrt_surfaces.read_surface("tensorrt_rtx")
    assert read == {"version": RTX.removeprefix("rtx-"), **surfaces[RTX]}


@pytest.mark.parametrize("path", PRESENT)
def test_which_version_has(path, surfaces):
    assert "".join("x" if has(s, path) else "-" for s in surfaces.values()) == PRESENT[path]


@pytest.mark.parametrize("path", NUMBERS)
def test_flags_change_their_number(path, surfaces):
    enum, _, member = path.partition(".")
    assert tuple(s["enums"][enum].get(member) for s in surfaces.values()) == NUMBERS[path]


@pytest.mark.parametrize("enum", ["ErrorCodeTRT", "ILogger.Severity", "TensorIOMode"])
def test_enums_that_never_changed(enum, surfaces):
    assert len({json.dumps(surface["enums"][enum]) for surface in surfaces.values()}) == 1


def test_a_class_outside_the_snapshot_is_an_error(surfaces):
    with pytest.raises(KeyError, match="IPluginRegistry: not in the snapshot"):
        has(surfaces[RTX], "IPluginRegistry.get_creator")


def test_a_wheel_that_pip_cannot_download_is_said(tmp_path):
    with pytest.raises(Unavailable, match="pip cannot download tensorrt_bindings==0"):
        tensorrt_surfaces.download("tensorrt_bindings==0", tmp_path)


def test_the_installed_cuda_bindings_have_what_a_runtime_calls():
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    assert missing_cuda_names()[1] == []


@pytest.mark.parametrize("requirement", CUDA_WHEELS)
def test_cuda_bindings_have_what_a_runtime_calls(requirement, wheels):
    pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    folder = wheels / requirement
    with zipfile.ZipFile(download(requirement, wheels)) as archive:
        archive.extractall(folder)
    file, missing = missing_cuda_names({**os.environ, "PYTHONPATH": str(folder)})
    assert file.startswith(str(folder))
    assert missing == []


ADAPTER = """
import json, tensorrt
from cnngru_edge.export.targets.trt.build import _typings
from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.trt import library as trt_library
trt = trt_library.load("tensorrt")
log, said = trt_library.logger(trt), []
for kind in ("Builder", "Runtime"):
    try:
        trt_library.create(trt, kind, log)
    except SessionError as e:
        said.append(str(e))
print(json.dumps([_typings(trt, strong_graph=strong) for strong in (False, True)] + said))
"""

TYPINGS = {
    "8.6.1": [["weak"], []],
    "10.3.0": [["strong", "weak"]] * 2,
    "10.13.3.9": [["strong", "weak"]] * 2,
    "10.16.1.11": [["strong", "weak"]] * 2,
    "11.0.0.114": [["strong"]] * 2,
    "11.4.0.106": [["strong"]] * 2,
}


@pytest.mark.parametrize("version", WHEELS)
def test_the_adapter_on_the_real_bindings(version, tmp_path):
    """How it would type a network, its logger, and a library that does not start.

    The shared library behind the bindings is a stand-in that gives null pointers, as the real one
    does where CUDA does not work.
    """
    try:
        wheel = tensorrt_surfaces.download(WHEELS[version], tmp_path)
        env = tensorrt_surfaces.unpack(wheel, tmp_path / "site")
    except Unavailable as e:
        pytest.skip(str(e))
    command = [sys.executable, "-c", ADAPTER]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    *typings, builder, runtime = json.loads(done.stdout)
    assert typings == TYPINGS[version]
    assert builder == runtime == f"TensorRT {version} does not start: it does not say why"
