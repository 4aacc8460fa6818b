import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.checkpoint import (
    load_checkpoint,
    load_stream_checkpoint,
    save_checkpoint,
)
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import OWN


def test_a_checkpoint_alone_gives_the_model_back(tiny, tiny_checkpoint):
    loaded = load_stream_checkpoint(tiny_checkpoint)
    assert loaded.spec == tiny.spec
    audio = torch.randn(1, 10 * tiny.spec.chunk_length)
    expected, _ = tiny(audio, tiny.initial_state())
    found, _ = loaded(audio, loaded.initial_state())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["tiny_text", "tiny_crnn"])
def test_of_a_model_without_a_stream_too(request, name, tmp_path):
    model = request.getfixturevalue(name)
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    loaded = load_checkpoint(path)
    assert type(loaded) is type(model)
    assert (loaded.spec, loaded.training) == (model.spec, False)
    given = torch.tensor([[2, 3, 4]]) if name == "tiny_text" else torch.rand(1, 1, 8, 20)
    assert torch.equal(loaded(given), model(given))


@pytest.mark.parametrize("name", ["tiny_text", "tiny_crnn"])
def test_tensors_that_do_not_fit_the_spec_are_named(request, name, tmp_path):
    model = request.getfixturevalue(name)
    path = tmp_path / "model.safetensors"
    weights = model.state_dict()
    for changed, found in (
        ({k: v for k, v in weights.items() if k != "head.bias"}, "missing"),
        (weights | {"head.bias": torch.zeros(2)}, "(2,)"),
    ):
        save_file(changed, path, metadata={METADATA_KEY: model.spec.to_json()})
        expected = f"{path}: tensor 'head.bias' is {found}, its spec asks for "
        with pytest.raises(SpecError, match=re.escape(expected)):
            load_checkpoint(path)


def test_where_a_stream_is_needed_others_are_refused_with_the_reason(tiny_text, tmp_path):
    path = tmp_path / "text.safetensors"
    save_checkpoint(tiny_text, path)
    message = (
        f"{path}: this model cannot be a stream: its GRU is bidirectional: it reads the phrase "
        "from the end as well"
    )
    with pytest.raises(SpecError, match=re.escape(message)):
        load_stream_checkpoint(path)


def test_a_model_without_a_stream_cannot_be_tuned(refused, tiny_crnn, tmp_path):
    path = tmp_path / "crnn.safetensors"
    save_checkpoint(tiny_crnn, path)
    options = ["--engine", "none.onnx", "--data", tmp_path, "--out", tmp_path / "out.safetensors"]
    assert refused("tune", path, *options) == (
        f"{path}: this model cannot be a stream: its GRU is bidirectional: it reads the line from "
        "the right as well"
    )


def test_the_module_of_another_package_is_not_rebuilt(tiny_text, tmp_path):
    path = tmp_path / "own.safetensors"
    tiny_text.spec = dataclasses.replace(tiny_text.spec, family=OWN)
    save_checkpoint(tiny_text, path)
    with pytest.raises(SpecError, match="family 'own': its module is not in this package"):
        load_checkpoint(path)


def test_the_same_model_gives_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tiny, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
