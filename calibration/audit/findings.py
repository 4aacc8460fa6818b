"""What can be wrong with a set of recordings: one function for each kind of finding."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

from cnngru_edge.calibration.audit.soundness import (
    CLIPPED,
    NARROW_DB,
    OFFSET_DB,
    QUIET_DBFS,
    SHORT_S,
    STEADY_DB,
    Sound,
)
from cnngru_edge.calibration.corpus.read import CALIB, EVAL, Clip, Corpus, shared_speakers
from cnngru_edge.models.errors import AudioError
from cnngru_edge.models.spec.stream import SILENCE, UNKNOWN

Severity = Literal["error", "warning", "note"]

_LONG = 10  # times the median: a recording that nobody has cut
_UNBALANCED = 10  # times as many clips of one word as of another


@dataclass(frozen=True)
class Finding:
    """What a check found, and the clips that it is about, by their path inside the corpus."""

    check: str
    severity: Severity
    text: str
    advice: str = ""
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heard:
    """A clip and its sound."""

    clip: Clip
    name: str
    sound: Sound

    @property
    def calibrates(self) -> bool:
        """Not for evaluation."""
        return self.clip.set != EVAL

    @property
    def should_speak(self) -> bool:
        """Not labelled as silence."""
        return self.clip.label != SILENCE

    @property
    def said(self) -> str:
        """Its label, or its text if it has none."""
        return self.clip.label or self.clip.text


def name_in(corpus: Corpus, path: Path) -> str:
    """A clip's path inside the corpus."""
    root = corpus.root
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def of_all(corpus: Corpus, heard: Sequence[Heard], sample_rate: int) -> Iterator[Finding]:
    """What there is to say of clips that were heard; `sample_rate` is the model's, in Hz."""
    yield from _speechless(heard)
    yield from _faults(heard)
    yield from _rates(heard, sample_rate)
    yield from _durations(heard)
    yield from _levels(heard)
    yield from _duplicates(heard)
    if not any(clip.label or clip.text for clip in corpus.clips):
        what = "recordings without labels: neither labels, sets nor speakers are checked"
        yield Finding("labels", "note", what)
        return
    yield from _texts(heard) if any(map(_is_text, corpus.clips)) else _labels(heard)
    yield from _sets(corpus, heard)
    yield from _speakers(corpus)


def unreadable(errors: Mapping[str, AudioError], heard: int) -> Iterator[Finding]:
    """The clips that cannot be read, by name, beside so many that can."""
    if errors:
        yield Finding(
            "unreadable",
            "error",
            f"{len(errors)} of {heard + len(errors)} recordings cannot be read: "
            f"{next(iter(errors.values()))}",
            "repair or remove them",
            tuple(errors),
        )


def too_few(heard: Sequence[Heard], least: int) -> Iterator[Finding]:
    """Fewer clips that calibrate than `least`."""
    count = sum(h.calibrates for h in heard)
    if count < least:
        yield Finding(
            "count",
            "error",
            f"{count} recordings for calibration, expected at least {least}",
            "give more; --min-clips accepts fewer",
        )


def _about(
    check: str,
    found: Sequence[Heard],
    heard: Sequence[Heard],
    what: str,
    advice: str,
    severity: Severity = "warning",
) -> Iterator[Finding]:
    """A finding about these of all that were heard, if there are any."""
    if found:
        text = f"{len(found)} of {len(heard)} recordings: {what}"
        yield Finding(check, severity, text, advice, tuple(h.name for h in found))


