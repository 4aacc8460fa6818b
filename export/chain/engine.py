"""Engines and their manifests: built where they are not there yet, gated, written as a pair."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.targets.base import MIN_COVERAGE
from cnngru_edge.export.targets.trt.build import (
    RTX_DEFAULT,
    BuildConfig,
    Built,
    Progress,
    build,
    device_of,
)
from cnngru_edge.models.atomic import file_sha256, staged, write_file
from cnngru_edge.models.errors import ExportError, SessionError
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.backends.trt.engine_file import (
    ENGINE_SUFFIX,
    LIBRARIES,
    MANIFEST_SUFFIX,
    Builder,
    Manifest,
    manifest_path,
    read_engine,
)
from cnngru_edge.runtime.session import TensorInfo

RTX_SUFFIX = f".rtx{ENGINE_SUFFIX}"
"""What the name of an engine of TensorRT-RTX ends with, unless a target is given."""


def write_engine(
    graph: Path,
    out: Path,
    config: BuildConfig,
    *,
    min_coverage: float = MIN_COVERAGE,
    timing_cache: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> tuple[Manifest, tuple[str, ...]]:
    """Build a graph and write the engine with its manifest, `<engine>.json`; see `build`.

    An engine that is there already, built from the same file with the same options by the same
    version on the same GPU and driver, is kept.

    Returns:
        The manifest, and notes: that the engine was kept, why it was not, what went otherwise.

    Raises:
        ExportError: less of it is in INT8 than `min_coverage` of the weights, or it does not build.
    """
    if out.suffix != ENGINE_SUFFIX:
        raise ExportError(f"{out}: an engine's name ends with {ENGINE_SUFFIX}")
    if out.is_dir():
        raise ExportError(f"{out}: a folder, not an engine")
    notes: list[str] = []
    if out.exists():
        manifest, differs = _kept(graph, out, config)
        if manifest is not None and not differs:
            manifest.coverage.check(str(graph), min_coverage)
            return manifest, (f"{out} is up to date",)
        notes.append(f"{out} is built again: {differs}")
    with staged(out.parent) as stage:  # before a build that may take minutes
        built = build(
            graph,
            config,
            min_coverage=min_coverage,
            timing_cache=timing_cache,
            progress=progress,
        )
        manifest = _manifest(graph, config, built)
        write_file(stage / out.name, built.engine)
        write_file(stage / (out.name + MANIFEST_SUFFIX), f"{manifest.to_json()}\n".encode())
    return manifest, (*notes, *built.notes)


def remove_engine(path: Path) -> None:
    """Remove an engine and its manifest, if they are there."""
    path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def _kept(graph: Path, out: Path, config: BuildConfig) -> tuple[Manifest | None, str]:
    """The manifest of an engine that is there, and what about it is not as it would be now."""
    try:
        _, manifest = read_engine(out)
    except SessionError as e:
        return None, str(e)
    gpu = device_of(config.library)
    was = {
        "graph": manifest.source_sha256[:12],
        "library": manifest.builder.name,
        "GPU": manifest.builder.gpu,
        "driver": manifest.builder.driver,
        "options": manifest.builder.options,
    }
    now = {
        "graph": file_sha256(graph)[:12],
        "library": f"{LIBRARIES[config.library]} {trt_library.load(config.library).__version__}",
        "GPU": gpu and gpu.model,
        "driver": gpu and gpu.driver,
        "options": _options(config),
    }
    return manifest, "; ".join(
        f"its {key} was {was[key]} and is {now[key]}" for key in was if was[key] != now[key]
    )


def _options(config: BuildConfig) -> dict[str, object]:
    """As JSON gives them back; what is not asked of TensorRT-RTX is settled here."""
    options = asdict(config)
    capabilities = config.capabilities
    if config.library == "tensorrt_rtx":
        capabilities = capabilities or RTX_DEFAULT
    return options | {"capabilities": list(capabilities)}


def _manifest(graph: Path, config: BuildConfig, built: Built) -> Manifest:
    sizes: dict[int | str, int] = {}
    if built.max_batch == 1:
        sizes["N"] = 1
    with open_session(graph) as session:
        spec = session.spec

        def fixed(tensor: TensorInfo) -> TensorInfo:
            return replace(tensor, shape=tuple(sizes.get(size, size) for size in tensor.shape))

        inputs = tuple(fixed(i) for i in session.inputs)
        outputs = tuple(fixed(o) for o in session.outputs)
    metadata = onnx_graph.load(graph).metadata_props
    return Manifest(
        sha256=hashlib.sha256(built.engine).hexdigest(),
        source=graph.name,
        source_sha256=file_sha256(graph),
        builder=Builder(
            library=config.library,
            version=built.version,
            typing=built.typing,
            flags=built.flags,
            capabilities=built.capabilities,
            gpu=built.gpu.model if built.gpu else None,
            driver=built.gpu.driver if built.gpu else None,
            options=_options(config),
            build_s=round(built.build_s, 1),
        ),
        max_batch=built.max_batch,
        max_samples=built.max_samples,
        inputs=inputs,
        outputs=outputs,
        metadata={key: text for key, text in metadata.items() if key != METADATA_KEY},
        spec=spec,
        coverage=built.coverage,
    )
