"""A GPU and its TensorRT, played by numpy and ONNX Runtime: for tests of the adapter's own logic.

What it is: `SimulatedCuda` (simulated_cuda) keeps the CUDA runtime's books and fails a test that
breaks its rules; `SimulatedTensorrt` has the names of one real version and no others, and an engine
of it is the ONNX file, run by ONNX Runtime.

What it is not: a GPU. Nothing here says whether TensorRT parses a graph, which kernels it chooses,
how exact or fast they are, or whether they can be captured. Kernels run in order and on one thread,
so a race between streams shows only as work that was not waited for. Where the documentation leaves
room, this takes the worst: nothing that is asynchronous happens before it is waited for.
"""

import contextlib
import enum
import functools
import inspect
import json
import struct
import sys
import types
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from simulated_cuda import SimulatedCuda
from tensorrt_surfaces import RTX, VERSIONS, load_surfaces

from cnngru_edge.runtime.backends.onnx import DISABLED_OPTIMIZERS

# As runtime/backends/trt/engine_file.py reads it, and our JSON's size.
ENGINE_HEADER = struct.Struct("<4sIqq4B4xI")
WEAK_ONLY, BOTH, STRONG_ONLY = VERSIONS[:1], VERSIONS[1:4], VERSIONS[4:]  # how they type
_NUMPY_OF = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
ONE_OF_EACH = (VERSIONS[0], VERSIONS[1], VERSIONS[5], RTX)  # where a version is not the question

_surfaces = functools.cache(load_surfaces)


class Number(enum.Enum):
    """An enum as pybind11 makes them: it has a number, and is none."""

    def __int__(self):
        return self.value


class Object:
    """An object with the public names of a real class in one version, and no others.

    What a subclass keeps for itself has a leading underscore.
    """

    _names = frozenset()

    def __getattribute__(self, name):
        if name.startswith("_"):
            return super().__getattribute__(name)
        self._require(name)
        return super().__getattribute__(name)

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            self._require(name)
            assert not inspect.isfunction(getattr(type(self), name)), f"{name} is a method"
        super().__setattr__(name, value)

    def _require(self, name):
        if name not in self._names:
            kind = type(self).__name__
            raise AttributeError(f"{kind} of {self._trt} has no attribute {name!r}")
        if not hasattr(type(self), name):
            raise NotImplementedError(f"{type(self).__name__}.{name} is not simulated")


@dataclass
class Build:
    """What a builder was given."""

    network_flags: set
    flags: set
    limits: dict
    tactics: set
    previews: set
    verbosity: str
    level: int
    capabilities: dict
    shapes: dict  # input: [least, usual, most]
    precisions: dict  # layer: what was asked
    has_profile: bool
    is_cancelled: bool = False


@dataclass
class Quirks:
    """What this TensorRT does otherwise than build and run everything, in INT8 where asked."""

    no_objects: str = ""  # Builder and Runtime are null, which is a TypeError of pybind11
    strong_error: str = ""  # what a strongly typed build fails with
    parse_error: str = ""
    build_error: str = ""
    open_error: str = ""
    context_error: str = ""
    execute_error: str = ""
    float_nodes: tuple = ()  # left in float
    opaque: bool = False  # the GRU is one block that the inspector does not open
    capturable: bool = True
    graph_offset: float = 0.0  # of the logits, in a captured execution
    on_build: object = None  # called while it builds


