"""Training on streams: cross-entropy at the end of each word, the state carried across words."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchaudio.functional import mask_along_axis_iid

from cnngru_edge.calibration.corpus import CALIB, TRAIN, Clip, Corpus, match_labels
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.checkpoint import save_checkpoint
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.errors import AudioError, CorpusError
from cnngru_edge.models.spec import SILENCE, UNKNOWN, ModelSpec
from cnngru_edge.models.streams import StreamBatch, StreamBuilder, StreamConfig, collate
from cnngru_edge.runtime.audio import Samples, read_audio


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    epochs: int = 80
    batch_size: int = 32  # streams
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.05
    dropout: float = 0.2
    average_decay: float = 0.998  # of the exponential moving average of the weights
    frequency_mask: int = 7  # mel bins, SpecAugment's F; twice a stream
    time_mask: int = 16  # frames, SpecAugment's T; four times a stream
    seed: int = 0
    streams: StreamConfig = field(default_factory=StreamConfig)


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
    clips, errors = _load(corpus.of(TRAIN), spec)
    held_out, more_errors = _load(corpus.of(CALIB), spec)
    noises, noise_errors = _load(corpus.noises_of(TRAIN), spec)
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
    run = _Run(model, config, builder.batches_per_epoch(config.batch_size))
    resume = out.with_name(f"{out.name}.resume")
    if resume.is_file():
        run.load(resume)
    elif not model.feature_mean.any():
        model.feature_mean, model.feature_std = _feature_statistics(model, builder, config)
        run.average = _averaged(model, config)
    while run.epoch < config.epochs:
        # Seeded by epoch, so that a resumed training hears what an unbroken one would have.
        torch.manual_seed(config.seed * 10_007 + run.epoch)
        rng = np.random.default_rng([config.seed, run.epoch])
        losses = [run.step(batch) for batch in builder.epoch(config.batch_size, rng)]
        run.epoch += 1
        averaged = run.averaged_model
        accuracy, loss = _validate(averaged, validation)
        run.best_accuracy = max(run.best_accuracy, accuracy)
        kept = accuracy >= run.best_accuracy - _standard_error(run.best_accuracy, len(held_out))
        if kept:
            save_checkpoint(averaged, out)
        run.save(resume)
        yield EpochReport(run.epoch, float(np.mean(losses)), accuracy, loss, kept)
    resume.unlink(missing_ok=True)


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


class _Run:
    """Everything that changes while training, so that it can be put down and taken up."""

    def __init__(self, model: CnnGru, config: TrainConfig, steps_per_epoch: int) -> None:
        self.config = config
        self.model = model
        self.model.dropout.p = config.dropout
        self.average = _averaged(self.model, config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        warmup = round(config.warmup_epochs * steps_per_epoch)
        total = config.epochs * steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(
                (step + 1) / (warmup + 1), _half_cosine(step - warmup, total - warmup)
            ),
        )
        self.epoch = 0
        self.best_accuracy = 0.0

    @property
    def averaged_model(self) -> CnnGru:
        """The model with the moving average of the weights."""
        assert isinstance(self.average.module, CnnGru)
        return self.average.module

    def step(self, batch: StreamBatch) -> float:
        """One update; the loss."""
        self.model.train()
        audio = torch.from_numpy(batch.audio)
        state = self.model.initial_state(len(audio))
        with torch.no_grad():
            features, _ = self.model.extract(audio, state[0])
            features = self._mask(features)
        logits, _ = self.model.classify(features, state[1:])
        loss = nn.functional.cross_entropy(
            _at_ends(logits, batch),
            torch.from_numpy(batch.targets).flatten(),
            label_smoothing=self.config.label_smoothing,
        )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()

    def _mask(self, features: Tensor) -> Tensor:
        # SpecAugment (Park et al. 2019) without time warping; normalized features have mean zero.
        features = features[:, None]  # (N, 1, T, M)
        for _ in range(2):
            features = mask_along_axis_iid(features, self.config.frequency_mask, 0.0, axis=3)
        for _ in range(4):
            features = mask_along_axis_iid(features, self.config.time_mask, 0.0, axis=2)
        return features[:, 0]

    def save(self, path: Path) -> None:
        """Put everything down."""
        everything = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best_accuracy": self.best_accuracy,
            "spec": self.model.spec.to_json(),
            "config": repr(self.config),
        }
        buffer = io.BytesIO()
        torch.save(everything, buffer)
        write_file(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Take everything up again."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        if (saved["spec"], saved["config"]) != (self.model.spec.to_json(), repr(self.config)):
            raise CorpusError(
                f"{path}: a training with other settings was stopped here; go on with those, or "
                "remove the file to start anew"
            )
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.epoch, self.best_accuracy = saved["epoch"], saved["best_accuracy"]


def _averaged(model: CnnGru, config: TrainConfig) -> AveragedModel:
    return AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(config.average_decay),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )


def _standard_error(share: float, count: int) -> float:
    """Of a share of so many clips, after the binomial distribution."""
    return math.sqrt(share * (1 - share) / count)


def _half_cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, step / max(1, total)))))


def _at_ends(logits: Tensor, batch: StreamBatch) -> Tensor:
    """(N, T, C) logits to those of the frames in which segments end, (N * segments, C)."""
    frames = torch.from_numpy(batch.frames)[:, :, None].expand(-1, -1, logits.shape[2])
    return logits.gather(1, frames).flatten(0, 1)


def _load(
    clips: Sequence[Clip], spec: ModelSpec
) -> tuple[list[tuple[Clip, Samples]], list[AudioError]]:
    loaded, errors = [], []
    for clip in clips:
        try:
            loaded.append((clip, read_audio(clip.path, spec.features.sample_rate).samples))
        except AudioError as e:
            errors.append(e)
    return loaded, errors


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


@torch.no_grad()
def _feature_statistics(
    model: CnnGru, builder: StreamBuilder, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([config.seed, 1_000_000])  # apart from any epoch's
    batch = next(builder.epoch(config.batch_size, rng))
    audio = torch.from_numpy(batch.audio)
    features, _ = model.log_mel(audio, model.initial_state(len(audio))[0])
    return features.mean((0, 1)), features.std((0, 1))
