"""An engine and the manifest beside it: read and checked before any library sees the engine.

Deserializing an engine runs what is in it, as native code does ("Serialized TensorRT engines are
executable artifacts", TensorRT documentation, Security). So an engine is opened only if it is the
one that its manifest was written for; what a manifest is worth depends on where it came from.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from cnngru_edge.models.errors import SessionError, SpecError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, read_spec
from cnngru_edge.runtime.session import PRECISION_KEY, TensorInfo, input_names

ENGINE_SUFFIX = ".engine"
MANIFEST_SUFFIX = ".json"

LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Modules that build and run engines, and what they are called."""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""GPUs that TensorRT-RTX 1.7 has kernels for: none of a Jetson (8.7, 11.0), nor Hopper (9.0)."""

_HEADER = struct.Struct("<4sIqq4B")  # magic, serialization version, entries, size, library version
_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}


@dataclass(frozen=True)
class Builder:
    """What built an engine, and where."""

    library: str  # one of LIBRARIES
    version: str
    typing: str  # strong: types as in the graph; weak: as the builder likes within the flags
    flags: tuple[str, ...]
    capabilities: tuple[str, ...]  # of the GPUs it is for, as 8.7
    gpu: str | None  # the one it was built on; None if that needed none
    driver: str | None  # the newest CUDA that the driver ran
    options: dict[str, Any]  # as they were given to the build
    build_s: float

    @property
    def name(self) -> str:
        """Library and version, as people write them."""
        return f"{LIBRARIES[self.library]} {self.version}"


@dataclass(frozen=True)
class Manifest:
    """What is known of an engine without opening it."""

    sha256: str
    source: str  # name of the graph that it was built from
    source_sha256: str
    builder: Builder
    max_batch: int
    max_samples: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: dict[str, str]  # of the graph
    spec: Spec
    coverage: Coverage

    def to_json(self) -> str:
        """For the file beside the engine."""
        nested = {"coverage": self.coverage.to_json(), "spec": json.loads(self.spec.to_json())}
        return json.dumps(asdict(self) | nested, indent=1)

    def command(self, engine: Path) -> str:
        """What builds it again, with the options of this build that say what it takes."""
        options = self.builder.options
        parts = [f"cnngru-edge build {self.source} --out {engine}"]
        if self.builder.library == "tensorrt_rtx":
            parts.append("--target tensorrt-rtx")
        if self.max_batch > 1:
            parts.append(f"--batch {self.max_batch}")
        if options.get("max_seconds"):
            parts.append(f"--max-seconds {options['max_seconds']}")
        if options.get("fp16") is False:
            parts.append("--no-fp16")
        return " ".join(parts)

    @property
    def summary(self) -> str:
        """How much of it is in INT8, by what, for what."""
        hidden = self.coverage.weights_hidden
        more = f" ({hidden:.1%} are in blocks that it does not show)" if hidden else ""
        return (
            f"{self.coverage.weights_int8:.1%} of the weights in INT8{more}, {self.builder.name}"
            f", {self.builder.typing} typing, for compute capability "
            f"{', '.join(self.builder.capabilities)}"
        )

    @property
    def precision(self) -> str:
        """In which its weights compute, by the receipt."""
        found = sorted({layer.precision for layer in self.coverage.layers})
        return "+".join(found) or self.metadata.get(PRECISION_KEY, "unknown")


@dataclass(frozen=True)
class Header:
    """The first bytes of an engine, as trtexec --getPlanVersionOnly reads them."""

    library: str
    size: int
    version: str


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine is."""
    return engine.with_name(engine.name + MANIFEST_SUFFIX)


def read_engine(engine: Path) -> tuple[bytes, Manifest]:
    """The bytes of an engine, which are those that its manifest was written for.

    Raises:
        SessionError: no such file, no manifest, of another engine, or not an engine at all.
    """
    if not engine.is_file():
        raise SessionError(f"{engine}: no such file")
    data = engine.read_bytes()
    manifest = read_manifest(engine)
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        header = read_header(data, engine)  # says more, where it can
        raise SessionError(
            f"{engine}: not the engine that {engine.name}{MANIFEST_SUFFIX} was written for (sha256 "
            f"differs; {len(data)} bytes, by {LIBRARIES[header.library]} {header.version}); copy "
            "both files again, or build the engine again"
        )
    header = read_header(data, engine)
    if header.library != manifest.builder.library:
        raise SessionError(
            f"{engine}: an engine of {LIBRARIES[header.library]}, and its manifest says "
            f"{manifest.builder.name}"
        )
    return data, manifest


