"""What this machine is: system, Jetson, GPU, and the libraries as they can really be imported."""

import json
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import distributions
from itertools import repeat
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from cnngru_edge.runtime.backends.trt.cuda import Gpu
from cnngru_edge.runtime.machine import jetson

_LIBRARIES = (
    "onnxruntime",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_dispatch",
    "tensorrt_rtx",
    "torch",
    "torchaudio",
    "onnx",
    "onnx_ir",
    "soundfile",
    "soxr",
)
_WHEELS = re.compile(
    r"(tensorrt(-lean|-dispatch|-rtx)?(-cu\d+)?(-bindings|-libs)?|onnxruntime.*|cuda-bindings"
    r"|cuda-python|torch)$"
)
_APT = re.compile(r"/usr/lib/python3[^/]*/dist-packages/?$")
_PATIENCE_S = 60.0  # torch takes ten seconds on a small device that has just been started

# Programs that give `found`. Each runs in a process of its own, and prints it last: a library may
# print while it loads.
_START = """
import json, sys
sys.path[:] = [p for p in sys.path if p]  # a folder here may be called like a library
"""
_END = """
print("\\n" + json.dumps(found), flush=True)
"""
_IMPORT = """
import importlib
name = sys.argv[1]
try:
    module = importlib.import_module(name)
    found = {"version": module.__version__} if module.__file__ else {}
    if name == "onnxruntime":
        found["providers"] = module.get_available_providers()
except BaseException as e:
    missing = isinstance(e, ModuleNotFoundError) and e.name == name
    found = {} if missing else {"error": f"{type(e).__name__}: {e}"}
"""
_GPU = """
from dataclasses import asdict
try:
    from cnngru_edge.runtime.backends.trt.cuda import Cuda
    found = {"gpu": asdict(Cuda().gpu)}
except Exception as e:
    found = {"error": str(e)}
"""
_DRIVER = """
import ctypes
version = ctypes.c_int()
try:
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
except OSError:
    pass
number = version.value
found = {"driver": f"{number // 1000}.{number % 1000 // 10}"} if number else {}
"""


@dataclass(frozen=True)
class Library:
    """What came of importing a library; neither version nor error: it is not installed."""

    version: str | None = None
    error: str | None = None  # in its own words, all of them

    @property
    def absence(self) -> str:
        """Why it cannot be used."""
        return f"cannot be imported: {self.error}" if self.error else "not installed"


@dataclass(frozen=True)
class Machine:
    """What there is to know of a machine, as it was found."""

    system: str  # as Linux
    release: str  # as Ubuntu 22.04.5 LTS
    architecture: str  # as aarch64
    python: str  # version
    python_prefix: str  # where it is installed; /usr is the system's own
    venv: bool
    system_packages: bool  # whether it sees what apt installs
    container: bool
    l4t_release: str | None = None  # first line of /etc/nv_tegra_release; None: not a Jetson
    model: str | None = None  # as the device tree has it
    power_mode: str | None = None
    driver: str | None = None  # the newest CUDA that the NVIDIA driver runs; None: no driver
    gpu: Gpu | None = None
    no_gpu: str | None = None  # why CUDA gives none, in one line
    libraries: Mapping[str, Library] = field(default_factory=dict)
    providers: tuple[str, ...] = ()  # of ONNX Runtime
    wheels: Mapping[str, str] = field(default_factory=dict)  # versions of what pip has installed
    apt_tensorrt: bool = False  # whether apt has installed TensorRT's library,
    apt_tensorrt_python: str | None = None  # and for which Python its module, as 3.10

    @property
    def l4t(self) -> str | None:
        """The L4T release of a Jetson, as 36.4.3."""
        return jetson.l4t_version(self.l4t_release or "")

    @property
    def jetpack(self) -> jetson.JetPack | None:
        """What this release of JetPack comes with, if it is a known one."""
        return jetson.JETPACKS.get(self.l4t or "")

    @property
    def generation(self) -> int | None:
        """Of JetPack: 5, 6 or 7; None if this is no Jetson, or one of a later generation."""
        return jetson.jetpack_generation(self.l4t) if self.l4t else None

    @property
    def cuda(self) -> int | None:
        """Major version of the newest CUDA that the driver runs."""
        return int(self.driver.split(".")[0]) if self.driver else None

    def library(self, name: str) -> Library:
        """What came of importing it."""
        return self.libraries.get(name, Library())


