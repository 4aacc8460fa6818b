"""Modules of other people: what is read of them, what is refused, and what is said of them."""

import dataclasses
import os
import pickle
import re

import own_models
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.own.checks import check_runs, has_cells, warnings_about, why_whole
from cnngru_edge.models.own.weights import load_own, read_weights
from cnngru_edge.models.own.wrapper import OwnModel, OwnSpec
from cnngru_edge.models.spec.stream import BLANK
from cnngru_edge.models.spec.whole import (
    OWN,
    TEXT_ANSWER,
    AudioInput,
    ImageInput,
    TokenInput,
    WholeFeatures,
    WholeSpec,
)
from cnngru_edge.runtime.inputs.read import example_input

torch.manual_seed(0)  # of the weights that are made while this is imported

LABELS = tuple(f"word {i}" for i in range(12))
FEATURES = WholeFeatures(n_fft=512, win_length=400, hop_length=160, n_mels=40)

TOML = """\
labels = ["yes", "no"]

[model]
n_classes = 2

[input]
kind = "audio"
layout = "N1MT"
samples = 16000

[input.features]
n_mels = 40
log = "decibels"
top_db = 80.0
"""


def audio(layout="NMT", features=FEATURES, **options):
    return AudioInput(features=features, layout=layout, **options)


def own(module, layout="NMT", labels=LABELS, **options):
    """A module with random weights that takes features of a second, or what `input` says."""
    options.setdefault("input", audio(layout))
    return OwnModel(module, WholeSpec(labels, **options))


def example(model):
    return torch.from_numpy(example_input(model.spec)[None])


def checked(model):
    check_runs(model, example(model))
    return model


def warnings_of(model):
    return list(warnings_about(model, example(model)))


# The TOML file.


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "model.toml"
        path.write_text(text)
        return path

    return write


def test_a_spec_is_read_from_toml(toml):
    found = OwnSpec.load(toml(TOML))
    assert found.arguments == {"n_classes": 2}
    assert (found.spec.labels, found.spec.family) == (("yes", "no"), OWN)
    features = WholeFeatures(n_mels=40, log="decibels", top_db=80.0)
    assert found.spec.input == AudioInput(samples=16_000, features=features, layout="N1MT")


def test_features_have_the_rate_of_their_audio(toml):
    text = TOML.replace("samples = 16000", "sample_rate = 8000")
    found = OwnSpec.load(toml(text.replace("n_mels = 40", "n_mels = 40\nf_max = 3800.0")))
    assert found.spec.input.features.sample_rate == 8000