class SimulatedTensorrt(types.ModuleType):
    """Stands in for the module tensorrt, or tensorrt_rtx."""

    def __init__(self, surface_version, cuda):
        is_rtx = surface_version == RTX
        super().__init__("tensorrt_rtx" if is_rtx else "tensorrt")
        self.__version__ = surface_version.removeprefix("rtx-")
        self._surface, self._cuda = _surfaces()[surface_version], cuda
        self._number = [int(part) for part in self.__version__.split(".")]
        self.quirks = Quirks(opaque=self._number[0] == 8)
        self.builds = []
        for name, members in self._surface["enums"].items():
            owner, _, inner = name.rpartition(".")
            if not owner:
                setattr(self, name, Number(inner, members))
        severity = Number("Severity", self._surface["enums"]["ILogger.Severity"])
        names = self._surface["classes"]
        for kind in (*Object.__subclasses__(), IProgressMonitor):
            name = kind.__name__
            if name in names:
                inside = {"_names": frozenset(names[name]), "_trt": self, "_is_rtx": is_rtx}
                setattr(self, name, type(name, (kind,), inside))
        self.ILogger = type("ILogger", (ILogger,), {"Severity": severity})
        for name, kind in {"float32": "FLOAT", "float16": "HALF", "int8": "INT8"}.items():
            setattr(self, name, self.DataType[kind])

    def __getattr__(self, name):
        if name in self._surface["names"]:
            raise NotImplementedError(f"{name} is not simulated")
        raise AttributeError(f"{self!r} has no attribute {name!r}")

    def __repr__(self):
        return f"{self.__name__} {self.__version__}"

    def nptype(self, kind):
        return {"INT32": np.int32, "INT64": np.int64, "FLOAT": np.float32}[kind.name]

    def _start(self, log, takes_gpu=True):
        assert isinstance(log, self.ILogger)
        if self.quirks.no_objects:
            say(log, "ERROR", self.quirks.no_objects)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        if takes_gpu and not (self._cuda.has_driver and self._cuda.probed):
            pytest.fail("8.6 crashes here: CUDA was not asked whether there is a driver")


def say(log, severity, text):
    """TensorRT swallows what a logger raises."""
    with contextlib.suppress(BaseException):
        log.log(log.Severity[severity], text)


class ILogger:
    """To be subclassed."""

    def log(self, severity, message):
        raise NotImplementedError


class IProgressMonitor:
    """To be subclassed."""


