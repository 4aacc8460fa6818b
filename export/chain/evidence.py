"""What an export or a comparison found, gathered for its report, and where it is from."""

import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.spec.whole import WholeSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.bench import Timing, measure_steps, measure_whole
from cnngru_edge.runtime.stream import fixed_length

FORMAT = 1

_PACKAGES = ("cnngru-edge", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "numpy")
_MEASURE_S = 0.3  # for each artefact and kind of step
_WARM_UP_S = 0.05
_CLIP_S = 1.0


def evidence(title: str, command: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """The object that `report.json` holds and `report.html` shows.

    Args:
        title: the model's name.
        command: what made it.
        sections: `comparison`, `streaming`, `coverage`, `sensitivity`, `search`, `audit`,
            `latency`, `files`; those that are missing are left out of the page.
    """
    return {
        "format": FORMAT,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        **sections,
    }


def versions() -> dict[str, str]:
    """Of what can change a figure; a package that is not there is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def described_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, size and hash of each."""
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    ]


def latencies(artefacts: Iterable[Path]) -> list[dict[str, Any]]:
    """How long a chunk of a stream and, where it can be, a clip of a second take each of them."""
    found = []
    for path in artefacts:
        with open_session(path) as session:
            if isinstance(session.spec, WholeSpec):
                timing = measure_whole(session, 1, _CLIP_S, _MEASURE_S, _WARM_UP_S)
                found.append(_latency(path, session.device, timing))
                continue
            chunk, rate = session.spec.chunk_length, session.spec.features.sample_rate
            fixed = fixed_length(session)
            lengths = [fixed] if fixed else [chunk, round(_CLIP_S * rate / chunk) * chunk]
            for length in lengths:
                timing = measure_steps(session, "", 1, length, _MEASURE_S, _WARM_UP_S)
                found.append(_latency(path, session.device, timing))
    return found


def _latency(path: Path, device: str, timing: Timing) -> dict[str, Any]:
    what = timing.what
    if timing.audio_ms is not None:
        is_clip = what == "clip" or timing.audio_ms >= 1000 * _CLIP_S
        what = f"{timing.audio_ms / 1000:g} s clip" if is_clip else f"{timing.audio_ms:g} ms step"
    times = timing.host_ms
    return {
        "artefact": path.name,
        "what": what,
        "device": device,
        "steps": timing.steps,
        "median": times.median,
        "p90": times.p90,
        "p99": times.p99,
        "quantiles_ms": timing.host_quantiles_ms,
    }


def _cpu() -> str:
    """The processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
