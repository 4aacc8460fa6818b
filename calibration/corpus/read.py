"""Labelled recordings, and which of them are for training, calibration and evaluation."""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnngru_edge.models.errors import CorpusError
from cnngru_edge.models.spec.stream import SILENCE, UNKNOWN, known_text, spelled
from cnngru_edge.models.spec.whole import ImageInput, Spec, TokenInput, WholeSpec
from cnngru_edge.runtime.inputs.read import Source

TRAIN, CALIB, EVAL = "train", "calib", "eval"
ALL = "all"
"""Not a set of its own: the three together."""

DEMO = Path(__file__).parents[1] / "demo"
"""The synthesized clips that come with the package."""

DEMO_PHRASES = Path(__file__).parents[1] / "demo_phrases"
DEMO_DIGITS = Path(__file__).parents[1] / "demo_digits"
"""Phrases and images that come with it, made by the command `demo`."""

_SET_NAMES = {
    **dict.fromkeys(["train", "training"], TRAIN),
    **dict.fromkeys(["calib", "calibration", "val", "valid", "validation", "dev"], CALIB),
    **dict.fromkeys(["eval", "evaluation", "test", "testing"], EVAL),
}
_COLUMNS = ("path", "set")  # that a manifest needs
_SAID = ("label", "text")  # one of which it needs too
_OF_PHRASES = ("text", "set", "label")  # that one without files needs
_NOISE_FOLDER = "_background_noise_"
_NOISE_TASK = "noise"
_AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".oga", ".mp3", ".aiff", ".aif", ".au"}


@dataclass(frozen=True)
class Clip:
    """A recording, image or phrase: what is said, by whom, and what it may be used for."""

    path: Path
    label: str
    set: str  # TRAIN, CALIB or EVAL; ALL for noise that may be used for each
    speaker: str  # "" where unknown
    text: str = ""  # all that is said, or that stands in an image; of a phrase, the phrase
    is_phrase: bool = False  # there is no file; the path says where the phrase stands

    @property
    def source(self) -> Source:
        """What a model is given."""
        return self.text if self.is_phrase else self.path


@dataclass(frozen=True)
class Corpus:
    """Clips, and recordings of noise without a word in them."""

    root: Path
    clips: tuple[Clip, ...]
    noises: tuple[Clip, ...] = ()

    def of(self, set_name: str) -> tuple[Clip, ...]:
        """The clips of one set, or of ALL, in a fixed order."""
        return tuple(clip for clip in self.clips if set_name in {clip.set, ALL})

    def noises_of(self, set_name: str) -> tuple[Clip, ...]:
        """The noises of one set, or of ALL, in a fixed order; those of no set of their own too."""
        return tuple(n for n in self.noises if n.set in {set_name, ALL} or set_name == ALL)


def read_corpus(path: Path, task: str | None = None) -> Corpus:
    """A corpus as `find_clips` finds it, each speaker in one set only.

    Raises:
        CorpusError: nothing usable there, or a speaker in two sets.
    """
    corpus = find_clips(path, task)
    if shared := shared_speakers(corpus):
        speaker, names = next(iter(shared.items()))
        raise CorpusError(
            f"{corpus.root}: {len(shared)} speakers are in more than one set, as {speaker!r} in "
            f"{' and '.join(names)}; split by speaker"
        )
    return corpus


def find_clips(path: Path, task: str | None = None) -> Corpus:
    """Find the clips below a folder, or those that a manifest lists.

    A folder with a `manifest.csv` (columns path, set, label or text; also speaker, task, word, if
    it has them) is read by that; a clip's text is in its column text, else word, else label. One
    with the columns text, set and label, and no path, lists phrases.
    Otherwise each folder is a label, as in Speech Commands: `validation_list.txt` and
    `testing_list.txt` name those sets where they exist, else one speaker in ten goes to each;
    `_background_noise_` holds noise. The speaker is what stands before `_nohash_` in a file's name.

    Args:
        path: the folder, or the manifest itself.
        task: takes only these rows of a manifest with a `task` column, and those of task `noise`.

    Raises:
        CorpusError: nothing usable there.
    """
    manifest = path / "manifest.csv" if path.is_dir() else path
    if manifest.is_file():
        corpus = _read_manifest(manifest, task)
    elif path.is_dir():
        corpus = _read_folders(path)
    else:
        raise CorpusError(f"{path}: no such folder or manifest")
    if not corpus.clips:
        raise CorpusError(f"{path}: no recordings found (WAV, FLAC or Ogg, in a folder per label)")
    return corpus