def test_tokens_and_images_are_read_from_toml(toml):
    words = ["<padding>", "<unknown>", "light"]
    tokens = f'labels = ["a", "b"]\n[input]\nkind = "tokens"\nvocabulary = {words}\n'
    assert OwnSpec.load(toml(tokens)).spec.input == TokenInput(tuple(words))
    image = 'labels = ["<blank>", "1"]\nanswers = "text"\n[input]\nkind = "image"\nheight = 32\n'
    assert OwnSpec.load(toml(image)).spec.input == ImageInput(32)


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("[model]", "[model", r"not a TOML file \(.+\)"),
        ("[model]", "kind = 7\n[model]", "model spec: unknown fields kind"),
        ('labels = ["yes", "no"]', "", "model spec: labels is missing"),
        ('["yes", "no"]', '["yes", "yes"]', r"labels: need at least two, all different, got \[.+"),
        ('["yes", "no"]', "3", "labels: need a list, got 3"),
        ("[model]", 'family = "crnn"\n[model]', "family is not for modules of one's own"),
        (
            "[model]",
            'why_whole = "so"\nlayers = {}\n[model]',
            "layers, why_whole is not for modules of one's own",
        ),
        ("[model]", 'answers = "words"\n[model]', "answers: need label or text, got 'words'"),
        ("[model]", 'answers = "text"\n[model]', "labels: the first of a CTC model is <blank>, .+"),
        (
            '["yes", "no"]',
            '["<blank>", "yes", "no"]\nanswers = "text"',
            "labels: a CTC model has characters, or words with a space before .+ got yes, no, .+",
        ),
        ('"audio"', '"video"', "input: kind is one of audio, tokens, image, got 'video'"),
        ("samples = 16000", "length = 16000", "input: unknown fields length"),
        (
            "samples = 16000",
            "samples = 0",
            "input: sizes are whole numbers from 1 to 100000000, got 0",
        ),
        ("samples = 16000", "samples = 0.5", r"input: samples is of type int, got 0\.5"),
        ("samples = 16000", "samples = true", "input: samples is of type int, got True"),
        ("samples = 16000", "samples = 9\nleast_samples = 10", "input: of 9 and of at least 10 .+"),
        ("n_mels = 40", "n_mels = 40\nmean = nan", "features: mean is nan"),
        ("n_mels = 40", "n_mels = 40.5", r"features: n_mels is of type int, got 40\.5"),
        ("n_mels = 40", 'n_mels = 40\ncenter = "no"', "features: center is of type bool, got 'no'"),
        (
            '"N1MT"',
            '"NS"',
            r"input: layout is one of NTM, NMT, N1TM, N1MT here \(.+\), got 'NS'",
        ),
        (
            "n_mels = 40",
            "sample_rate = 8000\nf_max = 3800.0",
            "input: sample_rate is 16000, that of its features 8000",
        ),
        ("n_mels = 40", "n_mfcc = 200", r"features: n_mfcc is 1 to n_mels \(\d+\), got 200"),
        ("n_mels = 40", "std = 0.0", r"features: std is above 0, got 0\.0"),
        ("n_mels = 40", "bins = 40", "model spec: TypeError: .*'bins'"),
        ('"decibels"', '"bels"', "features: log is natural or decibels, got 'bels'"),
        ('"decibels"', '"natural"', "features: top_db is for log = 'decibels'"),
        ("[input.features]", "[features]", "model spec: unknown fields features"),
    ],
)
def test_what_is_wrong_in_a_spec_is_one_line_with_the_file(toml, was, now, message):
    assert was in TOML
    path = toml(TOML.replace(was, now, 1))
    with pytest.raises(SpecError, match=rf"^{re.escape(str(path))}: {message}$"):
        OwnSpec.load(path)


@pytest.mark.parametrize("name", ["missing.toml", ""])
def test_a_spec_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(SpecError, match=f"^{re.escape(str(tmp_path / name))}: no such file$"):
        OwnSpec.load(tmp_path / name)


def test_a_spec_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "noise.toml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SpecError, match=r"noise\.toml: not a TOML file \(.+\)$"):
        OwnSpec.load(path)


@pytest.mark.parametrize("text", ["model = 3\n", "input = 3\n", "[input]\nfeatures = 3\n"])
def test_what_should_be_a_table_is_one(toml, text):
    path = toml(text + 'labels = ["a", "b"]\n' if "[" not in text else text)
    with pytest.raises(SpecError, match=r"model\.toml: .+"):
        OwnSpec.load(path)


# The class.


class Failing(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        raise ValueError(f"{n_classes} is not\nwhat it takes")


class TwoMore(nn.Module):
    def forward(self, x, lengths, mask):
        return x


class Strange(nn.Module):
    def forward(self, x, speaker):
        return x


class Optional(nn.Module):
    def __init__(self, n_classes=12):
        super().__init__()
        self.fc = nn.Linear(40, n_classes)

    def forward(self, x, lengths=None, *more, scale=1.0, **others):  # (N, M, T)
        assert lengths is None
        return self.fc(x.mean(2)) * scale


def state_of(name="Conv2dGru", **arguments):
    torch.manual_seed(3)
    return getattr(own_models, name)(**arguments).state_dict()


@pytest.fixture
def weights(tmp_path):
    def write(what, name="model.pt"):
        path = tmp_path / name
        torch.save(what, path)
        return path

    return write


def spec_with(**arguments):
    return OwnSpec(WholeSpec(LABELS, audio("N1MT")), arguments)


def load(path, name="own_models:Conv2dGru", **arguments):
    return load_own(name, path, spec_with(**arguments))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Conv2dGru", "Conv2dGru: expected package.module:Class"),
        (":Conv2dGru", ":Conv2dGru: expected package.module:Class"),
        ("own_models:", "own_models:: expected package.module:Class"),
        ("no_models:A", "no_models:A: no module 'no_models' here or where Python looks"),
        ("own_models.inner:A", "own_models.inner:A: no module 'own_models.inner' here or .+"),
        ("own_models:Missing", "own_models:Missing: no 'Missing' in own_models"),
        ("own_models:pack_padded_sequence", ".+: not a class of torch.nn.Module"),
        ("pathlib:Path", "pathlib:Path: not a class of torch.nn.Module"),
        ("own_models:torch", "own_models:torch: not a class of torch.nn.Module"),
    ],
)
def test_a_class_that_is_not_there_is_named(weights, name, message):
    path = weights(state_of())
    with pytest.raises(SpecError, match=f"^{message}$"):
        load(path, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", "no module 'nothing_like_it' here or where Python looks"),
        ("class A(:", r"cannot be imported \(SyntaxError: .+\)"),
        ("1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("raise SystemExit(3)", r"cannot be imported \(SystemExit: 3\)"),
    ],
)
def test_a_file_that_does_not_import_is_named(weights, tmp_path, monkeypatch, text, message):
    name = f"theirs_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=f"^{name}:A: {message}$"):
        load(weights(state_of()), f"{name}:A")


