"""Why a library that this package needs does not load, and what to type."""

import traceback
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cnngru_edge.models.errors import BackendMissing, first_line

CORE = ("numpy", "onnxruntime", "soundfile", "soxr")
EXPORT = ("torch", "onnx", "onnx_ir", "safetensors", "scipy", "jinja2", "jiwer", "PIL")
TRAIN = ("torchaudio",)
_EXTRAS = {**dict.fromkeys(EXPORT, "export"), **dict.fromkeys(TRAIN, "train")}
_DISTRIBUTIONS = {"PIL": "pillow"}  # of modules that are called otherwise
_OTHERWISE = {
    "onnx": "to build engines on a device, onnx onnx-ir",
    "onnx_ir": "to build engines on a device, onnx onnx-ir",
    "soundfile": "where its system library is missing, sudo apt install libsndfile1",
}


def import_fault(error: BaseException) -> BackendMissing | None:
    """What to show in place of an error that an import ended with.

    A library that is broken raises what it likes while it loads: ImportError where it was built for
    another Python, OSError where a system library is missing, AttributeError where numpy is of
    another version.

    Returns:
        What does not load, why, and what to type. None where it was no import of a library that
        this package needs.
    """
    name = _imported(error)
    if name not in _EXTRAS and name not in CORE:
        return None
    is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
    why = "is not installed" if is_missing else f"does not load ({_reason(error)})"
    steps = [remedy(name, is_broken=not is_missing)]
    if name in _OTHERWISE and is_missing == (name != "soundfile"):
        steps.append(_OTHERWISE[name])
    return BackendMissing(f"{name} {why}: {', or, '.join(steps)}")


def remedy(name: str, *, is_broken: bool = False) -> str:
    """The command that installs a library of this package, anew if it is broken.

    What breaks torchaudio is a torch of another version, and the extra pins the two.
    """
    extra = _EXTRAS.get(name)
    if extra and (name in TRAIN or not is_broken):
        return f"pip install 'cnngru-edge[{extra}]'"
    anew = "--force-reinstall " if is_broken else ""
    return f"pip install {anew}'{_requirement(name, extra)}'"


def _requirement(name: str, extra: str | None) -> str:
    """A library with the versions that this package takes, as it was installed."""
    wanted = canonicalize_name(_DISTRIBUTIONS.get(name, name))
    try:
        stated = [Requirement(text) for text in requires("cnngru-edge") or ()]
    except PackageNotFoundError:
        stated = []
    for r in stated:
        asked = r.marker is None or (extra and r.marker.evaluate({"extra": extra}))
        if canonicalize_name(r.name) == wanted and asked:
            return f"{r.name}{r.specifier}"
    return wanted


def _imported(error: BaseException) -> str:
    """The library whose import ended with this error, or ""."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if frame.f_code.co_name == "<module>" and (package in _EXTRAS or package in CORE):
            return package
    name = error.name if isinstance(error, ImportError) else None
    return (name or "").split(".")[0]


def _reason(error: BaseException) -> str:
    """What an import says of itself, in a line: the first cause of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
