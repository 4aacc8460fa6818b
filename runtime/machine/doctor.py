"""What this machine is, what each backend can do here, and the step to take for what is missing."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from packaging.version import Version
from rich.console import Console
from rich.table import Table

from cnngru_edge.runtime.backends.trt.engine_file import RTX_CAPABILITIES
from cnngru_edge.runtime.machine.libraries import remedy
from cnngru_edge.runtime.machine.survey import Library, Machine

OLDEST_PYTHON = Version("3.10")
OLDEST_ONNXRUNTIME = Version("1.23")  # the first whose MatMulNBits takes 8 bits on Arm
OLDEST_TENSORRT = Version("8.6")
_CUDA_PROVIDER = "CUDAExecutionProvider"
_DEVICE = ("onnxruntime", "soundfile", "soxr")  # what exporting needs as running does


@dataclass(frozen=True)
class Backend:
    """What a backend can do on a machine, why, and what to do for the rest."""

    name: str
    can: tuple[str, ...]  # of build, run
    found: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What a machine can do; `steps` are about all of it."""

    machine: Machine
    steps: tuple[str, ...]
    backends: tuple[Backend, ...]

    def to_json(self) -> dict[str, Any]:
        """For `cnngru-edge doctor --json`."""
        jetpack = self.machine.jetpack
        facts = {**asdict(self.machine), "l4t": self.machine.l4t}
        facts["jetpack"] = jetpack.name if jetpack else None
        backends = [asdict(backend) for backend in self.backends]
        return {"machine": facts, "steps": self.steps, "backends": backends}


def diagnose(machine: Machine) -> Diagnosis:
    """What each backend can do on this machine, and the steps to what it cannot."""
    backends = [_onnxruntime(machine)]
    if _CUDA_PROVIDER in machine.providers:
        found = f"{_CUDA_PROVIDER} is there and not used: .onnx files are run on the CPU"
        backends.append(Backend("ONNX Runtime, CUDA", (), found))
    backends += [_tensorrt(machine), _rtx(machine), _torchscript(machine)]
    backends.append(_stage(machine, "recordings", "read", ("soundfile", "soxr")))
    backends.append(_stage(machine, "export", "run", ("torch", "onnx", "onnx_ir", *_DEVICE)))
    backends.append(_stage(machine, "training", "run", ("torch", "torchaudio")))
    return Diagnosis(machine, tuple(_machine_steps(machine)), tuple(backends))


def _machine_steps(machine: Machine) -> Iterable[str]:
    if machine.generation == 5:
        yield (
            "JetPack 5 has Python 3.8, and TensorRT only for that; cnngru-edge needs 3.10: update "
            "the device to JetPack 6 or later (https://developer.nvidia.com/embedded/jetpack); "
            "there is none for Xavier"
        )
    elif Version(machine.python) < OLDEST_PYTHON:
        yield f"Python {machine.python} is too old: install Python {OLDEST_PYTHON} or newer"
    if machine.l4t and not machine.jetpack:
        yield (
            f"L4T {machine.l4t} is not known to this version of cnngru-edge, nor which TensorRT "
            "belongs to it: pip install --upgrade cnngru-edge"
        )


def _onnxruntime(machine: Machine) -> Backend:
    name, library = "ONNX Runtime", machine.library("onnxruntime")
    step = f"pip install --upgrade 'onnxruntime>={OLDEST_ONNXRUNTIME}'"
    if not library.version:
        again = remedy("onnxruntime", is_broken=True)
        return Backend(name, (), library.absence, (again if library.error else step,))
    if Version(library.version) < OLDEST_ONNXRUNTIME:
        found = f"{library.version} is too old for INT8: {OLDEST_ONNXRUNTIME} or newer is needed"
        return Backend(name, (), found, (step,))
    return Backend(name, ("run",), f"{library.version}, on the CPU")


def _tensorrt(machine: Machine) -> Backend:
    name, library = "TensorRT", machine.library("tensorrt")
    wheels = _wheels_of(machine, "tensorrt")
    remove = f"pip uninstall --yes {' '.join(wheels)}"
    if machine.generation == 5:
        return Backend(name, (), "JetPack 5 has 8.5.2, for Python 3.8; 8.6 or newer is needed")
    if machine.generation == 6 and any("-cu" in wheel for wheel in wheels):
        found = f"{library.version or library.absence}, from pip, which is built for SBSA servers; "
        found += "JetPack 6 runs only the one from apt"
        return Backend(name, (), found, (remove, *_apt_steps(machine)))
    if not library.version:
        return _tensorrt_missing(machine, library)
    if Version(library.version) < OLDEST_TENSORRT:
        found = f"{library.version} is too old: {OLDEST_TENSORRT} or newer is needed"
        return Backend(name, (), found)
    if wrong := _cuda_13_on_12(machine, wheels):
        steps = (remove, "pip install 'cnngru-edge[tensorrt-cu12]'")
        return Backend(name, (), f"{library.version} {wrong}", steps)
    found = _beside_jetpack(machine, library.version)
    if machine.jetpack and Version(library.version).major > 10:
        newer = "update the device to JetPack 7.2.2 or later"
        return Backend(name, (), found, (remove, *_apt_steps(machine)) if wheels else (newer,))
    if machine.gpu is None:
        return Backend(name, (), f"{found}; {_no_gpu(machine)}", _gpu_steps(machine))
    return Backend(name, ("build", "run"), found)


