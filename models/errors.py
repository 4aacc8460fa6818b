"""The errors that a user can cause or mend, each with a one-line message.

EdgeError
├── SpecError         a model description or checkpoint does not fit
├── InputError        a phrase or an image cannot be used
│   └── AudioError    a recording cannot be used
├── CorpusError       a folder of recordings or its labels cannot be used
├── CalibrationError  ranges are missing, or belong to something else
├── ExportError       a graph cannot be traced, quantized or written
├── ParityError       two forms of one model disagree
├── SessionError      an artefact cannot be opened or run here
└── BackendMissing    a library that this step needs is not installed, or does not load
"""


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or what it is."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What an error of a library says last, or what it is; ONNX Runtime's reason stands there."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


class EdgeError(Exception):
    """A stated failure: the command line prints the message alone and exits 1."""


class SpecError(EdgeError):
    """A model description or checkpoint does not fit."""


class InputError(EdgeError):
    """A phrase or an image cannot be used."""


class AudioError(InputError):
    """A recording cannot be used."""


class CorpusError(EdgeError):
    """A folder of recordings or its labels cannot be used."""


class CalibrationError(EdgeError):
    """Ranges are missing, or belong to something else."""


class ExportError(EdgeError):
    """A graph cannot be traced, quantized or written."""


class ParityError(EdgeError):
    """Two forms of one model disagree."""


class SessionError(EdgeError):
    """An artefact cannot be opened or run here."""


class BackendMissing(EdgeError):
    """A library that this step needs is not installed, or does not load."""
