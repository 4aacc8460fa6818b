"""Modules and ONNX files that are not ours, through the chain: traced, calibrated, in INT8."""

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import own_models
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.artefacts import FLOAT, INT8, TORCHSCRIPT
from cnngru_edge.export.chain import pipeline
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.lower.float_layers import float_reasons
from cnngru_edge.export.quantize.run import layers_in, quantize_checked, quantize_onnx
from cnngru_edge.export.targets.base import TARGETS, TENSORRT, TENSORRT_FP16
from cnngru_edge.export.targets.cpu_receipt import onnxruntime_coverage
from cnngru_edge.export.targets.receipt import coverage
from cnngru_edge.export.targets.trt.lint import lint
from cnngru_edge.export.trace.own_onnx import OnnxModel, load_onnx
from cnngru_edge.models.errors import ExportError, ParityError, SpecError
from cnngru_edge.models.own.checks import check_runs, warnings_about
from cnngru_edge.models.own.wrapper import OwnModel, OwnSpec
from cnngru_edge.models.spec.stream import BLANK
from cnngru_edge.models.spec.whole import (
    TEXT_ANSWER,
    AudioInput,
    TokenInput,
    WholeFeatures,
    WholeSpec,
)
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.label import softmax
from cnngru_edge.runtime.inputs.read import example_input, fitted, read_input
from cnngru_edge.runtime.stream import clip_logits

LABELS = tuple(f"word {i}" for i in range(12))
FEATURES = WholeFeatures(
    n_fft=512, win_length=400, hop_length=160, n_mels=40, log_offset=1e-3, mean=-3.0, std=3.0
)
CLIPS = CalibrateConfig(min_clips=16)

SUBJECTS = {
    # module, layout of its features (None: the waveform), samples of every clip
    "Conv2dGru": (own_models.Conv2dGru, "N1MT", None),
    "Conv1dGru3": (own_models.Conv1dGru3, "NMT", None),
    "AttentionGru": (own_models.AttentionGru, "NTM", None),
    "KeywordCrnn": (own_models.KeywordCrnn, "N1TM", None),
    "ConvLstm": (own_models.ConvLstm, "NMT", None),
    "WaveformGru": (own_models.WaveformGru, None, None),
    "PackedGru": (own_models.PackedGru, "NTM", None),
    "CellGru": (own_models.CellGru, "NMT", 8_000),
    "BatchAsTime": (own_models.BatchAsTime, "N1MT", 16_000),
}
MODULES = {
    # layers as the owner calls them
    "Conv2dGru": {"conv.0", "conv.4", "gru.weight_ih_l0", "gru.weight_hh_l0", "fc"},
    "Conv1dGru3": {
        "conv1",
        "conv2",
        *(f"rnn.weight_{part}_l{layer}" for part in ("ih", "hh") for layer in range(3)),
        "fc1",
        "fc2",
    },
    "AttentionGru": {
        "conv",
        *(f"gru.weight_{part}_l0{end}" for part in ("ih", "hh") for end in ("", "_reverse")),
        "attention.0",
        "attention.2",
        "head",
    },
    "KeywordCrnn": {
        "conv",
        *(
            f"gru.weight_{part}_l{layer}{end}"
            for part in ("ih", "hh")
            for layer in range(2)
            for end in ("", "_reverse")
        ),
        "dense",
        "out",
    },
    "ConvLstm": {
        "features.0",
        *(f"lstm.weight_{part}_l{layer}" for part in ("ih", "hh") for layer in range(2)),
        "classifier",
    },
    "WaveformGru": {"conv1", "conv2", "gru.weight_ih_l0", "gru.weight_hh_l0", "fc"},
    "PackedGru": {"conv", "gru.weight_ih_l0", "gru.weight_hh_l0", "fc"},
    "CellGru": {"conv", "cell", "cell_2", "fc"},  # two products in a module
    "BatchAsTime": {"conv", "gru.weight_ih_l0", "gru.weight_hh_l0", "fc"},
}


def audio(layout, **options):
    features = None if layout is None else FEATURES
    return AudioInput(features=features, layout=layout or "N1S", least_samples=4_000, **options)


