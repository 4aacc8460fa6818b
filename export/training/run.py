"""What every training shares: its settings, its steps, and how it goes on after a kill."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchaudio.functional import mask_along_axis_iid

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.training.connected import ConnectedConfig
from cnngru_edge.export.training.streams import StreamConfig
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import AudioError, CorpusError
from cnngru_edge.models.nets.checkpoint import Model
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.runtime.inputs.audio import Samples, read_audio

M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    epochs: int = 80
    batch_size: int = 32  # streams, rows of strings, phrases or images
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.05  # of a model that answers labels
    dropout: float = 0.2
    average_decay: float = 0.998  # of the exponential moving average of the weights
    frequency_mask: int = 7  # mel bins, SpecAugment's F; twice a stream
    time_mask: int = 16  # frames, SpecAugment's T; four times a stream
    unknown_words: float = 0.0  # share of the words that a text model is not told
    seed: int = 0
    streams: StreamConfig = field(default_factory=StreamConfig)  # of a keyword model
    connected: ConnectedConfig = field(default_factory=ConnectedConfig)  # of a CTC model
    easy_epochs: int = 5  # of a CTC model: in which strings grow from a word, and noise comes


class Run(Generic[M]):
    """Everything that changes while training, so that it can be put down and taken up."""

    def __init__(self, model: M, config: TrainConfig, steps_per_epoch: int) -> None:
        self.config = config
        self.model = model
        self.model.dropout.p = config.dropout
        self.average = self._averaged()
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
        self.best = -math.inf  # the higher the better

    @property
    def averaged_model(self) -> M:
        """The model with the moving average of the weights."""
        return cast("M", self.average.module)

    def go_on(self, resume: Path) -> bool:
        """Take up what `save` put down in this file; whether there is one."""
        if not resume.is_file():
            return False
        self._load(resume)
        return True

    def chance(self) -> np.random.Generator:
        """Seeded by epoch, so that a resumed training hears what an unbroken one would have."""
        torch.manual_seed(self.config.seed * 10_007 + self.epoch)
        return np.random.default_rng([self.config.seed, self.epoch])

    def update(self, loss: Tensor) -> float:
        """One step of the weights against a loss of `model`; the loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()

    def save(self, path: Path) -> None:
        """Put everything down."""
        everything = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "spec": self.model.spec.to_json(),
            "config": repr(self.config),
        }
        buffer = io.BytesIO()
        torch.save(everything, buffer)
        write_file(path, buffer.getvalue())

    def _load(self, path: Path) -> None:
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
        self.epoch, self.best = saved["epoch"], saved["best"]

    def _averaged(self) -> AveragedModel:
        decay = self.config.average_decay
        return AveragedModel(
            self.model,
            multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )


class StreamRun(Run[CnnGru]):
    """Of a model that hears streams: with the statistics of its features, and SpecAugment."""

    def start(self, resume: Path, heard: Callable[[], Samples]) -> None:
        """Go on from the file, if there is one; else with the statistics of what will be heard."""
        if not self.go_on(resume) and not self.model.feature_mean.any():
            self.model.feature_mean, self.model.feature_std = _statistics(self.model, heard())
            self.average = self._averaged()

    def step(self, samples: Samples, loss_of: Callable[[Tensor], Tensor]) -> float:
        """One update by the loss of the logits (N, T, C) of samples (N, S); the loss."""
        self.model.train()
        audio = torch.from_numpy(samples)
        state = self.model.initial_state(len(audio))
        with torch.no_grad():
            features, _ = self.model.extract(audio, state[0])
            features = self._mask(features)
        logits, _ = self.model.classify(features, state[1:])
        return self.update(loss_of(logits))

    def _mask(self, features: Tensor) -> Tensor:
        # SpecAugment (Park et al. 2019) without time warping; normalized features have mean zero.
        features = features[:, None]  # (N, 1, T, M)
        for _ in range(2):
            features = mask_along_axis_iid(features, self.config.frequency_mask, 0.0, axis=3)
        for _ in range(4):
            features = mask_along_axis_iid(features, self.config.time_mask, 0.0, axis=2)
        return features[:, 0]


def resume_path(out: Path) -> Path:
    """Where a training that writes `out` is put down."""
    return out.with_name(f"{out.name}.resume")


def load_clips(
    clips: Sequence[Clip], spec: ModelSpec
) -> tuple[list[tuple[Clip, Samples]], list[AudioError]]:
    """The recordings at the model's sample rate, and the errors of those that cannot be read."""
    loaded, errors = [], []
    for clip in clips:
        try:
            loaded.append((clip, read_audio(clip.path, spec.features.sample_rate).samples))
        except AudioError as e:
            errors.append(e)
    return loaded, errors


def standard_error(share: float, count: int) -> float:
    """Of a share of so many examples, after the binomial distribution."""
    return math.sqrt(share * (1 - share) / count)


@torch.no_grad()
def _statistics(model: CnnGru, samples: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    audio = torch.from_numpy(samples)
    features, _ = model.log_mel(audio, model.initial_state(len(audio))[0])
    return features.mean((0, 1)), features.std((0, 1))


def _half_cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, step / max(1, total)))))
