"""Connected words: single-word clips of one speaker joined into strings, with their text.

Where there are no recorded sentences, this is what a CTC model can learn from: words that follow
one another, their silent edges over each other, in rows of several strings with pauses between.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import soxr

from cnngru_edge.export.training.streams import excerpt, fade, silent_piece, snr_gain
from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.stream import FLUSH_S

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WAYS = ("left", "right", "up", "down", "forward", "backward")
COMMANDS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("go",), _WAYS),
    (("go",), _WAYS, ("stop",)),
    (("stop",), ("go",), _WAYS),
    (("yes", "no"), ("stop", "go")),
    (("on", "off"), _WAYS),
    (_DIGITS, _DIGITS),
    (_DIGITS, _DIGITS, _DIGITS),
)
"""A small grammar: a phrase is one word of each of its places, in this order."""


@dataclass(frozen=True)
class ConnectedConfig:
    """How words become strings, and strings rows."""

    words: tuple[int, int] = (1, 6)  # of a string, fewer where a speaker has fewer clips
    words_in_row: int = 6  # at least; the state is carried from string to string
    gap_s: tuple[float, float] = (-0.1, 0.5)  # from speech to speech; silent edges overlap
    pause_s: tuple[float, float] = (0.1, 1.2)  # after a string
    phrase_share: float = 0.2  # of the strings to follow COMMANDS, where the speaker has the words
    silence_share: float = 0.1  # of a row's parts to be without a word
    noise_probability: float = 0.7  # of a row to lie in noise
    snr_db: tuple[float, float] = (0.0, 30.0)
    gain_db: tuple[float, float] = (-18.0, 6.0)
    speed: tuple[float, float] = (0.88, 1.14)


@dataclass(frozen=True)
class Utterance:
    """Samples of one speaker, and what is said in them."""

    samples: Samples
    text: str
    speaker: str  # "" where unknown: joined with no other


@dataclass(frozen=True)
class RowBatch:
    """Rows of one length, each cut into parts of one text."""

    audio: Samples  # (N, S)
    ends: tuple[tuple[int, ...], ...]  # of each row, the output frames that its parts end before
    texts: tuple[tuple[str, ...], ...]  # of each row


class RowBuilder:
    """Augmented rows from clips and noises; the same for the same seed."""

    def __init__(
        self,
        clips: Sequence[Utterance],
        noises: Sequence[Samples],
        *,
        sample_rate: int,
        chunk_length: int,
        config: ConnectedConfig,
    ) -> None:
        self.clips, self.noises, self.config = clips, noises, config
        self.rate, self.chunk = sample_rate, chunk_length
        self.joiner = Joiner(clips, sample_rate, config)

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches let every clip be heard about once."""
        words = sum(max(1, len(clip.text.split())) for clip in self.clips)
        return max(1, round(words / (batch_size * self.config.words_in_row)))

    def epoch(
        self, batch_size: int, rng: np.random.Generator, ease: float = 1.0
    ) -> Iterator[RowBatch]:
        """As many rows as let every clip be heard about once.

        Args:
            batch_size: rows at a time.
            rng: all chance comes from it.
            ease: 0 is single words without noise, 1 is all that the config says.
        """
        firsts = self.joiner.firsts(rng)
        for _ in range(self.batches_per_epoch(batch_size)):
            rows = [self._row(firsts, rng, ease) for _ in range(batch_size)]
            yield collate(rows, self.chunk)

    def _row(
        self, firsts: Iterator[int], rng: np.random.Generator, ease: float
    ) -> tuple[Samples, list[int], list[str]]:
        pieces = [np.zeros(round(rng.uniform(0, 0.4) * self.rate), np.float32)]
        ends, texts = [], []
        heard = 0
        while heard < self.config.words_in_row:
            if rng.random() < self.config.silence_share:
                piece, text = silent_piece(self.noises, self.rate, rng), ""
                heard += 1  # it takes about as long as a word
            else:
                piece, text = self._string(next(firsts), rng, ease)
                heard += max(1, len(text.split()))
            is_last = heard >= self.config.words_in_row
            pause = FLUSH_S if is_last else rng.uniform(*self.config.pause_s)
            pieces += [piece, np.zeros(round(pause * self.rate), np.float32)]
            ends.append(sum(len(piece) for piece in pieces))
            texts.append(text)
        audio = np.concatenate(pieces)
        if self.noises and rng.random() < ease * self.config.noise_probability:
            noise = excerpt(self.noises[int(rng.integers(len(self.noises)))], len(audio), rng)
            audio += noise * snr_gain(audio, noise, rng.uniform(*self.config.snr_db))
        return audio / np.float32(max(1.0, np.abs(audio).max(initial=0))), ends, texts

    def _string(self, first: int, rng: np.random.Generator, ease: float) -> tuple[Samples, str]:
        least, most = self.config.words
        chosen = self.joiner.choose(first, rng, (least, round(least + ease * (most - least))))
        audio = self.joiner.join(chosen, rng)
        if rng.random() < 0.7:
            factor = rng.uniform(*self.config.speed)
            audio = soxr.resample(audio, self.rate * factor, self.rate, quality="LQ")
        gain = np.float32(10 ** (rng.uniform(*self.config.gain_db) / 20))
        audio = fade(audio, round(rng.uniform(0.001, 0.02) * self.rate)) * gain
        return audio, self.joiner.text(chosen)


