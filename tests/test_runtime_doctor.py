import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from cnngru_edge.runtime.backends.trt.cuda import Gpu
from cnngru_edge.runtime.machine.doctor import diagnose, print_diagnosis
from cnngru_edge.runtime.machine.survey import Library, Machine, look, try_import

# Made machines, of facts as such machines show them: /etc/nv_tegra_release, the device tree and
# versions as in test_runtime_jetson.py, errors as they are in the places named beside them.

NO_MODULE = Library()
ORT = {"onnxruntime": Library("1.23.2")}
VENV = "python3 -m venv --system-site-packages .venv"

HOST = Machine(
    system="Linux",
    release="Ubuntu 22.04.5 LTS",
    architecture="x86_64",
    python="3.10.12",
    python_prefix="/usr",
    venv=True,
    system_packages=False,
    container=False,
    no_gpu="no NVIDIA driver is installed here",
    libraries={**ORT, "torch": Library("2.11.0+cpu")},
    providers=("CPUExecutionProvider",),
    wheels={"onnxruntime": "1.23.2", "torch": "2.11.0+cpu"},
)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", "13.0", False, 24 * 2**30, 128)
CUDA_13 = replace(
    HOST,
    driver="13.0",
    gpu=RTX_4090,
    no_gpu=None,
    libraries={**HOST.libraries, "tensorrt": Library("11.4.1.1"), "tensorrt_rtx": Library("1.7.1")},
    wheels={
        "cuda-bindings": "13.2.0",
        "tensorrt": "11.4.1.1",
        "tensorrt-cu13": "11.4.1.1",
        "tensorrt-cu13-bindings": "11.4.1.1",
        "tensorrt-cu13-libs": "11.4.1.1",
        "tensorrt-rtx": "1.7.1.116",
        "tensorrt-rtx-cu13": "1.7.1.116",
    },
)
CUDA_12 = replace(HOST, driver="12.4", gpu=replace(RTX_4090, driver="12.4"), no_gpu=None)

ORIN_NANO = replace(
    HOST,
    architecture="aarch64",
    system_packages=True,
    l4t_release="# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64",
    model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    power_mode="25W (1)",
    driver="12.6",
    gpu=Gpu("Orin", "8.7", "12.6", True, 7620 * 2**20, 8),
    no_gpu=None,
    libraries={**ORT, "tensorrt": Library("10.3.0")},
    wheels={"cuda-bindings": "12.9.4", "onnxruntime": "1.23.2"},
    apt_tensorrt=True,
    apt_tensorrt_python="3.10",
)
ORIN_7_2 = replace(
    ORIN_NANO,
    release="Ubuntu 24.04.4 LTS",
    python="3.12.3",
    l4t_release="# R39 (release), REVISION: 2.1, GCID: 1, BOARD: generic, EABI: aarch64",
    model="NVIDIA Jetson AGX Orin Developer Kit",
    driver="13.2",
    libraries={**ORT, "tensorrt": Library("10.16.2.10")},
    wheels={"cuda-bindings": "13.2.0"},
    apt_tensorrt_python="3.12",
)
THOR = replace(
    ORIN_7_2,
    l4t_release="# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64",
    model="NVIDIA Jetson AGX Thor Developer Kit",
    driver="13.0",
    gpu=Gpu("NVIDIA Thor", "11.0", "13.0", True, 125772 * 2**20, 20),
    libraries={**ORT, "tensorrt": Library("10.13.3.9")},
)
XAVIER = replace(
    ORIN_NANO,
    release="Ubuntu 20.04.6 LTS",
    python="3.8.10",
    l4t_release="# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64",
    model="Jetson-AGX",
    driver="11.4",
    libraries={**ORT, "tensorrt": Library("8.5.2.2")},
    wheels={},
    apt_tensorrt_python="3.8",
)


def backend(machine, name):
    return {b.name: b for b in diagnose(machine).backends}[name]


def with_library(machine, name, library):
    return replace(machine, libraries={**machine.libraries, name: library})


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (ORIN_NANO, "10.3.0, JetPack 6.2.1's own"),
        (ORIN_7_2, "10.16.2.10, JetPack 7.2.1's own"),
        (THOR, "10.13.3.9, JetPack 7.0's own"),
        (CUDA_13, "11.4.1.1"),
    ],
    ids=["JetPack 6", "JetPack 7.2", "Thor", "desktop"],
)
def test_where_all_is_there_tensorrt_builds_and_runs(machine, found):
    tensorrt = backend(machine, "TensorRT")
    assert (tensorrt.can, tensorrt.found, tensorrt.steps) == (("build", "run"), found, ())
    assert diagnose(machine).steps == ()


