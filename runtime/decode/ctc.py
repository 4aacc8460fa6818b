"""Texts out of the logits of a CTC model: the best path, or a beam with a word list and an n-gram.

The labels are characters, or words with a space before each.

CTC: A. Graves et al., ICML 2006. Prefix beam search: A. Hannun et al., arXiv:1408.2873 (2014).
Libraries do not fit a device: pyctcdecode needs numpy below 2, torchaudio's decoders torch, kenlm a
compiler; flashlight-text has no release since March 2024 and no wheel from Python 3.13 on.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple, Protocol

import numpy as np

from cnngru_edge.models.spec.stream import ModelSpec, is_of_words
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.decode.ngram import Ngram, Trie
from cnngru_edge.runtime.session import Array

BEAM = 16
"""Prefixes that are kept where there are words or an n-gram, and no number is asked for."""

_LEAST = math.log(1e-4)  # a character less probable than this in a frame is not tried there
_NEVER = -math.inf


@dataclass(frozen=True)
class Word:
    """A word of a text, between the peaks of its first and last character; or at its own peak.

    A causal model is sure of something a little after it was said.
    """

    word: str
    start: float  # s
    end: float
    score: float  # the geometric mean of its characters' probabilities at their peaks


@dataclass(frozen=True)
class Transcript:
    """What was said."""

    text: str
    score: float  # as a word's, over all words; 0 without any
    words: tuple[Word, ...]


@dataclass(frozen=True)
class DecodeConfig:
    """How a text is searched for: with none of these, by the best path."""

    beam: int | None = None  # prefixes to keep
    words: Trie | None = None  # only these
    ngram: Ngram | None = None
    alpha: float = 0.5  # weight of the n-gram's log probability
    beta: float = 1.5  # for each word, against its preference for few


class Decoder(Protocol):
    """Carries what it has found from chunk to chunk."""

    def reset(self, frame: int = 0) -> None:
        """Begin a text, at this frame."""
        ...

    def push(self, logits: Array) -> None:
        """Go on with logits (T, C)."""
        ...

    @property
    def transcript(self) -> Transcript:
        """The text so far."""
        ...


class Peak(NamedTuple):
    """A character of a text, or a word, where it is most probable."""

    label: str
    frame: int
    log_probability: float


def decoder_of(spec: Spec, config: DecodeConfig) -> Decoder:
    """The decoder that a configuration asks for."""
    if config.beam is None and config.words is None and config.ngram is None:
        return GreedyDecoder(spec)
    return BeamDecoder(spec, config)


def log_softmax(logits: Array) -> Array:
    """Along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


class GreedyDecoder:
    """The most probable label of each frame, repetitions and blanks left out."""

    def __init__(self, spec: Spec) -> None:
        self._labels, self._frame_s = spec.labels, frame_s(spec)
        self.reset()

    def reset(self, frame: int = 0) -> None:
        """Begin a text, at this frame."""
        self._frame, self._last = frame, 0
        self._peaks: list[Peak] = []

    def push(self, logits: Array) -> None:
        """Go on with logits (T, C)."""
        for row in log_softmax(logits):
            best = int(row.argmax())
            peak = Peak(self._labels[best], self._frame, float(row[best]))
            if best and best != self._last:
                self._peaks.append(peak)
            elif best and peak.log_probability > self._peaks[-1].log_probability:
                self._peaks[-1] = peak
            self._last = best
            self._frame += 1

    @property
    def transcript(self) -> Transcript:
        """The text so far."""
        return _transcript(self._peaks, self._frame_s)


class _Peaks(NamedTuple):
    """The peaks of a prefix, the last one first; prefixes share what they begin with."""

    last: Peak
    before: "_Peaks | None"


