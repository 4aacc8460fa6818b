"""An ONNX graph through the builder of TensorRT (8.6 to 11) or TensorRT-RTX: engine and receipt.

Strongly typed, a type in the graph is the type in the engine; that is the only way of TensorRT 11
and of TensorRT-RTX. Weakly typed, the builder chooses within what flags allow; that is the only way
of 8.6. Where both are (10.x) the strong one is tried first.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.targets.base import CPU, TARGETS, TENSORRT, TENSORRT_FP16
from cnngru_edge.export.targets.trt import lint
from cnngru_edge.export.targets.trt.receipt import rtx_coverage, tensorrt_coverage
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import EdgeError, ExportError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import OWN, WholeSpec, least_length_of, read_spec, sample_rate_of
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.backends.trt.cuda import Cuda, Gpu
from cnngru_edge.runtime.backends.trt.engine_file import LIBRARIES
from cnngru_edge.runtime.inputs.read import example_input
from cnngru_edge.runtime.machine import jetson
from cnngru_edge.runtime.session import CLIP_SAMPLES_KEY, PRECISION_KEY, TARGET_KEY
from cnngru_edge.runtime.stream import FLUSH_S

RTX_DEFAULT = ("8.6", "8.9", "12.0")
"""Compute capabilities to build for if none are asked: Ampere, Ada and Blackwell desktop GPUs."""

STRONG, WEAK = "strong", "weak"

_MIB = 1 << 20
_LONGEST_S = 30  # of a clip at a time, if nothing else is known; longer ones are cut

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps newly done and the steps in all."""


@dataclass(frozen=True)
class BuildConfig:
    """What a build can be asked for; an engine is reused only for equal ones.

    Attributes:
        library: one of LIBRARIES.
        batch: the most streams at a time.
        max_seconds: of audio at a time, for a graph of any length; None for the longest clip that
            it was calibrated with.
        fp16: whether what is not in INT8 may be in FP16, where the builder chooses (weak typing).
        workspace_mib: memory for one layer's scratch.
        tactic_memory_mib: memory for trying kernels; None for half of what is free on a GPU without
            memory of its own, and for TensorRT's default on others.
        optimization_level: 0 (fast build) to 5 (fast engine); None for TensorRT's default.
        capabilities: compute capabilities, TensorRT-RTX only; TensorRT builds for the GPU here.
    """

    library: str = "tensorrt"
    batch: int = 1
    max_seconds: float | None = None
    fp16: bool = True
    workspace_mib: int = 256
    tactic_memory_mib: int | None = None
    optimization_level: int | None = None
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """What a build made."""

    engine: bytes
    coverage: Coverage
    typing: str
    flags: tuple[str, ...]
    version: str  # of the library: an engine is for just this one
    gpu: Gpu | None  # it was built on, if that took one
    capabilities: tuple[str, ...]
    max_batch: int
    max_samples: int
    build_s: float
    notes: tuple[str, ...]  # what did not go as asked
    log: str


def device_of(library: str) -> Gpu | None:
    """The GPU that a build takes: TensorRT's needs one, TensorRT-RTX's none.

    Asked before TensorRT is touched, since 8.6 crashes without a driver.

    Raises:
        BackendMissing: there is none.
    """
    return None if library == "tensorrt_rtx" else Cuda().gpu


def can_build(library: str) -> bool:
    """Whether a library is installed, and the GPU there that its builder takes."""
    try:
        device_of(library)
    except EdgeError:  # none, or one that does not answer
        return False
    return trt_library.is_installed(library)


def target_of(library: str) -> str:
    """The target whose graphs the installed version of a library takes: FP16 where it can."""
    typings = _typings(trt_library.load(library), strong_graph=True)
    return TENSORRT_FP16.name if typings else TENSORRT.name