# Jetson


@pytest.mark.parametrize(
    ("machine", "extra"),
    [(ORIN_NANO, "jetpack6"), (ORIN_7_2, "jetpack7"), (THOR, "jetpack7")],
    ids=["JetPack 6", "JetPack 7.2", "Thor"],
)
def test_a_venv_that_does_not_see_tensorrt_from_apt_is_made_again(machine, extra):
    machine = replace(with_library(machine, "tensorrt", NO_MODULE), system_packages=False)
    tensorrt = backend(machine, "TensorRT")
    assert tensorrt.can == ()
    assert tensorrt.found == "installed by apt, where this Python does not look"
    assert tensorrt.steps == (VENV, f".venv/bin/pip install 'cnngru-edge[{extra}]'")


@pytest.mark.parametrize(
    "other",
    [
        {"python": "3.12.1", "python_prefix": "/home/me/.pyenv/versions/3.12.1"},
        {"python": "3.10.13", "python_prefix": "/home/me/.pyenv/versions/3.10.13"},
        {"python": "3.11.9"},
    ],
    ids=["pyenv, another version", "pyenv, the same version", "system, another version"],
)
def test_another_python_than_the_systems_never_sees_it(other):
    machine = with_library(replace(ORIN_NANO, **other), "tensorrt", NO_MODULE)
    assert backend(machine, "TensorRT").steps[0] == f"/usr/bin/{VENV}"


def test_a_jetson_without_tensorrt():
    machine = replace(ORIN_NANO, apt_tensorrt=False, apt_tensorrt_python=None)
    machine = with_library(machine, "tensorrt", NO_MODULE)
    assert backend(machine, "TensorRT").steps == ("sudo apt install nvidia-jetpack",)
    assert backend(machine, "TensorRT").found == "not installed"


def test_a_jetson_without_its_python_module():
    machine = replace(ORIN_NANO, apt_tensorrt_python=None, system_packages=False)
    machine = with_library(machine, "tensorrt", NO_MODULE)
    steps = backend(machine, "TensorRT").steps
    assert steps[:2] == ("sudo apt install python3-libnvinfer", VENV)


WHEELS = {"tensorrt": "10.13.3.9", "tensorrt-cu12": "10.13.3.9", "tensorrt-cu12-libs": "10.13.3.9"}


@pytest.mark.parametrize(
    "library",
    [Library("10.13.3.9"), Library(error="ImportError: libnvinfer.so.10: cannot open"), NO_MODULE],
    ids=["imported", "broken", "missing"],
)
def test_tensorrt_from_pip_is_not_for_jetpack_6(library):
    machine = replace(ORIN_NANO, wheels={**ORIN_NANO.wheels, **WHEELS})
    tensorrt = backend(with_library(machine, "tensorrt", library), "TensorRT")
    assert tensorrt.can == ()
    assert tensorrt.steps == ("pip uninstall --yes tensorrt tensorrt-cu12 tensorrt-cu12-libs",)
    assert "SBSA" in tensorrt.found
    closed = replace(machine, system_packages=False)
    assert backend(closed, "TensorRT").steps[1] == VENV


def test_a_wheel_of_jetpacks_own_tensorrt_is_not_taken_for_that():
    machine = replace(ORIN_NANO, wheels={**ORIN_NANO.wheels, "tensorrt": "10.3.0"})
    assert backend(machine, "TensorRT").can == ("build", "run")


def test_tensorrt_from_pip_is_fine_on_jetpack_7():
    wheels = {**THOR.wheels, "tensorrt": "10.16.1.11", "tensorrt-cu13": "10.16.1.11"}
    machine = with_library(replace(THOR, wheels=wheels), "tensorrt", Library("10.16.1.11"))
    tensorrt = backend(machine, "TensorRT")
    assert tensorrt.can == ("build", "run")
    assert tensorrt.found == "10.16.1.11, where JetPack 7.0 has 10.13"