def demo_for(spec: Spec) -> Path:
    """The demo that a model is given where there is no other data."""
    if isinstance(spec, WholeSpec) and isinstance(spec.input, TokenInput):
        return DEMO_PHRASES
    if isinstance(spec, WholeSpec) and isinstance(spec.input, ImageInput):
        return DEMO_DIGITS
    return DEMO


def match_labels(clips: Iterable[Clip], labels: Sequence[str]) -> dict[Path, str]:
    """What a model with these labels should answer for each clip.

    A word that the model does not know is `unknown` to it, if it has that label.

    Raises:
        CorpusError: a label that the model does not have, and no `unknown` either.
    """
    expected = {}
    for clip in clips:
        if clip.label not in labels and UNKNOWN not in labels:
            raise CorpusError(
                f"{clip.path}: label {clip.label!r} is not in the model, which has "
                f"{', '.join(labels)}; rename or remove the folder"
            )
        expected[clip.path] = clip.label if clip.label in labels else UNKNOWN
    return expected


def match_texts(clips: Iterable[Clip], labels: Sequence[str]) -> dict[Path, str]:
    """What a CTC model with these labels should write for each clip.

    Raises:
        CorpusError: a character or word that the model does not have, or a clip of `unknown` words.
    """
    expected = {}
    for clip in clips:
        if clip.text == UNKNOWN == clip.label:
            raise CorpusError(
                f"{clip.path}: label {UNKNOWN!r} does not say what is said; a manifest with a "
                "column text or word does"
            )
        if strange := sorted(set(spelled(labels, clip.text)) - set(labels)):
            raise CorpusError(
                f"{clip.path}: text {clip.text!r} has {strange[0].strip() or ' '!r}, and "
                f"{known_text(labels)}"
            )
        expected[clip.path] = clip.text
    return expected


def _read_manifest(manifest: Path, task: str | None) -> Corpus:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as f:  # Excel begins with a BOM
            reader = csv.DictReader(f)
            named = set(reader.fieldnames or ())
            of_phrases = "path" not in named and "text" in named
            said = [] if named & set(_SAID) else [_SAID[0]]
            missing = sorted({*(_OF_PHRASES if of_phrases else (*_COLUMNS, *said))} - named)
            if missing:
                raise CorpusError(f"{manifest}: no column {', '.join(missing)}")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise CorpusError(f"{manifest}: not a CSV file in UTF-8 ({e})") from e
    tasks = {row["task"] for _, row in rows if row.get("task")} - {_NOISE_TASK}
    if task is None and len(tasks) > 1:
        raise CorpusError(f"{manifest}: several tasks, choose one: {', '.join(sorted(tasks))}")
    if task is not None and task not in tasks:
        raise CorpusError(
            f"{manifest}: no task {task!r}, it has {', '.join(sorted(tasks)) or 'none'}"
        )
    clips: list[Clip] = []
    noises: list[Clip] = []
    for line, row in rows:
        is_noise = row.get("task") == _NOISE_TASK or row.get("label") == _NOISE_FOLDER
        if not is_noise and task is not None and row["task"] != task:
            continue
        needed = _COLUMNS if "text" in row else (*_COLUMNS, "label")  # a text may be empty
        needed = _OF_PHRASES if of_phrases else needed
        if empty := [column for column in needed if not row[column]]:
            raise CorpusError(f"{manifest}: line {line} has no {', '.join(empty)}")
        if row["set"] not in _SET_NAMES:
            raise CorpusError(
                f"{manifest}: line {line} has set {row['set']!r}, expected train, calib or eval"
            )
        text = "" if is_noise else _text(row, f"{manifest}: line {line}")
        clip = Clip(
            manifest.with_name(f"{manifest.name}:{line}")
            if of_phrases
            else manifest.parent / row["path"],
            row.get("label") or ("" if text or is_noise else SILENCE),
            _SET_NAMES[row["set"]],
            _speaker(row.get("speaker")),
            text,
            of_phrases,
        )
        (noises if is_noise else clips).append(clip)
    return Corpus(manifest.parent, tuple(clips), tuple(noises))