def test_a_class_is_found_in_the_folder_that_one_is_in(weights, tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("from own_models import Conv2dGru as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert isinstance(load(weights(state_of()), "mine_here:Mine").module, own_models.Conv2dGru)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Failing", {"n_classes": 3}, r"cannot be built with the \[model\] of the spec \(3 is not"),
        ("Failing", {}, r"cannot be built with the \[model\] .+ 'n_classes'"),
        ("Failing", {"hidden": 3}, r"cannot be built with the \[model\] .+ 'hidden'"),
    ],
)
def test_a_constructor_that_fails_is_one_line(weights, name, arguments, message):
    path = weights(state_of())
    with pytest.raises(SpecError, match=f"{name}: {message}") as e:
        load(path, f"{__name__}:{name}", **arguments)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("module", "names"), [(TwoMore(), "lengths, mask"), (Strange(), "speaker")]
)
def test_a_forward_that_needs_more_is_refused(module, names):
    message = f"^forward needs {names} besides its input; expected lengths or a hidden state at"
    with pytest.raises(SpecError, match=message):
        own(module)


def test_arguments_with_defaults_are_left_alone():
    assert checked(own(Optional()))(torch.zeros(2, 16_000)).shape == (2, 1, 12)


# The checkpoint.


def same_weights(model, expected):
    found = model.module.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def prefixed(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: prefixed("module.", s),
        lambda s: prefixed("_orig_mod.", s),
        lambda s: prefixed("module._orig_mod.", s),
        lambda s: {"state_dict": prefixed("model.", s), "epoch": 3, "lr": 0.1},
        lambda s: {
            "state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(12)},
            "epoch": 3,
        },
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.5},
        lambda s: {"model": prefixed("module.", s)},
        lambda s: {"net": s},
        lambda s: {"weights": s},
    ],
    ids=[
        "as it is",
        "DataParallel",
        "compiled",
        "both",
        "Lightning",
        "Lightning with a loss",
        "trainer",
        "model",
        "net",
        "weights",
    ],
)
def test_tensors_are_found_in_a_checkpoint(weights, wrap):
    expected = state_of()
    same_weights(load(weights(wrap(expected))), expected)


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.ckpt", "model"])
def test_the_name_of_a_checkpoint_does_not_matter(weights, name):
    expected = state_of()
    same_weights(load(weights(expected, name)), expected)


def test_safetensors_are_read(tmp_path):
    expected = state_of()
    save_file(prefixed("module.", expected), tmp_path / "model.safetensors")
    same_weights(load(tmp_path / "model.safetensors"), expected)


def test_weights_in_half_precision_are_computed_with_in_float32(weights):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state_of().items()}
    model = load(weights(half))
    assert {t.dtype for t in model.module.parameters()} == {torch.float32}
    assert checked(model)(torch.zeros(1, 16_000)).dtype == torch.float32


def test_missing_tensors_are_counted_and_named(weights):
    state = state_of()
    gone = [state.pop(key) for key in ("gru.weight_ih_l0", "fc.bias")]
    assert len(gone) == 2
    message = r"model\.pt: 2 tensors of own_models:Conv2dGru are missing, as 'gru\.weight_ih_l0'; "
    with pytest.raises(SpecError, match=message + r"it has conv\.0\.bias, .+ \.\.\.$"):
        load(weights(state))


def test_strange_tensors_are_counted_and_named(weights):
    state = state_of(layers=2)
    message = r"model\.pt: 4 tensors that own_models:Conv2dGru does not have, as 'gru\.bias_hh_l1'"
    with pytest.raises(SpecError, match=message):
        load(weights(state))
    same_weights(load(weights(state), layers=2), state)