def _speechless(heard: Sequence[Heard]) -> Iterator[Finding]:
    steady = [h for h in heard if h.should_speak and h.sound.is_steady]
    speaking = sum(h.calibrates and h.should_speak for h in heard)
    severity: Severity = "warning"
    advice, rest = f"remove them, or label them {SILENCE!r}", ""
    if 2 * sum(h.calibrates for h in steady) > speaking:
        severity, rest = "error", "; most of the calibration is without speech"
        advice = "calibrate with what the device is going to hear"
    silent = [h for h in steady if h.sound.is_quiet]
    what = f"silent, below {QUIET_DBFS:g} dBFS throughout{rest}"
    yield from _about("silence", silent, heard, what, advice, severity)
    noise = [h for h in steady if not h.sound.is_quiet]
    what = f"steady noise or hum, whose spectrum changes by less than {STEADY_DB:g} dB{rest}"
    yield from _about("noise", noise, heard, what, advice, severity)


def _faults(heard: Sequence[Heard]) -> Iterator[Finding]:
    """What can be wrong with a single recording."""
    yield from _about(
        "quiet",
        [h for h in heard if h.should_speak and h.sound.is_quiet and not h.sound.is_steady],
        heard,
        f"very quiet, below {QUIET_DBFS:g} dBFS at their loudest",
        "raise the gain; numbers of 16 bits may have been scaled down twice",
    )
    worst = max(h.sound.clipped for h in heard)
    yield from _about(
        "clipping",
        [h for h in heard if h.sound.clipped > CLIPPED],
        heard,
        f"clipped in more than {CLIPPED:.1%} of the samples, at most {worst:.1%}",
        "record them again with less gain; to scale them down does not mend it",
    )
    yield from _about(
        "offset",
        [h for h in heard if h.sound.offset_db > OFFSET_DB],
        heard,
        f"a DC offset less than {-OFFSET_DB:g} dB below the level",
        "subtract the mean; the microphone or its converter adds it, on the device too",
    )


def _rates(heard: Sequence[Heard], sample_rate: int) -> Iterator[Finding]:
    counts = Counter(h.sound.sample_rate for h in heard)
    mix = ", ".join(f"{count} at {rate} Hz" for rate, count in sorted(counts.items()))
    yield Finding("rates", "note", f"{mix}; the model hears {sample_rate} Hz")
    advice = f"record at {sample_rate} Hz or more, unless the device hears such audio too"
    below = [h for h in heard if h.sound.sample_rate < sample_rate]
    yield from _about("rates", below, heard, f"recorded below {sample_rate} Hz", advice)
    above = [h for h in heard if h.sound.sample_rate >= sample_rate and h.should_speak]
    narrow = [h for h in above if h.sound.high_db < NARROW_DB and not h.sound.is_steady]
    yield from _about("bandwidth", narrow, heard, "nothing above 4 kHz, as on a telephone", advice)


def _durations(heard: Sequence[Heard]) -> Iterator[Finding]:
    durations = [h.sound.duration_s for h in heard]
    middle = median(durations)
    yield Finding(
        "durations",
        "note",
        f"{min(durations):.2f} to {max(durations):.2f} s, median {middle:.2f} s",
    )
    short = [h for h in heard if h.sound.duration_s < SHORT_S]
    long = [h for h in heard if h.sound.duration_s > _LONG * middle]
    advice = "cut them anew, a word and some of the pauses around it"
    yield from _about("durations", short, heard, f"shorter than {SHORT_S:g} s", advice)
    yield from _about("durations", long, heard, f"over {_LONG} times the median's length", advice)


def _levels(heard: Sequence[Heard]) -> Iterator[Finding]:
    levels = [h.sound.level_dbfs for h in heard if h.should_speak and not h.sound.is_empty]
    if len(levels) > 1:
        low, *_, high = quantiles(levels, n=20)
        yield Finding(
            "levels",
            "note",
            f"the loudest part of nine in ten is at {low:.0f} to {high:.0f} dBFS, median "
            f"{median(levels):.0f} dBFS",
        )