def _read_folders(root: Path) -> Corpus:
    listed: dict[str, str] = {}
    for name, set_name in (("validation_list.txt", CALIB), ("testing_list.txt", EVAL)):
        if (root / name).is_file():
            listed |= dict.fromkeys((root / name).read_text(encoding="utf-8").split(), set_name)
    clips: list[Clip] = []
    noises: list[Clip] = []
    for path in audio_files(root):
        inside = path.relative_to(root)
        if len(inside.parts) < 2:
            raise CorpusError(
                f"{path}: lies outside the label folders; move it to {root / 'LABEL' / path.name}"
            )
        label = inside.parts[0]
        speaker = path.stem.split("_nohash_")[0] if "_nohash_" in path.stem else ""
        if label == _NOISE_FOLDER:
            noises.append(Clip(path, label, ALL, ""))
        elif listed:
            of_set = listed.get(inside.as_posix(), TRAIN)
            clips.append(Clip(path, label, of_set, speaker, _text({"label": label}, str(path))))
        else:
            of_set = _drawn_set(speaker or inside.as_posix())
            clips.append(Clip(path, label, of_set, speaker, _text({"label": label}, str(path))))
    return Corpus(root, tuple(clips), tuple(noises))


def calibration_clips(corpus: Corpus, least: int) -> tuple[Clip, ...]:
    """The calibration set; and the training set too, where it has fewer clips than `least`."""
    clips = corpus.of(CALIB)
    return clips if len(clips) >= least else (*clips, *corpus.of(TRAIN))


def calibration_sources(data: Path, task: str | None, least: int) -> list[Source]:
    """What to calibrate with: of a corpus as `calibration_clips`, else all audio in the folder."""
    if _is_loose(data):
        return list(audio_files(data))
    return [clip.source for clip in calibration_clips(read_corpus(data, task), least)]


def find_recordings(data: Path, task: str | None = None) -> Corpus:
    """A corpus as `find_clips`; of a folder without labels, all as calibration clips without."""
    if _is_loose(data):
        return Corpus(data, tuple(Clip(path, "", CALIB, "") for path in audio_files(data)))
    return find_clips(data, task)


def shared_speakers(corpus: Corpus) -> dict[str, list[str]]:
    """The speakers who are in more than one set, and in which."""
    sets = defaultdict(set)
    for clip in corpus.clips:
        if clip.speaker:
            sets[clip.speaker].add(clip.set)
    return {speaker: sorted(sets[speaker]) for speaker in sorted(sets) if len(sets[speaker]) > 1}


def spread(clips: Sequence[Clip], most: int) -> Sequence[Clip]:
    """No more than so many clips, evenly out of all."""
    return clips[:: max(1, -(-len(clips) // most))]


def audio_files(folder: Path) -> list[Path]:
    """Every file below `folder` whose name says that it is audio, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _AUDIO_SUFFIXES and not path.name.startswith(".")
    )


def _drawn_set(speaker: str) -> str:
    # By a hash, as Speech Commands does it: the set stays when other clips come or go.
    share = int(hashlib.sha256(speaker.encode()).hexdigest()[:8], 16) / 0xFFFF_FFFF
    return CALIB if share < 0.1 else EVAL if share < 0.2 else TRAIN


def _text(row: dict[str, str], where: str) -> str:
    """The column text as it stands; else the word, which a label `unknown` hides, or the label."""
    text = row.get("text")
    if text is None:
        label = row["label"]
        return "" if label == SILENCE else (row.get("word") or label).lower()
    if text != " ".join(text.split(" ")).strip() or "  " in text:
        raise CorpusError(f"{where} has a space too many in its text {text!r}")
    return text


def _speaker(named: str | None) -> str:
    return "" if named is None or named.lower() == UNKNOWN else named


def _is_loose(data: Path) -> bool:
    """Recordings without labels: some lie in the folder itself, and no manifest."""
    beside = data.is_dir() and any(path.parent == data for path in audio_files(data))
    return beside and not (data / "manifest.csv").is_file()
