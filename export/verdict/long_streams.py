"""Long streams with known words in them, and what detections in them are worth."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.training.streams import excerpt, fade, snr_gain
from cnngru_edge.export.verdict.statistics import CONFIDENCE, wilson_interval
from cnngru_edge.models.errors import InputError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, streamable
from cnngru_edge.runtime.decode.events import Detection, Detector
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.inputs.read import read_input
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import FLUSH_S, Stream, fixed_length

EARLY_S, LATE_S = 0.5, 0.8
"""A word is found by a detection from so long before its end to so long after it."""

_FLOOR_DB = -25.0  # below its loudest frame, where a clip's word is over
_FRAME_S = 0.02  # over which its energy is measured
_PUSH_S = 20.0  # of a stream at a time: what bounds the memory


@dataclass(frozen=True)
class MixConfig:
    """How words are strung together."""

    pause_s: tuple[float, float] = (0.3, 1.5)  # between two clips
    snr_db: tuple[float, float] = (5.0, 25.0)  # of the words, in each piece of background
    gain_db: tuple[float, float] = (-12.0, 3.0)  # of a stream
    length_s: float = 60.0  # of a stream, about


@dataclass(frozen=True)
class Word:
    """A clip in a stream."""

    label: str
    end_s: float  # where its speech is over
    clip: int  # its number among the clips
    samples: tuple[int, int]  # where the clip lies in the stream


@dataclass(frozen=True)
class LongStream:
    """Audio, and the clips in it in the order in which they are heard."""

    audio: Samples
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Score:
    """What detections are worth against the words that were said."""

    words: int = 0
    misses: int = 0
    false_accepts: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.words + other.words,
            self.misses + other.misses,
            self.false_accepts + other.false_accepts,
            self.seconds + other.seconds,
        )

    @property
    def hours(self) -> float:
        """What was heard."""
        return self.seconds / 3600

    @property
    def false_accepts_per_hour(self) -> float:
        """Detections of what was not said, an hour."""
        return self.false_accepts / self.hours

    @property
    def false_accepts_interval(self) -> tuple[float, float]:
        """Confidence interval (95 %) of the false accepts an hour."""
        low, high = poisson_interval(self.false_accepts)
        return low / self.hours, high / self.hours

    @property
    def false_accepts_bound(self) -> float:
        """The most false accepts an hour that are not ruled out: 95 %, one-sided.

        With none in T hours it is 3/T.
        """
        return poisson_interval(self.false_accepts, 0.9)[1] / self.hours

    @property
    def false_rejects(self) -> float:
        """Share of the words that were not found."""
        return self.misses / self.words

    @property
    def false_rejects_interval(self) -> tuple[float, float]:
        """Confidence interval (95 %) of that share."""
        return wilson_interval(self.misses, self.words)


def poisson_interval(count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a Poisson mean, of a count (F. Garwood, Biometrika 28, 1936)."""
    tail = (1 - confidence) / 2
    low = _poisson_mean(count - 1, 1 - tail) if count else 0.0
    return low, _poisson_mean(count, tail)


def _poisson_mean(most: int, probability: float) -> float:
    """The mean at which no more than `most` are counted with this probability, by bisection."""
    low, high = 0.0, 2.0 * most + 20.0
    for _ in range(50):
        mean = (low + high) / 2
        log = math.log(mean)
        terms = (math.exp(k * log - mean - math.lgamma(k + 1)) for k in range(most + 1))
        low, high = (mean, high) if sum(terms) > probability else (low, mean)
    return high


def load(clips: Iterable[Clip], spec: Spec) -> tuple[list[Clip], list[Array], list[InputError]]:
    """The clips that can be read, what the model is given of each, and why the others cannot."""
    read, samples, errors = [], [], []
    for clip in clips:
        try:
            samples.append(read_input(spec, clip.source))
        except InputError as e:
            errors.append(e)
        else:
            read.append(clip)
    return read, samples, errors


def speech_end(samples: Samples, sample_rate: int) -> int:
    """The sample at which a clip's speech is over, by the energy of its frames."""
    length = round(_FRAME_S * sample_rate)
    frames = pad_to_multiple(samples, length).reshape(-1, length)
    power = np.square(frames, dtype=np.float64).mean(1)
    loud = np.flatnonzero(power >= power.max() * 10 ** (_FLOOR_DB / 10))
    return min((int(loud[-1]) + 1) * length, len(samples))