class Joiner:
    """Chooses clips of one speaker and joins them."""

    def __init__(
        self, clips: Sequence[Utterance], sample_rate: int, config: ConnectedConfig
    ) -> None:
        self.clips, self.rate, self.config = clips, sample_rate, config
        self.edges = [speech_edges(clip.samples, sample_rate) for clip in clips]
        by_speaker = defaultdict(list)
        for i, clip in enumerate(clips):
            by_speaker[clip.speaker or f"{i}, alone"].append(i)
        self.others = {i: of_one for of_one in by_speaker.values() for i in of_one}
        # A word with few clips is heard more often, by the square root of what it lacks.
        counts = Counter(clip.text for clip in clips)
        usual = float(np.median([counts[clip.text] for clip in clips]))
        self.weights = np.array([max(1.0, (usual / counts[c.text]) ** 0.5) for c in clips])

    def firsts(self, rng: np.random.Generator) -> Iterator[int]:
        """The clips that strings begin with, without end."""
        order = np.repeat(np.arange(len(self.clips)), np.round(self.weights).astype(int))
        while True:
            yield from rng.permutation(order).tolist()

    def choose(self, first: int, rng: np.random.Generator, words: tuple[int, int]) -> list[int]:
        """Clips for a string of so many words: of one speaker, none twice."""
        wants_phrase = words[1] > 1 and rng.random() < self.config.phrase_share
        if wants_phrase and (phrase := self._phrase(first, rng, words[1])):
            return phrase
        count = int(rng.integers(words[0], words[1] + 1))
        others = [i for i in self.others[first] if i != first]
        weights = self.weights[others]
        chosen = [first]
        if size := min(count - 1, len(others)):
            drawn = rng.choice(others, size, replace=False, p=weights / weights.sum())
            chosen += drawn.tolist()
        rng.shuffle(chosen)
        return chosen

    def join(self, chosen: Sequence[int], rng: np.random.Generator) -> Samples:
        """The clips in this order, one's speech a gap after the other's."""
        pieces: list[tuple[int, Samples]] = []  # first sample, samples
        speech_end = 0
        for i in chosen:
            samples, (first, last) = self.clips[i].samples, self.edges[i]
            gap = round(rng.uniform(*self.config.gap_s) * self.rate)
            start = max(0, speech_end + gap - first) if pieces else 0
            pieces.append((start, fade(samples, self.rate // 100)))
            speech_end = start + last
        audio = np.zeros(max(start + len(piece) for start, piece in pieces), np.float32)
        for start, piece in pieces:
            audio[start : start + len(piece)] += piece
        return audio

    def text(self, chosen: Sequence[int]) -> str:
        """What is said in these clips."""
        return " ".join(self.clips[i].text for i in chosen)

    def _phrase(self, first: int, rng: np.random.Generator, most: int) -> list[int]:
        places = COMMANDS[int(rng.integers(len(COMMANDS)))]
        if len(places) > most:
            return []
        chosen: list[int] = []
        for words in places:
            fitting = [
                i for i in self.others[first] if self.clips[i].text in words and i not in chosen
            ]
            if not fitting:
                return []
            chosen.append(fitting[int(rng.integers(len(fitting)))])
        return chosen


def connect(
    clips: Sequence[Utterance], sample_rate: int, config: ConnectedConfig, rng: np.random.Generator
) -> list[Utterance]:
    """As many undisturbed strings as clips, one from each: to evaluate with."""
    joiner = Joiner(clips, sample_rate, config)
    strings = []
    for i, clip in enumerate(clips):
        chosen = joiner.choose(i, rng, config.words)
        strings.append(Utterance(joiner.join(chosen, rng), joiner.text(chosen), clip.speaker))
    return strings


def speech_edges(samples: Samples, rate: int) -> tuple[int, int]:
    """Where the speech of a clip begins and ends, in samples, with a margin for weak sounds.

    Frames of 20 ms within 30 dB of the loudest; 60 ms before them and 100 ms after.
    """
    frame = rate // 50
    frames = samples[: len(samples) // frame * frame].reshape(-1, frame)
    power = np.square(frames, dtype=np.float64).mean(1)
    loud = np.flatnonzero(power > 1e-3 * power.max(initial=0.0))
    if not len(loud):
        return 0, len(samples)
    first, last = int(loud[0]) * frame, int(loud[-1] + 1) * frame
    return max(0, first - 3 * frame), min(len(samples), last + 5 * frame)


def collate(rows: Sequence[tuple[Samples, list[int], list[str]]], chunk: int) -> RowBatch:
    """Rows of (audio, samples that their parts end before, texts) as one batch of whole chunks."""
    length = -(-max(len(audio) for audio, _, _ in rows) // chunk) * chunk
    batch = np.zeros((len(rows), length), np.float32)
    for row, (audio, _, _) in zip(batch, rows, strict=True):
        row[: len(audio)] = audio
    ends = tuple(tuple(-(-end // chunk) for end in row_ends) for _, row_ends, _ in rows)
    return RowBatch(batch, ends, tuple(tuple(texts) for _, _, texts in rows))