def read_manifest(engine: Path) -> Manifest:
    """The manifest of an engine, which may still be another's.

    Raises:
        SessionError: there is none, or it is not one.
    """
    path = manifest_path(engine)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        if not engine.is_file():
            raise SessionError(f"{engine}: no such file") from e
        raise SessionError(
            f"{path}: no such file; an engine is opened only with the manifest that 'cnngru-edge "
            "build' wrote beside it"
        ) from e
    except UnicodeDecodeError as e:
        raise SessionError(f"{path}: not the manifest of an engine") from e
    try:
        return _manifest(json.loads(text))
    except (AttributeError, KeyError, RecursionError, SpecError, TypeError, ValueError) as e:
        raise SessionError(f"{path}: not the manifest of an engine; build it again") from e


def read_header(data: bytes, engine: Path) -> Header:
    """The header of an engine; it says what the file claims to be, not that it is whole.

    The layout is trtexec's (printPlanVersion in NVIDIA/TensorRT samples/common/sampleEngines.cpp).

    Raises:
        SessionError: not an engine, or cut short.
    """
    if not data:
        raise SessionError(f"{engine}: empty; copy or build it again")
    library = _MAGIC.get(data[:4])
    if library is None:
        kind = " (an ONNX file?)" if data[:1] == b"\x08" else ""  # where protobuf has IR version
        raise SessionError(f"{engine}: not a TensorRT engine{kind}; it begins with {data[:4]!r}")
    if len(data) < _HEADER.size:
        raise SessionError(f"{engine}: cut short at {len(data)} bytes; copy or build it again")
    _, _, _, size, *version = _HEADER.unpack_from(data)
    if len(data) < size:
        raise SessionError(
            f"{engine}: cut short, {len(data)} of {size} bytes; copy or build it again"
        )
    return Header(library, size, ".".join(map(str, version)))


def _manifest(raw: dict[str, Any]) -> Manifest:
    derived = raw["coverage"]
    plain = {"coverage": {key: derived[key] for key in ("source", "layers")}}
    manifest: Manifest = _typed(Manifest, raw | plain)
    if manifest.builder.library not in LIBRARIES:
        raise ValueError(f"library {manifest.builder.library}")
    spec = manifest.spec
    states = spec.state if isinstance(spec, ModelSpec) else ()
    outputs = ["logits", *(state.next_name for state in states)]
    for tensors, names in ((manifest.inputs, input_names(spec)), (manifest.outputs, outputs)):
        if [tensor.name for tensor in tensors] != names or len(tensors[0].shape) < 2:
            raise ValueError(f"{names[0]} and states")
    least = spec.chunk_length if isinstance(spec, ModelSpec) else 1
    if manifest.max_batch < 1 or manifest.max_samples < least:
        raise ValueError("sizes")
    return manifest


def _typed(kind: Any, raw: Any) -> Any:
    """What JSON gave, as the type that a field is declared with, or a ValueError."""
    if kind == Spec:
        return read_spec(json.dumps(raw))
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        if raw.keys() != kinds.keys():
            raise ValueError(f"fields of {kind}")
        fields = {name: _typed(kinds[name], value) for name, value in raw.items()}
        return kind(**fields)  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(raw, list):
        return tuple(_typed(arguments[0], item) for item in raw)
    if origin is dict:
        return {_typed(str, key): _typed(arguments[1], value) for key, value in raw.items()}
    if origin is UnionType:
        kind = next((one for one in arguments if type(raw) is one), str)
    if kind is float and type(raw) is int:
        kind = int
    if kind is not Any and type(raw) is not kind:
        raise ValueError(f"{raw!r} is no {kind}")
    if isinstance(raw, str) and not raw.isprintable():
        raise ValueError("control characters")
    return raw