class Builder(Object):
    def __init__(self, log):
        self._trt._start(log, takes_gpu=not self._is_rtx)
        self._log = log

    def create_network(self, flags=0):
        return self._trt.INetworkDefinition(flags)

    def create_builder_config(self):
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        trt, quirks = self._trt, self._trt.quirks
        build = Build(
            network._flags,
            config._flags,
            config._limits,
            config._tactics,
            config._previews,
            config.profiling_verbosity.name,
            config.builder_optimization_level,
            config._capabilities,
            _shapes(network, config),
            {layer.name: layer._asked for layer in network._layers if layer._asked},
            bool(config._profiles),
        )
        trt.builds.append(build)
        say(self._log, "INFO", "Local timing cache in use.")
        if quirks.on_build:
            quirks.on_build(self._log)
        if error := self._refused(network, config, build):
            say(self._log, "ERROR", error)
            return None
        build.is_cancelled = not self._tell(config)
        if build.is_cancelled:
            say(self._log, "ERROR", "Error Code 1: Build cancelled")
            return None
        if config._cache is not None:
            config._cache._data += b"+measured"
        layers = _built_layers(network._model, build, quirks)
        if self._is_rtx and build.verbosity == "DETAILED":
            for layer in layers:
                say(self._log, "VERBOSE", _log_line(layer))
        settings = {
            "gpu": trt._cuda.capability if not self._is_rtx else None,
            "shapes": build.shapes,
            "layers": layers if build.verbosity == "DETAILED" else [],
            "strong": network._strong,
        }
        return _plan(trt, settings, network._data)

    def _refused(self, network, config, build):
        quirks = self._trt.quirks
        typed = {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"} & build.flags
        if network._strong and (typed or build.precisions):
            return f"Error Code 4: API Usage Error (flag {typed} on a strongly typed network)"
        if network._strong and quirks.strong_error:
            return quirks.strong_error
        if not network._strong and network._is_quantized and "INT8" not in build.flags:
            return "Error Code 4: API Usage Error (Q/DQ layers, and the flag INT8 is not set)"
        if None in build.shapes.values():
            return (
                "Error Code 4: Internal Error (Network has dynamic or shape inputs, but no "
                "optimization profile has been defined.)"
            )
        return quirks.build_error

    def _tell(self, config):
        """Phases to a monitor, one within another; what it raises is swallowed."""
        monitor, go_on = getattr(config, "progress_monitor", None), True
        if monitor is None:
            return True
        for method, *arguments in (
            ("phase_start", "Building", None, 3),
            ("step_complete", "Building", 0),
            ("phase_start", "Timing", "Building", 100),
            ("step_complete", "Timing", 7),
            ("phase_finish", "Timing"),
            ("step_complete", "Building", 1),
            ("phase_finish", "Building"),
        ):
            try:
                answer = getattr(monitor, method)(*arguments)
            except BaseException:
                continue
            if method == "step_complete" and not answer:
                go_on = False
        return go_on


class INetworkDefinition(Object):
    num_inputs = num_layers = 0

    def __init__(self, flags):
        known = self._trt.NetworkDefinitionCreationFlag
        self._flags = {member.name for member in known if flags >> int(member) & 1}
        assert sum(1 << int(known[name]) for name in self._flags) == flags, "an unknown flag"
        self._strong = self._trt._number[0] > 10 or self._is_rtx or "STRONGLY_TYPED" in self._flags
        self._inputs, self._layers = [], []

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]

    def _read(self, data):
        self._data, self._model = data, _typed(data)
        nodes = list(self._model.graph.all_nodes())
        self._is_quantized = any(node.op_type == "QuantizeLinear" for node in nodes)
        for value in self._model.graph.inputs:
            shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
            self._inputs.append(self._tensor(value.name, value.dtype, shape))
        for node in self._model.graph:
            outputs = [self._tensor(o.name, o.dtype, ()) for o in node.outputs]
            self._layers.append(self._trt.ILayer(node.name, outputs))
            if node.op_type in {"Reshape", "Slice"}:  # an importer computes shapes in more layers
                lengths = self._tensor("", ir.DataType.INT64, ())
                self._layers.append(self._trt.ILayer(f"{node.name}_shape", [lengths]))
        self.num_inputs, self.num_layers = len(self._inputs), len(self._layers)

    def _tensor(self, name, dtype, shape):
        old = self._trt._number[0] == 8  # has no int64
        kinds = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "INT64": "INT32" if old else "INT64"}
        kind = kinds.get(dtype.name if dtype else "FLOAT", "BOOL")
        return self._trt.ITensor(name, self._trt.DataType[kind], shape)


class ITensor(Object):
    name, dtype, shape = "", None, ()

    def __init__(self, name, dtype, shape):
        self.name, self.dtype, self.shape = name, dtype, shape


class ILayer(Object):
    name, num_outputs = "", 0

    def __init__(self, name, outputs):
        self.name, self._outputs, self.num_outputs = name, outputs, len(outputs)
        self._asked = {}

    def get_output(self, index):
        return self._outputs[index]

    @property
    def precision(self):
        return self._asked.get("precision")

    @precision.setter
    def precision(self, value):
        self._asked["precision"] = value.name

    def set_output_type(self, index, value):
        assert self._outputs[index].dtype == value, "a type that this output cannot have"
        self._asked[index] = value.name


class OnnxParser(Object):
    def __init__(self, network, log):
        self._network, self._log, self._errors = network, log, []

    def parse(self, data):
        assert isinstance(data, bytes)
        explicit = "EXPLICIT_BATCH" in self._network._flags or self._trt._number[0] != 8
        if self._is_rtx or explicit:
            self._network._read(data)
            half = any(
                node.inputs[1].dtype == ir.DataType.FLOAT16
                for node in self._network._model.graph.all_nodes()
                if node.op_type == "DequantizeLinear"
            )
            if half and self._trt._number[0] == 8:
                pytest.fail("8.6 reads FP16 scales as if they were FP32, without an error")
            error = self._trt.quirks.parse_error
        else:
            error = "This version of the ONNX parser only supports an explicit batch dimension"
        if error:
            self._errors.append(error)
            say(self._log, "ERROR", error)
        return not error

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return types.SimpleNamespace(desc=lambda: self._errors[index])