@dataclass(slots=True)
class _Prefix:
    """A beginning of a text, and the log probabilities of all alignments that write it."""

    text: str
    last: int  # label of its last character, 0 without any
    node: Trie | None  # of the word list, after its unfinished word
    context: tuple[str, ...]  # words that the n-gram sees before that
    bonus: float  # of the n-gram, for the finished words
    blank: float = _NEVER  # of those that end in a blank
    character: float = _NEVER  # of the others
    peaks: _Peaks | None = None
    most: float = _NEVER  # of what came into it at once, and brought the peaks

    @property
    def total(self) -> float:
        """Log probability of all alignments."""
        return _add(self.blank, self.character)

    @property
    def rank(self) -> float:
        """What the beam keeps most of."""
        return self.total + self.bonus

    def bring(self, log_probability: float, peaks: _Peaks | None) -> None:
        """Take over the peaks of alignments that are more probable than those before."""
        if log_probability > self.most:
            self.most, self.peaks = log_probability, peaks


class BeamDecoder:
    """Prefix beam search: of all texts that the beam holds, the one of the most probability.

    A text is as probable as all alignments that write it together; spaces at its ends and a space
    after a space do not count. An n-gram adds `alpha` times its log probability of each word, and
    `beta`.
    """

    def __init__(self, spec: Spec, config: DecodeConfig) -> None:
        self._labels, self._frame_s, self._config = spec.labels, frame_s(spec), config
        self._space = spec.labels.index(" ") if " " in spec.labels else -1
        self._is_of_words = is_of_words(spec.labels)
        self._width = config.beam or BEAM
        self.reset()

    def reset(self, frame: int = 0) -> None:
        """Begin a text, at this frame."""
        self._frame = frame
        context = self._config.ngram.start if self._config.ngram else ()
        self._beam = [_Prefix("", 0, self._config.words, context, 0.0, blank=0.0)]

    def push(self, logits: Array) -> None:
        """Go on with logits (T, C)."""
        for row in log_softmax(logits):
            self._step(row.tolist())
            self._frame += 1

    @property
    def transcript(self) -> Transcript:
        """The text so far."""
        _, best = max(self._found().values(), key=lambda one: one[0])
        peaks, link = [], best.peaks
        while link is not None:
            peaks.append(link.last)
            link = link.before
        peaks.reverse()
        unfinished = len(best.text) - len(self._finished(best))  # characters
        return _transcript(peaks[: len(peaks) - unfinished], self._frame_s)

    @property
    def texts(self) -> dict[str, float]:
        """The log probability of each text that the beam holds, with what the n-gram adds."""
        return {text: rank for text, (rank, _) in self._found().items()}

    def _step(self, log_p: list[float]) -> None:
        """Go on with one frame."""
        likely = [label for label, p in enumerate(log_p) if label and p > _LEAST]
        found: dict[str, _Prefix] = {}
        for prefix in self._beam:
            total = prefix.total
            self._stay(found, prefix, total, log_p)
            for label in likely:
                # The same label again needs a blank between; a space after a space is none.
                source = prefix.blank if label == prefix.last else total
                if source == _NEVER or (label == self._space and prefix.last in (0, label)):
                    continue
                longer = self._extended(found, prefix, label)
                if longer is not None:
                    here = source + log_p[label]
                    peak = Peak(self._labels[label], self._frame, log_p[label])
                    longer.character = _add(longer.character, here)
                    longer.bring(here, _Peaks(peak, prefix.peaks))
        self._beam = nlargest(self._width, found.values(), key=lambda prefix: prefix.rank)

    def _stay(
        self, found: dict[str, _Prefix], prefix: _Prefix, total: float, log_p: list[float]
    ) -> None:
        """The alignments that write nothing more in this frame."""
        same = found.get(prefix.text)
        if same is None:
            same = _Prefix(prefix.text, prefix.last, prefix.node, prefix.context, prefix.bonus)
            found[prefix.text] = same
        same.blank = _add(same.blank, total + log_p[0])
        if prefix.last in (0, self._space) and self._space > 0:
            same.character = _add(same.character, total + log_p[self._space])
        elif prefix.last:
            same.character = _add(same.character, prefix.character + log_p[prefix.last])
        peaks = prefix.peaks
        if peaks is not None and prefix.character > prefix.blank:
            here = log_p[prefix.last]
            if here > peaks.last.log_probability:
                peaks = _Peaks(Peak(peaks.last.label, self._frame, here), peaks.before)
        same.bring(total + max(log_p[0], log_p[prefix.last]), peaks)

    def _extended(self, found: dict[str, _Prefix], prefix: _Prefix, label: int) -> _Prefix | None:
        """A prefix and a character or word, if the word list has such words."""
        written = self._labels[label] if prefix.text else self._labels[label].lstrip()
        text = prefix.text + written
        if text in found:
            return found[text]
        node, context, bonus = prefix.node, prefix.context, prefix.bonus
        if written[0] == " ":
            if node is not None:
                if "" not in node:
                    return None
                node = self._config.words
            context, bonus = self._with_word(prefix)
        if node is not None:
            for character in written.lstrip():
                if character not in node:
                    return None
                node = node[character]
            if self._is_of_words and "" not in node:
                return None
        found[text] = _Prefix(text, label, node, context, bonus)
        return found[text]

    def _with_word(self, prefix: _Prefix) -> tuple[tuple[str, ...], float]:
        """Context and bonus once its last word is finished."""
        word = prefix.text.rpartition(" ")[2]
        if self._config.ngram is None or not word:
            return prefix.context, prefix.bonus
        log_p = self._config.ngram.log_probability(word, prefix.context)
        bonus = prefix.bonus + self._config.alpha * log_p + self._config.beta
        return (*prefix.context, word)[-self._config.ngram.order :], bonus

    def _found(self) -> dict[str, tuple[float, _Prefix]]:
        """Each text as it would be if it ended here: its rank, and the best prefix that writes it.

        Where a word list leaves no prefix whose last word is finished, that word is left out.
        """
        whole = [p for p in self._beam if self._finished(p) == p.text]
        groups: dict[str, list[_Prefix]] = defaultdict(list)
        for prefix in whole or self._beam:
            groups[self._finished(prefix).rstrip()].append(prefix)
        found = {}
        for text, prefixes in groups.items():
            total = _NEVER
            for prefix in prefixes:
                total = _add(total, prefix.total)
            best = max(prefixes, key=lambda prefix: prefix.total)
            found[text] = total + self._ended(best), best
        return found

    def _finished(self, prefix: _Prefix) -> str:
        """Its text without a word that the word list does not have."""
        if prefix.node is None or prefix.node is self._config.words or "" in prefix.node:
            return prefix.text
        return prefix.text[: prefix.text.rfind(" ") + 1]

    def _ended(self, prefix: _Prefix) -> float:
        """What the n-gram says to it if it ends here."""
        if self._config.ngram is None or not prefix.text:
            return prefix.bonus
        context, bonus = self._with_word(prefix)
        return bonus + self._config.alpha * self._config.ngram.end(context)


