"""Engines for TensorRT-RTX, built ahead of time and without a GPU, and their manifests."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnngru_edge.export import lint, onnx_graph
from cnngru_edge.export.coverage import Coverage, rtx_coverage
from cnngru_edge.export.onnx_graph import file_sha256
from cnngru_edge.export.targets import CPU, MIN_COVERAGE, TARGETS
from cnngru_edge.models.atomic import staged, write_file
from cnngru_edge.models.errors import BackendMissing, ExportError, SpecError
from cnngru_edge.models.spec import ModelSpec
from cnngru_edge.runtime.session import TARGET_KEY, open_session

CAPABILITIES = ("8.6", "8.9", "12.0")
"""Compute capabilities to build for if none are asked: Ampere, Ada and Blackwell desktop GPUs.
TensorRT-RTX has none for Jetson (8.7, 11.0) nor Hopper (9.0)."""

ENGINE_SUFFIX = ".engine"
MANIFEST_SUFFIX = ".json"
_KEYS = {"sha256", "builder", "compute_capabilities", "inputs", "outputs", "spec", "coverage"}
_MAX_BATCH, _MAX_SECONDS = 8, 30  # of a graph with free dimensions


@dataclass(frozen=True)
class Built:
    """What a build made."""

    engine: bytes
    coverage: Coverage
    version: str  # of TensorRT-RTX: an engine is for just this release
    capabilities: tuple[str, ...]


def rtx_is_installed() -> bool:
    """Whether TensorRT-RTX can be imported here."""
    try:
        import tensorrt_rtx  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def build_rtx(graph: Path, capabilities: tuple[str, ...] = CAPABILITIES) -> Built:
    """Build a graph with TensorRT-RTX's ahead-of-time compiler, which needs no GPU.

    Its kernels are finished on the GPU that runs them. It shares its parser and compiler with
    TensorRT 11, and is a proxy for TensorRT on a Jetson, not a proof.

    Args:
        graph: an INT8 graph for a TensorRT target.
        capabilities: compute capabilities, as "8.6".

    Raises:
        BackendMissing: tensorrt-rtx is not installed.
        ExportError: it does not parse or build the graph; its own words are in the message.
    """
    try:
        import tensorrt_rtx as trt
    except (ImportError, OSError) as e:
        raise BackendMissing(
            f"tensorrt_rtx cannot be imported ({e}): pip install 'cnngru-edge[tensorrt-rtx]'"
        ) from e
    model = onnx_graph.load(graph)
    target = model.metadata_props.get(TARGET_KEY)
    if target == CPU:
        raise ExportError(f"{graph}: quantized for a CPU; quantize it with --target tensorrt-fp16")
    if rules := TARGETS.get(target or CPU):
        lint.check(model, rules)
    log = _log(trt)
    log.start()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(graph.read_bytes())
    log.stop_if_asked()
    if not parsed:
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise ExportError(f"{graph}: TensorRT-RTX does not parse it: {errors}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names in the log's layers
    capabilities = tuple(dict.fromkeys(capabilities))
    config.num_compute_capabilities = len(capabilities)
    known = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    for index, capability in enumerate(capabilities):
        if capability not in known:
            raise ExportError(
                f"TensorRT-RTX does not build for compute capability {capability!r}; it does for "
                f"{', '.join(known)}"
            )
        config.set_compute_capability(known[capability], index)
    _add_profile(builder, config, network, graph)
    engine = builder.build_serialized_network(network, config)
    log.stop_if_asked()
    if engine is None:
        errors = " ".join(text for severity, text in log.lines if "ERROR" in severity)
        raise ExportError(f"{graph}: TensorRT-RTX does not build it: {' '.join(errors.split())}")
    coverage = rtx_coverage(graph, build_log(), trt.__version__)
    return Built(bytes(engine), coverage, trt.__version__, capabilities)


def write_engine(
    graph: Path,
    out: Path,
    capabilities: tuple[str, ...] = CAPABILITIES,
    min_coverage: float = MIN_COVERAGE,
) -> Coverage:
    """Build a graph and write the engine, with a manifest beside it; see `build_rtx`.

    The manifest, `<engine>.json`, holds the engine's hash, what it was built from and with, for
    which GPUs, and the receipt of the build.
    """
    if out.suffix != ENGINE_SUFFIX:
        raise ExportError(f"{out}: an engine's name ends with {ENGINE_SUFFIX}")
    built = build_rtx(graph, capabilities)
    built.coverage.check(str(graph), min_coverage)
    with open_session(graph) as session:
        manifest = {
            "sha256": hashlib.sha256(built.engine).hexdigest(),
            "source_sha256": file_sha256(graph),
            "builder": f"tensorrt_rtx {built.version}",
            "compute_capabilities": list(built.capabilities),
            "inputs": [asdict(i) for i in session.inputs],
            "outputs": [asdict(o) for o in session.outputs],
            "spec": asdict(session.spec),
            "coverage": built.coverage.to_json(),
        }
    text = json.dumps(manifest, indent=1)
    with staged(out.parent) as stage:
        write_file(stage / out.name, built.engine)
        write_file(stage / (out.name + MANIFEST_SUFFIX), f"{text}\n".encode())
    return built.coverage


def read_manifest(engine: Path) -> dict[str, Any]:
    """The manifest of an engine.

    Raises:
        ExportError: there is none, or it is of another engine.
    """
    path = engine.with_name(engine.name + MANIFEST_SUFFIX)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        missing = _KEYS - manifest.keys()
        if not missing:
            ModelSpec.from_json(json.dumps(manifest["spec"]))
            missing = {"weights_int8", "macs_int8", "layers", "source"} - manifest[
                "coverage"
            ].keys()
    except FileNotFoundError as e:
        raise ExportError(
            f"{path}: no such file; an engine is opened only with the manifest that was written "
            "beside it"
        ) from e
    except (AttributeError, SpecError, TypeError, ValueError) as e:
        raise ExportError(f"{path}: not the manifest of an engine") from e
    if missing:
        raise ExportError(f"{path}: not the manifest of an engine: no {', '.join(sorted(missing))}")
    if manifest.get("sha256") != file_sha256(engine):
        raise ExportError(f"{engine}: not the engine that {path.name} was written for")
    return manifest


def _add_profile(builder: Any, config: Any, network: Any, graph: Path) -> None:
    """The lengths and batches that a graph with free dimensions is built for."""
    with open_session(graph) as session:
        chunk, rate = session.spec.chunk_length, session.spec.features.sample_rate
    second = rate // chunk * chunk
    profile = builder.create_optimization_profile()
    is_free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        limits = [
            [size] * 3
            if size >= 0
            else ([1, 1, _MAX_BATCH] if axis == 0 else [chunk, second, _MAX_SECONDS * second])
            for axis, size in enumerate(tensor.shape)
        ]
        is_free |= -1 in tuple(tensor.shape)
        profile.set_shape(tensor.name, *zip(*limits, strict=True))
    if is_free:
        config.add_optimization_profile(profile)


def build_log() -> str:
    """What TensorRT-RTX said during the latest build, its table of layers included."""
    return "\n".join(text for log in _registered for _, text in log.lines)


_registered: list[Any] = []  # TensorRT keeps the first logger of a process, whatever comes later


def _log(trt: Any) -> Any:
    """The process's one logger; it keeps all lines of the latest build."""
    if not _registered:

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.start()

            def start(self) -> None:
                self.lines: list[tuple[str, str]] = []
                self.stop: BaseException | None = None

            def log(self, severity: Any, message: str) -> None:
                # A signal's exception may come up here, and TensorRT would swallow it.
                try:
                    self.lines.append((severity.name, message))
                except BaseException as e:
                    self.stop = e

            def stop_if_asked(self) -> None:
                if self.stop is not None:
                    raise self.stop

        _registered.append(Log())
    return _registered[0]