class IBuilderConfig(Object):
    profiling_verbosity, builder_optimization_level = None, 3
    progress_monitor, num_compute_capabilities = None, 0

    def __init__(self):
        trt = self._trt
        self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        self._flags, self._limits, self._previews = {"TF32"}, {}, set()
        self._tactics = set(trt.TacticSource.__members__)
        self._profiles, self._cache, self._capabilities = [], None, {}

    def set_flag(self, flag):
        self._flags.add(self._trt.BuilderFlag(flag).name)

    def clear_flag(self, flag):
        self._flags.discard(self._trt.BuilderFlag(flag).name)

    def set_memory_pool_limit(self, pool, size):
        self._limits[self._trt.MemoryPoolType(pool).name] = size

    def get_tactic_sources(self):
        return sum(1 << int(self._trt.TacticSource[name]) for name in self._tactics)

    def set_tactic_sources(self, mask):
        self._tactics = {
            member.name for member in self._trt.TacticSource if mask >> int(member) & 1
        }
        return True

    def set_preview_feature(self, feature, enable):
        assert enable
        self._previews.add(self._trt.PreviewFeature(feature).name)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data):
        kind = self._trt._cuda.name.encode()
        return self._trt.ITimingCache(data or b"timing of " + kind, kind)

    def set_timing_cache(self, cache, ignore_mismatch):
        if not cache._data.startswith(b"timing of " + cache._kind) and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def set_compute_capability(self, capability, index):
        if index >= self.num_compute_capabilities:
            return False
        self._capabilities[index] = self._trt.ComputeCapability(capability).name
        return True


class ITimingCache(Object):
    def __init__(self, data, kind):
        self._data, self._kind = data, kind

    def serialize(self):
        return memoryview(self._data)


class IOptimizationProfile(Object):
    def __init__(self):
        self._limits = {}

    def set_shape(self, name, least, usual, most):
        if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
            raise ValueError(f"profile of {name}: {least}, {usual}, {most}")
        self._limits[name] = [tuple(least), tuple(usual), tuple(most)]


class Runtime(Object):
    engine_host_code_allowed = False

    def __init__(self, log):
        self._trt._start(log)
        self._log = log

    def deserialize_cuda_engine(self, data):
        trt, text = self._trt, self._trt.quirks.open_error
        say(self._log, "INFO", f"Loaded engine size: {len(data)} bytes")
        assert self.engine_host_code_allowed is False
        _, _, _, size, *version, length = ENGINE_HEADER.unpack_from(data)
        rest = data[ENGINE_HEADER.size :]
        settings = json.loads(rest[:length])
        if [*trt._number, 0][:4] != version:
            text = "The engine plan file is not compatible with this version of TensorRT"
        if settings["gpu"] not in (None, list(trt._cuda.capability)):
            text = "The engine plan file is generated on an incompatible device"
        if text or len(data) != size:
            say(self._log, "ERROR", f"IRuntime::deserializeCudaEngine: Error Code 1: {text}")
            return None
        return trt.ICudaEngine(settings, rest[length:], self._log)


class ICudaEngine(Object):
    def __init__(self, settings, model, log):
        self._settings, self._model, self._log = settings, model, log

    def get_tensor_dtype(self, name):
        kind = self._dtype(name)
        kinds = {np.int32: "INT32", np.int64: "INT64", np.float32: "FLOAT"}
        return self._trt.DataType[kinds[kind.type]]

    def _dtype(self, name):
        """Of an input; 8.6 has no 64-bit integers."""
        (found,) = (i.type for i in _session(self._model).get_inputs() if i.name == name)
        kind = np.dtype(_NUMPY_OF[found])
        return np.dtype(np.int32) if self._trt._number[0] == 8 and kind == np.int64 else kind

    def create_engine_inspector(self):
        return self._trt.EngineInspector(self._settings)

    def create_execution_context(self):
        say(self._log, "WARNING", "Using an engine plan file across different models of devices")
        if self._trt.quirks.context_error:
            say(self._log, "ERROR", self._trt.quirks.context_error)
            return None
        return self._trt.IExecutionContext(self)


