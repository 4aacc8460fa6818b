"""Training models that take their input whole: intents of phrases, and lines of text in images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cnngru_edge.calibration.corpus.read import (
    CALIB,
    TRAIN,
    Clip,
    Corpus,
    match_labels,
    match_texts,
)
from cnngru_edge.export.training.ctc import greedy_texts
from cnngru_edge.export.training.run import Run, TrainConfig, resume_path, standard_error
from cnngru_edge.models.errors import CorpusError, InputError
from cnngru_edge.models.nets.checkpoint import save_checkpoint
from cnngru_edge.models.nets.crnn import DIGITS, Crnn
from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru
from cnngru_edge.models.spec.stream import BLANK
from cnngru_edge.models.spec.whole import PADDING, UNKNOWN_WORD, TokenInput, WholeSpec
from cnngru_edge.runtime.inputs.read import read_input, words_of
from cnngru_edge.runtime.session import Array

TEXT_CONFIG = TrainConfig(
    epochs=12,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=1.0,
    dropout=0.3,
    average_decay=0.99,
    unknown_words=0.1,
)
"""How a text model is trained where nothing else is asked for."""

CRNN_CONFIG = TrainConfig(
    epochs=9,
    batch_size=32,
    learning_rate=4e-3,
    warmup_epochs=0.5,
    dropout=0.1,
    average_decay=0.99,
)
"""How a CRNN is trained where nothing else is asked for."""


@dataclass(frozen=True)
class WholeReport:
    """What an epoch came to; all but the first on the calibration set, of the averaged weights."""

    epoch: int
    train_loss: float
    loss: float
    accuracy: float  # share of the examples that are answered right, of texts without an error
    kept: bool

    @property
    def summary(self) -> str:
        """In one line."""
        return (
            f"epoch {self.epoch}: training loss {self.train_loss:.3f}; held out: loss "
            f"{self.loss:.3f}, accuracy {self.accuracy:.2%}{', kept' if self.kept else ''}"
        )


@dataclass(frozen=True)
class Example:
    """What a model is given, without the batch axis, and what it should answer."""

    given: Array
    expected: str


@dataclass(frozen=True)
class Batch:
    """Examples side by side."""

    given: Tensor  # (N, ...)
    expected: list[str]


def train_whole(
    corpus: Corpus, model: TextCnnGru | Crnn, out: Path, config: TrainConfig
) -> Iterator[WholeReport | InputError]:
    """Train `model` on the corpus, one report an epoch; `out` is always the one to keep.

    That is the latest epoch whose accuracy on the calibration set is within a standard error of
    the best. The rest is as in `export.training.keywords.train`.

    Raises:
        CorpusError: nothing to train on, or nothing in the calibration set to choose the best by;
            a label or a character that the model does not have.
    """
    spec = model.spec
    examples, errors = load_examples(corpus.of(TRAIN), spec)
    held_out, more_errors = load_examples(corpus.of(CALIB), spec)
    yield from (*errors, *more_errors)
    for name, loaded in ((TRAIN, examples), (CALIB, held_out)):
        if not loaded:
            raise CorpusError(f"{corpus.root}: nothing that can be used in the set {name!r}")

    validation = batches_of(held_out, spec, config, np.random.default_rng(config.seed))
    steps = len(batches_of(examples, spec, config, np.random.default_rng(config.seed)))
    run = Run(model, config, steps)
    run.go_on(resume_path(out))
    while run.epoch < config.epochs:
        chance = run.chance()
        losses = []
        for batch in batches_of(examples, spec, config, chance):
            model.train()
            given = batch.given
            if isinstance(spec.input, TokenInput):
                given = _without_some_words(given, config.unknown_words, chance)
            losses.append(run.update(_loss(spec, model(given), batch.expected, config)))
        run.epoch += 1
        accuracy, loss = validate(run.averaged_model, validation, config)
        run.best = max(run.best, accuracy)
        kept = accuracy >= run.best - standard_error(run.best, len(held_out))
        if kept:
            save_checkpoint(run.averaged_model, out)
        run.save(resume_path(out))
        yield WholeReport(run.epoch, float(np.mean(losses)), loss, accuracy, kept)
    resume_path(out).unlink(missing_ok=True)


def choose_vocabulary(corpus: Corpus) -> tuple[str, ...]:
    """The words that are at least twice in the phrases to train on.

    Raises:
        CorpusError: the corpus has no phrases.
    """
    if not all(clip.is_phrase for clip in corpus.clips):
        raise CorpusError(
            f"{corpus.root}: no phrases; a manifest.csv with the columns text, set and label, and "
            "no path, lists them"
        )
    counts = Counter(word for clip in corpus.of(TRAIN) for word in words_of(clip.text))
    return (PADDING, UNKNOWN_WORD, *sorted(word for word, n in counts.items() if n > 1))


def choose_intents(corpus: Corpus) -> tuple[str, ...]:
    """The labels of the phrases to train on.

    Raises:
        CorpusError: there are none.
    """
    if not corpus.of(TRAIN):
        raise CorpusError(f"{corpus.root}: nothing in the set 'train'")
    return tuple(sorted({clip.label for clip in corpus.of(TRAIN)}))


def choose_characters(corpus: Corpus) -> tuple[str, ...]:
    """The labels of a CRNN: the ten digits, or all characters of the texts.

    Raises:
        CorpusError: the corpus has no images with texts.
    """
    if any(clip.is_phrase for clip in corpus.clips):
        raise CorpusError(
            f"{corpus.root}: no images; a manifest.csv with the columns path, set and text lists "
            "them"
        )
    found = {character for clip in corpus.clips for character in clip.text}
    return DIGITS if found <= set(DIGITS) else (BLANK, *sorted(found))


def load_examples(clips: Sequence[Clip], spec: WholeSpec) -> tuple[list[Example], list[InputError]]:
    """What the model is given and should answer, and the errors of what cannot be read."""
    truth = (
        match_texts(clips, spec.labels) if spec.writes_text else match_labels(clips, spec.labels)
    )
    examples, errors = [], []
    for clip in clips:
        try:
            examples.append(Example(read_input(spec, clip.source), truth[clip.path]))
        except InputError as e:
            errors.append(e)
    return examples, errors


def batches_of(
    examples: Sequence[Example], spec: WholeSpec, config: TrainConfig, chance: np.random.Generator
) -> list[Batch]:
    """Every example once: phrases of one length together, images of about one width.

    No padding word reaches a GRU; the narrower images end with their last column, as `fitted` has
    it, which is at most a few pixels more of the ground.
    """
    lengths = np.array([example.given.shape[-1] for example in examples])
    order = chance.permutation(len(examples))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups = [order]
    if not spec.writes_text:
        groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
    size = config.batch_size
    rows = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    return [_collate([examples[i] for i in rows[k]]) for k in chance.permutation(len(rows))]


@torch.no_grad()
def validate(
    model: TextCnnGru | Crnn, batches: Sequence[Batch], config: TrainConfig
) -> tuple[float, float]:
    """Share of the examples that are answered right, and their loss."""
    model.eval()
    right, losses, count = 0, 0.0, 0
    for batch in batches:
        logits = model(batch.given)
        found = answers(model.spec, logits)
        right += sum(a == b for a, b in zip(found, batch.expected, strict=True))
        losses += len(found) * _loss(model.spec, logits, batch.expected, config).item()
        count += len(found)
    return right / count, losses / count


def answers(spec: WholeSpec, logits: Tensor) -> list[str]:
    """The label or, greedily, the text of each of (N, T, C) logits."""
    if spec.writes_text:
        return greedy_texts(logits, spec.labels)
    return [spec.labels[i] for i in logits[:, 0].argmax(1).tolist()]


def _loss(spec: WholeSpec, logits: Tensor, expected: Sequence[str], config: TrainConfig) -> Tensor:
    if not spec.writes_text:
        targets = torch.tensor([spec.labels.index(label) for label in expected])
        return nn.functional.cross_entropy(
            logits[:, 0], targets, label_smoothing=config.label_smoothing
        )
    loss: Tensor = nn.functional.ctc_loss(
        logits.log_softmax(2).transpose(0, 1),
        torch.tensor([spec.labels.index(c) for text in expected for c in text]),
        torch.full((len(logits),), logits.shape[1]),
        torch.tensor([len(text) for text in expected]),
        reduction="sum",
        zero_infinity=True,  # of a text too long for its columns
    )
    return loss / max(1, sum(len(text) for text in expected))


def _collate(examples: Sequence[Example]) -> Batch:
    widest = max(example.given.shape[-1] for example in examples)
    rows = []
    for example in examples:
        missing = widest - example.given.shape[-1]
        pads = [(0, 0)] * (example.given.ndim - 1) + [(0, missing)]
        rows.append(np.pad(example.given, pads, mode="edge"))
    return Batch(torch.from_numpy(np.stack(rows)), [example.expected for example in examples])


def _without_some_words(given: Tensor, share: float, chance: np.random.Generator) -> Tensor:
    unknown = torch.from_numpy(chance.random(given.shape) < share)
    return given.masked_fill(unknown, 1)  # the place of UNKNOWN_WORD in every vocabulary
