"""What words a text may have, and how probable: word lists, and n-grams in the ARPA format.

ARPA: the format of D. Paul's, as SRILM's ngram-format(5) describes it, which KenLM writes too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.stream import is_of_words, known_text, spelled
from cnngru_edge.models.spec.whole import Spec

Trie = dict[str, "Trie"]
"""The words that begin alike, by their next character; one that ends here has the key ''."""

_START, _END, _UNKNOWN = "<s>", "</s>", "<unk>"
_RARE = -7.0  # log10 of a word that is not in a model without <unk>: one in ten million
_LN10 = math.log(10)


@dataclass(frozen=True)
class Ngram:
    """A back-off model of words (S. Katz, 1987)."""

    order: int  # words in its longest n-gram
    grams: dict[tuple[str, ...], tuple[float, float]]  # log10 of probability, of back-off weight

    @property
    def start(self) -> tuple[str, ...]:
        """What comes before the first word of a text."""
        return (_START,)

    def log_probability(self, word: str, context: tuple[str, ...]) -> float:
        """The natural logarithm of a word's probability after those before it."""
        if (word,) not in self.grams:
            word = _UNKNOWN
        return _LN10 * self._log10(word, context)

    def end(self, context: tuple[str, ...]) -> float:
        """The natural logarithm of the probability that a text ends after these words."""
        return self.log_probability(_END, context) if (_END,) in self.grams else 0.0

    def _log10(self, word: str, context: tuple[str, ...]) -> float:
        backed_off = 0.0
        for start in range(max(0, len(context) - self.order + 1), len(context) + 1):
            before = context[start:]
            if found := self.grams.get((*before, word)):
                return backed_off + found[0]
            backed_off += self.grams.get(before, (0.0, 0.0))[1]
        return backed_off + _RARE


def read_words(path: Path, spec: Spec) -> Trie:
    """The words of a file, one on each line.

    Raises:
        SessionError: no such file, not UTF-8, without words, or with one that the model cannot
            write.
    """
    root: Trie = {}
    labels = [label for label in spec.labels if label != " "]  # none within a word
    for number, line in enumerate(_lines(path), start=1):
        units = [f" {line}"] if line and is_of_words(labels) else list(line)
        if strange := sorted(set(units) - set(labels)):
            raise SessionError(
                f"{path}: line {number} has {strange[0].strip() or ' '!r}, and "
                f"{known_text(labels)}; give one word on each line"
            )
        node = root
        for character in line:
            node = node.setdefault(character, {})
        if line:
            node[""] = {}
    if not root:
        raise SessionError(f"{path}: no words; give one on each line")
    return root


def read_arpa(path: Path, spec: Spec) -> Ngram:
    """An n-gram model in the ARPA format.

    Raises:
        SessionError: no such file, not ARPA, cut short, or no word in it that the model can write.
    """
    grams: dict[tuple[str, ...], tuple[float, float]] = {}
    expected: dict[int, int] = {}
    found: dict[int, int] = {}
    order, is_ended = 0, False
    for number, line in enumerate(_lines(path), start=1):
        try:
            if line.startswith("ngram ") and not order:
                size, _, count = line.removeprefix("ngram ").partition("=")
                expected[int(size)] = int(count)
            elif line.startswith("\\") and line.endswith("-grams:"):
                order = int(line[1:].partition("-")[0])
            elif line == "\\end\\":
                is_ended = True
                break
            elif line and order:
                probability, *words = line.split()
                backoff = float(words.pop()) if len(words) > order else 0.0
                if len(words) != order:
                    raise ValueError
                grams[tuple(words)] = float(probability), backoff
                found[order] = found.get(order, 0) + 1
        except ValueError as e:
            raise SessionError(f"{path}: line {number} is not ARPA: {line[:60]!r}") from e
    if not grams or not is_ended or any(found.get(n, 0) != expected[n] for n in expected):
        raise SessionError(f"{path}: not an n-gram model in the ARPA format, or cut short")
    words = [gram[0] for gram in grams if len(gram) == 1]
    if not any(set(spelled(spec.labels, word)) <= set(spec.labels) for word in words):
        raise SessionError(
            f"{path}: no word in it is one for this model: {known_text(spec.labels)}"
        )
    return Ngram(max(map(len, grams)), grams)


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise SessionError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8") as f:
            yield from (line.strip() for line in f)
    except UnicodeDecodeError as e:
        raise SessionError(f"{path}: not text in UTF-8 ({e})") from e
