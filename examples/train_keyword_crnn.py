"""Train the example module on a manifest of one-word clips, in plain torch and torchaudio.

python examples/train_keyword_crnn.py MANIFEST.csv sc12 examples/keyword_crnn.pt
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile
import torch
from keyword_crnn import KeywordCrnn
from torch import Tensor, nn
from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

LABELS = [
    "yes",
    "no",
    "up",
    "down",
    "left",
    "right",
    "on",
    "off",
    "stop",
    "go",
    "unknown",
    "silence",
]
SECOND = 16_000


def read(manifest: Path, task: str, sets: set[str]) -> tuple[Tensor, Tensor]:
    """Clips of a second, and the place of each label."""
    clips, labels = [], []
    for row in csv.DictReader(manifest.open()):
        if row["task"] == task and row["set"] in sets:
            samples, _ = soundfile.read(manifest.parent / row["path"], dtype="float32")
            clip = np.zeros(SECOND, np.float32)
            clip[: len(samples[:SECOND])] = samples[:SECOND]
            clips.append(clip)
            labels.append(LABELS.index(row["label"] if row["label"] in LABELS else "unknown"))
    return torch.from_numpy(np.stack(clips)), torch.tensor(labels)


def read_noise(manifest: Path) -> Tensor:
    """All noise to train with, in one row."""
    rows = [r for r in csv.DictReader(manifest.open()) if r["task"] == "noise"]
    paths = [manifest.parent / row["path"] for row in rows if row["set"] == "train"]
    noises = [soundfile.read(path, dtype="float32", always_2d=True)[0][:, 0] for path in paths]
    row = np.concatenate(noises)
    return torch.from_numpy(np.tile(row, 1 + SECOND // len(row)))


def main(manifest: Path, task: str, out: Path, epochs: int) -> None:
    """Train, and write the weights of the last epoch."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    clips, labels = read(manifest, task, {"train"})
    held_out, truth = read(manifest, task, {"calib"})
    noise = read_noise(manifest)
    silence = len(clips) // 14
    mel = MelSpectrogram(SECOND, 512, 480, 160, f_min=20, f_max=7600, n_mels=40)
    masks = nn.Sequential(FrequencyMasking(7), TimeMasking(20))
    model = KeywordCrnn()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    batches = (len(clips) + silence) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches)
    counts = torch.bincount(labels, minlength=len(LABELS)).clamp(min=1).float()
    weights = (counts.median() / counts).sqrt().clamp(0.5, 2.0)
    loss_of = nn.CrossEntropyLoss(weight=weights, label_smoothing=0.05)

    def features(audio: Tensor) -> Tensor:
        return ((torch.log(mel(audio) + 1e-4) + 4.0) / 3.0).transpose(1, 2)[:, None]

    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(clips) + silence)
        for i in range(batches):
            chosen = order[64 * i : 64 * i + 64]
            is_clip = chosen < len(clips)
            audio = torch.zeros(len(chosen), SECOND)
            audio[is_clip] = clips[chosen[is_clip]]
            target = torch.full((len(chosen),), LABELS.index("silence"))
            target[is_clip] = labels[chosen[is_clip]]
            shifts = torch.randint(-1600, 1600, (len(chosen),)).tolist()
            audio = torch.stack([a.roll(s) for a, s in zip(audio, shifts, strict=True)])
            audio = audio * 10 ** torch.empty(len(chosen), 1).uniform_(-0.9, 0.3)
            starts = torch.randint(len(noise) - SECOND, (len(chosen),)).tolist()
            beside = torch.stack([noise[s : s + SECOND] for s in starts])
            audio = audio + beside * torch.rand(len(chosen), 1) ** 3
            with torch.no_grad():
                given = masks(features(audio))
            loss = loss_of(model(given), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            right = (model(features(held_out)).argmax(1) == truth).float().mean()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, other speakers {right:.2%}", flush=True)
    torch.save({"epoch": epochs, "state_dict": model.state_dict()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the example module.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=24)
    main(**vars(parser.parse_args()))
