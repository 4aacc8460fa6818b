import dataclasses
import itertools
from pathlib import Path

import needs_torchaudio  # noqa: F401
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import TINY_SPEC

from cnngru_edge.calibration.corpus.read import DEMO, Clip, Corpus, read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.export.training.connected import ConnectedConfig, RowBatch
from cnngru_edge.export.training.ctc import (
    CTC_SPEC,
    choose_alphabet,
    ctc_loss,
    greedy_texts,
    take_convolutions,
    train_ctc,
)
from cnngru_edge.export.training.run import TrainConfig
from cnngru_edge.models.errors import AudioError, CorpusError, SpecError
from cnngru_edge.models.nets.checkpoint import load_checkpoint, save_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ALPHABET, BLANK, CTC, ConvSpec

SPEC = dataclasses.replace(
    TINY_SPEC,
    labels=("<blank>", " ", "a", "o"),
    convs=(ConvSpec(4, (3, 3), (2, 2)), ConvSpec(6, (4, 3), (4, 2))),  # 40 ms
    hidden_size=32,
    num_layers=1,
    family=CTC,
)
CONFIG = TrainConfig(
    epochs=3,
    learning_rate=0.01,
    batch_size=2,
    warmup_epochs=0.5,
    average_decay=0.5,
    frequency_mask=1,
    time_mask=0,
    dropout=0.0,
    easy_epochs=5,
    connected=ConnectedConfig(
        words=(1, 2), words_in_row=3, noise_probability=0.0, gain_db=(-3.0, 3.0), speed=(0.95, 1.05)
    ),
)


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Corpus:
    """Two words of a letter each: a low tone and a high one."""
    root = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows = ["path,set,text,speaker"]
    time = np.arange(4800) / 16_000
    for set_name, count in (("train", 90), ("calib", 12)):
        for i in range(count):
            text, hertz = (("a", 300), ("o", 2500))[i % 2]
            tone = np.sin(2 * np.pi * hertz * rng.uniform(0.9, 1.1) * time) * np.hanning(4800)
            path = f"{set_name}{i}.wav"
            soundfile.write(root / path, np.pad(0.5 * tone, 1600), 16_000)
            rows.append(f"{path},{set_name},{text},{set_name}{i // 6}")
    (root / "manifest.csv").write_text("\n".join(rows))
    return read_corpus(root)


def run(corpus, out, config, epochs=None):
    torch.manual_seed(0)
    return list(itertools.islice(train_ctc(corpus, CnnGru(SPEC), out, config), epochs))


def test_it_learns_and_the_best_is_kept(tones, tmp_path):
    out = tmp_path / "tones.safetensors"
    reports = run(tones, out, dataclasses.replace(CONFIG, epochs=12))
    assert reports[-1].train_loss < 0.8  # above 1 without telling the tones apart
    assert min(report.word_error_rate for report in reports) < 0.8  # 1 while all is blank
    best = min(reports, key=lambda report: report.loss)
    assert best.kept
    assert not any(report.kept for report in reports[best.epoch :])
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


def test_a_text_that_the_model_cannot_write_is_refused(tones, tmp_path):
    strange = Clip(tmp_path / "x.wav", "", "train", "x", "axe")
    corpus = dataclasses.replace(tones, clips=(*tones.clips, strange))
    with pytest.raises(CorpusError, match=r"x.wav: text 'axe' has 'e'"):
        run(corpus, tmp_path / "out.safetensors", CONFIG)


def test_without_texts_to_choose_by_there_is_no_training(tones, tmp_path):
    silent = [dataclasses.replace(clip, text="") for clip in tones.of("calib")]
    corpus = dataclasses.replace(tones, clips=(*tones.of("train"), *silent))
    with pytest.raises(CorpusError, match="no clips with a text in the set 'calib'"):
        run(corpus, tmp_path / "out.safetensors", CONFIG)


def test_what_cannot_be_read_is_named_and_left_out(tones, tmp_path):
    missing = Clip(tmp_path / "gone.wav", "", "train", "x", "a")
    corpus = dataclasses.replace(tones, clips=(*tones.clips, missing))
    reports = run(corpus, tmp_path / "out.safetensors", dataclasses.replace(CONFIG, epochs=1))
    assert isinstance(reports[0], AudioError)
    assert "gone.wav: no such file" in str(reports[0])
    assert reports[1].epoch == 1


def test_words_are_learned_as_labels(tones, tmp_path):
    spec = dataclasses.replace(SPEC, labels=choose_alphabet(tones, of_words=True))
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, epochs=12)
    reports = list(train_ctc(tones, CnnGru(spec), tmp_path / "out.safetensors", config))
    assert min(report.word_error_rate for report in reports) < 0.5  # 1 while all is blank
    model = load_checkpoint(tmp_path / "out.safetensors")
    assert model.spec.labels == ("<blank>", " a", " o")


def test_the_loss_is_minus_the_log_of_all_alignments():
    # Two parts in a row of six frames: " a" in three frames, nothing in three.
    logits = torch.randn(1, 6, 4, dtype=torch.float64)
    batch = RowBatch(np.zeros((1, 6), np.float32), ((3, 6),), (("a", ""),))
    p = logits.softmax(2)[0]
    blank, space, a = 0, 1, 2
    paths = [(space, a, a), (space, space, a), (space, a, blank), (space, blank, a)]
    says_a = sum(p[0, x] * p[1, y] * p[2, z] for x, y, z in [*paths, (blank, space, a)])
    nothing = p[3:, blank].prod()
    expected = -(says_a.log() + nothing.log())
    assert ctc_loss(batch, SPEC, logits).item() == pytest.approx(expected.item())