def test_tensorrt_11_needs_a_later_jetpack_7():
    machine = with_library(ORIN_7_2, "tensorrt", Library("11.4.1.1"))
    tensorrt = backend(machine, "TensorRT")
    assert (tensorrt.can, tensorrt.steps) == ((), ("update the device to JetPack 7.2.2 or later",))
    assert "11.4.1" in tensorrt.found
    wheels = {"tensorrt": "11.4.1.1", "tensorrt-cu13-libs": "11.4.1.1", "cuda-bindings": "13.2.0"}
    assert backend(replace(machine, wheels=wheels), "TensorRT").steps == (
        "pip uninstall --yes tensorrt tensorrt-cu13-libs",
    )


def test_tensorrt_11_on_a_jetpack_7_later_than_this_table():
    release = "# R39 (release), REVISION: 9.0, GCID: 1"
    machine = replace(ORIN_7_2, l4t_release=release)
    diagnosis = diagnose(with_library(machine, "tensorrt", Library("11.4.1.1")))
    tensorrt = diagnosis.backends[1]
    assert tensorrt.can == ("build", "run")
    assert tensorrt.found.endswith(
        "supports it from 11.4.1 on, for AGX Orin and Thor with JetPack 7.2.2"
    )
    assert diagnosis.steps == (
        "L4T 39.9.0 is not known to this version of cnngru-edge, nor which TensorRT belongs to it: "
        "pip install --upgrade cnngru-edge",
    )


def test_a_jetson_of_a_later_generation():
    machine = replace(ORIN_7_2, l4t_release="# R41 (release), REVISION: 1.0, GCID: 1")
    machine = replace(with_library(machine, "tensorrt", NO_MODULE), system_packages=False)
    assert backend(machine, "TensorRT").steps == (VENV, ".venv/bin/pip install 'cnngru-edge'")


def test_jetpack_5_is_too_old():
    diagnosis = diagnose(XAVIER)
    assert len(diagnosis.steps) == 1
    assert "update the device to JetPack 6 or later" in diagnosis.steps[0]
    tensorrt = diagnosis.backends[1]
    assert (tensorrt.can, tensorrt.steps) == ((), ())
    assert "8.6 or newer" in tensorrt.found


# Jonah-May-OSS/wyoming-whisper-trt#1038: a container of an older JetPack on L4T 39.2.0
NO_DLA = Library(
    error="ImportError: libnvdla_compiler.so: cannot open shared object file: No such file or "
    "directory"
)


def test_a_container_that_is_older_than_the_device():
    machine = with_library(replace(ORIN_7_2, container=True), "tensorrt", NO_DLA)
    tensorrt = backend(machine, "TensorRT")
    assert NO_DLA.error in tensorrt.found
    assert len(tensorrt.steps) == 1
    assert "use a container made for this JetPack" in tensorrt.steps[0]


def test_jetpack_6_may_lack_the_compiler_for_its_dla():
    tensorrt = backend(with_library(ORIN_NANO, "tensorrt", NO_DLA), "TensorRT")
    assert tensorrt.steps == (
        "on the device, outside of containers: sudo apt install nvidia-l4t-dla-compiler",
    )


@pytest.mark.parametrize(
    ("machine", "step"),
    [
        (ORIN_NANO, "pip install 'cnngru-edge[jetpack6]'"),
        (ORIN_7_2, "pip install 'cnngru-edge[jetpack7]'"),
        (THOR, "pip install 'cnngru-edge[jetpack7]'"),
        (CUDA_12, "pip install 'cuda-bindings<13'"),
        (CUDA_13, "pip install 'cuda-bindings<14'"),
    ],
    ids=["JetPack 6", "JetPack 7.2", "Thor", "CUDA 12", "CUDA 13"],
)
def test_cuda_bindings_are_missing(machine, step):
    why = "cuda-bindings cannot be imported (No module named 'cuda')"
    wheels = {n: v for n, v in machine.wheels.items() if n != "cuda-bindings"}
    machine = replace(machine, gpu=None, no_gpu=why, wheels=wheels)
    machine = with_library(machine, "tensorrt", Library("10.3.0"))
    tensorrt = backend(machine, "TensorRT")
    assert (tensorrt.can, tensorrt.steps) == ((), (step,))
    assert why in tensorrt.found