class EngineInspector(Object):
    def __init__(self, settings):
        self._settings = settings

    def get_engine_information(self, form):
        assert form == self._trt.LayerInformationFormat.JSON
        new = self._trt._number[0] > 10
        layers = [_layer_json(layer, new) for layer in self._settings["layers"]]
        return json.dumps({"Layers": layers, "I/O Tensors" if new else "Bindings": ["audio"]})


class IExecutionContext(Object):
    nvtx_verbosity = None

    def __init__(self, engine):
        self.nvtx_verbosity = self._trt.ProfilingVerbosity.DETAILED
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self._session = _session(engine._model)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._types = {i.name: _NUMPY_OF[i.type] for i in self._session.get_inputs()}
        self._ready = False  # it sets itself up in the first execution of a shape

    def set_input_shape(self, name, shape):
        least, _, most = self._engine._settings["shapes"][name]
        if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            text = f"Error Code 3: API Usage Error ({name}: {shape} is not in {least} to {most})"
            say(self._engine._log, "ERROR", text)
            return False
        self._ready &= self._shapes.get(name) == tuple(shape)
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        """Of an output, once the shapes of all inputs are set; TensorRT infers it."""
        if name in self._shapes:
            return self._shapes[name]
        zeros = {n: np.zeros(shape, self._types[n]) for n, shape in self._shapes.items()}
        (found,) = self._session.run([name], zeros)
        return found.shape

    def set_tensor_address(self, name, address):
        if name not in {*self._engine._settings["shapes"], *self._outputs}:
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        trt, cuda = self._trt, self._trt._cuda
        assert self.nvtx_verbosity == trt.ProfilingVerbosity.NONE, "names cost time in each enqueue"
        assert stream_handle != 0, "the default stream makes TensorRT wait for the device"
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        assert shapes.keys() == self._engine._settings["shapes"].keys(), "a shape is not set"
        assert addresses.keys() == {*shapes, *self._outputs}, "an address is not set"
        text = trt.quirks.execute_error
        if cuda.is_capturing and not (self._ready and trt.quirks.capturable):
            cuda.invalidate_capture()
            text = "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)"
        if text:
            say(self._engine._log, "ERROR", f"IExecutionContext::enqueueV3: {text}")
            return False
        self._ready = True
        offset = trt.quirks.graph_offset if cuda.is_capturing else 0

        def work():
            feed = {}
            for name, shape in shapes.items():
                kind = self._engine._dtype(name)
                data = cuda.read(addresses[name], kind.itemsize * int(np.prod(shape)))
                given = np.frombuffer(data, kind).reshape(shape)
                feed[name] = given.astype(self._types[name], copy=False)
            found = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
            found["logits"] = found["logits"] + np.float32(offset)
            ranges = {n: (addresses[n], addresses[n] + v.nbytes) for n, v in (feed | found).items()}
            for output in found:
                low, high = ranges[output]
                for name, (start, end) in ranges.items():
                    clash = name != output and start < high and low < end
                    assert not clash, f"{output} is written over {name}"
            for name, value in found.items():
                cuda.write(addresses[name], value.tobytes())

        cuda.execute(stream_handle, work)
        return True


@functools.lru_cache(maxsize=32)
def _session(model):
    """As runtime/backends/onnx.py opens it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(
        model, options, providers=providers, disabled_optimizers=DISABLED_OPTIMIZERS
    )


@functools.lru_cache(maxsize=32)
def _typed(data):
    """A graph with the types of its values."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data)))


