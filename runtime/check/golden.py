"""A few clips and what the float model says to them, beside the artefacts: a device tests itself.

A clip here may be a phrase or an image too. `golden.npz` holds, of N clips: `given` (all of them in
a row: samples int16, token ids int32 or pixels uint8) and `lengths` (N,), `names` (N,), `labels`
(N,) or texts that the float model gives, `logits` float32 (all frames in a row, C) and `frames`
(N,); and `format`, `spec` (JSON), `sha256` (of the float graph), `sqnr_db` (the lowest of the INT8
forms over all clips, when they were exported).
"""

import io
import json
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.atomic import file_sha256, write_file
from cnngru_edge.models.errors import CorpusError, InputError, SessionError, first_line
from cnngru_edge.models.spec.whole import (
    ImageInput,
    Spec,
    TokenInput,
    WholeSpec,
    fixed_length_of,
    read_spec,
    sample_rate_of,
)
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.agreement import power, sqnr_db
from cnngru_edge.runtime.decode.answer import clip_answer, clip_lead
from cnngru_edge.runtime.inputs.read import Source, check_tokens, read_input
from cnngru_edge.runtime.session import CLIP_SAMPLES_KEY, SOURCE_KEY, Array, Session
from cnngru_edge.runtime.stream import clip_logits

GOLDEN = "golden.npz"

_FORMAT = 2
_CLIPS = 16
_CANDIDATES = 96  # that the float model hears to find them
_LONGEST_S = 3.0  # of a recording: what is behind it is left out
_CLEAR = 0.5  # by which the best probability leads: no rounding changes the label
_ROUNDING_DB = 3.0
"""What another builder's rounding may cost. An engine rounds at other places than the graph that it
was built from, with errors of the same size and independent: twice the noise at most."""
_LARGEST = 1 << 26  # bytes of the arrays, unpacked: a hundred times what is written
_ARRAYS: dict[str, tuple[type, int]] = {  # type and dimensions
    "format": (np.integer, 0),
    "spec": (np.str_, 0),
    "sha256": (np.str_, 0),
    "sqnr_db": (np.float64, 0),
    "given": (np.integer, 1),
    "lengths": (np.int64, 1),
    "names": (np.str_, 1),
    "labels": (np.str_, 1),
    "logits": (np.float32, 2),
    "frames": (np.int64, 1),
}


@dataclass(frozen=True)
class GoldenClip:
    """A clip, and the float model's answer."""

    name: str
    given: npt.NDArray[Any]  # samples (S,) int16, token ids (L,) int32, or an image (H * W,) uint8
    label: str
    logits: Array  # (T, C), as `clip_logits` gives them


@dataclass(frozen=True)
class Golden:
    """The clips, of which model they are, and how near to it INT8 was."""

    spec: Spec
    sha256: str  # of the float graph
    sqnr_db: float  # the lowest of the INT8 forms
    clips: tuple[GoldenClip, ...]


@dataclass(frozen=True)
class Failure:
    """A clip that was answered otherwise."""

    clip: str
    expected: str
    found: str


@dataclass(frozen=True)
class SelfTest:
    """How an artefact answered the golden clips."""

    engine: str
    backend: str
    device: str
    precision: str
    clips: int
    failures: tuple[Failure, ...]
    sqnr_db: float  # over all logits; infinite if they are the float model's own
    min_sqnr_db: float

    @property
    def passed(self) -> bool:
        """Every answer as expected, and no more noise than another rounding makes."""
        return not self.failures and self.sqnr_db >= self.min_sqnr_db

    def to_json(self) -> str:
        """One line of JSON; an infinite SQNR is null."""
        sqnr = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return json.dumps(asdict(self) | {"sqnr_db": sqnr, "passed": self.passed})

    @property
    def lines(self) -> Iterator[str]:
        """For people: each failure, then all in one."""
        for failure in self.failures:
            yield f"{failure.clip}: expected {failure.expected}, got {failure.found}"
        yield (
            f"{self.engine}: {'passed' if self.passed else 'failed'}: "
            f"{self.clips - len(self.failures)} of {self.clips} answers as the float model's, SQNR "
            f"{self.sqnr_db:.1f} dB, expected {self.min_sqnr_db:.1f} dB or more; {self.backend}, "
            f"{self.device}, {self.precision}"
        )


