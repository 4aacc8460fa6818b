"""What each part loads: a device has no torch; one that only runs what was built, no onnx."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from cnngru_edge.export.cli import main

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "torchaudio", "scipy", "safetensors"}
ONNX = {"onnx", "onnx_ir"}
BACKENDS = {"tensorrt", "tensorrt_rtx", "cuda"}  # looked for only when they are needed
HEAVY = TORCH | ONNX | BACKENDS

RUNTIME = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "runtime").rglob("*.py")
    if path.stem != "__init__"
)
ON_A_DEVICE = [name for name in RUNTIME if name != "runtime.backends.torchscript"]
START = "from cnngru_edge.export.cli import main; main()"


def loaded_by(code):
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def without(modules, code, *arguments):
    """Run code in a process that does not have these modules."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules)})); {code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    ["export.cli", "calibration.ranges.choose", "models.spec.whole", "models.errors", *ON_A_DEVICE],
)
def test_a_device_needs_no_torch(module):
    assert not loaded_by(f"import cnngru_edge.{module}") & HEAVY


@pytest.mark.parametrize(
    "module",
    [
        *("chain.engine", "chain.inspection", "graph.files", "quantize.run"),
        *("targets.receipt", "targets.trt.lint", "targets.trt.build"),
    ],
)
def test_an_engine_is_built_without_torch(module):
    assert not loaded_by(f"import cnngru_edge.export.{module}") & (TORCH | BACKENDS)


def test_all_of_the_runtime_is_there_without_torch_and_onnx():
    modules = ", ".join(f"cnngru_edge.{module}" for module in ON_A_DEVICE)
    done = without(HEAVY, f"import {modules}")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_torchscript_needs_is_named():
    done = without(HEAVY, "import cnngru_edge.runtime.backends.torchscript")
    assert re.search(
        r"BackendMissing: torch is not installed, .*cnngru-edge\[export\]", done.stderr
    )


def test_the_command_line_starts_without_a_backend():
    assert "onnxruntime" not in loaded_by("import cnngru_edge.export.cli")


def test_running_a_model_needs_no_torch(exported, demo):
    arguments = ["run", "--engine", str(exported / "model.int8.onnx"), str(demo.clips[0].path)]
    code = f"from cnngru_edge.export.cli import main; main({arguments}, standalone_mode=False)"
    assert not loaded_by(code) & HEAVY


def test_a_device_runs_a_model(exported, demo):
    engine, clip = exported / "model.int8.onnx", demo.clips[0].path
    done = without(HEAVY, START, "run", "--engine", engine, clip)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{clip} ")


@pytest.mark.parametrize("command", [[], *[[name] for name in main.list_commands(None)]])
def test_help_needs_no_backend(command):
    done = without(HEAVY | {"onnxruntime"}, START, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    names = command or main.list_commands(click.Context(main))
    assert all(name in done.stdout for name in names)


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this machine"
)
@pytest.mark.parametrize("form", ["chunk", "clip"])
def test_a_device_without_torch_builds_an_engine(exported, tmp_path, form):
    graph, out = exported / f"model.int8.tensorrt-fp16.{form}.onnx", tmp_path / "a.rtx.engine"
    done = without(TORCH, START, "build", graph, "--out", out, "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 100.0% of the weights in INT8, TensorRT-RTX ")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.json"}
    inspected = without(TORCH, START, "inspect", out)
    assert "100.0% of the weights and 100.0% of the" in inspected.stdout


def test_a_device_compares_with_the_float_model(exported):
    graphs = exported / "model.fp32.onnx", exported / "model.int8.onnx"
    done = without(TORCH | ONNX, START, "compare", *graphs, "--set", "calib", "--margin", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("204 clips: ")


def test_a_device_audits_recordings():
    done = without(TORCH | ONNX | {"jinja2"}, START, "audit", ROOT / "calibration" / "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("444 recordings, 444 s: fit to calibrate with")


def test_a_device_without_torch_quantizes(exported, tmp_path):
    ranges, out = exported / "ranges.json", tmp_path / "a.onnx"
    graph = exported / "model.fp32.onnx"
    done = without(TORCH, START, "quantize", graph, "--ranges", ranges, "--out", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", sorted(ONNX))
def test_what_a_build_needs_is_named(exported, tmp_path, missing):
    graph, out = exported / "model.int8.tensorrt-fp16.chunk.onnx", tmp_path / "a.rtx.engine"
    done = without({missing}, START, "build", graph, "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"Error: {missing} is not installed: pip .* onnx onnx-ir\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