def _tensorrt_missing(machine: Machine, library: Library) -> Backend:
    """It cannot be imported: it comes from apt on a Jetson, and from pip elsewhere."""
    found = library.absence
    steps: tuple[str, ...]
    if "libnvdla_compiler.so" in (library.error or ""):
        steps = (_dla_step(machine),)
    elif machine.l4t:
        if machine.apt_tensorrt_python and not library.error:
            found = "installed by apt, where this Python does not look"
        steps = _apt_steps(machine)
        # A new venv gets cuda-bindings with the extra.
        if machine.gpu is None and (machine.driver is None or not _venv_steps(machine)):
            steps += _gpu_steps(machine)
    elif machine.driver is None:
        found, steps = f"{found}; {_no_gpu(machine)}", _gpu_steps(machine)
    else:
        again = "--force-reinstall " if library.error else ""
        extra = "tensorrt-cu12" if machine.cuda == 12 else "tensorrt"
        steps = (f"pip install {again}'cnngru-edge[{extra}]'",)
    for lesser in ("tensorrt_lean", "tensorrt_dispatch"):
        if machine.library(lesser).version:
            found += f"; {lesser} does not build, and does not run what cnngru-edge builds"
    return Backend("TensorRT", (), found, steps)


def _beside_jetpack(machine: Machine, version: str) -> str:
    """A TensorRT that can be imported, beside the one that JetPack comes with."""
    own = machine.jetpack
    if own and f"{version}.".startswith(f"{own.tensorrt}."):
        return f"{version}, JetPack {own.name}'s own"
    found = f"{version}, where JetPack {own.name} has {own.tensorrt}" if own else version
    if machine.l4t and Version(version).major > 10:
        found += "; NVIDIA supports it from 11.4.1 on, for AGX Orin and Thor with JetPack 7.2.2"
    return found


def _apt_steps(machine: Machine) -> tuple[str, ...]:
    """To JetPack's own TensorRT, and to a Python that sees it."""
    if machine.apt_tensorrt_python:
        return _venv_steps(machine)
    package = "python3-libnvinfer" if machine.apt_tensorrt else "nvidia-jetpack"
    return (f"sudo apt install {package}", *_venv_steps(machine))


def _venv_steps(machine: Machine) -> tuple[str, ...]:
    """To a Python that sees what apt has installed, if this one does not."""
    own = machine.apt_tensorrt_python or (machine.jetpack.python if machine.jetpack else None)
    is_other = machine.python_prefix != "/usr" or (own and _minor(machine.python) != own)
    if machine.system_packages and not is_other:
        return ()
    extra = f"[jetpack{machine.generation}]" if machine.generation else ""
    return (
        f"{'/usr/bin/python3' if is_other else 'python3'} -m venv --system-site-packages .venv",
        f".venv/bin/pip install 'cnngru-edge{extra}'",
    )


def _dla_step(machine: Machine) -> str:
    """The container runtime lends this library of the device, which need not have it.

    Not on JetPack 7.2: Jonah-May-OSS/wyoming-whisper-trt#1038. On JetPack 6 it is a package.
    """
    if machine.generation == 6:
        return "on the device, outside of containers: sudo apt install nvidia-l4t-dla-compiler"
    return (
        "from JetPack 7.2 on there is no such library, and this TensorRT is for an earlier one: "
        "use a container made for this JetPack, or the device's own TensorRT"
    )


def _rtx(machine: Machine) -> Backend:
    name, library, gpu = "TensorRT-RTX", machine.library("tensorrt_rtx"), machine.gpu
    if not library.version:
        if machine.l4t or machine.system == "Darwin":
            return Backend(name, (), f"{library.absence}, and not for this machine")
        again = "--force-reinstall " if library.error else ""
        step = f"pip install {again}'cnngru-edge[tensorrt-rtx]'"
        return Backend(name, (), f"{library.absence}; it builds without a GPU", (step,))
    found = f"{library.version}, builds without a GPU"
    if machine.l4t or (gpu and gpu.capability not in RTX_CAPABILITIES):
        this = f"this GPU ({gpu.capability})" if gpu else "a Jetson's GPU"
        return Backend(name, ("build",), f"{found}; has no kernels for {this}")
    steps = _gpu_steps(machine) if gpu is None else ()
    wheels = _wheels_of(machine, "tensorrt-rtx")
    if wrong := _cuda_13_on_12(machine, wheels):
        steps = (f"pip uninstall --yes {' '.join(wheels)}", "pip install tensorrt-rtx-cu12", *steps)
        return Backend(name, ("build",), f"{found}; {wrong}", steps)
    if gpu is None:
        return Backend(name, ("build",), f"{found}; {_no_gpu(machine)}", steps)
    return Backend(name, ("build", "run"), found)


