import csv
import dataclasses
import itertools

import needs_torchaudio  # noqa: F401
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cnngru_edge.calibration.corpus.read import Clip, Corpus, read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.export.training.run import TrainConfig
from cnngru_edge.export.training.whole import (
    Example,
    _without_some_words,
    batches_of,
    choose_characters,
    choose_intents,
    choose_vocabulary,
    load_examples,
    train_whole,
)
from cnngru_edge.models.errors import CorpusError, InputError
from cnngru_edge.models.nets.checkpoint import load_checkpoint, save_checkpoint
from cnngru_edge.models.nets.crnn import Crnn, crnn_spec
from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru, text_spec

CONFIG = TrainConfig(
    epochs=8, batch_size=8, learning_rate=0.01, warmup_epochs=0.5, average_decay=0.5, dropout=0.0
)
SIZES = {"embedding_size": 8, "channels": 6, "kernel_sizes": [1, 3], "hidden_size": 6}
NOTHING = "nothing that can be used in the set 'calib'"


def corpus_of(root, rows) -> Corpus:
    root.mkdir(exist_ok=True)
    with (root / "manifest.csv").open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    return read_corpus(root)


@pytest.fixture(scope="module")
def phrases(tmp_path_factory) -> Corpus:
    """The intent is in the order of two words, among others."""
    rng = np.random.default_rng(0)
    rows = [("text", "set", "label")]
    for set_name, count in (("train", 160), ("calib", 24)):
        for i in range(count):
            first, second = ("on", "off") if i % 2 else ("off", "on")
            others = ["um"] * int(rng.integers(4)) + ["please"] * int(rng.integers(3))
            words = [*others, first, second, *["now"] * int(rng.integers(3))]
            rows.append((" ".join(words), set_name, f"{first}_first"))
    return corpus_of(tmp_path_factory.mktemp("phrases"), rows)


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Corpus:
    """Two characters: bars at the top and at the bottom."""
    root = tmp_path_factory.mktemp("bars")
    rng = np.random.default_rng(0)
    rows = [("path", "set", "text")]
    for set_name, count in (("train", 120), ("calib", 16)):
        for i in range(count):
            text = "".join(str(digit) for digit in rng.integers(2, size=rng.integers(1, 4)))
            image = np.full((8, 12 * len(text) + 4), 255, np.uint8)
            for k, digit in enumerate(text):
                image[(slice(0, 3) if digit == "0" else slice(5, 8)), 12 * k + 4 : 12 * k + 10] = 0
            Image.fromarray(image).save(root / f"{set_name}{i}.png")
            rows.append((f"{set_name}{i}.png", set_name, text))
    return corpus_of(root, rows)


def text_model(corpus):
    torch.manual_seed(0)
    return TextCnnGru(text_spec(choose_intents(corpus), choose_vocabulary(corpus), **SIZES))


def image_model(corpus):
    torch.manual_seed(0)
    pools = [[2, 2], [2, 2], [2, 1]]
    layers = {"channels": [4, 8, 8], "pools": pools, "hidden_size": 12, "num_layers": 1}
    return Crnn(crnn_spec(choose_characters(corpus), 8, **layers))


FAMILIES = [("phrases", text_model), ("bars", image_model)]


@pytest.fixture(params=FAMILIES, ids=["text", "crnn"])
def family(request):
    name, build = request.param
    return request.getfixturevalue(name), build


def test_it_learns_and_is_kept(family, tmp_path):
    corpus, build = family
    out = tmp_path / "model.safetensors"
    reports = list(train_whole(corpus, build(corpus), out, CONFIG))
    assert [report.epoch for report in reports] == list(range(1, 9))
    assert reports[-1].accuracy >= 0.9  # half of the phrases by chance, and hardly a line
    assert reports[-1].kept
    assert reports[-1].summary.endswith("%, kept")
    assert reports[-1].loss < reports[0].loss
    assert type(load_checkpoint(out)) is type(build(corpus))
    assert list(tmp_path.iterdir()) == [out]  # nothing is left to resume


def test_a_killed_training_goes_on_as_if_it_had_not_been(family, tmp_path):
    corpus, build = family
    config = dataclasses.replace(CONFIG, epochs=3, dropout=0.2, unknown_words=0.2)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    expected = list(train_whole(corpus, build(corpus), whole, config))
    first = list(itertools.islice(train_whole(corpus, build(corpus), broken, config), 2))
    assert (tmp_path / "broken.safetensors.resume").is_file()
    rest = list(train_whole(corpus, build(corpus), broken, config))
    assert [*first, *rest] == expected
    assert broken.read_bytes() == whole.read_bytes()


def test_without_a_calibration_set_there_is_no_training(family, tmp_path):
    corpus, build = family
    corpus = dataclasses.replace(corpus, clips=corpus.of("train"))
    with pytest.raises(CorpusError, match=NOTHING):
        next(train_whole(corpus, build(corpus), tmp_path / "out", CONFIG))