def test_a_tensor_of_another_shape_is_named(weights):
    message = (
        r"model\.pt: tensor 'gru\.weight_ih_l0' is \(96, 240\), own_models:Conv2dGru has "
        r"\(144, 240\); give its sizes under \[model\] of the spec"
    )
    with pytest.raises(SpecError, match=message):
        load(weights(state_of(hidden=32)))


@pytest.mark.parametrize("what", [{}, [1, 2], 7, {"epoch": 3}, {"state_dict": {}}, None])
def test_a_checkpoint_without_tensors_is_named(weights, what):
    with pytest.raises(SpecError, match=r"model\.pt: no tensors in it; save model\.state_dict\(\)"):
        load(weights(what))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


MORE = r"holds more than tensors, which can run code when loaded; save model\.state_dict\(\) alone$"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("with_torch", [True, False], ids=["torch", "pickle"])
def test_no_code_of_a_checkpoint_is_run(tmp_path, with_torch, protocol):
    path, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    what = {"state_dict": state_of(), "config": Trap(sprung)}
    if with_torch:
        torch.save(what, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(what, protocol))
    with pytest.raises(SpecError, match=rf"model\.pt: ({MORE}|not a checkpoint that torch reads)"):
        load(path)
    assert not sprung.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["new", "old"])
def test_a_pickled_module_is_refused_in_one_line(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save(own_models.Conv2dGru(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SpecError, match=rf"model\.pt: {MORE}") as e:
        load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x03\x04", b"this is text\n" * 9, b"\x80\x02}q\x00.", b"\x08\x07", b"\xff" * 999],
    ids=["empty", "zip", "text", "pickle", "short", "noise"],
)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SpecError, match=rf"^{re.escape(str(path))}: .+") as e:
        load(path)
    assert "\n" not in str(e.value)


def test_a_checkpoint_cut_short_is_one_line(weights):
    path = weights(state_of())
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(SpecError, match=r"model\.pt: not a checkpoint that torch reads$"):
        load(path)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", ""])
def test_a_checkpoint_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(SpecError, match="no such checkpoint"):
        read_weights(tmp_path / name)


# One run.


class Frames(nn.Module):
    """Logits of each frame, time or batch first."""

    def __init__(self, batch_first, n_classes=3):
        super().__init__()
        self.gru = nn.GRU(40, n_classes, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):  # (N, T, M)
        return self.gru(x if self.batch_first else x.transpose(0, 1))[0]


TEXT = {"labels": (BLANK, "a", "b"), "answers": TEXT_ANSWER}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("seconds", [1.0, 0.02], ids=["a second", "three frames"])
def test_logits_of_frames_are_put_batch_first(batch_first, seconds):
    model = own(Frames(batch_first), "NTM", **TEXT)
    check_runs(model, torch.from_numpy(example_input(model.spec, seconds)[None]))
    assert model.time_first is not batch_first
    assert model(torch.zeros(2, 16_000)).shape == (2, 101, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            own(own_models.Conv1dGru3(n_mfcc=64)),
            r"^the module does not run on an input of shape \(1, 40, 101\) \(.+64.+\); kind, ",
        ),
        (
            own(own_models.Conv2dGru(), "NTM"),
            r"the module does not run on an input of shape \(1, 101, 40\)",
        ),
        (
            own(own_models.WaveformGru(), input=AudioInput(layout="N1S", samples=64)),
            r"the module does not run on an input of shape \(1, 1, 64\)",
        ),
        (
            own(own_models.Conv2dGru(n_classes=10), "N1MT"),
            "^the module gives 10 logits, the spec has 12 labels$",
        ),
        (
            own(Frames(batch_first=True), "NTM", ("a", "b", "c")),
            r"gives logits of shape \(1, 101, 3\), expected \(N, C\) for a label; answers in the",
        ),
        (
            own(own_models.Conv2dGru(n_classes=3), "N1MT", **TEXT),
            r"gives logits of shape \(1, 3\), expected \(N, T, C\) for a text; answers in the",
        ),
    ],
    ids=["mels", "layout", "short", "labels", "frames", "no frames"],
)
def test_what_does_not_fit_is_said(model, message):
    with pytest.raises(SpecError, match=message) as e:
        checked(model)
    assert "\n" not in str(e.value)


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what