def lively(module):
    """Random weights that answer differently to different clips."""
    torch.manual_seed(5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = None  # the average of all that it is trained on
            layer.weight.data.uniform_(0.7, 1.3)
            layer.bias.data.normal_(std=0.3)
        elif hasattr(layer, "weight_ih_l0") or isinstance(layer, nn.RNNCellBase):
            for parameter in layer.parameters():
                parameter.data *= 1.5
        elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.weight.data *= 1.5
    return module.eval()


def subject(name, clips):
    """A module whose batch norms have seen recordings."""
    kind, layout, samples = SUBJECTS[name]
    spec = WholeSpec(LABELS, audio(layout, samples=samples), why_whole="it is not ours")
    model = OwnModel(lively(kind()), spec)
    given = [fitted(spec, read_input(spec, clip)) for clip in clips]
    shortest = min(map(len, given))
    with torch.inference_mode():
        model.module.train()
        model(torch.from_numpy(np.stack([samples[:shortest] for samples in given])))
        model.module.eval()
    check_runs(model, torch.from_numpy(example_input(spec)[None]))
    return model


@pytest.fixture(autouse=True, scope="module")
def without_programs():
    """They take a second each; test_export_program.py has them."""

    def none(model, path):
        raise ExportError("not here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "export_program", none)
        yield


@pytest.fixture(scope="module")
def heard(demo):
    """Recordings to calibrate with, and others."""
    calib, others = demo.of("calib"), demo.of("eval")
    return (
        [clip.path for clip in calib[:: len(calib) // 24][:24]],
        [clip.path for clip in others[:: len(others) // 16][:16]],
    )


class Made:
    """What a model becomes: float graph and INT8 forms in a folder."""

    def __init__(self, model, out, heard, targets=TARGETS):
        self.model, self.out = model, out
        calib, self.others = heard
        clips = [read_input(model.spec, path) for path in calib[:3]]
        self.parity = pipeline.trace(model, out, clips)
        self.float = out / FLOAT
        ranges, errors = calibrate(self.float, calib, CLIPS)
        assert errors == []
        ranges.save(out / "ranges.json")
        self.forms = {target: out / f"{target}.onnx" for target in targets}
        for target, path in self.forms.items():
            quantize_onnx(self.float, out / "ranges.json", path, target)

    @property
    def reasons(self):
        return float_reasons(onnx_graph.load(self.float))

    @functools.cache  # noqa: B019  # they live as long as the module's tests
    def logits(self, path):
        with open_session(path) as session:
            found = [clip_logits(session, read_input(session.spec, clip)) for clip in self.others]
        return np.concatenate(found)

    @functools.cache  # noqa: B019
    def expected(self):
        """Of the module itself, in torch."""
        spec, found = self.model.spec, []
        with torch.inference_mode():
            for clip in self.others:
                given = fitted(spec, read_input(spec, clip))
                found.append(self.model(torch.from_numpy(given[None]))[0].numpy())
        return np.concatenate(found)

    def sqnr_db(self, target="cpu", of_changes=False):
        """Of the logits, or only of what in them changes from clip to clip."""
        reference = self.expected()
        noise = self.logits(self.forms[target]) - reference
        signal = reference - reference.mean(0) if of_changes else reference
        return 10 * np.log10((signal**2).sum() / (noise**2).sum())


@pytest.fixture(scope="module")
def made(tmp_path_factory, heard):
    found = {}

    def make(name):
        if name not in found:
            found[name] = Made(subject(name, heard[0]), tmp_path_factory.mktemp(name), heard)
        return found[name]

    return make


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_float_graph_answers_as_the_module(made, name):
    chain = made(name)
    expected = chain.expected()
    assert np.ptp(expected, axis=0).max() > 0.1  # it does not answer the same to all
    for path in (chain.float, chain.out / TORCHSCRIPT):
        np.testing.assert_allclose(chain.logits(path), expected, rtol=0, atol=1e-4)
    assert all(parity.max_abs_error <= 1e-4 for parity in chain.parity)


@pytest.mark.parametrize("name", SUBJECTS)
def test_all_of_it_is_in_int8_under_the_owners_names(made, name):
    chain = made(name)
    assert set(layers_in(chain.float)) == MODULES[name]
    assert chain.reasons == {}
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    assert receipt.weights_int8 == 1, receipt
    assert {layer.name for layer in receipt.layers} == MODULES[name]


@pytest.mark.parametrize("name", SUBJECTS)
def test_int8_answers_almost_as_the_module(made, name):
    chain = made(name)
    assert chain.sqnr_db() > 20
    assert chain.sqnr_db(of_changes=True) > (9 if name == "WaveformGru" else 17)


@pytest.mark.parametrize("target", [TENSORRT, TENSORRT_FP16], ids=lambda target: target.name)
@pytest.mark.parametrize("name", SUBJECTS)
def test_graphs_for_tensorrt_keep_its_rules_and_answer_alike(made, name, target):
    chain = made(name)
    assert lint(onnx_graph.load(chain.forms[target.name]), target) == []
    assert chain.sqnr_db(target.name) > 20


@pytest.mark.parametrize("name", ["Conv2dGru", "AttentionGru", "ConvLstm"])
def test_tensorrt_rtx_builds_all_of_it_in_int8(made, name):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")
    chain = made(name)
    receipt = coverage(chain.forms[TENSORRT_FP16.name], TENSORRT_FP16.name)
    assert receipt.weights_int8 == 1, receipt


@pytest.mark.parametrize("name", ["Conv2dGru", "PackedGru"])
def test_any_number_and_length_of_clips_is_taken(made, name):
    chain = made(name)
    with open_session(chain.forms["cpu"]) as session:
        assert session.inputs[0].shape == ("N", "S")
        assert session.outputs[0].shape == ("N", 1, 12)
        for shape in ((1, 5_000), (3, 12_345)):
            assert session.run({"audio": np.zeros(shape, np.float32)})["logits"].shape == (
                shape[0],
                1,
                12,
            )


def test_a_length_that_is_given_is_kept(made):
    with open_session(made("CellGru").float) as session:
        assert session.inputs[0].shape == ("N", 8_000)


# What cannot be traced.


def traced(model, tmp_path, heard):
    clips = [read_input(model.spec, path) for path in heard[0][:3]]
    return pipeline.trace(model, tmp_path / "out", clips)


def of_module(module, layout, **options):
    return OwnModel(lively(module), WholeSpec(LABELS, audio(layout, **options)))


def test_what_cannot_be_traced_is_one_line(tmp_path, heard):
    model = of_module(own_models.NotTraceable(), "NTM")
    with pytest.raises((ExportError, ParityError)) as e:
        traced(model, tmp_path, heard)
    assert "\n" not in str(e.value)
    assert re.search("cannot be traced", str(e.value))
    assert not (tmp_path / "out" / FLOAT).exists()


class Refuses(nn.Module):
    """What torch or the module itself does not let be traced."""

    def __init__(self, in_onnx):
        super().__init__()
        self.fc = nn.Linear(40, 12)
        self.in_onnx = in_onnx

    def forward(self, x):  # (N, M, T)
        if torch.onnx.is_in_onnx_export() if self.in_onnx else torch.jit.is_tracing():
            raise RuntimeError("no tracing here\nwith more to say")
        return self.fc(x.mean(2))


@pytest.mark.parametrize("in_onnx", [True, False], ids=["ONNX", "TorchScript"])
def test_what_torch_refuses_to_trace_is_one_line(tmp_path, heard, in_onnx):
    model = of_module(Refuses(in_onnx), "NMT")
    message = r"^this module cannot be traced \(RuntimeError: no tracing here\); give one length"
    with pytest.raises(ExportError, match=message) as e:
        traced(model, tmp_path, heard)
    assert "\n" not in str(e.value)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_loop_over_frames_needs_a_length_and_says_so(tmp_path, heard):
    model = of_module(own_models.CellGru(), "NMT")
    with pytest.raises(ParityError, match=r"one length: give that under \[input\] of the spec$"):
        traced(model, tmp_path, heard)


class Rnn(nn.Module):
    """An RNN, which has no form in INT8, between layers that have."""

    def __init__(self, n_classes=12):
        super().__init__()
        self.conv = nn.Conv1d(40, 24, 5, stride=2)
        self.rnn = nn.RNN(24, 32, batch_first=True)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, M, T)
        x = torch.relu(self.conv(x)).transpose(1, 2)
        return self.fc(self.rnn(x)[0].mean(1))


def test_an_rnn_stays_in_float_and_the_rest_is_in_int8(tmp_path, heard):
    chain = Made(of_module(Rnn(), "NMT"), tmp_path, heard)
    assert chain.reasons == {"rnn": "RNN has no INT8 form here"}
    found = {
        layer.name: layer.precision for layer in onnxruntime_coverage(chain.forms["cpu"]).layers
    }
    assert found["conv"] == found["fc"] == "int8"
    assert {precision for name, precision in found.items() if "rnn" in name} == {"fp32"}
    assert chain.sqnr_db() > 20
    for target in (TENSORRT, TENSORRT_FP16):
        assert lint(onnx_graph.load(chain.forms[target.name]), target) == []


@pytest.mark.parametrize(
    ("kind", "layout", "layers"),
    [
        (own_models.NamedLikeOurs, "NTM", {"log_mel_of_module", "fc"}),
        (own_models.WaveformNamedLikeOurs, None, {"log_mel", "fc"}),
        (own_models.LogarithmInside, None, {"conv1", "conv2", "fc"}),
    ],
)
def test_no_layer_is_taken_for_a_part_of_our_front_end(tmp_path, heard, kind, layout, layers):
    chain = Made(of_module(kind(), layout), tmp_path, heard, ["cpu"])
    assert set(layers_in(chain.float)) == layers
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    assert {layer.name: layer.precision for layer in receipt.layers} == dict.fromkeys(
        layers, "int8"
    )


def test_a_front_end_of_its_own_stays_in_float_and_is_listed(tmp_path, heard):
    module = own_models.Spectrogram().eval()
    chain = Made(OwnModel(module, WholeSpec(LABELS, audio(None))), tmp_path, heard, ["cpu"])
    reason = "a part of the front-end: float by design"
    assert chain.reasons == {"fourier": reason, "mel": reason}
    assert set(layers_in(chain.float)) == {"gru.weight_ih_l0", "gru.weight_hh_l0", "fc"}


class Text(nn.Module):
    """Logits of each frame, time first, as nn.CTCLoss takes them."""

    def __init__(self, n_classes=4):
        super().__init__()
        self.conv = nn.Conv1d(40, 24, 5, stride=2)
        self.gru = nn.GRU(24, 32)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, M, T)
        x = torch.relu(self.conv(x)).permute(2, 0, 1)
        return torch.log_softmax(self.fc(self.gru(x)[0]), 2)


class PackedOtherwise(nn.Module):
    """Packed with the batch first, for a GRU and an LSTM whose time is first, and back."""

    def __init__(self, n_classes=12):
        super().__init__()
        self.gru = nn.GRU(40, 24)
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.fc = nn.Linear(16 + 24, n_classes)

    def forward(self, x, lengths):  # (N, T, M), (N,)
        x = own_models.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, h = self.gru(x)
        x, _ = self.lstm(x)
        x, lengths = own_models.pad_packed_sequence(x)
        return self.fc(torch.cat([h[-1], x.sum(0) / lengths[:, None]], 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_sequences_may_be_laid_out_otherwise(tmp_path, heard, monkeypatch):
    monkeypatch.setitem(sys.modules, "not_to_be_imported", None)
    model = of_module(PackedOtherwise(), "NTM")
    forwards = nn.GRU.forward, nn.LSTM.forward
    for parity in traced(model, tmp_path, heard):
        assert parity.max_abs_error < 1e-4
    assert (nn.GRU.forward, nn.LSTM.forward) == forwards
    assert own_models.pack_padded_sequence is torch.nn.utils.rnn.pack_padded_sequence


class WithoutWeights(nn.Module):
    def forward(self, x):  # (N, T, M)
        return x.mean(1)[:, :12]


def test_a_module_without_layers_is_not_quantized(tmp_path, heard):
    model = OwnModel(WithoutWeights(), WholeSpec(LABELS, audio("NTM")))
    with pytest.raises(ExportError, match=r"model\.fp32\.onnx: no layer of it can be in INT8$"):
        Made(model, tmp_path, heard, ["cpu"])
    with pytest.raises(ExportError, match=r"no layer of it can be in INT8$"):
        quantize_checked(
            tmp_path / FLOAT, tmp_path / "ranges.json", tmp_path / INT8, "cpu", None, 1.0
        )


def test_a_module_without_layers_for_int8_says_why(tmp_path, heard):
    model = OwnModel(OnlyRnn(), WholeSpec(LABELS, audio("NTM")))
    message = "no layer of it can be in INT8; rnn stays in float: RNN has no INT8 form here$"
    with pytest.raises(ExportError, match=message):
        Made(model, tmp_path, heard, ["cpu"])


class OnlyRnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(40, 12, batch_first=True)

    def forward(self, x):  # (N, T, M)
        return self.rnn(x)[0][:, -1]


def test_a_module_that_writes_texts_goes_through(tmp_path, heard):
    spec = WholeSpec((BLANK, "a", "b", "c"), audio("NMT"), answers=TEXT_ANSWER)
    model = OwnModel(lively(Text()), spec)
    check_runs(model, torch.from_numpy(example_input(spec)[None]))
    assert model.time_first
    chain = Made(model, tmp_path, heard)
    assert chain.sqnr_db() > 20
    with open_session(chain.forms["cpu"]) as session:
        assert session.outputs[0].shape == ("N", "T", 4)
        found = session.run({"audio": np.zeros((2, 16_000), np.float32)})["logits"]
    assert found.shape == (2, 49, 4)


class Pooled(nn.Module):
    """Adaptive pools over mel bins and over frames, as image models have them, and a GELU."""

    def __init__(self, pool, frames=1):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, (5, 5), (2, 2), padding=2)
        self.over_bins = getattr(nn, f"Adaptive{pool}Pool2d")((1, None))
        self.gru = nn.GRU(16, 24, batch_first=True)
        self.over_frames = getattr(nn, f"Adaptive{pool}Pool1d")(frames)
        self.fc = nn.Linear(24 * frames, 12)

    def forward(self, x):  # (N, 1, M, T)
        x = self.over_bins(nn.functional.gelu(self.conv(x)))[:, :, 0]
        x, _ = self.gru(x.transpose(1, 2))
        return self.fc(self.over_frames(x.transpose(1, 2)).flatten(1))


@pytest.mark.parametrize("pool", ["Avg", "Max"])
def test_adaptive_pools_take_clips_of_any_length(tmp_path, heard, pool):
    chain = Made(of_module(Pooled(pool), "N1MT"), tmp_path, heard)
    np.testing.assert_allclose(chain.logits(chain.float), chain.expected(), rtol=0, atol=1e-4)
    assert onnxruntime_coverage(chain.forms["cpu"]).weights_int8 == 1
    assert chain.sqnr_db() > 20
    with open_session(chain.forms["cpu"]) as session:
        assert session.inputs[0].shape == ("N", "S")


def test_an_adaptive_pool_to_several_frames_is_not_traced(tmp_path, heard):
    with pytest.raises(ExportError, match="cannot be traced") as caught:
        traced(of_module(Pooled("Avg", 5), "N1MT"), tmp_path, heard)
    assert "\n" not in str(caught.value)


class Attends(nn.Module):
    """Multi-head attention over all frames, or of the last one over them."""

    def __init__(self, of_last):
        super().__init__()
        self.gru = nn.GRU(40, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, bias=not of_last)
        self.fc = nn.Linear(32, 12)
        self.of_last = of_last

    def forward(self, x):  # (N, T, M)
        x, _ = self.gru(x)
        query = x[:, -1:] if self.of_last else x
        attended, shares = self.attention(query, x, x, need_weights=not self.of_last)
        if shares is not None:
            attended = attended * shares.amax(2, keepdim=True)
        return self.fc(attended.mean(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("of_last", [False, True])
def test_attention_takes_clips_of_any_length(tmp_path, heard, of_last, frozen):
    module = Attends(of_last).requires_grad_(not frozen)
    chain = Made(of_module(module, "NTM"), tmp_path, heard)
    np.testing.assert_allclose(chain.logits(chain.float), chain.expected(), rtol=0, atol=1e-4)
    assert onnxruntime_coverage(chain.forms["cpu"]).weights_int8 == 1
    assert chain.sqnr_db() > 20
    with open_session(chain.forms["cpu"]) as session:
        assert session.inputs[0].shape == ("N", "S")
    for target in (TENSORRT, TENSORRT_FP16):
        assert lint(onnx_graph.load(chain.forms[target.name]), target) == []


class Probable(nn.Module):
    """A softmax at its end, as Keras models have it."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(40, 32, batch_first=True)
        self.fc = nn.Linear(32, 12)

    def forward(self, x):  # (N, T, M)
        return self.fc(self.gru(x)[0][:, -1]).softmax(-1)


def test_of_probabilities_the_logarithms_are_the_logits(tmp_path, heard):
    model = of_module(Probable(), "NTM")
    given = torch.from_numpy(example_input(model.spec)[None])
    check_runs(model, given)
    assert [w for w in warnings_about(model, given) if "it gives probabilities" in w]
    chain = Made(model, tmp_path, heard)
    with torch.inference_mode():
        clip = read_input(model.spec, heard[1][0])
        expected = model.module(model.given_to_module(torch.from_numpy(clip[None]))).numpy()
    with open_session(chain.float) as session:
        found = softmax(clip_logits(session, clip))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert chain.sqnr_db() > 20
    assert onnxruntime_coverage(chain.forms["cpu"]).weights_int8 == 1


# ONNX files of other exporters.


class ProbableInHalf(Probable):
    def forward(self, x):
        return super().forward(x).half()


def test_probabilities_in_half_precision_are_seen():
    model = of_module(ProbableInHalf(), "NTM")
    check_runs(model, torch.from_numpy(example_input(model.spec)[None]))
    assert model.gives_probabilities


def test_a_file_with_a_softmax_at_its_end(tmp_path, heard):
    free = {0: "n", 1: "t"}
    path = from_torch(Probable(), tmp_path / "a.onnx", torch.zeros(2, 101, 40), 14, free)
    model = loaded(path)
    assert model.gives_probabilities
    (parity,) = traced(model, tmp_path, heard)
    assert parity.max_abs_error < 1e-4


def test_a_file_for_several_at_a_time_is_refused(tmp_path):
    path = from_torch(Probable(), tmp_path / "a.onnx", torch.zeros(4, 101, 40), 14)
    with pytest.raises(SpecError) as caught:
        loaded(path)
    assert str(caught.value) == (
        f"{path}: its input mfcc takes 4 at a time; export it for one, or with a free batch axis"
    )


def test_a_file_of_other_sizes_than_the_spec_says_is_named(tmp_path):
    free = {0: "n", 1: "t"}
    path = from_torch(Probable(), tmp_path / "a.onnx", torch.zeros(2, 101, 40), 14, free)
    for layout in ("NMT", "N1TM"):
        with pytest.raises(SpecError, match=r"mfcc of the file is \(n, t, 40\)") as caught:
            loaded(path, replace(KERAS, input=audio(layout)))
        assert "\n" not in str(caught.value)


KERAS = WholeSpec(LABELS, audio("NTM"), why_whole="it is not ours")


def weights_of(rng, *shape):
    deviation = np.float32(np.sqrt(max(1, np.prod(shape[1:]))))
    return rng.standard_normal(shape, np.float32) / deviation


def keras_graph(rng, path, *, lengths=False, rows="batch", opset=13):
    """Conv1d over channels last, batch norm, a GRU and a dense layer, as tf2onnx writes them."""
    hidden, channels, mels = 24, 32, 40
    constants = {
        "kernel": weights_of(rng, channels, mels, 1, 5),
        "conv_bias": weights_of(rng, channels),
        "gamma": rng.uniform(0.7, 1.3, channels).astype(np.float32),
        "beta": weights_of(rng, channels),
        "mean": weights_of(rng, channels),
        "variance": rng.uniform(0.5, 2, channels).astype(np.float32),
        "gru_W": 2 * weights_of(rng, 1, 3 * hidden, channels),
        "gru_R": 2 * weights_of(rng, 1, 3 * hidden, hidden),
        "gru_B": weights_of(rng, 1, 6 * hidden),
        "dense_W": weights_of(rng, hidden, len(LABELS)),
        "dense_B": weights_of(rng, len(LABELS)),
        "axis_2": np.array([2], np.int64),
        "axis_0": np.array([0], np.int64),
        "lengths": np.array([10], np.int32),
    }
    nodes = [
        ("conv1d/wide", "Unsqueeze", ["input_1", "axis_2"], ["wide"], {}),
        ("conv1d/first", "Transpose", ["wide"], ["channels_first"], {"perm": [0, 3, 2, 1]}),
        (
            "conv1d/Conv1D",
            "Conv",
            ["channels_first", "kernel", "conv_bias"],
            ["conv"],
            {"strides": [1, 2]},
        ),
        ("re_lu/Relu", "Relu", ["conv"], ["relu"], {}),
        (
            "batch_normalization/batchnorm",
            "BatchNormalization",
            ["relu", "gamma", "beta", "mean", "variance"],
            ["norm"],
            {"epsilon": 1e-3},
        ),
        ("conv1d/narrow", "Squeeze", ["norm", "axis_2"], ["frames"], {}),
        ("gru/time_first", "Transpose", ["frames"], ["time_first"], {"perm": [2, 0, 1]}),
        (
            "gru/gru",
            "GRU",
            ["time_first", "gru_W", "gru_R", "gru_B", "lengths" if lengths else ""],
            ["", "last"],
            {"hidden_size": hidden, "linear_before_reset": 1},
        ),
        ("gru/state", "Squeeze", ["last", "axis_0"], ["state"], {}),
        ("dense/MatMul", "Gemm", ["state", "dense_W", "dense_B"], ["dense_1"], {}),
    ]
    if not lengths:
        del constants["lengths"]
    graph = helper.make_graph(
        [
            helper.make_node(kind, given, written, name=f"model/{name}", **attributes)
            for name, kind, given, written, attributes in nodes
        ],
        "keras",
        [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, [rows, None, mels])],
        [helper.make_tensor_value_info("dense_1", TensorProto.FLOAT, [rows, len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def from_torch(module, path, example, opset=11, free=None, ir_version=None):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            lively(module),
            example,
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["mfcc"],
            output_names=["scores"],
            dynamic_axes={"mfcc": free} if free else None,
        )
    return path


def loaded(path, spec=KERAS):
    model = load_onnx(path, OwnSpec(spec, {}))
    check_runs(model, torch.from_numpy(example_input(spec)[None]))
    return model


def test_a_file_as_keras_exporters_make_it(tmp_path, rng, heard):
    path = keras_graph(rng, tmp_path / "keras.onnx")
    chain = Made(loaded(path), tmp_path / "out", heard)
    assert [parity.path.name for parity in chain.parity] == [FLOAT]
    assert not (chain.out / TORCHSCRIPT).exists()
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    assert receipt.weights_int8 == 1, receipt
    assert sorted(layer.name for layer in receipt.layers) == [
        "model.conv1d",
        "model.dense",
        "model.gru.weight_hh_l0",
        "model.gru.weight_ih_l0",
    ]
    assert chain.sqnr_db() > 20
    with open_session(chain.forms["cpu"]) as session:
        assert (session.inputs[0].shape, session.outputs[0].shape) == (("N", "S"), ("N", 1, 12))
    for target in (TENSORRT, TENSORRT_FP16):
        assert lint(onnx_graph.load(chain.forms[target.name]), target) == []
    # With features before it, it answers as the file itself does to features.
    original = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = np.sin(np.arange(16_000, dtype=np.float32))[None]
    features = chain.model.given_to_module(torch.from_numpy(given)).numpy()
    (expected,) = original.run(None, {"input_1": features})
    with open_session(chain.float) as session:
        found = session.run({"audio": given})["logits"][:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_file_of_torch_for_one_clip_at_a_time(tmp_path, heard):
    path = from_torch(own_models.Conv2dGru(), tmp_path / "a.onnx", torch.zeros(1, 1, 40, 101))
    spec = WholeSpec(LABELS, audio("N1MT", samples=16_000), why_whole="it is not ours")
    model = loaded(path, spec)
    assert not model.free_batch
    chain = Made(model, tmp_path / "out", heard)
    with open_session(chain.forms["cpu"]) as session:
        assert session.inputs[0].shape == (1, 16_000)
        assert session.max_batch == 1
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    assert receipt.weights_int8 == 1, receipt
    assert chain.sqnr_db() > 20


def test_a_file_with_an_lstm_and_features_before_it(tmp_path, heard):
    example = torch.zeros(2, 40, 101)
    free = {0: "n", 2: "t"}
    path = from_torch(own_models.ConvLstm(), tmp_path / "a.onnx", example, opset=14, free=free)
    chain = Made(loaded(path, replace(KERAS, input=audio("NMT"))), tmp_path / "out", heard)
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    assert receipt.weights_int8 == 1, receipt
    assert chain.sqnr_db() > 20


def test_a_file_of_torchs_newest_opset_with_a_mean_over_frames(tmp_path, heard):
    # Its axes are an input since opset 18, and ONNX's converter does not come down from 20.
    example, free = torch.zeros(2, 40, 101), {0: "n", 2: "t"}
    for opset in (17, 18, 20):
        path = from_torch(own_models.ConvLstm(), tmp_path / f"{opset}.onnx", example, opset, free)
        model = loaded(path, replace(KERAS, input=audio("NMT")))
        (parity,) = traced(model, tmp_path / str(opset), heard)
        assert parity.max_abs_error < 1e-4


def test_weights_may_lie_in_a_file_beside_it(tmp_path, heard):
    example, free = torch.zeros(2, 40, 101), {0: "n", 2: "t"}
    path = from_torch(own_models.ConvLstm(), tmp_path / "whole.onnx", example, 17, free)
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(path), beside, save_as_external_data=True, location="beside.onnx.data")
    assert (tmp_path / "beside.onnx.data").stat().st_size > beside.stat().st_size
    (parity,) = traced(loaded(beside, replace(KERAS, input=audio("NMT"))), tmp_path, heard)
    assert parity.max_abs_error < 1e-4
    assert [made.name for made in (tmp_path / "out").iterdir()] == [FLOAT]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 24)
        self.gru = nn.GRU(24, 32, batch_first=True)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.gru(self.embedding(x))[0][:, -1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_file_that_takes_tokens(tmp_path, dtype):
    path = from_torch(
        Tokens(), tmp_path / "a.onnx", torch.zeros(2, 5, dtype=dtype), 13, {0: "n", 1: "l"}
    )
    words = ("<padding>", "<unknown>", *"abcdefg")
    model = loaded(path, WholeSpec(("x", "y", "z"), TokenInput(words), why_whole="it is not ours"))
    given = [np.array([2, 3, 4, 8]), np.array([1, 7]), np.array([5, 5, 5, 5, 5, 5])]
    (parity,) = pipeline.trace(model, tmp_path / "out", given)
    assert parity.max_abs_error < 1e-5
    phrases = ["a b c", "g", "d e nothing", "f f f f f f f"] * 5
    ranges, _ = calibrate(tmp_path / "out" / FLOAT, phrases, CLIPS)
    ranges.save(tmp_path / "ranges.json")
    quantize_onnx(tmp_path / "out" / FLOAT, tmp_path / "ranges.json", tmp_path / INT8)
    receipt = onnxruntime_coverage(tmp_path / INT8)
    assert receipt.weights_int8 == 1, receipt
    with open_session(tmp_path / INT8) as session, torch.inference_mode():
        assert session.inputs[0].dtype == "int64"
        for tokens in given:
            found = session.run({"tokens": tokens[None]})["logits"]
            expected = model(torch.from_numpy(tokens[None])).numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)


def test_lengths_in_a_file_keep_its_gru_in_float(tmp_path, rng, heard):
    path = keras_graph(rng, tmp_path / "keras.onnx", lengths=True, rows=1)
    chain = Made(loaded(path), tmp_path / "out", heard)
    ((layer, reason),) = chain.reasons.items()
    assert layer == "model.gru"
    assert "cannot be lowered because of its sequence_lens" in reason
    receipt = onnxruntime_coverage(chain.forms["cpu"])
    in_int8 = {layer.name for layer in receipt.layers if layer.precision == "int8"}
    assert in_int8 == {"model.conv1d", "model.dense"}
    for target in (TENSORRT, TENSORRT_FP16):
        assert lint(onnx_graph.load(chain.forms[target.name]), target) == []


# Files that are refused.


def small_graph(path, inputs=1, kind=TensorProto.FLOAT, quantized=False, names=None):
    called = names or {}
    names = [f"x{i}" for i in range(inputs)]
    y, last = called.get("y", "y"), "scores" if "logits" in called.values() else "logits"
    infos = [helper.make_tensor_value_info(name, kind, ["n", 40, "t"]) for name in names]
    weight = np.ones((12, 40, 3), helper.tensor_dtype_to_np_dtype(kind))
    nodes = [
        helper.make_node("Sum", names, ["x"]),
        helper.make_node("Conv", ["x", "w"], [y], name="conv"),
        helper.make_node("GlobalAveragePool", [y], ["z"]),
        helper.make_node("Flatten", ["z"], [last]),
    ]
    initializers = [numpy_helper.from_array(weight, "w")]
    if quantized:
        initializers[0].name = "w_float"
        initializers += [
            numpy_helper.from_array(np.float32(0.1), "s"),
            numpy_helper.from_array(np.int8(0), "zero"),
        ]
        nodes[1:1] = [
            helper.make_node("QuantizeLinear", ["w_float", "s", "zero"], ["w_int8"]),
            helper.make_node("DequantizeLinear", ["w_int8", "s", "zero"], ["w"]),
        ]
    outputs = [helper.make_tensor_value_info(last, kind, ["n", 12])]
    graph = helper.make_graph(nodes, "small", infos, outputs, initializers)
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


NMT = OwnSpec(replace(KERAS, input=audio("NMT")), {})


def test_two_inputs_are_refused(tmp_path):
    path = small_graph(tmp_path / "a.onnx", inputs=2)
    with pytest.raises(SpecError, match=r"a\.onnx: expected one input, it has x0, x1$"):
        load_onnx(path, NMT)


@pytest.mark.parametrize("data", [None, b"", b"this is no graph", b"\x08\x07"])
def test_what_is_no_onnx_file_is_one_line(tmp_path, data):
    path = tmp_path / "a.onnx"
    message = "no such file"
    if data is not None:
        path.write_bytes(data)
        message = r"ONNX Runtime does not open it \(.+\)"
    with pytest.raises(SpecError, match=rf"^{re.escape(str(path))}: {message}$"):
        load_onnx(path, NMT)


def test_arguments_are_not_for_a_file(tmp_path):
    with pytest.raises(SpecError, match=r"a\.onnx: \[model\] of a spec is for a class"):
        load_onnx(small_graph(tmp_path / "a.onnx"), replace(NMT, arguments={"n_classes": 3}))


def test_half_precision_is_refused(tmp_path):
    path = small_graph(tmp_path / "a.onnx", kind=TensorProto.FLOAT16)
    with pytest.raises(SpecError, match=r"its input x0 is float16, expected float32, .+") as e:
        load_onnx(path, NMT)
    assert "\n" not in str(e.value)


def test_a_quantized_file_is_refused(tmp_path, heard):
    model = loaded(small_graph(tmp_path / "a.onnx", quantized=True), NMT.spec)
    with pytest.raises(ExportError, match=r"a\.onnx: .*already quantized; give the float graph$"):
        traced(model, tmp_path, heard)
    assert not (tmp_path / "out" / FLOAT).exists()


@pytest.mark.parametrize("name", ["logits", "audio", "features", "given", "given_to_module"])
def test_names_of_ours_in_a_file_do_no_harm(tmp_path, heard, name):
    path = small_graph(tmp_path / "a.onnx", names={"y": name})
    traced(loaded(path, NMT.spec), tmp_path, heard)


def token_graph(path):
    """Whose inner values are called as our input and output are."""
    weights = {"table": np.eye(9, 8, dtype=np.float32), "v": np.ones((8, 3), np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["tokens"]),
            helper.make_node("ReduceMean", ["tokens"], ["logits"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["logits", "v"], ["features"]),
        ],
        "small",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "l"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def test_names_of_ours_in_a_file_of_tokens_do_no_harm(tmp_path):
    words = ("<padding>", "<unknown>", *"abcdefg")
    spec = WholeSpec(("x", "y", "z"), TokenInput(words), why_whole="it is not ours")
    model = loaded(token_graph(tmp_path / "a.onnx"), spec)
    (parity,) = pipeline.trace(model, tmp_path / "out", [np.array([2, 3, 4])])
    assert parity.max_abs_error < 1e-6
    with open_session(tmp_path / "out" / FLOAT) as session:
        assert [value.name for value in (*session.inputs, *session.outputs)] == ["tokens", "logits"]


def with_last(path, kind):
    """A small graph whose answer is cast to another type."""
    model = onnx.load(small_graph(path))
    (output,) = model.graph.output
    model.graph.node.append(helper.make_node("Cast", [output.name], ["cast"], to=kind))
    output.name, output.type.tensor_type.elem_type = "cast", kind
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_an_answer_of_other_floats_is_cast(tmp_path, heard, kind):
    traced(loaded(with_last(tmp_path / "a.onnx", kind), NMT.spec), tmp_path, heard)
    with open_session(tmp_path / "out" / FLOAT) as session:
        assert (
            session.run({"audio": np.zeros((1, 8_000), np.float32)})["logits"].dtype == np.float32
        )


def test_an_answer_of_integers_is_refused(tmp_path):
    path = with_last(tmp_path / "a.onnx", TensorProto.INT64)
    with pytest.raises(SpecError, match=r"first output cast is int64, expected logits in float32$"):
        load_onnx(path, NMT)


def test_a_file_is_never_written_to(tmp_path, heard):
    path = small_graph(tmp_path / "a.onnx")
    before = path.read_bytes()
    model = load_onnx(path, NMT)
    assert isinstance(model, OnnxModel)
    traced(model, tmp_path, heard)
    assert Path(path).read_bytes() == before
