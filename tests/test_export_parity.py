import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.export.trace.parity import TOLERANCE, check_parity
from cnngru_edge.export.trace.torchscript import export_torchscript
from cnngru_edge.models.errors import ParityError


@pytest.fixture
def clips(rng):
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in (8000, 9999, 80)]


@pytest.mark.parametrize("suffix", [".ts", ".onnx"])
def test_an_artefact_equals_its_model(tiny, clips, tmp_path, suffix):
    path = tmp_path / f"tiny{suffix}"
    write = {".ts": export_torchscript, ".onnx": export_onnx}[suffix]
    write(tiny.for_export(), path)
    assert check_parity(tiny, path, clips).max_abs_error <= TOLERANCE


def edited(path, edit):
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, path)


def test_a_wrong_weight_is_found(tiny, clips, tmp_path):
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny.for_export(), path)

    def nudge(graph):
        bias = next(i for i in graph.initializer if i.name == "head.bias")
        values = numpy_helper.to_array(bias) + np.float32(1e-3)
        bias.CopyFrom(numpy_helper.from_array(values, "head.bias"))

    edited(path, nudge)
    with pytest.raises(
        ParityError, match=r"tiny.onnx: tensor 'logits' differs from torch by 0.001"
    ):
        check_parity(tiny, path, clips)


def test_a_state_that_is_not_carried_is_found(tiny, clips, tmp_path):
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny.for_export(), path)

    def forget(graph):  # the hidden state that goes out is the one that came in
        for node in graph.node:
            node.output[:] = ["lost" if o == "gru1_hidden_next" else o for o in node.output]
        graph.node.append(onnx.helper.make_node("Identity", ["gru1_hidden"], ["gru1_hidden_next"]))

    edited(path, forget)
    with pytest.raises(ParityError, match="'gru1_hidden_next' differs from torch"):
        check_parity(tiny, path, clips)


def test_nan_does_not_pass(tiny, clips, tmp_path):
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny.for_export(), path)

    def spoil(graph):
        bias = next(i for i in graph.initializer if i.name == "head.bias")
        values = np.full_like(numpy_helper.to_array(bias), np.nan)
        bias.CopyFrom(numpy_helper.from_array(values, "head.bias"))

    edited(path, spoil)
    with pytest.raises(ParityError, match="by nan"):
        check_parity(tiny, path, clips)
