"""The wheel as a device gets it: in an empty environment, on each Python that is installed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cnngru_edge.runtime.inputs.audio import read_audio

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "export", "models", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    # From a copy of what git knows or would add: setuptools would leave its build folder here.
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\n")
    source = out / "source"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([*pip, "-w", str(out), "."], cwd=source, check=True)
    return next(out.glob("*.whl"))


def interpreter(version):
    """A Python of this version, on the path or under pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        found = shutil.which(candidate)
        # A shim on the path may stand for nothing.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def is_package(folder):
    return (folder / "__init__.py").is_file()


def test_it_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    modules = {
        f"cnngru_edge/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.name == "py.typed" or (path.suffix == ".py" and is_package(path.parent))
    }
    data = {
        f"cnngru_edge/{path.relative_to(ROOT)}"
        for pattern in (
            "export/report/*.j2",
            "calibration/demo*/manifest.csv",
            "calibration/demo*/README.md",
            "calibration/demo/*/*.flac",
            "calibration/demo_digits/images/*.png",
            "models/pretrained/*.safetensors",
        )
        for path in ROOT.glob(pattern)
    }
    assert names == modules | data


def locked_versions():
    """The lock as constraints, for a wheel has no hash there."""
    lines = (ROOT / "locks" / "dev.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.rstrip(" \\") for line in lines if not line.startswith(" "))


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_device_runs_a_model_without_torch(wheel, version, exported, demo, wav, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed")
    venv, constraints = tmp_path / "venv", tmp_path / "constraints.txt"
    constraints.write_text(locked_versions())
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "-p", python, venv], check=True)
    install = [uv, "pip", "install", "--quiet", "-p", venv / "bin/python", "-c", constraints]
    subprocess.run([*install, wheel], check=True)

    clips = [clip for clip in demo.of("eval") if clip.label == "yes"]
    engine = exported / "model.int8.onnx"
    command = [venv / "bin/cnngru-edge", "run", "--engine", engine, *(clip.path for clip in clips)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" yes ") > len(clips) / 2

    silence = np.zeros(8_000, np.float32)
    word = read_audio(clips[0].path, 16_000).samples
    long = wav("long.wav", np.concatenate([silence, word, silence]))
    engine = exported / "model.int8.chunk.onnx"
    command = [venv / "bin/cnngru-edge", "run", "--engine", engine, "--stream", "--json", long]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["yes"]

    missing = subprocess.run([venv / "bin/python", "-c", "import torch"], capture_output=True)
    assert missing.returncode != 0
    export = [venv / "bin/cnngru-edge", "export", "--out", tmp_path / "out"]
    refused = subprocess.run(export, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr == (
        "Error: onnx_ir is not installed: pip install 'cnngru-edge[export]', or, to build "
        "engines on a device, pip install onnx onnx-ir\n"
    )

    if version not in {"3.10", "3.13"}:  # the oldest and the newest are enough
        return
    # The runtime's own tests, against the installed package.
    subprocess.run([*install, "pytest"], check=True)
    tests = [
        ROOT / "tests" / f"test_runtime_{name}.py" for name in ("audio", "decode", "recognize")
    ]
    options = ["-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [venv / "bin/python", "-m", "pytest", *options, *tests],
        cwd=tmp_path,
        env={**os.environ, "CNNGRU_EDGE_EXPORTED": str(exported)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