def _torchscript(machine: Machine) -> Backend:
    name, library = "TorchScript", machine.library("torch")
    if library.version:
        return Backend(name, ("run",), f"torch {library.version}, on the CPU")
    found = f"torch: {library.absence}"
    if machine.l4t:
        return Backend(name, (), f"{found}; a device does not need it")
    return Backend(name, (), found, (remedy("torch", is_broken=bool(library.error)),))


def _stage(machine: Machine, name: str, verb: str, libraries: tuple[str, ...]) -> Backend:
    """What needs libraries and no device: reading recordings, exporting, training."""
    found = {library: machine.library(library) for library in libraries}
    absent = {name: library for name, library in found.items() if not library.version}
    if not absent:
        return Backend(name, (verb,), ", ".join(f"{n} {lib.version}" for n, lib in found.items()))
    text = "; ".join(f"{n}: {library.absence}" for n, library in absent.items())
    is_for_a_host = "torch" in libraries
    if machine.l4t and is_for_a_host:
        return Backend(name, (), f"{text}; a device does not need it")
    steps = (remedy(n, is_broken=bool(library.error)) for n, library in absent.items())
    return Backend(name, (), text, tuple(dict.fromkeys(steps)))


def _wheels_of(machine: Machine, library: str) -> list[str]:
    """The wheels from pip that make up `tensorrt` or `tensorrt-rtx`."""
    names = [name for name in machine.wheels if name.startswith("tensorrt")]
    return sorted(n for n in names if ("rtx" in n) == ("rtx" in library))


def _cuda_13_on_12(machine: Machine, wheels: list[str]) -> str | None:
    """What is wrong with wheels for CUDA 13 on a driver that is older than that."""
    if machine.cuda is None or machine.cuda > 12 or not any("cu13" in name for name in wheels):
        return None
    return f"is for CUDA 13, and the driver runs CUDA up to {machine.driver}"


def _no_gpu(machine: Machine) -> str:
    if machine.driver is None:
        return "there is no NVIDIA driver here, or not one that this process can reach"
    return machine.no_gpu or "CUDA finds no GPU"


def _gpu_steps(machine: Machine) -> tuple[str, ...]:
    """To a GPU, where CUDA does not give one."""
    if machine.driver is None:
        return _driver_steps(machine)
    cuda, bindings = machine.cuda or 0, machine.wheels.get("cuda-bindings")
    if cuda < 12:
        return ("update the NVIDIA driver to one for CUDA 12 or later",)
    if bindings is None and machine.generation in (6, 7):
        return (f"pip install 'cnngru-edge[jetpack{machine.generation}]'",)
    if bindings is None or Version(bindings).major > cuda:
        return (f"pip install 'cuda-bindings<{cuda + 1}'",)
    return ("see with nvidia-smi what the driver finds; unset CUDA_VISIBLE_DEVICES",)


def _driver_steps(machine: Machine) -> tuple[str, ...]:
    if machine.system == "Darwin":
        return ()
    if machine.container:
        return (f"start the container with {'--runtime nvidia' if machine.l4t else '--gpus all'}",)
    if machine.l4t:
        return ("sudo apt install nvidia-l4t-cuda",)
    return ("if there is an NVIDIA GPU, install its driver: https://www.nvidia.com/drivers",)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """One screen: the machine, what each backend can do, and the steps, to be copied."""
    for line in _describe(diagnosis.machine):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table("backend", "can", "found")
    for backend in diagnosis.backends:
        table.add_row(backend.name, ", ".join(backend.can) or "-", backend.found)
    console.print(table)
    for about, steps in [
        ("this machine", diagnosis.steps),
        *((backend.name, backend.steps) for backend in diagnosis.backends),
    ]:
        if steps:
            console.print(f"{about}:", highlight=False)
        for step in steps:
            console.print(f"  {step}", highlight=False, soft_wrap=True)


def _describe(machine: Machine) -> Iterable[str]:
    """The machine, in lines."""
    if machine.l4t:
        jetpack = f"JetPack {machine.jetpack.name}" if machine.jetpack else "an unknown JetPack"
        mode = f", power mode {machine.power_mode}" if machine.power_mode else ""
        yield f"{machine.model or 'Jetson'}, {jetpack} (L4T {machine.l4t}){mode}"
    kind = "Python"
    if machine.venv:
        kind = f"venv {'with' if machine.system_packages else 'without'} system packages, Python"
    where = "in a container, " if machine.container else ""
    yield f"{where}{machine.release}, {machine.architecture}, {kind} {machine.python}"
    if machine.gpu:
        memory = machine.gpu.memory_bytes / 2**30
        yield (
            f"GPU: {machine.gpu.name}, compute capability {machine.gpu.capability}, "
            f"{memory:.1f} GiB; the driver runs CUDA up to {machine.driver or machine.gpu.driver}"
        )
    else:
        yield f"GPU: {_no_gpu(machine)}"
