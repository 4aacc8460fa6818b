"""What one artefact answers to labelled recordings, and the file that carries it elsewhere."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from cnngru_edge.calibration.corpus.read import Clip, match_labels, match_texts
from cnngru_edge.calibration.ranges.workers import in_order
from cnngru_edge.export.training.streams import excerpt, snr_gain
from cnngru_edge.models.atomic import file_sha256, write_file
from cnngru_edge.models.errors import CorpusError, InputError, SessionError
from cnngru_edge.models.spec.stream import spelled
from cnngru_edge.models.spec.whole import Spec, sample_rate_of
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.answer import clip_transcript
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import Samples, read_audio
from cnngru_edge.runtime.inputs.read import read_input, source_sha256
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import clip_logits

RESULTS_SUFFIX = ".json"
CLEAN = "clean"

_FORMAT = 1
_GROUP = 8  # clips that a worker takes at a time
_NOISE_S = 300  # of a noise


@dataclass(frozen=True)
class Conditions:
    """How each clip is heard: as it is, and mixed with noise.

    Which noise, and which part of it, follows from the clip's own bytes and the seed: it is the
    same in whatever order, folder or process the clip comes, and the same at each SNR.
    """

    noises: tuple[Path, ...] = ()
    snrs_db: tuple[float, ...] = ()  # over the whole length of a clip
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """`clean`, `20 dB`, ..."""
        return (CLEAN, *(f"{snr:g} dB" for snr in self.snrs_db))

    @property
    def sha256(self) -> str:
        """Of the noises and the seed: two models have to have heard the same."""
        parts = [file_sha256(path) for path in self.noises]
        return hashlib.sha256("".join([*parts, str(self.seed)]).encode()).hexdigest()

    def heard(self, samples: Samples, sha256: str, sample_rate: int) -> Iterator[Samples]:
        """A clip in each condition, in the order of `names`."""
        yield samples
        if self.snrs_db:
            rng = np.random.default_rng([self.seed, int(sha256[:16], 16)])
            noise = _noise(self.noises[int(rng.integers(len(self.noises)))], sample_rate)
            noise = excerpt(noise, len(samples), rng)
            for snr_db in self.snrs_db:
                yield samples + noise * snr_gain(samples, noise, snr_db)


@dataclass(frozen=True)
class Artefact:
    """Which file answered, and how it ran."""

    path: str
    sha256: str
    precision: str
    backend: str
    device: str


@dataclass(frozen=True)
class Answer:
    """A label, and by how much its probability exceeds that of the next one.

    Of a CTC model the text of the best path, and its score.
    """

    label: str
    margin: float


@dataclass(frozen=True)
class Answered:
    """A clip, and the answer in each condition."""

    path: str  # from the corpus's folder; of a phrase where it stands, and the phrase
    sha256: str  # of the file
    true: str  # label or text
    speaker: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Results:
    """All answers of one artefact."""

    artefact: Artefact
    labels: tuple[str, ...]
    sample_rate: int | None  # of the model, in Hz; None of one that takes no audio
    conditions: tuple[str, ...]
    conditions_sha256: str
    clips: tuple[Answered, ...]
    writes_text: bool = False  # the answers are texts, not labels

    def save(self, path: Path) -> None:
        """Write as JSON."""
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=1)
        write_file(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            SessionError: no such file, or not a results file.
        """
        if not path.is_file():
            raise SessionError(
                f"{path}: no such file; 'cnngru-edge compare --save-results' writes it"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != _FORMAT:
                raise SessionError(f"{path}: another version's format; run the comparison again")
            results = cls(
                artefact=Artefact(**raw.pop("artefact")),
                labels=tuple(raw.pop("labels")),
                conditions=tuple(raw.pop("conditions")),
                clips=tuple(
                    Answered(**clip | {"answers": tuple(Answer(**a) for a in clip["answers"])})
                    for clip in raw.pop("clips")
                ),
                **raw,
            )
            paths = {clip.path for clip in results.clips}
            if len(paths) < len(results.clips) or not all(
                _is_whole(clip, results) for clip in results.clips
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SessionError(f"{path}: not a results file of 'cnngru-edge compare'") from e
        return results


def answer_clips(
    artefact: Path,
    root: Path,
    clips: Sequence[Clip],
    conditions: Conditions,
    *,
    workers: int = 1,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[Results, list[InputError]]:
    """Let an artefact answer every clip; its results, and the recordings left out.

    The results do not depend on the number of workers, each of which opens the artefact.

    Raises:
        SessionError: the artefact cannot be opened, or answers NaN.
        CorpusError: no clip can be used, or one has a label that the model does not know.
    """
    with open_session(artefact) as session:
        spec = session.spec
        described = Artefact(
            artefact.name,
            file_sha256(artefact),
            session.precision,
            session.backend,
            session.device,
        )
    if conditions.snrs_db and sample_rate_of(spec) is None:
        raise SessionError(
            f"{artefact}: this model takes no recordings, so there is no noise in it"
        )
    truth = truth_of(clips, spec)
    found: list[Answered] = []
    errors: list[InputError] = []
    labelled = [(clip, truth[clip.path]) for clip in clips]
    groups = [labelled[i : i + _GROUP] for i in range(0, len(clips), _GROUP)]
    work = partial(_answer_group, root=root, conditions=conditions)
    for part in in_order(work, artefact, groups, workers):
        for one in part:
            if isinstance(one, InputError):
                errors.append(one)
            else:
                found.append(one)
        progress(len(part))
    if not found:
        raise CorpusError("no recordings to compare on: none of the set can be read")
    return Results(
        described,
        spec.labels,
        sample_rate_of(spec),
        conditions.names,
        conditions.sha256,
        tuple(found),
        spec.writes_text,
    ), errors


def truth_of(clips: Iterable[Clip], spec: Spec) -> dict[Path, str]:
    """What a model should answer to each clip: a label, or a text.

    Raises:
        CorpusError: a label or a character that the model does not have.
    """
    match = match_texts if spec.writes_text else match_labels
    return match(clips, spec.labels)


def check_conditions(
    name: str, heard: tuple[str, ...], sha256: str, conditions: Conditions
) -> None:
    """Refuse answers to clips that were heard otherwise than so.

    Raises:
        SessionError: other conditions, other noises or another seed.
    """
    if (heard, sha256) != (conditions.names, conditions.sha256):
        raise SessionError(
            f"{name}: answers to clips heard {', '.join(heard)}, not {', '.join(conditions.names)} "
            "with these noises and this seed; give the same --noise, --snr and --seed"
        )


def answer(session: Session, given: Array) -> Answer:
    """What a model answers to a clip.

    Raises:
        SessionError: it answers NaN.
    """
    logits = clip_logits(session, given)
    if not np.isfinite(logits).all():
        raise SessionError("a model answers NaN; its file is damaged, export it again")
    if session.spec.writes_text:
        transcript = clip_transcript(session.spec, logits)
        return Answer(transcript.text, round(transcript.score, 6))
    scores = clip_scores(session.spec, logits)
    second, best = np.sort(scores)[-2:]
    return Answer(session.spec.labels[int(scores.argmax())], round(float(best - second), 6))


def _is_whole(clip: Answered, results: Results) -> bool:
    """Whether a file says all of a clip that it should, in the labels of its model."""
    said = [clip.true, *(answer.label for answer in clip.answers)]
    if results.writes_text:
        said = [label for text in said for label in spelled(results.labels, text)]
    return (
        len(clip.answers) == len(results.conditions)
        and set(said) <= set(results.labels)
        and all(isinstance(answer.margin, float | int) for answer in clip.answers)
    )


def _answer_group(
    session: Session,
    clips: Sequence[tuple[Clip, str]],
    *,
    root: Path,
    conditions: Conditions,
) -> list[Answered | InputError]:
    rate = sample_rate_of(session.spec)
    found: list[Answered | InputError] = []
    for clip, true in clips:
        try:
            given = read_input(session.spec, clip.source)
        except InputError as e:
            found.append(e)
            continue
        sha256 = source_sha256(clip.source)
        heard = conditions.heard(given, sha256, rate) if rate else [given]
        answers = tuple(answer(session, one) for one in heard)
        path = clip.path.relative_to(root) if clip.path.is_relative_to(root) else clip.path
        name = f"{path.as_posix()}: {clip.text}" if clip.is_phrase else path.as_posix()
        found.append(Answered(name, sha256, true, clip.speaker, answers))
    return found


@lru_cache(maxsize=32)
def _noise(path: Path, sample_rate: int) -> Samples:
    # Kept in memory: of a long one the beginning is enough.
    return read_audio(path, sample_rate).samples[: _NOISE_S * sample_rate].copy()