def test_a_text_too_long_for_its_frames_costs_nothing():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    batch = RowBatch(np.zeros((1, 2), np.float32), ((2,),), (("aoa",),))
    loss = ctc_loss(batch, SPEC, logits)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_greedy_texts_leave_out_repetitions_and_blanks():
    best = torch.tensor([[0, 2, 2, 0, 2, 1, 0, 1, 3], [1, 1, 0, 0, 0, 0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(best, 4).float()
    assert greedy_texts(logits, SPEC.labels) == ["aa o", ""]


def test_the_alphabet_is_english_or_what_the_texts_need(tones):
    assert choose_alphabet(tones) == ALPHABET
    other = Corpus(tones.root, (Clip(tones.root, "", "train", "", "où"),))
    assert choose_alphabet(other) == ("<blank>", " ", "o", "ù")
    assert choose_alphabet(tones, of_words=True) == ("<blank>", " a", " o")


@pytest.mark.parametrize(("text", "strange"), [("Go", "'G'"), ("go 2", "'2'"), ("go-on", "'-'")])
def test_a_text_is_written_as_it_is_said(text, strange):
    corpus = Corpus(Path(), (Clip(Path("a.wav"), "", "train", "", text),))
    with pytest.raises(CorpusError, match=f"a.wav: text '{text}' has {strange}, expected letters"):
        choose_alphabet(corpus)


def test_convolutions_are_taken_from_a_keyword_model(tiny):
    spec = dataclasses.replace(TINY_SPEC, labels=ALPHABET, family=CTC, hidden_size=7)
    model = CnnGru(spec)
    take_convolutions(model, tiny)
    for name, weights in tiny.convs.state_dict().items():
        assert torch.equal(model.convs.state_dict()[name], weights)
    assert torch.equal(model.feature_mean, tiny.feature_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convs": (ConvSpec(4, (3, 3), (2, 2)),)}, "has other convolutions than a CTC model"),
        (
            {"features": dataclasses.replace(TINY_SPEC.features, f_min=50.0)},
            "has other features than a CTC model",
        ),
    ],
)
def test_what_is_not_alike_is_not_taken(tiny, change, message):
    spec = dataclasses.replace(TINY_SPEC, labels=ALPHABET, family=CTC, **change)
    with pytest.raises(SpecError, match=message):
        take_convolutions(CnnGru(spec), tiny)


def test_the_command_trains_a_model_that_writes_words(tones, tmp_path):
    out = tmp_path / "words.safetensors"
    start = ["train", "--family", "ctc", "--units", "words", "--data", str(tones.root)]
    sizes = ["--epochs", "1", "--hidden-size", "8", "--num-layers", "1"]
    done = CliRunner().invoke(main, [*start, *sizes, "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    spec = load_checkpoint(out).spec
    assert spec.labels == (BLANK, " a", " o")
    assert spec.endpoint.silence_s > CTC_SPEC.endpoint.silence_s


def test_the_command_trains_and_goes_on_from_a_checkpoint(tones, tmp_path, kws12_checkpoint):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    start = ["train", "--family", "ctc", "--data", str(tones.root), "--epochs", "1"]
    sizes = ["--hidden-size", "8", "--num-layers", "1"]
    warm = ["--init", str(kws12_checkpoint)]
    done = CliRunner().invoke(main, [*start, *sizes, *warm, "--out", str(first)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{first}\n"
    assert "word errors" in done.stderr
    model = load_checkpoint(first)
    assert (model.spec.family, model.spec.labels) == (CTC, ALPHABET)
    assert (model.spec.hidden_size, model.spec.num_layers) == (8, 1)
    assert torch.equal(model.feature_mean, load_checkpoint(kws12_checkpoint).feature_mean)

    done = CliRunner().invoke(main, [*start, "--init", str(first), "--out", str(second)])
    assert done.exit_code == 0, done.stderr
    assert load_checkpoint(second).spec == model.spec


def test_options_of_the_other_family_are_refused(tones, tmp_path, tiny_checkpoint):
    text = tmp_path / "text.safetensors"
    save_checkpoint(CnnGru(SPEC), text)
    start = ["train", "--data", str(tones.root), "--out", str(tmp_path / "out.safetensors")]
    for options, message in (
        (["--units", "words"], "--units is for --family ctc"),
        (["--family", "ctc", "--init", str(text), "--units", "words"], "--init settles labels"),
        (["--family", "ctc", "--light"], "--labels, --light and --read-delay are for --family kws"),
        (["--family", "ctc", "--labels", "yes"], "--labels, --light and --read-delay"),
        (["--family", "ctc", "--init", str(text), "--num-layers", "1"], "--init settles labels"),
        (["--init", str(text)], "--init is a model of --family ctc"),
    ):
        done = CliRunner().invoke(main, [*start, *options])
        assert done.exit_code == 2
        assert message in done.stderr


def test_the_demo_clips_have_texts():
    clips = read_corpus(DEMO).clips
    assert choose_alphabet(Corpus(DEMO, clips)) == ALPHABET
    assert {clip.text for clip in clips if clip.label == "unknown"} >= {"house", "happy"}
    assert all(clip.text == "" for clip in clips if clip.label == "silence")
