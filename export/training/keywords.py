"""Training on streams: cross-entropy at the end of each word, the state carried across words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cnngru_edge.calibration.corpus.read import CALIB, TRAIN, Clip, Corpus, match_labels
from cnngru_edge.export.training.run import (
    StreamRun,
    TrainConfig,
    load_clips,
    resume_path,
    standard_error,
)
from cnngru_edge.export.training.streams import StreamBatch, StreamBuilder, StreamConfig, collate
from cnngru_edge.models.errors import AudioError, CorpusError
from cnngru_edge.models.nets.checkpoint import save_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import SILENCE, UNKNOWN, ModelSpec
from cnngru_edge.runtime.inputs.audio import Samples

LIGHT = TrainConfig(
    epochs=25,
    learning_rate=1e-3,
    warmup_epochs=1.0,
    dropout=0.1,
    frequency_mask=5,
    time_mask=8,
    streams=StreamConfig(
        noise_probability=0.5,
        snr_db=(0.0, 30.0),
        gain_db=(-15.0, 6.0),
        speed=(0.92, 1.09),
    ),
)
"""For a model that is already good: streams nearer to what will be heard, and smaller steps."""


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to; accuracies on the calibration speakers, of the averaged weights."""

    epoch: int
    train_loss: float
    accuracy: float
    loss: float
    kept: bool

    @property
    def summary(self) -> str:
        """In one line."""
        return (
            f"epoch {self.epoch}: training loss {self.train_loss:.3f}; other speakers: "
            f"loss {self.loss:.3f}, accuracy {self.accuracy:.2%}{', kept' if self.kept else ''}"
        )


def train(
    corpus: Corpus, model: CnnGru, out: Path, config: TrainConfig
) -> Iterator[EpochReport | AudioError]:
    """Train `model` on the corpus, one report an epoch; `out` is always the one to keep.

    That is the latest epoch whose accuracy on the calibration speakers is within a standard error
    of the best: a few hundred clips cannot tell more, and the rate of learning falls to the end.

    A model whose feature statistics were never set gets those of the corpus.

    A file `out`.resume beside it lets a killed training go on; it is removed at the end. A
    recording that cannot be read is yielded as its error and left out.

    Raises:
        CorpusError: no clips to train on, or none of the calibration set to choose the best by.
    """
    spec = model.spec
    clips, errors = load_clips(corpus.of(TRAIN), spec)
    held_out, more_errors = load_clips(corpus.of(CALIB), spec)
    noises, noise_errors = load_clips(corpus.noises_of(TRAIN), spec)
    yield from (*errors, *more_errors, *noise_errors)
    for name, loaded in ((TRAIN, clips), (CALIB, held_out)):
        if not loaded:
            raise CorpusError(f"{corpus.root}: no clips in the set {name!r}")

    builder = StreamBuilder(
        [samples for _, samples in clips],
        _targets([clip for clip, _ in clips], spec),
        [samples for _, samples in noises],
        silence=spec.labels.index(SILENCE) if SILENCE in spec.labels else None,
        sample_rate=spec.features.sample_rate,
        chunk_length=spec.chunk_length,
        config=config.streams,
    )
    validation = _validation_batches(held_out, spec, config)
    run = StreamRun(model, config, builder.batches_per_epoch(config.batch_size))
    chance = np.random.default_rng([config.seed, 1_000_000])  # apart from any epoch's
    run.start(resume_path(out), lambda: next(builder.epoch(config.batch_size, chance)).audio)
    while run.epoch < config.epochs:
        losses = [
            run.step(batch.audio, partial(_loss, config, batch))
            for batch in builder.epoch(config.batch_size, run.chance())
        ]
        run.epoch += 1
        averaged = run.averaged_model
        accuracy, loss = _validate(averaged, validation)
        run.best = max(run.best, accuracy)
        kept = accuracy >= run.best - standard_error(run.best, len(held_out))
        if kept:
            save_checkpoint(averaged, out)
        run.save(resume_path(out))
        yield EpochReport(run.epoch, float(np.mean(losses)), accuracy, loss, kept)
    resume_path(out).unlink(missing_ok=True)


def choose_labels(corpus: Corpus, words: Sequence[str] | None) -> tuple[str, ...]:
    """The labels of a model: `words`, or all of the corpus, with what goes beside them.

    `silence` where there is noise to learn it from, `unknown` where there are other words; first.

    Raises:
        CorpusError: a word that is not in the corpus.
    """
    found = {clip.label for clip in corpus.clips}
    chosen = tuple(words) if words else tuple(sorted(found - {SILENCE, UNKNOWN}))
    if missing := [word for word in chosen if word not in found]:
        raise CorpusError(f"{corpus.root}: no clips of {', '.join(missing)}")
    silence = (SILENCE,) if corpus.noises or SILENCE in found else ()
    unknown = (UNKNOWN,) if found - set(chosen) - {SILENCE} else ()
    return (*silence, *unknown, *(word for word in chosen if word not in (SILENCE, UNKNOWN)))


def _loss(config: TrainConfig, batch: StreamBatch, logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        _at_ends(logits, batch),
        torch.from_numpy(batch.targets).flatten(),
        label_smoothing=config.label_smoothing,
    )


def _at_ends(logits: Tensor, batch: StreamBatch) -> Tensor:
    """(N, T, C) logits to those of the frames in which segments end, (N * segments, C)."""
    frames = torch.from_numpy(batch.frames)[:, :, None].expand(-1, -1, logits.shape[2])
    return logits.gather(1, frames).flatten(0, 1)


def _targets(clips: Sequence[Clip], spec: ModelSpec) -> list[int]:
    expected = match_labels(clips, spec.labels)
    return [spec.labels.index(expected[clip.path]) for clip in clips]


def _validation_batches(
    clips: Sequence[tuple[Clip, Samples]], spec: ModelSpec, config: TrainConfig
) -> list[StreamBatch]:
    # Every clip once, in streams like those of training but undisturbed.
    targets = _targets([clip for clip, _ in clips], spec)
    order = np.random.default_rng(config.seed).permutation(len(clips))
    segments = min(config.streams.segments, len(clips))
    delay = round(config.streams.read_delay_s * spec.features.sample_rate)
    streams = []
    for rows in order[: len(order) // segments * segments].reshape(-1, segments):
        pieces = [clips[i][1] for i in rows]
        ends = np.cumsum([len(piece) for piece in pieces]) + delay
        audio = np.pad(np.concatenate(pieces), (0, delay))
        streams.append((audio, ends.tolist(), [targets[i] for i in rows]))
    return [
        collate(streams[i : i + config.batch_size], spec.chunk_length)
        for i in range(0, len(streams), config.batch_size)
    ]


@torch.no_grad()
def _validate(model: CnnGru, batches: Sequence[StreamBatch]) -> tuple[float, float]:
    model.eval()
    correct, losses, count = 0, 0.0, 0
    for batch in batches:
        audio = torch.from_numpy(batch.audio)
        logits = _at_ends(model(audio, model.initial_state(len(audio)))[0], batch)
        targets = torch.from_numpy(batch.targets).flatten()
        correct += int((logits.argmax(1) == targets).sum())
        losses += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return correct / count, losses / count