@pytest.mark.parametrize(
    ("machine", "step"),
    [
        (ORIN_NANO, "pip install 'cuda-bindings<13'"),
        (CUDA_12, "pip install 'cuda-bindings<13'"),
        (replace(CUDA_13, driver="11.8"), "update the NVIDIA driver to one for CUDA 12 or later"),
    ],
    ids=["JetPack 6", "CUDA 12", "CUDA 11"],
)
def test_cuda_bindings_are_for_a_newer_driver(machine, step):
    machine = replace(machine, gpu=None, no_gpu="...", wheels={"cuda-bindings": "13.2.0"})
    tensorrt = backend(with_library(machine, "tensorrt", Library("10.3.0")), "TensorRT")
    assert (tensorrt.can, tensorrt.steps) == ((), (step,))


def test_a_jetson_needs_tensorrt_and_cuda_bindings():
    machine = replace(ORIN_NANO, gpu=None, no_gpu="...", wheels={}, apt_tensorrt_python=None)
    assert backend(with_library(machine, "tensorrt", NO_MODULE), "TensorRT").steps == (
        "sudo apt install python3-libnvinfer",
        "pip install 'cnngru-edge[jetpack6]'",
    )
    closed = replace(machine, system_packages=False)
    assert backend(with_library(closed, "tensorrt", NO_MODULE), "TensorRT").steps == (
        "sudo apt install python3-libnvinfer",
        VENV,
        ".venv/bin/pip install 'cnngru-edge[jetpack6]'",
    )
    outside = replace(closed, driver=None, container=True)
    assert backend(with_library(outside, "tensorrt", NO_MODULE), "TensorRT").steps[3:] == (
        "start the container with --runtime nvidia",
    )


# Desktops and servers


@pytest.mark.parametrize(
    ("machine", "extra"),
    [(CUDA_12, "tensorrt-cu12"), (CUDA_13, "tensorrt")],
    ids=["CUDA 12", "CUDA 13"],
)
def test_tensorrt_is_installed_for_the_drivers_cuda(machine, extra):
    missing = with_library(machine, "tensorrt", NO_MODULE)
    assert backend(missing, "TensorRT").steps == (f"pip install 'cnngru-edge[{extra}]'",)
    error = Library(error="ImportError: libnvinfer.so.10: cannot open shared object file")
    broken = backend(with_library(machine, "tensorrt", error), "TensorRT")
    assert broken.steps == (f"pip install --force-reinstall 'cnngru-edge[{extra}]'",)
    assert error.error in broken.found


def test_tensorrt_for_cuda_13_on_a_driver_for_cuda_12():
    machine = replace(CUDA_13, driver="12.8", gpu=None, no_gpu="...")
    tensorrt, rtx = backend(machine, "TensorRT"), backend(machine, "TensorRT-RTX")
    assert (tensorrt.can, rtx.can) == ((), ("build",))
    assert tensorrt.found == "11.4.1.1 is for CUDA 13, and the driver runs CUDA up to 12.8"
    assert tensorrt.steps == (
        "pip uninstall --yes tensorrt tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs",
        "pip install 'cnngru-edge[tensorrt-cu12]'",
    )
    assert rtx.steps == (
        "pip uninstall --yes tensorrt-rtx tensorrt-rtx-cu13",
        "pip install tensorrt-rtx-cu12",
        "pip install 'cuda-bindings<13'",
    )


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, ("if there is an NVIDIA GPU, install its driver: https://www.nvidia.com/drivers",)),
        ({"container": True}, ("start the container with --gpus all",)),
        (
            {"container": True, "l4t_release": ORIN_NANO.l4t_release},
            ("start the container with --runtime nvidia",),
        ),
        ({"system": "Darwin"}, ()),
    ],
    ids=["host", "container", "container on a Jetson", "macOS"],
)
def test_without_a_driver_nothing_runs_on_a_gpu(changes, steps):
    # TensorRT 8.6 too: it would crash if its runtime were made here.
    if "l4t_release" not in changes:  # nor is there a use for TensorRT
        assert backend(replace(HOST, **changes), "TensorRT").steps == steps
    machine = with_library(replace(HOST, **changes), "tensorrt", Library("8.6.2"))
    tensorrt = backend(machine, "TensorRT")
    assert (tensorrt.can, tensorrt.steps) == ((), steps)
    assert tensorrt.found.endswith(
        "there is no NVIDIA driver here, or not one that this process can reach"
    )


