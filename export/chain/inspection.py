"""What is inside an artefact: the file's own words, and the receipt of what became of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cnngru_edge.export.targets.base import CPU
from cnngru_edge.export.targets.receipt import coverage
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.engine_file import ENGINE_SUFFIX, read_engine
from cnngru_edge.runtime.session import TARGET_KEY


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
            "spec": json.loads(session.spec.to_json()),
        }
    receipt = coverage(path, target) if path.suffix == ".onnx" else None
    found["coverage"] = receipt and receipt.to_json()
    return found


def _inspect_engine(path: Path) -> dict[str, Any]:
    _, manifest = read_engine(path)
    builder = manifest.builder
    gpu = f"{builder.gpu}, " if builder.gpu else ""
    return {
        "format": ENGINE_SUFFIX.removeprefix("."),
        "sha256": manifest.sha256,
        "size_bytes": path.stat().st_size,
        "backend": builder.name,
        "target": f"{gpu}compute capability {', '.join(builder.capabilities)}",
        "precision": manifest.precision,
        "inputs": [asdict(i) for i in manifest.inputs],
        "outputs": [asdict(o) for o in manifest.outputs],
        "spec": json.loads(manifest.spec.to_json()),
        "build": asdict(builder) | {"source_sha256": manifest.source_sha256},
        "coverage": manifest.coverage.to_json(),
    }
