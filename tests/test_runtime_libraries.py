"""A library that is missing or does not load is told in one line, with what to type."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from cnngru_edge.runtime.machine.libraries import CORE, EXPORT, TRAIN, import_fault, remedy

START = "from cnngru_edge.export.start import main; main()"
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
OTHER_ABI = "raise ImportError('/lib/x.so: undefined symbol: _PyThing')"
NO_SYSTEM_LIBRARY = "raise OSError('cannot load library libsndfile.so')"
OTHER_TORCH = (
    "try:\n    raise OSError('x.so: undefined symbol: torch_exception_get_what')\n"
    "except OSError as e:\n    raise OSError('Could not load this library: x.so') from e"
)
OTHER_NUMPY = "import numpy\nnumpy.no_such_name"
BROKEN = {
    "onnxruntime": OTHER_ABI,
    "soundfile": NO_SYSTEM_LIBRARY,
    "soxr": OTHER_NUMPY,
    "torch": OTHER_ABI,
    "torchaudio": OTHER_TORCH,
}


@pytest.fixture
def cnngru_edge(tmp_path):
    """Run the command line where modules have other code; gives exit code, stdout and stderr."""

    def run(modules, *arguments):
        folder = tmp_path / "modules"
        folder.mkdir()
        for name, code in modules.items():
            (folder / f"{name}.py").write_text(code)
        command = [sys.executable, "-c", START, *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(folder)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("library", "code", "line"),
    [
        ("onnxruntime", MISSING, "is not installed: pip install 'onnxruntime"),
        (
            "onnxruntime",
            OTHER_ABI,
            "does not load (/lib/x.so: undefined symbol: _PyThing): pip install --force-reinstall "
            "'onnxruntime",
        ),
        ("soundfile", MISSING, "is not installed: pip install 'soundfile"),
        (
            "soundfile",
            NO_SYSTEM_LIBRARY,
            "does not load (cannot load library libsndfile.so): pip install --force-reinstall "
            "'soundfile",
        ),
    ],
)
def test_what_a_clip_needs(cnngru_edge, exported, demo, library, code, line):
    engine, clip = exported / "model.int8.onnx", demo.clips[0].path
    done = cnngru_edge({library: code}, "run", "--engine", engine, clip)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {library} {line}")
    assert done.stderr.count("\n") == 1
    assert ("libsndfile1" in done.stderr) == (code == NO_SYSTEM_LIBRARY)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (MISSING, "is not installed: pip install 'soxr"),
        (
            OTHER_NUMPY,
            "does not load (module 'numpy' has no attribute 'no_such_name'): pip install "
            "--force-reinstall 'soxr",
        ),
    ],
)
def test_what_another_rate_needs(cnngru_edge, exported, wav, rng, code, line):
    clip = wav("a.wav", rng.uniform(-0.1, 0.1, 8_000), 8_000)
    done = cnngru_edge({"soxr": code}, "run", "--engine", exported / "model.int8.onnx", clip)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: soxr {line}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "code", "line"),
    [
        ("torch", MISSING, "is not installed: pip install 'cnngru-edge[export]'\n"),
        (
            "torch",
            OTHER_ABI,
            "does not load (/lib/x.so: undefined symbol: _PyThing): pip install --force-reinstall "
            "'torch",
        ),
        ("torchaudio", MISSING, "is not installed: pip install 'cnngru-edge[train]'\n"),
        (
            "torchaudio",
            OTHER_TORCH,
            "does not load (x.so: undefined symbol: torch_exception_get_what): pip install "
            "--force-reinstall 'torch==2.11.0' 'torchaudio==2.11.0'\n",
        ),
    ],
)
def test_what_training_needs(cnngru_edge, manifest, tmp_path, demo, library, code, line):
    clips = zip(("train", "calib"), demo.clips, strict=False)
    rows = [(clip.path, part, clip.label) for part, clip in clips]
    data, out = manifest(("path", "set", "label"), *rows), tmp_path / "a.safetensors"
    done = cnngru_edge({library: code}, "train", "--data", data, "--labels", "yes", "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {library} {line}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", [MISSING, OTHER_TORCH], ids=["missing", "broken"])
def test_a_module_is_traced_without_torchaudio(cnngru_edge, tmp_path, tiny_checkpoint, code):
    done = cnngru_edge({"torchaudio": code}, "trace", tiny_checkpoint, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "torchaudio" not in done.stderr
    assert (tmp_path / "out" / "model.fp32.onnx").is_file()


def test_doctor_and_help_stand_when_all_else_falls(cnngru_edge):
    done = cnngru_edge(BROKEN, "doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    backends = {b["name"]: b for b in json.loads(done.stdout)["backends"]}
    for name, said in {
        "ONNX Runtime": "ImportError: /lib/x.so: undefined symbol: _PyThing",
        "TorchScript": "ImportError: /lib/x.so: undefined symbol: _PyThing",
        "recordings": "soundfile: cannot be imported: OSError: cannot load library libsndfile.so",
        "export": "torch: cannot be imported: ImportError: /lib/x.so",
        "training": "torchaudio: cannot be imported: OSError: Could not load this library: x.so",
    }.items():
        assert backends[name]["can"] == []
        assert said in backends[name]["found"]
        assert backends[name]["steps"]
    pair = "pip install --force-reinstall 'torch==2.11.0' 'torchaudio==2.11.0'"
    assert backends["training"]["steps"][-1] == pair


def test_of_libraries_that_need_each_other_the_broken_one_is_named(cnngru_edge, tmp_path):
    done = cnngru_edge({"onnx": OTHER_ABI}, "export", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: onnx does not load (/lib/x.so: undefined symbol: _Py")


@pytest.mark.parametrize("library", ["numpy", "rich", "packaging"])
def test_what_the_command_line_itself_needs(cnngru_edge, library):
    done = cnngru_edge({library: OTHER_ABI}, "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {library} does not load (/lib/x.so: undefined symbol")
    assert done.stderr.count("\n") == 1


def test_what_a_worker_needs(cnngru_edge, exported):
    graphs = exported / "model.fp32.onnx", exported / "model.int8.onnx"
    done = cnngru_edge({"soundfile": NO_SYSTEM_LIBRARY}, "compare", *graphs, "--workers", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"(compare .*\n)*Error: soundfile does not load \(.*\n", done.stderr)


@pytest.mark.parametrize(
    "code",
    [
        "from numpy import no_such_name",
        "import numpy; numpy.zeros(-1)",
        "import onnx; onnx.load('none.onnx')",
    ],
)
def test_a_fault_of_ours_stays_one(code):
    """What a library raises when it is used, or is asked for what it has not."""
    with pytest.raises(Exception, match=r"\w") as e:
        exec(code, {"__name__": "cnngru_edge.ours"})
    assert import_fault(e.value) is None


def test_an_error_of_something_else_stays_what_it_is():
    assert import_fault(ImportError("cannot import name 'x'", name="somelib")) is None
    with pytest.raises(IndexError) as e:
        [][0]
    assert import_fault(e.value) is None


def test_every_requirement_has_its_command():
    stated = [Requirement(text) for text in requires("cnngru-edge")]

    def needed(extra):
        asked = [r for r in stated if r.marker and r.marker.evaluate({"extra": extra})]
        return {r.name.replace("-", "_").replace("pillow", "PIL") for r in asked}

    assert needed("export") - {"tomli"} == set(EXPORT)
    assert needed("train") == {"cnngru_edge", "torch", *TRAIN}
    core = {r.name: r for r in stated if not r.marker}
    for name in CORE:
        assert remedy(name) == f"pip install '{name}{core[name].specifier}'"