@pytest.mark.parametrize(
    ("what", "name"), [(None, "NoneType"), ({}, "dict"), ((), "tuple"), ((3,), "int")]
)
def test_what_is_no_tensor_is_named(what, name):
    with pytest.raises(SpecError, match=f"^the module gives a {name}, expected a tensor of logits"):
        checked(own(Gives(what)))


@pytest.mark.parametrize("shape", [(12,), (), (1, 1, 1, 12)])
def test_a_tensor_of_another_rank_is_refused(shape):
    message = f"the module gives logits of shape {re.escape(str(shape))}, expected "
    with pytest.raises(SpecError, match=message):
        checked(own(Gives(torch.zeros(shape))))


def test_fewer_rows_than_inputs_are_refused():
    with pytest.raises(SpecError, match=r"gives logits of shape \(1, 12\) for 2 inputs$"):
        checked(own(Gives(torch.zeros(1, 12))))


# Lengths and states.


class Spy(nn.Module):
    """Keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 12)


class Lengths(Spy):
    def forward(self, x, lengths):
        self.seen = lengths
        return self.fc(x.mean(-1) if x.shape[-2] == 40 else x.mean(-2))


class Hidden(Spy):
    def forward(self, x, hidden):
        self.seen = hidden
        return self.fc(x.mean(-1)), hidden


class Makes(Hidden):
    def init_hidden(self, batch):
        return torch.full((1, batch, 5), 2.0)


@pytest.mark.parametrize("layout", ["NMT", "NTM"])
def test_lengths_are_the_frames_of_every_clip(layout):
    model = own(Lengths(), layout)
    model(torch.zeros(3, 16_000))
    assert model.module.seen.tolist() == [101, 101, 101]
    assert model.module.seen.dtype == torch.int64


def test_a_state_begins_as_the_module_says_or_with_nothing():
    model = checked(own(Hidden()))
    assert model(torch.zeros(2, 16_000)).shape == (2, 1, 12)
    assert model.module.seen is None
    model = checked(own(Makes()))
    model(torch.zeros(2, 16_000))
    assert model.module.seen.shape == (1, 2, 5)


def test_packed_sequences_run():
    assert checked(own(own_models.PackedGru(), "NTM"))(torch.zeros(2, 9_000)).shape == (2, 1, 12)


# Why it is no stream.


@pytest.mark.parametrize(
    ("module", "layout", "reason"),
    [
        (
            own_models.AttentionGru(),
            "NTM",
            "gru is bidirectional; conv may look ahead, for it pads both ends; ",
        ),
        (own_models.KeywordCrnn(), "N1TM", "gru is bidirectional; "),
        (
            own_models.Conv1dGru3(),
            "NMT",
            "conv1 and 1 more may look ahead, for it pads both ends; ",
        ),
        (own_models.CellGru(), "NMT", ""),
        (nn.MultiheadAttention(8, 2), "NTM", "attends to all of its input; "),
    ],
)
def test_why_a_module_is_no_stream_is_said_by_its_layers(module, layout, reason):
    if isinstance(module, nn.MultiheadAttention):
        holder = Optional()
        holder.attend, module, reason = module, holder, f"attend {reason}"
    found = why_whole(own(module, layout))
    assert found == f"{reason}it has no state to carry from chunk to chunk"


def test_an_image_has_no_ahead():
    spec = WholeSpec(LABELS, ImageInput(40))
    assert "ahead" not in why_whole(OwnModel(own_models.Conv1dGru3(), spec))


def test_cells_are_seen():
    assert has_cells(own(own_models.CellGru()))
    assert not has_cells(own(own_models.Conv1dGru3()))


# What a user should know.


class NormalizesOverBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 12)

    def forward(self, x):
        x = x.mean(2)
        return self.fc((x - x.mean(0)) / (x.std(0, correction=0) + 1e-3))


class OneFrame(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(40 * 101, 16, batch_first=True)
        self.fc = nn.Linear(16, 12)

    def forward(self, x):
        return self.fc(self.rnn(x.flatten(1)[:, None])[0][:, -1])


class ForgotBatchFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(40, 16)
        self.fc = nn.Linear(16, 12)

    def forward(self, x):  # (N, T, M)
        return self.fc(self.rnn(x)[0][:, -1])


CLEAN = [
    (own_models.Conv2dGru, "N1MT"),
    (own_models.Conv1dGru3, "NMT"),
    (own_models.AttentionGru, "NTM"),
    (own_models.KeywordCrnn, "N1TM"),
    (own_models.ConvLstm, "NMT"),
    (own_models.PackedGru, "NTM"),
    (own_models.CellGru, "NMT"),
]


@pytest.mark.parametrize(("kind", "layout"), CLEAN)
def test_a_clean_module_is_warned_of_nothing(kind, layout):
    assert warnings_of(checked(own(kind(), layout))) == []


def test_a_batch_that_becomes_time_is_recognised_and_named():
    model = checked(own(own_models.BatchAsTime(), "N1MT", input=audio("N1MT", samples=16_000)))
    (warning,) = warnings_of(model)
    assert warning.startswith("gru reads the batch as time: ")
    assert "depends on the others beside it" in warning


def test_a_gru_that_is_given_the_batch_first_without_being_told_is_warned_of():
    (warning,) = warnings_of(checked(own(ForgotBatchFirst(), "NTM")))
    assert warning.startswith("rnn reads the batch as time: ")


class LooksBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 12)

    def forward(self, x):
        return self.fc(torch.cumsum(x.mean(2), 0))


def test_a_batch_whose_first_clip_alone_is_right_is_found():
    (warning,) = warnings_of(checked(own(LooksBack())))
    assert warning.startswith("a clip's answer depends on the others in its batch")


def test_one_frame_is_named():
    model = checked(own(OneFrame(), input=audio("NMT", samples=16_000)))
    (warning,) = warnings_of(model)
    assert warning.startswith("rnn reads one frame: ")


def test_whatever_else_mixes_the_batch_is_found():
    (warning,) = warnings_of(checked(own(NormalizesOverBatch())))
    assert re.match(r"a clip's answer depends on the others in its batch \(by \d", warning)


def test_a_module_for_one_clip_at_a_time_is_not_asked_for_more():
    model = own(NormalizesOverBatch())
    model.free_batch = False
    (warning,) = warnings_of(checked(model))
    assert warning.startswith("it takes one input at a time")


class OneAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(40, 12, batch_first=True)

    def forward(self, x):  # (N, T, M)
        return self.rnn(x, torch.zeros(1, 1, 12))[0][:, -1]


def test_a_module_that_runs_on_one_clip_alone_is_for_one_at_a_time():
    model = checked(own(OneAlone(), "NTM"))
    assert not model.free_batch
    (warning,) = warnings_of(model)
    assert warning.startswith("it takes one input at a time")


def test_the_layouts_of_what_a_module_takes():
    features = FEATURES
    sizes = {"NTM": (2, 101, 40), "NMT": (2, 40, 101), "N1TM": (2, 1, 101, 40)}
    sizes["N1MT"] = (2, 1, 40, 101)
    for layout, shape in sizes.items():
        model = own(Optional(), layout)
        assert model.given_to_module(torch.zeros(2, 16_000)).shape == shape
        assert shape[model.time_axis] == 101
    for layout, shape in {"NS": (2, 16_000), "N1S": (2, 1, 16_000)}.items():
        model = own(Optional(), input=audio(layout, features=None))
        assert model.given_to_module(torch.zeros(2, 16_000)).shape == shape
        assert shape[model.time_axis] == 16_000
    mfcc = dataclasses.replace(features, n_mfcc=13)
    model = own(Optional(), input=audio("NMT", features=mfcc))
    assert model.given_to_module(torch.zeros(2, 16_000)).shape == (2, 13, 101)


class Unsteady(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 12)

    def forward(self, x):
        return self.fc(nn.functional.dropout(x, 0.5, training=True).mean(1))


class OneLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(101 * 40, 12)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_a_module_that_answers_otherwise_each_time_is_refused():
    with pytest.raises(SpecError, match="answers the same input otherwise each time: chance"):
        checked(own(Unsteady(), "NTM"))


def test_a_module_with_damaged_weights_is_refused():
    module = own_models.AttentionGru()
    module.head.weight.data[0, 0] = float("nan")
    with pytest.raises(SpecError, match="answers NaN or infinity"):
        checked(own(module, "NTM"))


def test_a_module_of_one_length_is_told_to_give_it():
    with pytest.raises(SpecError, match=r"takes one length only, give samples under \[input\]"):
        checked(own(OneLength(), "NTM"))
    checked(own(OneLength(), input=audio("NTM", samples=16_000)))