def test_a_driver_that_shows_no_gpu():
    why = "CUDA does not start: no CUDA-capable device is detected (CUDA error 100)"
    tensorrt = backend(replace(CUDA_13, gpu=None, no_gpu=why), "TensorRT")
    assert tensorrt.found == f"11.4.1.1; {why}"
    assert tensorrt.steps == (
        "see with nvidia-smi what the driver finds; unset CUDA_VISIBLE_DEVICES",
    )


def test_tensorrt_older_than_8_6():
    old = with_library(CUDA_12, "tensorrt", Library("8.5.3.1"))
    assert backend(old, "TensorRT").can == ()
    assert backend(with_library(CUDA_12, "tensorrt", Library("8.6.0")), "TensorRT").can != ()


def test_lean_is_not_enough():
    machine = with_library(CUDA_12, "tensorrt_lean", Library("10.13.3"))
    tensorrt = backend(machine, "TensorRT")
    assert tensorrt.can == ()
    assert "tensorrt_lean does not build" in tensorrt.found


# TensorRT-RTX


def test_rtx_builds_without_a_gpu():
    machine = with_library(HOST, "tensorrt_rtx", Library("1.7.1.116"))
    assert backend(machine, "TensorRT-RTX").can == ("build",)
    assert backend(CUDA_13, "TensorRT-RTX").can == ("build", "run")


@pytest.mark.parametrize("capability", ["8.7", "9.0", "11.0"])
def test_rtx_has_no_kernels_for_some(capability):
    machine = replace(CUDA_13, gpu=replace(RTX_4090, capability=capability))
    rtx = backend(machine, "TensorRT-RTX")
    assert (rtx.can, rtx.steps) == (("build",), ())
    assert f"has no kernels for this GPU ({capability})" in rtx.found


def test_rtx_is_not_offered_to_a_jetson():
    rtx = backend(ORIN_NANO, "TensorRT-RTX")
    assert (rtx.can, rtx.steps) == ((), ())
    assert backend(HOST, "TensorRT-RTX").steps == ("pip install 'cnngru-edge[tensorrt-rtx]'",)


# The CPU


def test_onnx_runtime():
    assert backend(HOST, "ONNX Runtime").can == ("run",)
    step = ("pip install --upgrade 'onnxruntime>=1.23'",)
    old = backend(with_library(HOST, "onnxruntime", Library("1.21.1")), "ONNX Runtime")
    assert (old.can, old.steps) == ((), step)
    missing = backend(with_library(HOST, "onnxruntime", NO_MODULE), "ONNX Runtime")
    assert (missing.can, missing.found, missing.steps) == ((), "not installed", step)
    assert backend(with_library(HOST, "onnxruntime", Library("1.23.0")), "ONNX Runtime").can


def test_onnx_runtime_for_cuda_is_shown_where_it_is():
    assert "ONNX Runtime, CUDA" not in [b.name for b in diagnose(CUDA_13).backends]
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert backend(replace(CUDA_13, providers=providers), "ONNX Runtime, CUDA").can == ()


def test_torchscript():
    assert backend(HOST, "TorchScript").can == ("run",)
    missing = backend(with_library(HOST, "torch", NO_MODULE), "TorchScript")
    assert (missing.can, missing.steps) == ((), ("pip install 'cnngru-edge[export]'",))
    assert backend(ORIN_NANO, "TorchScript").steps == ()


def test_an_old_python():
    assert diagnose(replace(HOST, python="3.9.18")).steps == (
        "Python 3.9.18 is too old: install Python 3.10 or newer",
    )
    assert diagnose(replace(HOST, python="3.10.0")).steps == ()


# Looking


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that can be imported in other processes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, code: (tmp_path / f"{name}.py").write_text(code)


CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.mark.parametrize(
    ("code", "library"),
    [
        ("__version__ = '10.3.0'; print('hello')", Library("10.3.0")),
        (CRASH, Library(error="it crashes (SIGSEGV)")),
        ("import time; time.sleep(60)", Library(error="it hangs; given up after 2 s")),
        (
            "import ctypes; ctypes.CDLL('libnvinfer.so.99')",
            Library(
                error="OSError: libnvinfer.so.99: cannot open shared object file: No such file or "
                "directory"
            ),
        ),
        ("import numby", Library(error="ModuleNotFoundError: No module named 'numby'")),
        ("raise SystemExit(3)", Library(error="SystemExit: 3")),
        (
            "import os; os.write(2, b'no licence\\n'); os._exit(3)",
            Library(error="it ends its process with status 3: no licence"),
        ),
        (
            "",
            Library(error="AttributeError: module 'somelib' has no attribute '__version__'"),
        ),
        ("__version__ = 'new'", Library(error="its version is 'new'")),
        ("__version__ = '1'\nimport atexit, os\natexit.register(os.abort)", Library("1")),
    ],
    ids=[
        "fine",
        "crashes",
        "hangs",
        "no library",
        "no dependency",
        "exits",
        "ends",
        "no version",
        "odd version",
        "crashes at the end",
    ],
)
def test_an_import_is_tried(module, code, library):
    module("somelib", code)
    assert try_import("somelib", 2.0) == library


def test_what_is_not_there_is_not_an_error(tmp_path, monkeypatch):
    assert try_import("somelib") == Library()
    (tmp_path / "somelib").mkdir()  # a folder, as it stays behind when a library is removed
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert try_import("somelib") == Library()


def test_a_folder_here_is_not_taken_for_a_library(tmp_path, monkeypatch):
    (tmp_path / "somelib.py").write_text("__version__ = '1'")
    monkeypatch.chdir(tmp_path)
    assert try_import("somelib") == Library()


def test_this_machine_with_a_tensorrt_that_crashes(module):
    module("tensorrt", CRASH)
    module("onnxruntime", "__version__ = '1.20.1'\ndef get_available_providers(): return ['A']")
    machine = look()
    assert machine.libraries["tensorrt"] == Library(error="it crashes (SIGSEGV)")
    assert machine.libraries["onnxruntime"] == Library("1.20.1")
    assert machine.providers == ("A",)
    tensorrt = backend(machine, "TensorRT")
    assert tensorrt.can == ()
    assert "it crashes (SIGSEGV)" in tensorrt.found


def test_this_machine():
    machine = look()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert machine.architecture == os.uname().machine
    assert (machine.gpu is None) == bool(machine.no_gpu)
    torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    assert bool(machine.libraries["torch"].version) == (torch.returncode == 0)
    assert "CPUExecutionProvider" in machine.providers
    backends = {b.name: b for b in diagnose(machine).backends}
    assert backends["ONNX Runtime"].can == ("run",)
    assert ("build" in backends["TensorRT-RTX"].can) == ("tensorrt-rtx" in machine.wheels)
    if machine.driver is None:
        assert not any("run" in backends[name].can for name in ("TensorRT", "TensorRT-RTX"))


@pytest.mark.gpu
def test_this_gpu():
    machine = look()
    assert machine.gpu
    assert machine.gpu.driver == machine.driver


# Telling


def test_the_diagnosis_as_json():
    found = json.loads(json.dumps(diagnose(ORIN_NANO).to_json()))
    assert found["machine"]["jetpack"] == "6.2.1"
    assert found["machine"]["l4t"] == "36.4.7"
    assert found["machine"]["gpu"]["capability"] == "8.7"
    assert found["machine"]["libraries"]["tensorrt"] == {"version": "10.3.0", "error": None}
    assert found["backends"][1] == {
        "name": "TensorRT",
        "can": ["build", "run"],
        "found": "10.3.0, JetPack 6.2.1's own",
        "steps": [],
    }


def test_the_diagnosis_as_text(capsys):
    machine = replace(with_library(ORIN_NANO, "tensorrt", NO_MODULE), system_packages=False)
    print_diagnosis(diagnose(machine), Console(markup=False, width=100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{ORIN_NANO.model}, JetPack 6.2.1 (L4T 36.4.7), power mode 25W (1)",
        "Ubuntu 22.04.5 LTS, aarch64, venv without system packages, Python 3.10.12",
        "GPU: Orin, compute capability 8.7, 7.4 GiB; the driver runs CUDA up to 12.6",
    ]
    start = lines.index("TensorRT:")
    assert lines[start + 1 : start + 3] == [
        f"  {VENV}",
        "  .venv/bin/pip install 'cnngru-edge[jetpack6]'",
    ]


def test_a_long_step_stays_one_line(capsys):
    print_diagnosis(diagnose(XAVIER), Console(markup=False, width=40))
    assert f"  {diagnose(XAVIER).steps[0]}" in capsys.readouterr().out.splitlines()