def frame_s(spec: Spec) -> float:
    """Seconds of audio in one output frame; of what takes no time, 1."""
    if not isinstance(spec, ModelSpec):
        return 1.0
    return spec.chunk_length / spec.features.sample_rate


def _transcript(peaks: Iterable[Peak], seconds: float) -> Transcript:
    spoken: list[list[Peak]] = [[]]
    for peak in peaks:
        if peak.label[0] == " ":
            spoken.append([])
        if peak.label != " ":
            spoken[-1].append(peak)
    words, log_p = [], []
    for of_word in filter(None, spoken):
        log_p += [peak.log_probability for peak in of_word]
        words.append(
            Word(
                word="".join(peak.label for peak in of_word).lstrip(),
                start=round(of_word[0].frame * seconds, 3),
                end=round((of_word[-1].frame + 1) * seconds, 3),
                score=_mean_probability(log_p[-len(of_word) :]),
            )
        )
    text = " ".join(word.word for word in words)
    return Transcript(text, _mean_probability(log_p), tuple(words))


def _mean_probability(log_p: list[float]) -> float:
    return math.exp(sum(log_p) / len(log_p)) if log_p else 0.0


def _add(a: float, b: float) -> float:
    """The logarithm of the sum of two probabilities."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == _NEVER else high + math.log1p(math.exp(low - high))