def _duplicates(heard: Sequence[Heard]) -> Iterator[Finding]:
    copies = defaultdict(list)
    for h in heard:
        if not h.sound.is_empty:  # zeros are no copy of anything
            copies[h.sound.digest].append(h)
    across, named, within = [], [], []
    for group in copies.values():
        is_across = len({h.calibrates for h in group}) > 1
        is_named = len({h.said for h in group}) > 1
        if is_across:
            across.append(group)
        if is_named:
            named.append(sorted(group, key=lambda h: h.said))
        if len(group) > 1 and not (is_across or is_named):
            within.append(group)
    yield from _copies(
        "error",
        across,
        "in calibration and evaluation",
        "remove them from one of the two, or the evaluation knows what it is asked",
    )
    kind = "texts" if any(map(_is_text, (h.clip for h in heard))) else "labels"
    yield from _copies("error", named, f"with two {kind}", f"keep the {kind[:-1]} that is right")
    yield from _copies("warning", within, "in one set", "keep one of each: copies weigh double")


def _copies(
    severity: Severity, groups: Sequence[Sequence[Heard]], where: str, advice: str
) -> Iterator[Finding]:
    if groups:
        first, *_, last = groups[0]  # the two that differ
        names = tuple(h.name for group in groups for h in group)
        text = f"{len(groups)} times the same audio {where}, as {first.name} and {last.name}"
        yield Finding("duplicates", severity, text, advice, names)


def _labels(heard: Sequence[Heard]) -> Iterator[Finding]:
    calibrating = Counter(h.clip.label for h in heard if h.calibrates)
    evaluating = {h.clip.label for h in heard if not h.calibrates}
    words = {label: n for label, n in calibrating.items() if label not in {SILENCE, UNKNOWN}}
    if words:
        rare, common = min(words, key=words.__getitem__), max(words, key=words.__getitem__)
        few, many = words[rare], words[common]
        each = f"{few} ({rare}) to {many} ({common})" if few < many else f"{few}"
        yield Finding("labels", "note", f"{len(words)} words, {each} recordings of each")
        scarce = [
            h for h in heard if h.calibrates and _UNBALANCED * words.get(h.clip.label, many) < many
        ]
        what = f"of words that are {_UNBALANCED} times as rare as {common!r}"
        yield from _about("labels", scarce, heard, what, "add recordings of these words")
    missing = sorted(evaluating - set(calibrating))
    if calibrating and missing:
        yield Finding(
            "labels",
            "note" if missing == [SILENCE] else "warning",
            f"in evaluation but not in calibration: {', '.join(missing)}",
            "add recordings with that label to the calibration",
        )


def _is_text(clip: Clip) -> bool:
    return bool(clip.text) and not clip.label


def _texts(heard: Sequence[Heard]) -> Iterator[Finding]:
    texts = [h.clip.text.split() for h in heard if h.clip.text]
    if texts:
        longest, different = max(map(len, texts)), len({word for text in texts for word in text})
        what = f"{len(texts)} of up to {longest} words, of {different} different ones"
        yield Finding("texts", "note", what)


def _sets(corpus: Corpus, heard: Sequence[Heard]) -> Iterator[Finding]:
    if not corpus.of(EVAL):
        yield Finding("sets", "note", "no evaluation set, so no overlap with it is looked for")
    if any(h.calibrates and h.clip.set != CALIB for h in heard):
        yield Finding(
            "sets",
            "note",
            f"{len(corpus.of(CALIB))} recordings in the calibration set, so that the training set "
            "calibrates too",
        )


def _speakers(corpus: Corpus) -> Iterator[Finding]:
    shared = shared_speakers(corpus)
    if shared:
        speaker, names = next(iter(shared.items()))
        yield Finding(
            "speakers",
            "error",
            f"{len(shared)} in more than one set, as {speaker!r} in {' and '.join(names)}",
            "split by speaker",
            tuple(name_in(corpus, c.path) for c in corpus.clips if c.speaker in shared),
        )
    unknown = sum(not clip.speaker and clip.label != SILENCE for clip in corpus.clips)
    if unknown:
        yield Finding(
            "speakers",
            "note",
            f"{unknown} of {len(corpus.clips)} recordings do not say who speaks, so they may be in "
            "two sets",
        )