def _plan(trt, settings, model):
    """Settings and graph behind the header of a real engine."""
    text = json.dumps(settings).encode()
    is_rtx = trt.__name__ == "tensorrt_rtx"
    magic, size = b"vtrt" if is_rtx else b"ftrt", ENGINE_HEADER.size + len(text) + len(model)
    version = [*trt._number, 0][:4]
    return ENGINE_HEADER.pack(magic, 0, 1, size, *version, len(text)) + text + model


def _shapes(network, config):
    """[least, usual, most] of each input; None if it is free and nothing limits it."""
    profile = config._profiles[0]._limits if config._profiles else {}
    shapes = {i.name: tuple(i.shape) for i in network._inputs}
    return {n: profile.get(n) if -1 in shape else [shape] * 3 for n, shape in shapes.items()}


def _built_layers(model, build, quirks):
    """The products of a graph, in which type they compute and what weight they hold."""
    layers = []
    for node in model.graph.all_nodes():
        if node.op_type not in {"Conv", "GRU", "MatMul"}:
            continue
        data, weight = (_stored(value) for value in node.inputs[:2])
        frontend = node.name.startswith("/log_mel/")
        asked = build.precisions.get(node.name, {}).get("precision")
        stored = {str(node.inputs[1].dtype), str(weight.dtype)}
        half = "FLOAT16" in stored or ("FP16" in build.flags and asked != "FLOAT")
        kind = "Half" if half and (asked or not frontend) else "Float"
        both = data is not node.inputs[0] and weight is not node.inputs[1]
        if both and node.name not in quirks.float_nodes:
            kind = "Int8"
        layer = {"node": node.name, "op": node.op_type, "type": kind, "shape": list(weight.shape)}
        layers.append(layer | {"opaque": quirks.opaque and node.name.startswith("/grus")})
    return layers


def _stored(value):
    """What a Q/DQ pair, or a DequantizeLinear alone, quantizes; else the value itself."""
    node = value.producer()
    while node is not None and node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
        value, node = node.inputs[0], node.inputs[0].producer()
    return value


def _layer_json(layer, new):
    """A layer as TensorRT's engine inspector shows it."""
    node, kind = layer["node"], layer["type"]
    if layer["opaque"]:
        block = {"LayerType": "Myelin", "Inputs": [], "TacticName": "", "Metadata": ""}
        return {"Name": f"{{ForeignNode[{node}...{node}]}}", **block}
    read = {"Name": "read", "Dimensions": [1, 64]}
    found = {"Inputs": [read | ({"Datatype": kind} if new else {"Format/Datatype": kind})]}
    found["Metadata"] = f"[ONNX Layer: {node}]"
    if layer["op"] == "Conv":
        read["Format/Datatype"] = f"Row major linear {kind} format"
        name = {"Name": f"{node} + relu", "LayerType": "CaskConvolution"}
        weights = {"Type": kind, "Count": int(np.prod(layer["shape"]))}
        return name | found | {"ParameterType": "Convolution", "Weights": weights}
    return {"Name": "__myl_Fc_myl0_1", "LayerType": "gemm", **found, "TacticName": "xmma"}


def _log_line(layer):
    """A layer as TensorRT-RTX tells it while it builds."""
    kind, sizes = layer["type"], ",".join(map(str, layer["shape"]))
    return (
        f"Name: __myl_1, LayerType: gemm, Inputs: [ {{ Name: read, Dimensions: [1,1], Format/"
        f"Datatype: {kind} }}], Constants: [ {{ Name: weight, Dimensions: [{sizes}], Format/"
        f"Datatype: {kind} }}], Outputs: [], Metadata: [ONNX Layer: {layer['node']}]"
    )


def install(monkeypatch, surface_version="10.3.0", **device):
    """Let the adapter find this TensorRT, and this GPU; both."""
    cuda = SimulatedCuda(**device)
    trt = SimulatedTensorrt(surface_version, cuda)
    monkeypatch.setattr("cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    return cuda, trt
