"""When a stream's probabilities make an event: the fewest words lost at a rate of false accepts.

Without the refractory time the labels do not touch each other, so each has a table of misses and
false accepts over its thresholds, and the best thresholds together are found exactly. What they
then reach is counted with the runtime's own Detector.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cnngru_edge.calibration.corpus.read import CALIB, EVAL, Clip, Corpus, audio_files, match_labels
from cnngru_edge.export.verdict.long_streams import (
    LongStream,
    MixConfig,
    Score,
    background_streams,
    detect,
    load,
    matches,
    score,
    stream_logits,
    word_streams,
)
from cnngru_edge.models.errors import CorpusError, InputError, SessionError, SpecError
from cnngru_edge.models.spec.stream import CTC, SILENCE, DecisionSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.label import softmax
from cnngru_edge.runtime.session import Array

SMOOTHINGS_S = (0.06, 0.1, 0.16, 0.2, 0.3, 0.4, 0.5, 0.6)
RELEASES = (0.2, 0.4, 0.6, 0.75)
THRESHOLDS = tuple(
    round(float(t), 4) for t in (*np.arange(0.4, 0.9, 0.025), *np.arange(0.9, 0.9999, 0.0025))
)

Progress = Callable[[int, int], None]
"""Told how many more candidates are done, of how many."""


@dataclass(frozen=True)
class TuneConfig:
    """What to reach, on how much audio."""

    false_accepts_per_hour: float = 1.0
    hours: float = 1.0  # of words in a row; background is heard besides
    seed: int = 0
    mix: MixConfig = field(default_factory=MixConfig)


@dataclass(frozen=True)
class Tuned:
    """A decision, and what it reaches on the streams that it was chosen on."""

    decision: DecisionSpec
    words: Score
    background: Score
    target: float  # false accepts an hour
    clips: int  # different ones; each is heard several times

    @property
    def total(self) -> Score:
        """Over all that was heard."""
        return self.words + self.background

    @property
    def reached(self) -> bool:
        """Whether the false accepts stay within the target."""
        return self.total.false_accepts <= self.target * self.total.hours

    @property
    def summary(self) -> str:
        """What it reaches, in words; and whether that proves the target."""
        total = self.total
        lines = [
            f"{total.false_accepts_per_hour:.2f} false accepts/h and {total.false_rejects:.1%} "
            f"false rejects; {total.hours:.2f} h heard, {self.words.words} words to find, "
            f"{self.clips} different clips",
            f"false accepts: {self.words.false_accepts} in {self.words.hours:.2f} h of words, "
            f"{self.background.false_accepts} in {self.background.hours:.2f} h of background alone",
        ]
        if not self.reached:
            lines.append(
                f"the target of {self.target:g}/h is not reached: these are the fewest false "
                "accepts that were found"
            )
        elif total.false_accepts_bound > self.target:
            lines.append(
                f"too short to prove {self.target:g}/h: {total.false_accepts} in "
                f"{total.hours:.2f} h can be up to {total.false_accepts_bound:.1f}/h (95 %)"
            )
        return "\n".join(lines)


def tune(
    spec: ModelSpec,
    engine: Path,
    corpus: Corpus,
    background: Sequence[Clip] = (),
    config: TuneConfig | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Tuned, list[InputError]]:
    """Choose smoothing, release and a threshold for each word; the same for the same seed.

    Args:
        spec: of the checkpoint.
        engine: the artefact of it that is to make the events.
        corpus: its calibration clips are strung together, with its noises under them.
        background: recordings without any of the words; heard alone, and under the words where
            the corpus has no noises.
        config: what to reach.
        progress: see Progress.

    Raises:
        SessionError: the artefact cannot be opened or is of another model.
        CorpusError: no calibration clips, or none of a word.
    """
    config = config or TuneConfig()
    rate = spec.features.sample_rate
    rng = np.random.default_rng(config.seed)
    with open_session(engine) as session:
        check_same_model(spec, session.spec, engine)
        truth = _check_words(spec, corpus)
        clips, samples, errors = load(corpus.of(CALIB), spec)
        noise_clips = [noise for noise in corpus.noises if noise.set != EVAL]
        _, noises, noise_errors = load(noise_clips, spec)
        _, alone, alone_errors = load(background, spec)
        errors += noise_errors + alone_errors
        if not clips:
            raise CorpusError(f"{corpus.root}: none of the calibration clips can be read")
        words = word_streams(
            samples,
            [truth[clip.path] for clip in clips],
            noises or alone,
            sample_rate=rate,
            seconds=3600 * config.hours,
            rng=rng,
            config=config.mix,
        )
        silent = background_streams(alone, rng=rng, config=config.mix)
        streams = [*words, *silent]
        logits = stream_logits(session, streams)
    best = None
    budget = config.false_accepts_per_hour * sum(len(s.audio) for s in streams) / rate / 3600
    candidates = list(_candidates(spec, streams, logits, int(budget), progress))
    for _, decision in sorted(candidates, key=lambda c: c[0]):
        tuned = _measured(spec, decision, words, silent, logits, config, len(clips))
        if best is None or _cost(tuned) < _cost(best):
            best = tuned
        if best.reached:
            break
    assert best is not None  # there are always candidates
    return best, errors


def check_has_events(spec: ModelSpec, checkpoint: Path) -> None:
    """Refuse a model without words of its own."""
    if spec.family == CTC:
        raise SpecError(
            f"{checkpoint}: a ctc model, whose texts end after {spec.endpoint.silence_s:g} s of "
            "silence; only the events of a keyword model are tuned"
        )


def background_clips(folder: Path) -> list[Clip]:
    """All recordings in a folder, as noises.

    Raises:
        CorpusError: there are none.
    """
    paths = audio_files(folder)
    if not paths:
        raise CorpusError(f"{folder}: no recordings found (WAV, FLAC or Ogg)")
    return [Clip(path, SILENCE, CALIB, "") for path in paths]


def check_same_model(spec: ModelSpec, found: ModelSpec, engine: Path) -> None:
    """An artefact fits a checkpoint if all but the decision is equal.

    Raises:
        SessionError: it is of another model.
    """
    if replace(spec, decision=found.decision) != found:
        different = [
            name
            for name in ("labels", "features", "convs", "hidden_size", "num_layers")
            if getattr(spec, name) != getattr(found, name)
        ]
        raise SessionError(
            f"{engine}: made from another model than the checkpoint, {', '.join(different)} "
            "differ; export the checkpoint"
        )


def _check_words(spec: ModelSpec, corpus: Corpus) -> dict[Path, str]:
    clips = corpus.of(CALIB)
    if not clips:
        raise CorpusError(
            f"{corpus.root}: no clips for calibration; give some to the set 'calib', other "
            "speakers than those of training"
        )
    truth = match_labels(clips, spec.labels)
    if missing := [word for word in spec.words if word not in truth.values()]:
        raise CorpusError(f"{corpus.root}: no calibration clip of {', '.join(missing)}")
    return truth


def _cost(tuned: Tuned) -> tuple[bool, int, int]:
    total = tuned.total
    if tuned.reached:
        return False, total.misses, total.false_accepts
    return True, total.false_accepts, total.misses


def _measured(
    spec: ModelSpec,
    decision: DecisionSpec,
    words: Sequence[LongStream],
    silent: Sequence[LongStream],
    logits: Sequence[Array],
    config: TuneConfig,
    clips: int,
) -> Tuned:
    decided = replace(spec, decision=decision)

    def total(streams: Sequence[LongStream], outputs: Sequence[Array]) -> Score:
        scores = [
            score(detect(decided, o), s, decided) for s, o in zip(streams, outputs, strict=True)
        ]
        return sum(scores, Score())

    split = len(words)
    return Tuned(
        decision,
        total(words, logits[:split]),
        total(silent, logits[split:]),
        config.false_accepts_per_hour,
        clips,
    )


def _candidates(
    spec: ModelSpec,
    streams: Sequence[LongStream],
    logits: Sequence[Array],
    budget: int,
    progress: Progress,
) -> Iterator[tuple[tuple[int, int], DecisionSpec]]:
    """For each smoothing and release the best thresholds, with (false accepts over it, misses)."""
    probabilities = [softmax(row.astype(np.float64)) for row in logits]
    frame_s = spec.chunk_length / spec.features.sample_rate
    total = len(SMOOTHINGS_S) * len(RELEASES)
    for smoothing_s in SMOOTHINGS_S:
        averages = [moving_average(row, round(smoothing_s / frame_s)) for row in probabilities]
        for release in RELEASES:
            thresholds = np.array([t for t in THRESHOLDS if t >= release])
            tables = {
                word: _table(spec, word, averages, streams, thresholds, release)
                for word in spec.words
            }
            cost, chosen = choose(tables, budget)
            by_word = {word: float(thresholds[i]) for word, i in chosen.items()}
            usual, _ = Counter(by_word.values()).most_common(1)[0]
            own = tuple((word, t) for word, t in by_word.items() if t != usual)
            yield (
                cost,
                replace(
                    spec.decision,
                    smoothing_s=smoothing_s,
                    threshold=usual,
                    thresholds=own,
                    release=release,
                ),
            )
            progress(1, total)


def moving_average(probabilities: Array, frames: int) -> Array:
    """(T, C) averaged over the last `frames`, zeros before the first, as the Detector does it."""
    frames = max(frames, 1)
    sums = np.cumsum(np.pad(probabilities, ((frames, 0), (0, 0))), axis=0)
    average: Array = (sums[frames:] - sums[:-frames]) / frames
    return average


def crossings(average: Array, label: int, thresholds: Array, release: float) -> list[Array]:
    """For each time that a label is up, the frame in which it reaches each threshold; -1: never.

    It is up from the release on until it falls below it, and is one detection at most.
    """
    up = np.concatenate([[False], average[:, label] >= release, [False]])
    edges = np.flatnonzero(up[1:] != up[:-1]).reshape(-1, 2)
    leading = np.where(average.argmax(1) == label, average[:, label], 0.0)
    found = []
    for start, end in edges:
        frames = np.searchsorted(np.maximum.accumulate(leading[start:end]), thresholds)
        found.append(np.where(frames < end - start, start + frames, -1))
    return found


def _table(
    spec: ModelSpec,
    word: str,
    averages: Sequence[Array],
    streams: Sequence[LongStream],
    thresholds: Array,
    release: float,
) -> list[tuple[int, int]]:
    """(misses, false accepts) of a word at each threshold."""
    frame_s = spec.chunk_length / spec.features.sample_rate
    misses, false_accepts = np.zeros((2, len(thresholds)), int)
    for average, stream in zip(averages, streams, strict=True):
        ends = [said.end_s for said in stream.words if said.label == word]
        times: dict[int, list[float]] = defaultdict(list)
        for frames in crossings(average, spec.labels.index(word), thresholds, release):
            for i in np.flatnonzero(frames >= 0).tolist():
                times[i].append((int(frames[i]) + 1) * frame_s)
        for i in range(len(thresholds)):
            hits = matches(times[i], ends)
            misses[i] += len(ends) - hits
            false_accepts[i] += len(times[i]) - hits
    return list(zip(misses.tolist(), false_accepts.tolist(), strict=True))


def choose(
    tables: dict[str, list[tuple[int, int]]], budget: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The thresholds, by number, with the fewest misses at no more than `budget` false accepts.

    Where several are as good, the highest. Where none stays within the budget, those with the
    fewest false accepts. The cost is (false accepts over the budget, misses).
    """
    least = sum(min(false for _, false in table) for table in tables.values())
    limit = max(budget, least)
    # By false accepts so far: misses so far, and the thresholds that give them.
    best: dict[int, tuple[int, dict[str, int]]] = {0: (0, {})}
    for word, table in tables.items():
        options: dict[int, tuple[int, int]] = {}  # by false accepts: misses, threshold
        for i, (missed, false) in enumerate(table):
            if false not in options or missed <= options[false][0]:
                options[false] = (missed, i)
        following: dict[int, tuple[int, dict[str, int]]] = {}
        for spent, (lost, chosen) in best.items():
            for false, (missed, i) in options.items():
                key = spent + false
                if key <= limit and (key not in following or lost + missed < following[key][0]):
                    following[key] = (lost + missed, {**chosen, word: i})
        best = following
    misses, spent = min((lost, spent) for spent, (lost, _) in best.items())
    return (max(0, spent - budget), misses), best[spent][1]
