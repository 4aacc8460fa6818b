"""Training a CTC model on rows of strings: the loss of each string, the state carried over all.

CTC: Graves et al. 2006. A GRU that has only heard single strings from a zero state forgets how to
listen when it runs on, and learns no blank for the silence between; see export.training.streams.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import edit_distance

from cnngru_edge.calibration.corpus.read import CALIB, TRAIN, Clip, Corpus, match_texts
from cnngru_edge.export.training.connected import (
    ConnectedConfig,
    RowBatch,
    RowBuilder,
    Utterance,
    collate,
    connect,
)
from cnngru_edge.export.training.run import StreamRun, TrainConfig, load_clips, resume_path
from cnngru_edge.models.errors import AudioError, CorpusError, SpecError
from cnngru_edge.models.nets.checkpoint import save_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import (
    ALPHABET,
    BLANK,
    CTC,
    ConvSpec,
    EndpointSpec,
    ModelSpec,
    spelled,
)
from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.stream import FLUSH_S

CTC_SPEC = ModelSpec(
    ALPHABET,
    # As a keyword model's, whose weights they can start from, but for a frame every 40 ms: a
    # character lasts longer, and there is half the work.
    convs=(
        ConvSpec(32, (5, 5), (2, 2)),
        ConvSpec(48, (3, 3), (2, 2)),
        ConvSpec(64, (3, 3), (1, 1)),
        ConvSpec(64, (3, 3), (1, 2)),
    ),
    hidden_size=192,
    num_layers=2,
    family=CTC,
)
"""What a CTC model is where nothing else is asked for."""

OF_WORDS_SPEC = replace(CTC_SPEC, endpoint=EndpointSpec(silence_s=1.2))
"""The same for labels that are words: each has one peak, so that more blanks lie between two."""

CTC_CONFIG = TrainConfig(
    epochs=20, batch_size=16, learning_rate=3e-3, warmup_epochs=1.0, average_decay=0.99
)
"""How a CTC model is trained where nothing else is asked for."""

CTC_FURTHER = replace(CTC_CONFIG, epochs=14, learning_rate=1e-3, easy_epochs=0)
"""How one is trained that can write already."""

_WORDS_IN_ROW = 24
"""Of recorded sentences: two or three of them."""


@dataclass(frozen=True)
class CtcReport:
    """What an epoch came to; the rest on the calibration speakers, of the averaged weights."""

    epoch: int
    train_loss: float  # for each character
    loss: float  # the same, undisturbed
    word_error_rate: float  # greedy
    kept: bool

    @property
    def summary(self) -> str:
        """In one line."""
        return (
            f"epoch {self.epoch}: training loss {self.train_loss:.3f}; other speakers: loss "
            f"{self.loss:.3f}, word errors {self.word_error_rate:.2%}"
            f"{', kept' if self.kept else ''}"
        )


def train_ctc(
    corpus: Corpus, model: CnnGru, out: Path, config: TrainConfig
) -> Iterator[CtcReport | AudioError]:
    """Train `model` on the corpus, one report an epoch; `out` is always the one to keep.

    That is the epoch of the lowest loss on the calibration speakers. A corpus of single words is
    joined into strings (`config.connected`), one with longer texts is taken as it is. The rest is
    as in `export.training.keywords.train`.

    Raises:
        CorpusError: no clips to train on, or none of the calibration set to choose the best by; a
            text with a character or word that the model does not have.
    """
    spec = model.spec
    match_texts(corpus.clips, spec.labels)
    clips, errors = load_clips([clip for clip in corpus.of(TRAIN) if clip.text], spec)
    held_out, more_errors = load_clips([clip for clip in corpus.of(CALIB) if clip.text], spec)
    noises, noise_errors = load_clips(corpus.noises_of(TRAIN), spec)
    yield from (*errors, *more_errors, *noise_errors)
    for name, loaded in ((TRAIN, clips), (CALIB, held_out)):
        if not loaded:
            raise CorpusError(f"{corpus.root}: no clips with a text in the set {name!r}")

    connected = _connected(config.connected, [clip for clip, _ in clips])
    builder = RowBuilder(
        _utterances(clips),
        [samples for _, samples in noises],
        sample_rate=spec.features.sample_rate,
        chunk_length=spec.chunk_length,
        config=connected,
    )
    validation = _validation(_utterances(held_out), spec, connected, config)
    run = StreamRun(model, config, builder.batches_per_epoch(config.batch_size))
    chance = np.random.default_rng([config.seed, 1_000_000])  # apart from any epoch's
    run.start(resume_path(out), lambda: next(builder.epoch(config.batch_size, chance)).audio)
    while run.epoch < config.epochs:
        ease = min(1.0, run.epoch / max(1, config.easy_epochs))
        losses = [
            run.step(batch.audio, partial(ctc_loss, batch, spec))
            for batch in builder.epoch(config.batch_size, run.chance(), ease)
        ]
        run.epoch += 1
        loss, word_error_rate = validate(run.averaged_model, validation)
        kept = -loss > run.best
        if kept:
            run.best = -loss
            save_checkpoint(run.averaged_model, out)
        run.save(resume_path(out))
        yield CtcReport(run.epoch, float(np.mean(losses)), loss, word_error_rate, kept)
    resume_path(out).unlink(missing_ok=True)


def choose_alphabet(corpus: Corpus, of_words: bool = False) -> tuple[str, ...]:
    """The labels of a CTC model: those for English, or all letters that the texts need.

    Or all their words, with a space before each: for a few words, with as many clips of each, which
    are then neither misspelled nor others.

    Raises:
        CorpusError: a text is written otherwise than it is said: capitals, digits, punctuation.
    """
    for clip in corpus.clips:
        for character in clip.text:
            if not (character in " '" or (character.isalpha() and character == character.lower())):
                raise CorpusError(
                    f"{clip.path}: text {clip.text!r} has {character!r}, expected letters in lower "
                    "case, apostrophes and single spaces"
                )
    if of_words:
        return BLANK, *sorted({f" {word}" for clip in corpus.clips for word in clip.text.split()})
    found = {character for clip in corpus.clips for character in clip.text}
    return ALPHABET if found <= set(ALPHABET) else (BLANK, *sorted(found | {" "}))


def take_convolutions(model: CnnGru, source: CnnGru) -> None:
    """Start from the convolutions and feature statistics of another model, of any family.

    Raises:
        SpecError: their features or convolutions are not alike.
    """
    if source.spec.features != model.spec.features:
        raise SpecError("the checkpoint to start from has other features than a CTC model")
    weights = source.convs.state_dict()
    shapes = {name: tensor.shape for name, tensor in model.convs.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise SpecError("the checkpoint to start from has other convolutions than a CTC model")
    model.convs.load_state_dict(weights)
    model.feature_mean, model.feature_std = source.feature_mean, source.feature_std


def ctc_loss(batch: RowBatch, spec: ModelSpec, logits: Tensor) -> Tensor:
    """The loss of each part of each row, over the characters of all.

    A text in characters begins with a space, as each of its words after the first does: whether a
    word is the first is nothing that can be heard, and decoders leave that space out.
    """
    log_probs = logits.log_softmax(2)
    parts = [
        log_probs[row, start:end]
        for row, ends in enumerate(batch.ends)
        for start, end in zip((0, *ends), ends, strict=False)
    ]
    texts = [text for of_row in batch.texts for text in of_row]
    before = " " if " " in spec.labels else ""
    written = [spelled(spec.labels, before + text) if text else [] for text in texts]
    targets = [torch.tensor([spec.labels.index(label) for label in one]) for one in written]
    loss: Tensor = nn.functional.ctc_loss(
        pad_sequence(parts),
        torch.cat(targets).long(),
        torch.tensor([len(part) for part in parts]),
        torch.tensor([len(target) for target in targets]),
        reduction="sum",
        zero_infinity=True,  # of a text too long for its frames
    )
    return loss / max(1, sum(len(text) for text in texts))


def greedy_texts(logits: Tensor, labels: Sequence[str]) -> list[str]:
    """The most probable label of each frame of (N, T, C), repetitions and blanks left out."""
    texts = []
    for best in logits.argmax(2):
        kept = torch.unique_consecutive(best)
        text = "".join(labels[i] for i in kept.tolist() if i)
        texts.append(" ".join(text.split()))
    return texts


@torch.no_grad()
def validate(model: CnnGru, batches: Sequence[RowBatch]) -> tuple[float, float]:
    """Loss for each character and word error rate of rows of one part each."""
    model.eval()
    losses, characters, edits, words = 0.0, 0, 0, 0
    for batch in batches:
        audio = torch.from_numpy(batch.audio)
        logits, _ = model(audio, model.initial_state(len(audio)))
        texts = [text for (text,) in batch.texts]
        count = sum(len(text) for text in texts)
        losses += count * ctc_loss(batch, model.spec, logits).item()
        characters += count
        for expected, found in zip(texts, greedy_texts(logits, model.spec.labels), strict=True):
            edits += edit_distance(expected.split(), found.split())
            words += len(expected.split())
    return losses / characters, edits / words


def _connected(config: ConnectedConfig, clips: Sequence[Clip]) -> ConnectedConfig:
    if any(" " in clip.text for clip in clips):
        return replace(config, words=(1, 1), words_in_row=_WORDS_IN_ROW)
    return config


def _utterances(clips: Sequence[tuple[Clip, Samples]]) -> list[Utterance]:
    return [Utterance(samples, clip.text, clip.speaker) for clip, samples in clips]


def _validation(
    clips: Sequence[Utterance], spec: ModelSpec, connected: ConnectedConfig, config: TrainConfig
) -> list[RowBatch]:
    rate = spec.features.sample_rate
    strings = connect(
        clips, rate, replace(connected, phrase_share=0.0), np.random.default_rng(config.seed)
    )
    rows = []
    for string in sorted(strings, key=lambda string: len(string.samples)):
        audio = np.pad(string.samples, (0, round(FLUSH_S * rate)))
        rows.append((audio, [len(audio)], [string.text]))
    size = config.batch_size
    return [collate(rows[i : i + size], spec.chunk_length) for i in range(0, len(rows), size)]
