"""Programs of torch.export: what torch has in place of TorchScript."""

import logging

import numpy as np
import own_models
import pytest
import torch
from conftest import TINY_SPEC
from torch import nn

from cnngru_edge.export.artefacts import FLOAT, PROGRAM, TORCHSCRIPT
from cnngru_edge.export.chain import pipeline
from cnngru_edge.export.trace import program
from cnngru_edge.export.trace.parity import TOLERANCE, check_parity
from cnngru_edge.export.trace.program import export_program, has_programs
from cnngru_edge.models.errors import ExportError, SessionError
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import AudioInput, WholeFeatures, WholeSpec
from cnngru_edge.runtime.backends.torchscript import TorchSession
from cnngru_edge.runtime.stream import Stream

needs_programs = pytest.mark.skipif(
    not has_programs(), reason=f"programs need torch {program.SINCE} or newer"
)
LABELS = ("yes", "no", "other")
FEATURES = WholeFeatures(
    n_fft=512, win_length=400, hop_length=160, n_mels=40, log_offset=1e-3, mean=-3.0, std=3.0
)


def own(module, layout="NMT", **options):
    """A model of a module that is not ours."""
    features = None if layout == "N1S" else FEATURES
    given = AudioInput(features=features, layout=layout, least_samples=4_000, **options)
    return OwnModel(module.eval(), WholeSpec(LABELS, given, why_whole="it is not ours"))


@pytest.fixture
def clips(rng):
    """Of several lengths, one a chunk."""
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in (8000, 9999, 80)]


@pytest.fixture
def long_clips(rng):
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in (8000, 9999, 4001)]


@needs_programs
def test_a_program_equals_its_model_in_any_length_and_batch(tiny, clips, tmp_path):
    path = tmp_path / PROGRAM
    export_program(tiny.for_export(), path)
    assert check_parity(tiny, path, clips).max_abs_error <= TOLERANCE
    with TorchSession(path) as session, torch.inference_mode():
        assert (session.spec, session.max_batch) == (TINY_SPEC, None)
        chunk = TINY_SPEC.chunk_length
        audio = np.stack([clips[0][:chunk], clips[1][:chunk]])
        stream = Stream(session, batch=2)
        found = np.concatenate([stream.push(audio), stream.push(audio)], axis=1)
        expected, _ = tiny(torch.from_numpy(np.tile(audio, 2)), tiny.initial_state(2))
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE)


@needs_programs
def test_its_recurrent_layers_stay_and_its_spec_is_inside(tiny, tmp_path):
    path = tmp_path / PROGRAM
    export_program(tiny.for_export(), path)
    extra = {METADATA_KEY: ""}
    loaded = torch.export.load(path, extra_files=extra)
    operators = [str(node.target) for node in loaded.graph.nodes]
    assert operators.count("aten.gru.input") == TINY_SPEC.num_layers
    assert extra[METADATA_KEY] == TINY_SPEC.to_json()


@needs_programs
def test_the_same_model_gives_the_same_file(tiny, tmp_path):
    for name in ("a.pt2", "b.pt2"):
        export_program(tiny.for_export(), tmp_path / name)
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


@needs_programs
def test_phrases_of_one_word_and_of_many(tiny_text, tmp_path):
    path = tmp_path / PROGRAM
    export_program(tiny_text.for_export(), path)
    with TorchSession(path) as session, torch.inference_mode():
        for rows, length in ((1, 1), (1, 2), (3, 7), (2, 12)):
            tokens = torch.randint(0, 11, (rows, length))
            found = session.run({"tokens": tokens.numpy()})["logits"]
            np.testing.assert_allclose(found, tiny_text(tokens).numpy(), atol=TOLERANCE)


@needs_programs
def test_lines_of_any_width(tiny_crnn, tmp_path):
    path = tmp_path / PROGRAM
    export_program(tiny_crnn.for_export(), path)
    with TorchSession(path) as session, torch.inference_mode():
        for rows, width in ((1, 32), (1, 33), (3, 131)):
            image = torch.rand(rows, 1, 8, width)
            found = session.run({"image": image.numpy()})["logits"]
            np.testing.assert_allclose(found, tiny_crnn(image).numpy(), atol=TOLERANCE)


class PlainRnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(40, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


@needs_programs
@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (lambda: own_models.PackedGru(3), "NTM"),
        (lambda: own_models.ConvLstm(3), "NMT"),
        (lambda: own_models.AttentionGru(3), "NTM"),
        (PlainRnn, "NTM"),
    ],
    ids=["PackedGru", "ConvLstm", "AttentionGru", "PlainRnn"],
)
def test_modules_of_ones_own_are_programs_too(module, layout, long_clips, tmp_path):
    model = own(module(), layout)
    export_program(model, tmp_path / PROGRAM)
    assert check_parity(model, tmp_path / PROGRAM, long_clips).max_abs_error <= TOLERANCE


class Decides(nn.Module):
    """What depends on its input in Python, though never otherwise."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(40, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if x.abs().max() < 0:
            x = -x
        return self.fc(self.gru(x)[0][:, -1])


@needs_programs
def test_what_torch_export_does_not_take_is_said_and_the_rest_is_written(
    long_clips, tmp_path, capfd
):
    (tmp_path / PROGRAM).write_text("of another model")
    notes = []
    found = pipeline.trace(own(Decides(), "NTM"), tmp_path, long_clips, notes.append)
    assert [parity.path.name for parity in found] == [TORCHSCRIPT, FLOAT]
    assert {path.name for path in tmp_path.iterdir()} == {TORCHSCRIPT, FLOAT}
    (note,) = notes
    assert note.startswith("no model.pt2: torch.export does not take it (")
    assert "\n" not in note
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


@needs_programs
def test_a_program_that_answers_otherwise_is_not_written(tiny, clips, tmp_path, monkeypatch):
    def spoiled(model, path):
        model.head.bias.data += 1
        export_program(model, path)
        model.head.bias.data -= 1

    monkeypatch.setattr(pipeline, "export_program", spoiled)
    notes = []
    pipeline.trace(tiny, tmp_path, clips, notes.append)
    assert {path.name for path in tmp_path.iterdir()} == {TORCHSCRIPT, FLOAT}
    assert notes[0].startswith("no model.pt2: model.pt2: tensor 'logits' differs from torch by 1,")


def test_an_older_torch_makes_none(tiny, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(ExportError, match=r"it needs torch 2\.11 or newer, here is 2\.6\.0\+cpu"):
        export_program(tiny.for_export(), tmp_path / PROGRAM)
    notes = []
    pipeline.trace(tiny, tmp_path, clips, notes.append)
    assert notes == ["no model.pt2: it needs torch 2.11 or newer, here is 2.6.0+cpu"]


@needs_programs
def test_torch_is_left_as_it_was(tiny, tmp_path):
    x, state = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    gru = nn.GRU(3, 4)
    before = gru(x, state)[0]
    kernels = dict(torch.ops.aten.gru.input.py_kernels)
    export_program(tiny.for_export(), tmp_path / PROGRAM)
    assert torch.ops.aten.gru.input.py_kernels == kernels
    assert torch.equal(gru(x, state)[0], before)


@needs_programs
def test_a_program_is_traced_and_not_run(cli, refused, tiny_checkpoint, wav, rng, tmp_path):
    """Loading one may run code."""
    out = tmp_path / "out"
    traced = cli("trace", tiny_checkpoint, "--out", out)
    assert (traced.exit_code, traced.stderr) == (0, "")
    assert f"{out}/model.pt2: equals torch within " in traced.stdout
    clip = wav("a.wav", 0.1 * rng.standard_normal(16_000).astype(np.float32))
    assert refused("run", "--engine", out / PROGRAM, clip) == (
        f"{out / PROGRAM}: torch.export.load may run code that a file holds, so it is not opened "
        "here; run the .onnx or .ts file beside it"
    )


@needs_programs
def test_an_input_that_a_program_does_not_take_is_a_line(tiny_crnn, tmp_path):
    path = tmp_path / PROGRAM
    export_program(tiny_crnn.for_export(), path)
    with (
        TorchSession(path) as session,
        pytest.raises(SessionError, match="torch does not run this input"),
    ):
        session.run({"image": np.zeros((1, 1, 9, 32), np.float32)})
