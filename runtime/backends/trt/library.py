"""TensorRT and TensorRT-RTX as they are installed: imported, listened to, and their errors told.

What a version can do is found by name on its module, never from its version or a flag's number:
`hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")`. The numbers change between majors.
"""

import importlib
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

from cnngru_edge.models.errors import BackendMissing, SessionError
from cnngru_edge.runtime.backends.trt.engine_file import LIBRARIES

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
        r"[Oo]ut of memory|OutOfMemory|insufficient (memory|workspace)|memory pool"
        r"|Could not find any implementation"
        r"|Requested amount of GPU memory",
        "perhaps too little memory; close other programs, or build with a smaller --workspace, "
        "--batch or --max-seconds",
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


@contextmanager
def stops_held_back() -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM wait until the block is done; gives whether one waits.

    TensorRT swallows an exception that comes up in a logger or a progress monitor, and a signal's
    comes up wherever Python runs: there, for as long as a build takes.
    """
    waiting: list[int] = []
    if current_thread() is not main_thread():  # signals come up in the main one only
        yield lambda: False
        return
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, lambda number, _: waiting.append(number)) for stop in stops}
    try:
        yield lambda: bool(waiting)
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def logger(trt: Any) -> Any:
    """The process's one logger of a library, which keeps the first that it is given.

    It has the lines since `start()` as (severity, text): all of TensorRT-RTX, whose receipt is read
    from them, and of TensorRT the warnings and errors, since the rest can be very much.
    """
    if trt not in _registered:
        ignored = set() if trt.__name__ == "tensorrt_rtx" else {"INFO", "VERBOSE"}

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.start()

            def start(self) -> None:
                self.lines: list[tuple[str, str]] = []

            def log(self, severity: Any, message: str) -> None:
                if severity.name not in ignored:
                    self.lines.append((severity.name, message))

        _registered[trt] = Log()
    return _registered[trt]


_registered: dict[Any, Any] = {}  # by module