def selftest(engine: Path, golden: Path) -> SelfTest:
    """Let an artefact answer the golden clips.

    Raises:
        SessionError: either cannot be read, they are of different models, or it answers NaN.
    """
    failures = []
    signal = noise = 0.0
    with open_session(engine) as session:
        expected = read_golden(golden)
        source = session.metadata.get(SOURCE_KEY, expected.sha256)
        if (session.spec, source) != (expected.spec, expected.sha256):
            raise SessionError(f"{golden}: of another model than {engine}; give its own --golden")
        for clip in expected.clips:
            logits = clip_logits(session, _unpacked(session.spec, clip.given))
            if not np.isfinite(logits).all():
                raise SessionError(
                    f"{engine}: answers NaN to {clip.name}; it is damaged, export or build it again"
                )
            signal += power(clip.logits)
            noise += power(clip.logits - logits)
            label = clip_answer(session.spec, logits)
            if label != clip.label:
                failures.append(Failure(clip.name, clip.label, label))
        return SelfTest(
            str(engine),
            session.backend,
            session.device,
            session.precision,
            len(expected.clips),
            tuple(failures),
            sqnr_db(signal, noise),
            expected.sqnr_db - _ROUNDING_DB,
        )


def write_golden(
    path: Path, reference: Path, candidates: Sequence[Path], clips: Sequence[Source]
) -> int:
    """Choose clips that a float graph and all its INT8 forms answer alike; how many there are.

    They are spread over the labels, and those come first that the float model is sure of. The same
    files in give the same file out.

    Raises:
        CorpusError: there is none.
    """
    with ExitStack() as held:
        session = held.enter_context(open_session(reference))
        forms = [held.enter_context(open_session(form)) for form in candidates]
        chosen, answers = [], []
        spec = session.spec
        for lead, clip in _in_turn(session, clips, _lengths(spec, forms)):
            found = [clip_logits(form, _unpacked(spec, clip.given)) for form in forms]
            is_same = (clip_answer(spec, logits) == clip.label for logits in found)
            if all(is_same) and all(clip_lead(spec, logits) >= lead / 2 for logits in found):
                chosen.append(clip)
                answers.append(found)
            if len(chosen) == _CLIPS:
                break
        if not chosen:
            raise CorpusError(
                f"{path}: no clip that {reference.name} and its INT8 forms hear alike"
            )
        signal = sum(power(clip.logits) for clip in chosen)
        noises = [
            sum(power(clip.logits - logits) for clip, logits in zip(chosen, form, strict=True))
            for form in zip(*answers, strict=True)
        ]
        sqnr = min(sqnr_db(signal, noise) for noise in noises)
        golden = Golden(spec, file_sha256(reference), sqnr, tuple(chosen))
    _write(path, golden)
    return len(chosen)


def read_golden(path: Path) -> Golden:
    """Read what `write_golden` wrote.

    Raises:
        SessionError: no such file, or damaged.
    """
    if not path.is_file():
        raise SessionError(
            f"{path}: no such file; 'cnngru-edge export' writes one beside the artefacts, copy it "
            "to where the engine is, or give it as --golden"
        )
    data = path.read_bytes()
    try:
        return _golden(_arrays(data))
    except Exception as e:  # what zipfile and numpy raise for damaged files has no common base
        raise SessionError(
            f"{path}: not a golden set, or damaged ({first_line(e).rstrip('.')}); copy it again"
        ) from e