def look(patience_s: float = _PATIENCE_S) -> Machine:
    """Look at this machine.

    Libraries are imported, and CUDA is asked, in processes of their own and all at once: a broken
    library can end its process, and one that hangs is given up after `patience_s` seconds. Nothing
    of TensorRT is constructed: 8.6 crashes on that where there is no driver.
    """
    asked = {name: (_IMPORT, name) for name in _LIBRARIES}
    asked |= {"gpu": (_GPU, ""), "driver": (_DRIVER, "")}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(_ask, *zip(*asked.values(), strict=True), repeat(patience_s))
        found = dict(zip(asked, answers, strict=True))
    gpu = found["gpu"].get("gpu")
    return Machine(
        system=platform.system(),
        release=_release(),
        architecture=platform.machine(),
        python=platform.python_version(),
        python_prefix=sys.base_prefix,
        venv=sys.prefix != sys.base_prefix,
        system_packages=any(map(_APT.search, sys.path)),
        container=any(Path(p).exists() for p in ("/.dockerenv", "/run/.containerenv")),
        l4t_release=jetson.release(),
        model=jetson.module_name(),
        power_mode=jetson.power_mode(),
        driver=found["driver"].get("driver"),
        gpu=Gpu(**gpu) if gpu else None,
        no_gpu=found["gpu"].get("error"),
        libraries={name: _library(found[name]) for name in _LIBRARIES},
        providers=tuple(found["onnxruntime"].get("providers", ())),
        wheels=_wheels(),
        apt_tensorrt=any(Path("/usr/lib").glob(f"{platform.machine()}-linux-gnu/libnvinfer.so.*")),
        apt_tensorrt_python=_apt_tensorrt_python(),
    )


def try_import(name: str, patience_s: float = _PATIENCE_S) -> Library:
    """Import a library in a process of its own, and say what came of it."""
    return _library(_ask(_IMPORT, name, patience_s))


def _ask(program: str, argument: str, patience_s: float) -> dict[str, Any]:
    """What a program finds; one that does not come so far gives {"error": what came of it}."""
    try:
        # Not with -I: PYTHONPATH is how some users find their TensorRT.
        done = subprocess.run(
            [sys.executable, "-c", _START + program + _END, argument],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it hangs; given up after {patience_s:g} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode < 0:
            return {"error": f"it crashes ({_signal_name(-done.returncode)})"}
        said = (done.stderr.strip() or "without a word").splitlines()[-1]
        return {"error": f"it ends its process with status {done.returncode}: {said}"}
    return answer


def _library(answer: dict[str, Any]) -> Library:
    try:
        version = answer.get("version")
        return Library(version and str(Version(version)), answer.get("error"))
    except (InvalidVersion, TypeError):
        return Library(error=f"its version is {version!r}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _release() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def _wheels() -> dict[str, str]:
    """What pip has installed of the libraries here, by canonical name; the first on the path."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = canonicalize_name(str(distribution.metadata.json.get("name", "")))
        if _WHEELS.match(name) and not _APT.search(str(distribution.locate_file(""))):
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def _apt_tensorrt_python() -> str | None:
    """The Python that apt's TensorRT is for: in its file's name, or in a folder's, or the only."""
    system = Path("/usr/bin/python3").resolve()
    for module in Path("/usr/lib").glob("python3*/dist-packages/tensorrt/tensorrt*.so"):
        text = f"{module.name} {module} {system}"
        tag = re.search(r"cpython-3(\d+)-", text) or re.search(r"python3\.(\d+)", text)
        return f"3.{tag[1]}" if tag else None
    return None