def test_what_cannot_be_read_is_named_and_left_out(phrases, bars, tmp_path):
    missing = Clip(tmp_path / "gone.png", "", "train", "", "01")
    empty = Clip(tmp_path / "manifest.csv:9", "on_first", "train", "", "?!", True)
    for corpus, clip, build, message in (
        (bars, missing, image_model, "gone.png: no such file"),
        (phrases, empty, text_model, "'?!': no word in it"),
    ):
        model = build(corpus)
        corpus = dataclasses.replace(corpus, clips=(*corpus.clips, clip))
        config = dataclasses.replace(CONFIG, epochs=1)
        error, report = train_whole(corpus, model, tmp_path / "out.safetensors", config)
        assert isinstance(error, InputError)
        assert message in str(error)
        assert report.epoch == 1


def test_phrases_of_one_length_are_together_and_all_are_there(phrases):
    spec = text_model(phrases).spec
    examples, _ = load_examples(phrases.of("train"), spec)
    batches = batches_of(examples, spec, CONFIG, np.random.default_rng(0))
    assert max(len(batch.expected) for batch in batches) <= CONFIG.batch_size
    seen = [tuple(row) for batch in batches for row in batch.given.tolist()]
    assert sorted(seen) == sorted(tuple(example.given.tolist()) for example in examples)
    assert not any(0 in row for row in seen)  # no padding


def test_narrow_images_end_with_their_last_column(bars):
    spec = image_model(bars).spec
    narrow = np.linspace(0, 1, 40, dtype=np.float32).reshape(1, 8, 5)
    wide = np.zeros((1, 8, 7), np.float32)
    examples = [Example(wide, "1"), Example(narrow, "0")]
    (batch,) = batches_of(examples, spec, CONFIG, np.random.default_rng(0))
    given = batch.given[batch.expected.index("0")].numpy()
    assert given.shape == (1, 8, 7)
    np.testing.assert_array_equal(given[..., :5], narrow)
    np.testing.assert_array_equal(given[..., 5], given[..., 4])
    np.testing.assert_array_equal(given[..., 6], given[..., 4])


def test_some_words_are_not_told():
    given = torch.full((50, 40), 7)
    found = _without_some_words(given, 0.1, np.random.default_rng(0))
    assert set(found.unique().tolist()) == {1, 7}
    assert 0.08 < (found == 1).double().mean() < 0.12


def test_a_word_is_known_from_its_second_time_on(tmp_path):
    rows = [("text", "set", "label"), ("Turn on, turn", "train", "a"), ("rare", "calib", "b")]
    corpus = corpus_of(tmp_path / "few", [*rows, ("rare on", "train", "b")])
    assert choose_vocabulary(corpus) == ("<padding>", "<unknown>", "on", "turn")
    assert choose_intents(corpus) == ("a", "b")


def test_characters_are_the_digits_or_those_of_the_texts(bars, tmp_path):
    assert choose_characters(bars) == ("<blank>", *"0123456789")
    rows = [("path", "set", "text"), ("a.png", "train", "b7-a")]
    assert choose_characters(corpus_of(tmp_path / "plates", rows)) == ("<blank>", *"-7ab")


def test_the_command_trains_goes_on_and_is_the_same_again(family, tmp_path):
    corpus, build = family
    name = "text" if build is text_model else "crnn"
    first, again, second = (tmp_path / f"{n}.safetensors" for n in ("first", "again", "second"))
    if name == "crnn":  # the command's own height is 32
        save_checkpoint(build(corpus), first)
        start = ["--init", str(first)]
    else:
        start = ["--hidden-size", "8"]
    common = ["train", "--family", name, "--data", str(corpus.root), "--epochs", "1", "--seed", "3"]
    for out in (second, again):
        result = CliRunner().invoke(main, [*common, *start, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{out}\n"
        assert "epoch 1: training loss " in result.stderr
    assert second.read_bytes() == again.read_bytes()
    result = CliRunner().invoke(main, [*common, "--init", str(second), "--out", str(first)])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(first).spec == load_checkpoint(second).spec


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("text", ["--labels", "a,b"], "--labels, --light and --read-delay are for --family kws"),
        ("crnn", ["--light"], "--labels, --light and --read-delay are for --family kws"),
        ("text", ["--num-layers", "2"], "--num-layers is not for --family text, which has one"),
    ],
)
def test_options_of_other_families_are_refused(phrases, tmp_path, family, options, message):
    common = ["train", "--family", family, "--data", str(phrases.root)]
    result = CliRunner().invoke(main, [*common, "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("family", ["kws", "ctc", "crnn"])
def test_a_start_of_another_family_is_refused(phrases, bars, demo, tiny_text, tmp_path, family):
    init = tmp_path / "text.safetensors"
    save_checkpoint(tiny_text, init)
    data = bars.root if family == "crnn" else demo.root
    common = ["train", "--family", family, "--data", str(data), "--init", str(init)]
    result = CliRunner().invoke(main, [*common, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "Error: --init is a model of --family text\n" in result.stderr


def test_a_corpus_of_another_kind_is_refused(refused, phrases, bars, tmp_path):
    out = tmp_path / "out.safetensors"
    assert refused("train", "--family", "text", "--data", bars.root, "--out", out) == (
        f"{bars.root}: no phrases; a manifest.csv with the columns text, set and label, and no "
        "path, lists them"
    )
    assert refused("train", "--family", "crnn", "--data", phrases.root, "--out", out) == (
        f"{phrases.root}: no images; a manifest.csv with the columns path, set and text lists them"
    )
    assert refused("train", "--data", phrases.root, "--out", out) == (
        f"{phrases.root}: phrases, not recordings; --family text learns those"
    )