def _packed(spec: Spec, given: Array) -> npt.NDArray[Any]:
    """What `read_input` gives, in a row of small integers."""
    packed: npt.NDArray[Any]
    if rate := sample_rate_of(spec):
        fixed = fixed_length_of(spec.input) if isinstance(spec, WholeSpec) else None
        samples = given[: fixed or round(_LONGEST_S * rate)]
        packed = np.clip(np.rint(samples * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    elif np.issubdtype(given.dtype, np.integer):
        packed = given.astype(np.int32)
    else:
        packed = np.rint(given * 255).astype(np.uint8).ravel()
    return packed


def _unpacked(spec: Spec, packed: npt.NDArray[Any]) -> Array:
    """What it was packed from, but for what was rounded."""
    if not isinstance(spec, WholeSpec) or sample_rate_of(spec):
        return packed.astype(np.float32) / np.float32(2**15)
    if isinstance(spec.input, TokenInput):
        return check_tokens(packed.tolist(), spec.input)
    assert isinstance(spec.input, ImageInput)
    return packed.reshape(1, spec.input.height, -1).astype(np.float32) / np.float32(255)


def _lengths(spec: Spec, forms: Sequence[Session]) -> tuple[float, float]:
    """Of a model that takes its input whole, how long one is that all its engines take."""
    seen = [form.metadata[CLIP_SAMPLES_KEY] for form in forms if CLIP_SAMPLES_KEY in form.metadata]
    if not isinstance(spec, WholeSpec) or not seen:
        return 0, math.inf
    shortest, _, longest = map(int, seen[0].split(","))
    return shortest, longest


def _in_turn(
    session: Session, sources: Sequence[Source], lengths: tuple[float, float]
) -> Iterator[tuple[float, GoldenClip]]:
    """Clips that can be read and by how much they lead, label after label, the sure ones first."""
    spec = session.spec
    by_label: dict[str, list[tuple[float, GoldenClip]]] = defaultdict(list)
    for source in sources[:: -(-len(sources) // _CANDIDATES) or 1]:
        try:
            given = _packed(spec, read_input(spec, source))
        except InputError:
            continue  # whoever hears all of them names it
        rounded = _unpacked(spec, given)
        fits = lengths[0] <= rounded.shape[-1] <= lengths[1]
        if not fits or given.nbytes > _LARGEST // (2 * _CLIPS):
            continue
        logits = clip_logits(session, rounded)
        label, lead = clip_answer(spec, logits), clip_lead(spec, logits)
        clip = GoldenClip(_name(source), given, label, logits)
        by_label[label].append((min(lead, _CLEAR), clip))
    ranked = [sorted(by_label[k], key=lambda x: -x[0]) for k in sorted(by_label)]
    ranked.sort(key=lambda found: -found[0][0])  # of texts there are as many as clips
    for found in chain.from_iterable(zip_longest(*ranked)):
        if found is not None:
            yield found


def _name(source: Source) -> str:
    return f"{source.parent.name}/{source.name}" if isinstance(source, Path) else str(source)


def _write(path: Path, golden: Golden) -> None:
    clips = golden.clips
    data = io.BytesIO()
    np.savez_compressed(
        data,
        format=np.array(_FORMAT),
        spec=np.array(golden.spec.to_json()),
        sha256=np.array(golden.sha256),
        sqnr_db=np.array(golden.sqnr_db),
        given=np.concatenate([clip.given for clip in clips]),
        lengths=np.array([len(clip.given) for clip in clips], np.int64),
        names=np.array([clip.name for clip in clips]),
        labels=np.array([clip.label for clip in clips]),
        logits=np.concatenate([clip.logits for clip in clips]),
        frames=np.array([len(clip.logits) for clip in clips], np.int64),
    )
    write_file(path, data.getvalue())


def _arrays(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays in a file, no larger than those that were written can be."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > _LARGEST:
        raise ValueError(f"{size:,} bytes of arrays")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        if (found := file["format"].item()) != _FORMAT:  # other formats have other arrays
            raise ValueError(f"format {found}, expected {_FORMAT}")
        arrays = {name: file[name] for name in _ARRAYS}
    for name, (kind, dimensions) in _ARRAYS.items():
        array = arrays[name]
        if array.ndim != dimensions or not np.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} is of type {array.dtype} and shape {array.shape}")
    return arrays


def _golden(arrays: dict[str, npt.NDArray[Any]]) -> Golden:
    spec = read_spec(str(arrays["spec"]))
    names, labels = arrays["names"].tolist(), arrays["labels"].tolist()
    given, logits = (_split(arrays, *pair) for pair in (("given", "lengths"), ("logits", "frames")))
    if not len(given) == len(logits) == len(names) == len(labels) > 0:
        counts = f"{len(given)} lengths, {len(logits)} frames"
        raise ValueError(f"{counts}, {len(names)} names, {len(labels)} labels")
    if (classes := arrays["logits"].shape[1]) != len(spec.labels):
        raise ValueError(f"logits of {classes} labels, expected {len(spec.labels)}")
    for name, packed, label, answer in zip(names, given, labels, logits, strict=True):
        _unpacked(spec, packed)
        if clip_answer(spec, answer) != label:
            raise ValueError(f"{name} is labelled {label}, against its logits")
    clips = map(GoldenClip, names, given, labels, logits)
    return Golden(spec, str(arrays["sha256"]), float(arrays["sqnr_db"]), tuple(clips))


def _split(arrays: dict[str, npt.NDArray[Any]], name: str, sizes: str) -> list[npt.NDArray[Any]]:
    """An array cut into those of the clips."""
    found = arrays[sizes]
    if (found < 1).any() or found.sum() != len(arrays[name]):
        raise ValueError(f"{name}: {found.sum()} expected, {len(arrays[name])} found")
    return np.split(arrays[name], np.cumsum(found)[:-1])