def build(
    graph: Path,
    config: BuildConfig,
    *,
    min_coverage: float = 0,
    timing_cache: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Built:
    """Build a graph.

    TensorRT-RTX's kernels are finished on the GPU that runs them. It shares its parser and compiler
    with TensorRT 11, and is a proxy for TensorRT on a Jetson, not a proof.

    Args:
        graph: a float graph, or an INT8 graph for a TensorRT target.
        config: how.
        min_coverage: share of the weights that has to be in INT8; where a version has two typings,
            the second is tried if the first one gives less.
        timing_cache: TensorRT's measurements of kernels, read if it exists and then written.
        progress: told of the phases, by versions that tell (10 and later).

    Raises:
        BackendMissing: no library, or no GPU where it takes one.
        ExportError: it does not parse or build the graph, its own words are in the message; or too
            little is in INT8.
    """
    if config.library == "tensorrt_rtx":
        if timing_cache is not None:
            raise ExportError("TensorRT-RTX has no timing cache; leave --timing-cache out")
    elif config.capabilities:
        raise ExportError(
            "TensorRT builds for the GPU it runs on; --capability is for --target tensorrt-rtx"
        )
    model = onnx_graph.load(graph)
    target = TARGETS.get(model.metadata_props.get(TARGET_KEY, CPU))
    if target is None and model.metadata_props.get(PRECISION_KEY) == "int8":
        raise ExportError(f"{graph}: quantized for a CPU; quantize it with --target tensorrt-fp16")
    if target is not None:
        lint.check(model, target)
    gpu = device_of(config.library)
    trt = trt_library.load(config.library)
    typings = _typings(trt, strong_graph=target is not None and target.strongly_typed)
    if not typings:
        raise ExportError(
            f"{graph}: made for strong typing, which {LIBRARIES[config.library]} "
            f"{trt.__version__} does not have; give it the graph of --target tensorrt"
        )
    notes: list[str] = []
    for typing in typings:
        try:
            work = _Build(trt, graph, model, config, typing, gpu, timing_cache, progress)
            with trt_library.stops_held_back() as is_stopped:
                built = work.run(notes, is_stopped)
            built.coverage.check(str(graph), min_coverage)
            return built
        except ExportError as e:
            if typing == typings[-1]:
                raise
            notes.append(f"weakly typed, since strongly typed it fails: {e}")
    raise AssertionError


def _typings(trt: Any, *, strong_graph: bool) -> tuple[str, ...]:
    """How a version can build a graph, the better way first."""
    weak = hasattr(trt.BuilderFlag, "INT8")  # gone in 11, where the graph says it all
    strong = not weak or hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if not strong:
        # A parser this old reads FP16 scales as if they were FP32.
        return () if strong_graph else (WEAK,)
    return (STRONG, WEAK) if weak else (STRONG,)


class _Build:
    """One attempt, in one typing."""

    def __init__(
        self,
        trt: Any,
        graph: Path,
        model: ir.Model,
        config: BuildConfig,
        typing: str,
        gpu: Gpu | None,
        timing_cache: Path | None,
        progress: Progress,
    ) -> None:
        self.trt, self.graph, self.model, self.config = trt, graph, model, config
        self.typing, self.gpu = typing, gpu
        self.timing_cache, self.progress = timing_cache, progress
        self.name = f"{LIBRARIES[config.library]} {trt.__version__}"
        self.is_rtx = config.library == "tensorrt_rtx"
        self.flags: list[str] = []
        self.log = trt_library.logger(trt)
        self.spec = read_spec(model.metadata_props[METADATA_KEY])

    def run(self, notes: list[str], is_stopped: Callable[[], bool]) -> Built:
        """Parse, configure, build, and read the receipt."""
        start = time.perf_counter()
        self.log.start()
        builder = trt_library.create(self.trt, "Builder", self.log)
        network = builder.create_network(self._network_flags())
        parser = self.trt.OnnxParser(network, self.log)
        # ONNX Runtime computes the front-end's matrices once; TensorRT would at each step.
        folded = onnx_graph.fold_frontend(onnx_graph.load(self.graph))
        if not parser.parse(ir.to_proto(folded).SerializeToString()):
            errors = [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]
            reason = trt_library.explain([("ERROR", "; ".join(errors))])
            raise ExportError(f"{self.graph}: {self.name} does not parse it: {reason}")
        settings = builder.create_builder_config()
        self._set_limits(settings)
        self._set_precision(settings, network)
        capabilities = self._set_capabilities(settings)
        max_samples = self._set_shapes(builder, settings, network)
        cache = self._set_timing_cache(settings, notes)
        monitor = _monitor(self.trt, settings, self.progress, is_stopped)
        engine = builder.build_serialized_network(network, settings)
        if monitor is not None and monitor.error is not None:
            raise monitor.error
        if engine is None:
            raise self._failure("does not build it")
        if cache is not None and self.timing_cache is not None:
            write_file(self.timing_cache, bytes(settings.get_timing_cache().serialize()))
        log = "\n".join(text for _, text in self.log.lines)
        seconds = time.perf_counter() - start
        return Built(
            engine=bytes(engine),
            coverage=self._coverage(bytes(engine), log),
            typing=self.typing,
            flags=tuple(self.flags),
            version=self.trt.__version__,
            gpu=self.gpu,
            capabilities=capabilities,
            max_batch=self.config.batch,
            max_samples=max_samples,
            build_s=seconds,
            notes=tuple(dict.fromkeys(notes)),  # either attempt may have made one
            log=log,
        )

    def _failure(self, what: str) -> ExportError:
        reason = trt_library.explain(self.log.lines)
        return ExportError(f"{self.graph}: {self.name} {what}: {reason}")

    def _network_flags(self) -> int:
        known = self.trt.NetworkDefinitionCreationFlag
        names = ["EXPLICIT_BATCH"]  # until 10, and what later versions always have
        # Where there is no other typing, naming this one is deprecated.
        if self.typing == STRONG and hasattr(self.trt.BuilderFlag, "INT8"):
            names.append("STRONGLY_TYPED")
        return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))

    def _set_limits(self, settings: Any) -> None:
        pools = self.trt.MemoryPoolType
        settings.set_memory_pool_limit(pools.WORKSPACE, self.config.workspace_mib * _MIB)
        tactics = self.config.tactic_memory_mib
        if tactics is None and self.gpu is not None and self.gpu.integrated:
            # The system lives in the same memory; and CUDA takes what only caches files for used.
            tactics = (jetson.available_bytes() or 0) // 2 // _MIB
        if tactics:
            settings.set_memory_pool_limit(pools.TACTIC_DRAM, tactics * _MIB)
        if self.config.optimization_level is not None:
            settings.builder_optimization_level = self.config.optimization_level
        # For the receipt; a session turns off what it costs at run time.
        settings.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        preview: Any = getattr(self.trt, "PreviewFeature", object)
        if hasattr(preview, "PROFILE_SHARING_0806"):  # later it is always on
            settings.set_preview_feature(preview.PROFILE_SHARING_0806, True)
        if hasattr(preview, "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"):
            settings.set_preview_feature(
                preview.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, True
            )
        # An engine then needs neither cuBLAS nor cuDNN, each of which takes a lot of memory.
        external = sum(
            1 << int(member)
            for name, member in self.trt.TacticSource.__members__.items()
            if name.startswith(("CUBLAS", "CUDNN"))
        )
        sources = settings.get_tactic_sources()
        if sources & external:
            settings.set_tactic_sources(sources & ~external)
        if hasattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT-RTX asks for it where an enqueue is captured.
            settings.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def _set_precision(self, settings: Any, network: Any) -> None:
        flags = self.trt.BuilderFlag
        settings.clear_flag(flags.TF32)  # 10 bits of mantissa are too few for the front-end
        if self.typing == STRONG:
            return
        if self.model.metadata_props.get(PRECISION_KEY) == "int8":
            self.flags.append("INT8")
        if self.config.fp16 or self._is_half():
            self.flags += ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
            self._keep_frontend(network)
        for name in self.flags:
            settings.set_flag(getattr(flags, name))

    def _is_half(self) -> bool:
        target = TARGETS.get(self.model.metadata_props.get(TARGET_KEY, CPU))
        return target is not None and target.strongly_typed

    def _keep_frontend(self, network: Any) -> None:
        """In FP32: a power spectrum overflows FP16."""
        single = self.trt.float32
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if not layer.name.startswith(FRONTEND_NODES):
                continue
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if not all(output.dtype == single for output in outputs):
                continue  # of shapes, which have no precision to choose
            layer.precision = single
            for i in range(layer.num_outputs):
                layer.set_output_type(i, single)

    def _set_capabilities(self, settings: Any) -> tuple[str, ...]:
        """Which GPUs an engine is for: the one here, or for TensorRT-RTX those that were asked."""
        if not self.is_rtx:
            assert self.gpu is not None
            return (self.gpu.capability,)
        asked = tuple(dict.fromkeys(self.config.capabilities or RTX_DEFAULT))
        known = {
            f"{name[2:-1]}.{name[-1]}": member
            for name, member in self.trt.ComputeCapability.__members__.items()
            if name.startswith("SM")
        }
        settings.num_compute_capabilities = len(asked)
        for index, capability in enumerate(asked):
            if capability not in known:
                raise ExportError(
                    f"{self.name} does not build for compute capability {capability!r}; it does "
                    f"for {', '.join(known)}"
                )
            settings.set_compute_capability(known[capability], index)
        return asked

    def _set_shapes(self, builder: Any, settings: Any, network: Any) -> int:
        """Fix what is known, and give limits to what stays free; the longest input at a time."""
        least, usual, most = self._lengths()
        profile, is_free = builder.create_optimization_profile(), False
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = list(tensor.shape)
            if shape[0] == -1 and self.config.batch == 1:
                shape[0] = 1
                tensor.shape = shape  # as if the graph had been made so
            elif shape[0] not in {-1, self.config.batch}:
                raise ExportError(f"{self.graph}: for {shape[0]} streams, not for the batch asked")
            limits = [
                [size] * 3
                if size != -1
                else ([1, *[self.config.batch] * 2] if axis == 0 else [least, usual, most])
                for axis, size in enumerate(shape)
            ]
            if index == 0:
                most = limits[-1][2]
            is_free |= -1 in shape
            try:
                profile.set_shape(tensor.name, *zip(*limits, strict=True))
            except (RuntimeError, TypeError) as e:  # what its bindings make of a refusal
                reason = f"{tensor.name} from {limits}: {e}"
                raise ExportError(f"{self.graph}: {self.name} does not take {reason}") from e
        if is_free and settings.add_optimization_profile(profile) < 0:
            raise self._failure("does not take these sizes")
        return most

    def _lengths(self) -> tuple[int, int, int]:
        """The shortest, a usual and the longest input, in samples, tokens or columns."""
        rate = sample_rate_of(self.spec)
        seen = self.model.metadata_props.get(CLIP_SAMPLES_KEY)
        try:
            shortest, median, longest = map(int, seen.split(",")) if seen else (1, 0, 0)
        except ValueError as e:
            raise ExportError(
                f"{self.graph}: {CLIP_SAMPLES_KEY} is no list of three: {seen}"
            ) from e
        if self.config.max_seconds is not None:
            if rate is None:
                raise ExportError(f"{self.graph}: takes no audio, so there are no seconds of it")
            longest = round(self.config.max_seconds * rate)
        elif not seen:
            usual = example_input(self.spec).shape[-1] if isinstance(self.spec, WholeSpec) else 0
            median, longest = (rate, _LONGEST_S * rate) if rate else (usual, 4 * usual)
        if isinstance(self.spec, WholeSpec):
            least = least_length_of(self.spec.input)
            longest = max(longest, least)
            if self.spec.family == OWN:  # what it runs on at all, its owner need not have said
                least = max(least, min(shortest, longest))
            return least, min(max(median, least), longest), longest
        assert rate is not None
        chunk, flush = self.spec.chunk_length, round(FLUSH_S * rate)
        usual, most = (-(-(length + flush) // chunk) * chunk for length in (median, longest))
        return chunk, min(usual, most), most

    def _set_timing_cache(self, settings: Any, notes: list[str]) -> Any:
        if self.timing_cache is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            cache = settings.create_timing_cache(self.timing_cache.read_bytes())
            if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=False):
                return cache
            notes.append(f"{self.timing_cache} is of another GPU or version; made anew")
            self.log.start()  # what it says of that is no reason of a later failure
        cache = settings.create_timing_cache(b"")
        settings.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def _coverage(self, engine: bytes, log: str) -> Coverage:
        if self.is_rtx:
            return rtx_coverage(self.graph, log, self.trt.__version__)
        self.log.start()
        runtime = trt_library.create(self.trt, "Runtime", self.log)
        opened = runtime.deserialize_cuda_engine(engine)
        if opened is None:
            raise self._failure("does not open what it built")
        inspector = opened.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        del inspector, opened  # before the runtime that made them
        return tensorrt_coverage(self.graph, text, self.trt.__version__)


def _monitor(trt: Any, settings: Any, progress: Progress, is_stopped: Callable[[], bool]) -> Any:
    """Let a version that tells how far it is tell `progress`, and be stopped there."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: Exception | None = None  # TensorRT would swallow it
            self.phases: dict[str, tuple[int, int]] = {}  # those within no other: done, of

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phases[name] = (0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            self.tell(name, step + 1)
            return self.error is None and not is_stopped()

        def phase_finish(self, name: str) -> None:
            if name in self.phases:
                self.tell(name, self.phases[name][1])
                del self.phases[name]

        def tell(self, name: str, done: int) -> None:
            if name in self.phases and self.error is None:
                before, steps = self.phases[name]
                self.phases[name] = (done, steps)
                try:
                    progress(name, done - before, steps)
                except Exception as e:
                    self.error = e

    monitor = Monitor()
    settings.progress_monitor = monitor
    return monitor


def _refusal(error: Any) -> str:
    """What a parser says, and from TensorRT 10 on, of which node: it may be just `false`."""
    said = str(error.desc())
    operator = getattr(error, "node_operator", str)()
    if not operator:
        return said
    code = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    return f"{operator} {error.node_name()}: {code}, {said}"