def word_streams(
    clips: Sequence[Samples],
    labels: Sequence[str],
    noises: Sequence[Samples],
    *,
    sample_rate: int,
    seconds: float,
    rng: np.random.Generator,
    config: MixConfig | None = None,
) -> list[LongStream]:
    """Clips in random order with pauses, in noise: streams of `seconds` in all, or a little more.

    Every clip is heard as often as every other, once at least.
    """
    config = config or MixConfig()
    per_clip = sum(len(clip) for clip in clips) / len(clips) / sample_rate
    a_round = len(clips) * (per_clip + sum(config.pause_s) / 2)
    rounds = max(1, math.ceil(seconds / a_round))
    order = np.concatenate([rng.permutation(len(clips)) for _ in range(rounds)])
    ends = [speech_end(clip, sample_rate) for clip in clips]
    count = max(1, round(rounds * a_round / config.length_s))
    streams = []
    for row in np.array_split(order, count):
        pieces: list[Samples] = []
        words: list[Word] = []
        position = 0
        for i in row:
            pause = round(rng.uniform(*config.pause_s) * sample_rate)
            clip = fade(clips[i], sample_rate // 100)
            pieces += [np.zeros(pause, np.float32), clip]
            position += pause
            end_s = (position + ends[i]) / sample_rate
            words.append(Word(labels[i], end_s, int(i), (position, position + len(clip))))
            position += len(clip)
        pieces.append(np.zeros(round(LATE_S * sample_rate), np.float32))
        speech: Samples = np.concatenate(pieces)
        if noises:
            said: Samples = np.concatenate(pieces[1::2])  # without the pauses
            speech = speech + _background(said, len(speech), noises, sample_rate, rng, config)
        streams.append(LongStream(_played(speech, rng, config), tuple(words)))
    return streams


def background_streams(
    recordings: Sequence[Samples],
    *,
    rng: np.random.Generator,
    noises: Sequence[Samples] = (),
    config: MixConfig | None = None,
) -> list[LongStream]:
    """Recordings without words that the model knows, one stream each, with noise if there is."""
    config = config or MixConfig()
    streams = []
    for recording in recordings:
        audio = recording
        if noises:
            noise = excerpt(noises[int(rng.integers(len(noises)))], len(audio), rng)
            audio = audio + noise * snr_gain(audio, noise, rng.uniform(*config.snr_db))
        streams.append(LongStream(_played(audio, rng, config)))
    return streams


def stream_logits(session: Session, streams: Sequence[LongStream]) -> list[Array]:
    """Logits (T, C) of each, heard from its beginning with the state carried."""
    spec = streamable(session.spec)
    rows = session.inputs[0].shape[0]
    batch = rows if isinstance(rows, int) else 1  # all rows hear the same
    chunk = fixed_length(session) or spec.chunk_length
    step = max(1, round(_PUSH_S * spec.features.sample_rate / chunk)) * chunk
    flush = np.zeros(round(FLUSH_S * spec.features.sample_rate), np.float32)
    logits = []
    with Stream(session, batch) as stream:
        for long in streams:
            stream.reset()
            audio = pad_to_multiple(np.concatenate([long.audio, flush]), chunk)
            pieces = [audio[i : i + step] for i in range(0, len(audio), step)]
            pushed = [stream.push(np.tile(piece, (batch, 1)))[0] for piece in pieces]
            logits.append(np.concatenate(pushed))
    return logits


def detect(spec: ModelSpec, logits: Array) -> list[Detection]:
    """All detections in a stream, by the spec's decision."""
    return Detector(spec).push(logits)


def score(found: Iterable[Detection], stream: LongStream, spec: ModelSpec) -> Score:
    """Count the words that were not found, and the detections of what was not said."""
    detections = list(found)
    words = find_words(detections, stream, spec)
    hits = sum(is_found for _, is_found in words)
    seconds = len(stream.audio) / spec.features.sample_rate
    return Score(len(words), len(words) - hits, len(detections) - hits, seconds)


def find_words(
    found: Iterable[Detection], stream: LongStream, spec: ModelSpec
) -> list[tuple[Word, bool]]:
    """The words in a stream, by label, and whether each has a detection of its own."""
    said, heard = defaultdict(list), defaultdict(list)
    for word in stream.words:
        if word.label in spec.words:
            said[word.label].append(word)
    for detection in found:
        heard[detection.label].append(detection.time)
    words: list[tuple[Word, bool]] = []
    for label, of_label in said.items():
        are_found = match(heard[label], [word.end_s for word in of_label])
        words += zip(of_label, are_found, strict=True)
    return words


def matches(times: Sequence[float], ends: Sequence[float]) -> int:
    """How many ends have a time of their own: see `match`."""
    return sum(match(times, ends))


def match(times: Sequence[float], ends: Sequence[float]) -> list[bool]:
    """Which ends, in order, have a time of their own, in order, from EARLY_S to LATE_S."""
    found = []
    waiting = iter(times)
    time = next(waiting, None)
    for end in ends:
        while time is not None and time < end - EARLY_S:
            time = next(waiting, None)
        found.append(time is not None and time <= end + LATE_S)
        if found[-1]:
            time = next(waiting, None)
    return found


def _background(
    speech: Samples,
    length: int,
    noises: Sequence[Samples],
    sample_rate: int,
    rng: np.random.Generator,
    config: MixConfig,
) -> Samples:
    pieces: list[Samples] = []
    total = 0
    while total < length:
        noise = noises[int(rng.integers(len(noises)))]
        # Of a long recording ten seconds, so that a stream has several.
        noise = excerpt(noise, min(len(noise), 10 * sample_rate), rng)
        noise = noise * snr_gain(speech, noise, rng.uniform(*config.snr_db))
        pieces.append(fade(noise, sample_rate // 100))
        total += len(noise)
    background: Samples = np.concatenate(pieces)[:length]
    return background


def _played(audio: Samples, rng: np.random.Generator, config: MixConfig) -> Samples:
    audio = audio * np.float32(10 ** (rng.uniform(*config.gain_db) / 20))
    peak = float(np.abs(audio).max(initial=0))
    return np.asarray(audio / np.float32(max(1.0, peak)), np.float32)
