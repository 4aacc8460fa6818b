import dataclasses
from pathlib import Path

import needs_torchaudio  # noqa: F401
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import TINY_SPEC

from cnngru_edge.calibration.corpus.read import Clip, Corpus, read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.export.training.keywords import choose_labels, train
from cnngru_edge.export.training.run import TrainConfig
from cnngru_edge.export.training.streams import StreamConfig
from cnngru_edge.models.errors import AudioError, CorpusError
from cnngru_edge.models.nets.checkpoint import load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru

SPEC = dataclasses.replace(
    TINY_SPEC, labels=("silence", "low", "high"), hidden_size=16, num_layers=1
)
CONFIG = TrainConfig(
    epochs=4,
    learning_rate=0.01,
    batch_size=4,
    warmup_epochs=1.0,
    average_decay=0.5,
    frequency_mask=2,  # of eight mel bins
    time_mask=4,
    dropout=0.0,
    label_smoothing=0.0,
    streams=StreamConfig(segments=2, noise_probability=0.2, gap_s=(0.0, 0.01), read_delay_s=0.0),
)


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Corpus:
    """Two words that a tiny model can tell apart: a low tone and a high one."""
    root = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows = ["path,set,label,speaker"]
    time = np.arange(8000) / 16_000
    for set_name, count in (("train", 48), ("calib", 12)):
        for i in range(count):
            label, hertz = (("low", 300), ("high", 2500))[i % 2]
            tone = np.sin(2 * np.pi * hertz * rng.uniform(0.9, 1.1) * time) * np.hanning(8000)
            path = f"{label}/{set_name}{i}.wav"
            (root / label).mkdir(exist_ok=True)
            soundfile.write(root / path, 0.5 * tone, 16_000)
            rows.append(f"{path},{set_name},{label},{set_name}{i}")
    soundfile.write(root / "noise.wav", 0.1 * rng.standard_normal(32_000), 16_000)
    rows.append("noise.wav,train,_background_noise_,")
    (root / "manifest.csv").write_text("\n".join(rows))
    return read_corpus(root)


def run(corpus: Corpus, out: Path, config: TrainConfig, epochs: int | None = None) -> list:
    reports = []
    torch.manual_seed(0)
    for report in train(corpus, CnnGru(SPEC), out, config):
        reports.append(report)
        if epochs is not None and len(reports) == epochs:
            break
    return reports


def test_it_learns_and_is_kept(tones, tmp_path):
    out = tmp_path / "tones.safetensors"
    reports = run(tones, out, CONFIG)
    assert reports[-1].train_loss < 0.8 * reports[0].train_loss
    assert max(report.accuracy for report in reports) >= 0.9
    assert reports[0].kept
    assert reports[-1].kept
    assert load_checkpoint(out).spec == SPEC
    assert list(tmp_path.iterdir()) == [out]  # nothing is left to resume


def test_a_killed_training_goes_on_as_if_it_had_not_been(tones, tmp_path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    expected = run(tones, whole, CONFIG)
    first = run(tones, broken, CONFIG, epochs=2)
    assert (tmp_path / "broken.safetensors.resume").is_file()
    rest = run(tones, broken, CONFIG)
    assert [*first, *rest] == expected
    assert broken.read_bytes() == whole.read_bytes()


def test_other_settings_do_not_take_up_a_training(tones, tmp_path):
    out = tmp_path / "tones.safetensors"
    run(tones, out, CONFIG, epochs=1)
    with pytest.raises(CorpusError, match="a training with other settings was stopped here"):
        run(tones, out, dataclasses.replace(CONFIG, seed=1))


def test_what_cannot_be_read_is_named_and_left_out(tones, tmp_path):
    missing = Clip(tmp_path / "gone.wav", "low", "train", "x")
    corpus = dataclasses.replace(tones, clips=(*tones.clips, missing))
    reports = run(corpus, tmp_path / "out.safetensors", dataclasses.replace(CONFIG, epochs=1))
    assert isinstance(reports[0], AudioError)
    assert "gone.wav: no such file" in str(reports[0])
    assert reports[1].epoch == 1


def test_without_clips_to_choose_by_there_is_no_training(tones, tmp_path):
    corpus = dataclasses.replace(tones, clips=tones.of("train"))
    with pytest.raises(CorpusError, match="no clips in the set 'calib'"):
        run(corpus, tmp_path / "out.safetensors", CONFIG)


def test_features_are_normalized_by_what_was_heard(tones, tmp_path):
    out = tmp_path / "tones.safetensors"
    run(tones, out, dataclasses.replace(CONFIG, epochs=1))
    model = load_checkpoint(out)
    assert not torch.equal(model.feature_mean, torch.zeros(8))
    assert (model.feature_std > 0).all()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, ("silence", "high", "low")),
        (("low", "high"), ("silence", "low", "high")),
        (("low",), ("silence", "unknown", "low")),
    ],
)
def test_labels_are_the_words_and_what_goes_beside_them(tones, words, expected):
    assert choose_labels(tones, words) == expected


def test_a_word_without_clips_is_refused(tones):
    with pytest.raises(CorpusError, match="no clips of middle"):
        choose_labels(tones, ("low", "middle"))


def test_the_command_trains_and_goes_on_from_a_checkpoint(tones, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    start = ["train", "--data", str(tones.root), "--epochs", "1"]
    sizes = ["--labels", "low,high", "--hidden-size", "8", "--num-layers", "2"]
    done = CliRunner().invoke(main, [*start, *sizes, "--out", str(first)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{first}\n"
    assert "epoch 1: training loss" in done.stderr
    spec = load_checkpoint(first).spec
    assert (spec.labels, spec.hidden_size, spec.num_layers) == (("silence", "low", "high"), 8, 2)

    done = CliRunner().invoke(main, [*start, "--init", str(first), "--light", "--out", str(second)])
    assert done.exit_code == 0, done.stderr
    mean = load_checkpoint(first).feature_mean
    assert torch.equal(load_checkpoint(second).feature_mean, mean)  # what the weights are used to

    done = CliRunner().invoke(main, [*start, *sizes, "--init", str(first), "--out", str(second)])
    assert done.exit_code == 2
    assert "--init settles labels and layers" in done.stderr
