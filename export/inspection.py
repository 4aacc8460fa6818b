"""What is inside an artefact: the file's own words, and the receipt of what became of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cnngru_edge.export.coverage import Coverage, onnxruntime_coverage
from cnngru_edge.export.engine import (
    ENGINE_SUFFIX,
    build_rtx,
    read_manifest,
    rtx_is_installed,
)
from cnngru_edge.export.onnx_graph import file_sha256
from cnngru_edge.export.targets import CPU
from cnngru_edge.models.errors import ExportError
from cnngru_edge.runtime.session import TARGET_KEY, open_session


def inspect(path: Path) -> dict[str, Any]:
    """Format, hash, inputs and outputs, spec, size and coverage of an artefact.

    A `.onnx` is run once for its coverage, or built once if it is a graph for TensorRT; that of an
    `.engine` is in the manifest that its build wrote. `coverage` is None where nothing can tell:
    for TorchScript, and for a graph for TensorRT where TensorRT-RTX is not installed.
    """
    if path.suffix == ENGINE_SUFFIX:
        return _inspect_engine(path)
    with open_session(path) as session:
        target = session.metadata.get(TARGET_KEY, CPU)
        found: dict[str, Any] = {
            "format": path.suffix.removeprefix("."),
            "sha256": file_sha256(path),
            "size_bytes": path.stat().st_size,
            "backend": session.backend,
            "target": target,
            "precision": session.precision,
            "inputs": [asdict(i) for i in session.inputs],
            "outputs": [asdict(o) for o in session.outputs],
            "spec": asdict(session.spec),
        }
    receipt = coverage(path, target) if path.suffix == ".onnx" else None
    found["coverage"] = receipt and receipt.to_json()
    return found


def coverage(path: Path, target: str) -> Coverage | None:
    """The receipt of an ONNX file for one of quantize.TARGETS, if it can be had here."""
    if target == CPU:
        return onnxruntime_coverage(path)
    return build_rtx(path).coverage if rtx_is_installed() else None


def _inspect_engine(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    manifest = read_manifest(path)
    return {
        "format": ENGINE_SUFFIX.removeprefix("."),
        "sha256": manifest["sha256"],
        "size_bytes": path.stat().st_size,
        "backend": manifest["builder"],
        "target": f"compute capability {', '.join(map(str, manifest['compute_capabilities']))}",
        "precision": "+".join(sorted({x["precision"] for x in manifest["coverage"]["layers"]})),
        **{key: manifest[key] for key in ("inputs", "outputs", "spec", "coverage")},
    }
