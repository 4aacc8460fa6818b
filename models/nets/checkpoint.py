"""Checkpoints: safetensors with the model's spec in the metadata. Never a pickle."""

from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.crnn import Crnn
from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import CRNN, TEXT, WholeSpec, read_spec, streamable

Model: TypeAlias = CnnGru | TextCnnGru | Crnn
"""What a checkpoint can hold."""

PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""Checkpoints that come with the package."""

# A torch.save file is a zip archive, an older one starts with the pickle protocol opcode.
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_checkpoint(model: Model, path: Path) -> None:
    """Write weights and spec, so that the file alone rebuilds the model."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_file(path, save(weights, metadata={METADATA_KEY: model.spec.to_json()}))


def load_checkpoint(path: Path) -> Model:
    """Rebuild the model, of whatever family, in evaluation mode.

    Raises:
        SpecError: the file is no safetensors file, has no spec, or its tensors do not fit the spec.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such checkpoint")
    with path.open("rb") as f:
        if f.read(4).startswith(_PICKLE_MAGIC):
            raise SpecError(
                f"{path}: a pickle, which can run code when loaded; save the weights with "
                "cnngru_edge.models.nets.checkpoint.save_checkpoint, or give the module that they "
                "are of with --model and --spec"
            )
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as e:
        raise SpecError(f"{path}: not a safetensors checkpoint ({e})") from e
    if METADATA_KEY not in metadata:
        raise SpecError(
            f"{path}: no model spec in the metadata (key {METADATA_KEY!r}); "
            "'cnngru-edge train' and cnngru_edge.models.nets.checkpoint.save_checkpoint write it; "
            "a module of your own takes --model and --spec"
        )
    try:
        model = _built(metadata[METADATA_KEY])
    except SpecError as e:
        raise SpecError(f"{path}: {e}") from e
    _check_shapes(path, model, weights)
    model.load_state_dict(weights)
    return model.eval()


def load_stream_checkpoint(path: Path) -> CnnGru:
    """Rebuild a model that can be a stream, in evaluation mode.

    Raises:
        SpecError: it takes its input whole, or as `load_checkpoint`.
    """
    model = load_checkpoint(path)
    if not isinstance(model, CnnGru):
        try:
            streamable(model.spec)
        except SpecError as e:
            raise SpecError(f"{path}: {e}") from e
    assert isinstance(model, CnnGru)
    return model


def _built(text: str) -> Model:
    spec = read_spec(text)
    if not isinstance(spec, WholeSpec):
        return CnnGru(spec)
    if spec.family == TEXT:
        return TextCnnGru(spec)
    if spec.family == CRNN:
        return Crnn(spec)
    raise SpecError(f"family {spec.family!r}: its module is not in this package")


def _check_shapes(path: Path, model: Model, weights: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found == expected:
        return
    name = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
    raise SpecError(
        f"{path}: tensor {name!r} is {found.get(name, 'missing')}, "
        f"its spec asks for {expected.get(name, 'no such tensor')}"
    )
