"""TensorRT and TensorRT-RTX as they are installed: imported, listened to, and their errors told.

What a version can do is found by name on its module, never from its version or a flag's number:
`hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")`. The numbers change between majors.
"""

import importlib
import re
from typing import Any

from cnngru_edge.models.errors import BackendMissing, SessionError
from cnngru_edge.runtime.engine_file import LIBRARIES

_INSTALL = {
    "tensorrt": "pip install 'cnngru-edge[tensorrt]'; on a Jetson: sudo apt install tensorrt "
    "python3-libnvinfer, and a venv made with --system-site-packages",
    "tensorrt_rtx": "pip install 'cnngru-edge[tensorrt-rtx]'",
}

_HINTS = (
    # What the libraries say (from their binaries, 8.6 to 11.4 and RTX 1.7), and what to do.
    (
        r"magicTag|not compatible with this version|Version tag does not match|stdVersionRead"
        r"|plan major version does not match|Version Forward Compatibility"
        r"|created with TensorRT-RTX version|does not conform to",
        "the engine is of another version; build it again here",
    ),
    (
        r"incompatible device|Platform specific tag mismatch|not compatible with this "
        r"hardware-compatible|cannot run on this GPU|different models of devices",
        "the engine is of another kind of GPU or system; build it on the device that runs it",
    ),
    (
        r"getEngineHostCodeAllowed",
        "the engine was built version-compatible, which needs code from inside it; build it here",
    ),
    (
        r"does not support this compute capability",
        "TensorRT-RTX has no kernels for this GPU; use TensorRT",
    ),
    (
        r"cudaError 35|driver version is insufficient",
        "no NVIDIA driver, or one too old for this library; 'cnngru-edge doctor' says which",
    ),
    (
        r"[Oo]ut of memory|OutOfMemory|insufficient memory|memory pool"
        r"|Requested amount of GPU memory",
        "too little memory; close other programs, or build with a smaller --workspace, --batch or "
        "--max-seconds",
    ),
    (
        r"float scale|shiftIsAllZeros|requires 3 inputs for the INT8",
        "this version does not read the graph; quantize it with --target tensorrt",
    ),
    (
        r"Error Code 1: Myelin|MyelinCheckException",
        "its compiler does not take this graph; try the other TensorRT target",
    ),
)


def is_installed(library: str) -> bool:
    """Whether one of LIBRARIES can be imported here."""
    try:
        load(library)
    except BackendMissing:
        return False
    return True


def load(library: str) -> Any:
    """The module of one of LIBRARIES.

    Raises:
        BackendMissing: it cannot be imported; with its own words, and how to install it.
    """
    try:
        return importlib.import_module(library)
    except (ImportError, OSError) as e:
        reason = " ".join(str(e).split())
        raise BackendMissing(
            f"{LIBRARIES[library]} cannot be imported ({reason}): {_INSTALL[library]}"
        ) from e


def create(trt: Any, kind: str, log: Any) -> Any:
    """A Builder or Runtime of a library.

    Only to be called where there is a CUDA driver: without one, 8.6 crashes on a Runtime.

    Raises:
        SessionError: the library does not start; with its own words.
    """
    try:
        return getattr(trt, kind)(log)
    except TypeError as e:  # what its bindings make of a null pointer
        name = LIBRARIES[trt.__name__]
        raise SessionError(f"{name} {trt.__version__} does not start: {explain(log.lines)}") from e


def explain(lines: list[tuple[str, str]]) -> str:
    """The errors out of a log, in one line, and what to do if they are known."""
    errors = [text for severity, text in lines if "ERROR" in severity]
    said = " ".join(" ".join(dict.fromkeys(errors)).split()) or "it does not say why"
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, said)]
    return f"{said} ({hints[0]})" if hints else said


def logger(trt: Any) -> Any:
    """The process's one logger of a library, which keeps the first that it is given.

    It has the lines since `start()` as (severity, text), and a method `stop_if_asked`: TensorRT
    swallows what a logger raises, a signal's exception too, so that has to be raised afterwards.
    """
    if trt not in _registered:

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[tuple[str, str]] = []
                self.stop: BaseException | None = None

            def start(self) -> None:
                self.stop_if_asked()  # since nobody looked
                self.lines = []

            def log(self, severity: Any, message: str) -> None:
                try:
                    self.lines.append((severity.name, message))
                except BaseException as e:
                    self.stop = e

            def stop_if_asked(self) -> None:
                stop, self.stop = self.stop, None
                if stop is not None:
                    raise stop

        _registered[trt] = Log()
    return _registered[trt]


_registered: dict[Any, Any] = {}  # by module
