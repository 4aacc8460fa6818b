"""Why a library that this package needs does not load, and what to type."""

import traceback
from importlib.metadata import PackageNotFoundError, requires

from cnngru_edge.models.errors import BackendMissing, first_line

CORE = ("click", "numpy", "onnxruntime", "packaging", "rich", "soundfile", "soxr")
EXPORT = ("torch", "onnx", "onnx_ir", "safetensors", "scipy", "jinja2", "jiwer", "PIL")
TRAIN = ("torchaudio",)
_EXTRAS = {**dict.fromkeys(EXPORT, "export"), **dict.fromkeys(TRAIN, "train")}
_DISTRIBUTIONS = {"PIL": "pillow"}  # of modules that are called otherwise
_OTHERWISE = {
    "onnx": "to build engines on a device, pip install onnx onnx-ir",
    "onnx_ir": "to build engines on a device, pip install onnx onnx-ir",
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

    What breaks torchaudio is a torch of another version, so it comes with its own.
    """
    extra = _EXTRAS.get(name)
    if extra and not is_broken:
        return f"pip install 'cnngru-edge[{extra}]'"
    names = ("torch", name) if name in TRAIN else (name,)
    wanted = " ".join(f"'{_requirement(n, extra)}'" for n in names)
    return f"pip install {'--force-reinstall ' if is_broken else ''}{wanted}"


def _requirement(name: str, extra: str | None) -> str:
    """A library with the versions that this package takes, as it was installed."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:  # that may be what is broken
        return name
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
    """The library whose import by a module of ours ended with this error, or "".

    Of libraries that import each other it is the innermost. What a library imports while it runs
    is its own matter.
    """
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and (missing in _EXTRAS or missing in CORE):
        return missing
    found, importing = "", False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package == "cnngru_edge":
            found, importing = "", True
        elif frame.f_code.co_name == "<module>" and importing:
            found = package if package in _EXTRAS or package in CORE else found
        elif not found and package != "importlib":
            importing = False
    return found


def _reason(error: BaseException) -> str:
    """What an import says of itself, in a line: the first cause of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
