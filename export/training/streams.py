"""Training streams: words, noises and silences in a row, with a label at the end of each.

A GRU trained on single clips from a zero state has never heard a word after a word, and forgets how
to listen as soon as it runs on. So the unit of training is the stream, with the state carried.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.stream import FLUSH_S


@dataclass(frozen=True)
class StreamConfig:
    """How streams are put together and disturbed."""

    segments: int = 4  # words, noises or silences in a stream
    silence_share: float = 0.12  # of the segments
    noise_probability: float = 0.7  # of a stream to lie in noise
    snr_db: tuple[float, float] = (-5.0, 25.0)
    gain_db: tuple[float, float] = (-18.0, 6.0)
    speed: tuple[float, float] = (0.88, 1.14)
    read_delay_s: float = FLUSH_S  # after its end a word is read, as runtime.stream does it
    gap_s: tuple[float, float] = (-0.12, 0.25)  # below zero the silent edges of two clips overlap


@dataclass(frozen=True)
class StreamBatch:
    """Streams of one length, and what should have been heard just after each segment's end."""

    audio: Samples  # (N, S)
    frames: npt.NDArray[np.int64]  # (N, segments), the output frame in which each is read
    targets: npt.NDArray[np.int64]  # (N, segments), indices of labels


class StreamBuilder:
    """Augmented streams from labelled clips and noises; the same for the same seed."""

    def __init__(
        self,
        clips: Sequence[Samples],
        targets: Sequence[int],
        noises: Sequence[Samples],
        *,
        silence: int | None,
        sample_rate: int,
        chunk_length: int,
        config: StreamConfig,
    ) -> None:
        self.clips, self.targets, self.noises = clips, targets, noises
        self.silence, self.rate, self.chunk, self.config = (
            silence,
            sample_rate,
            chunk_length,
            config,
        )
        # A label with few clips is heard more often, by the square root of what it lacks.
        counts = Counter(targets)
        usual = float(np.median(list(counts.values())))
        repeats = {t: max(1, round((usual / count) ** 0.5)) for t, count in counts.items()}
        self.order = np.repeat(np.arange(len(clips)), [repeats[t] for t in targets])

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches let every clip be heard about once."""
        words = batch_size * self.config.segments * (1 - self._silence_share)
        return max(1, round(len(self.order) / words))

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[StreamBatch]:
        """One pass over the clips in random order, `batch_size` streams at a time."""
        order = iter(self._words(rng))
        for _ in range(self.batches_per_epoch(batch_size)):
            yield collate([self._stream(order, rng) for _ in range(batch_size)], self.chunk)

    @property
    def _silence_share(self) -> float:
        return self.config.silence_share if self.silence is not None else 0.0

    def _words(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield from rng.permutation(self.order)

    def _stream(
        self, words: Iterator[int], rng: np.random.Generator
    ) -> tuple[Samples, list[int], list[int]]:
        pieces: list[tuple[int, Samples]] = []  # first sample (may be negative), samples
        ends, targets = [], []
        end = 0
        for _ in range(self.config.segments):
            if rng.random() < self._silence_share:
                assert self.silence is not None  # or its share would be zero
                piece, target = silent_piece(self.noises, self.rate, rng), self.silence
            else:
                word = next(words)
                piece, target = self._spoken(self.clips[word], rng), self.targets[word]
            start = end + round(rng.uniform(*self.config.gap_s) * self.rate)
            start = max(start, end - len(piece) // 2)  # a short clip keeps half to itself
            pieces.append((start, piece))
            end = start + len(piece)
            ends.append(end)
            targets.append(target)
        delay = round(self.config.read_delay_s * self.rate)
        ends = [end + delay for end in ends]
        audio: Samples = np.zeros(ends[-1], np.float32)
        for start, piece in pieces:
            skipped = max(0, -start)
            audio[start + skipped : start + len(piece)] += piece[skipped:]
        if self.noises and rng.random() < self.config.noise_probability:
            audio += self._background(audio, rng)
        peak = np.abs(audio).max(initial=0)
        return audio / np.float32(max(1.0, peak)), ends, targets

    def _spoken(self, clip: Samples, rng: np.random.Generator) -> Samples:
        if rng.random() < 0.7:
            factor = rng.uniform(*self.config.speed)
            import soxr  # comparing needs this module, and no resampling

            clip = soxr.resample(clip, self.rate * factor, self.rate, quality="LQ")
        return fade(clip, round(rng.uniform(0.001, 0.02) * self.rate)) * self._gain(rng)

    def _background(self, audio: Samples, rng: np.random.Generator) -> Samples:
        noise = excerpt(self.noises[int(rng.integers(len(self.noises)))], len(audio), rng)
        return noise * snr_gain(audio, noise, rng.uniform(*self.config.snr_db))

    def _gain(self, rng: np.random.Generator) -> np.float32:
        return np.float32(10 ** (rng.uniform(*self.config.gain_db) / 20))


def collate(streams: Sequence[tuple[Samples, list[int], list[int]]], chunk: int) -> StreamBatch:
    """Streams of (audio, samples read after, targets) as one batch of whole chunks."""
    length = -(-max(len(audio) for audio, _, _ in streams) // chunk) * chunk
    batch = np.zeros((len(streams), length), np.float32)
    for row, (audio, _, _) in zip(batch, streams, strict=True):
        row[: len(audio)] = audio
    # The frame that ends with that sample or just after it.
    frames = np.array([[-(-end // chunk) - 1 for end in ends] for _, ends, _ in streams])
    return StreamBatch(batch, frames, np.array([targets for _, _, targets in streams]))


def silent_piece(noises: Sequence[Samples], rate: int, rng: np.random.Generator) -> Samples:
    """About a second without a word: a noise, white noise or digital silence."""
    length = round(rng.uniform(0.8, 1.6) * rate)
    kind = rng.random()
    if kind < 0.15:
        return np.zeros(length, np.float32)
    if kind < 0.35 or not noises:
        level = 10 ** rng.uniform(-5, -1.5)
        return (level * rng.standard_normal(length)).astype(np.float32)
    noise = excerpt(noises[int(rng.integers(len(noises)))], length, rng)
    return fade(noise, rate // 100) * np.float32(10 ** rng.uniform(-2, 0))


def excerpt(noise: Samples, length: int, rng: np.random.Generator) -> Samples:
    """`length` samples of a noise from a random place, repeated where it is too short."""
    start = int(rng.integers(max(1, len(noise) - length + 1)))
    return np.resize(noise[start:], length)


def snr_gain(speech: Samples, noise: Samples, snr_db: float) -> np.float32:
    """What to multiply `noise` with for an SNR over the whole length, in dB of mean power."""
    speech_power = float(np.mean(np.square(speech, dtype=np.float64)))
    noise_power = float(np.mean(np.square(noise, dtype=np.float64)))
    if noise_power == 0:
        return np.float32(0)
    return np.float32((speech_power / noise_power) ** 0.5 * 10 ** (-snr_db / 20))


def fade(samples: Samples, length: int) -> Samples:
    """`samples` with a linear fade of `length` at both ends, so that joints do not click."""
    samples = samples.copy()
    ramp = np.linspace(0, 1, min(length, len(samples) // 2), dtype=np.float32)
    samples[: len(ramp)] *= ramp
    samples[len(samples) - len(ramp) :] *= ramp[::-1]
    return samples
