"""The tensors of a module that is not ours, from its owner's checkpoint."""

import importlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError, first_line
from cnngru_edge.models.own.wrapper import OwnModel, OwnSpec

_NESTED = ("model_state_dict", "state_dict", "model", "net", "weights")
"""Where checkpoints of trainers keep a model's tensors."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and trainers put before the names."""


def load_own(name: str, checkpoint: Path, own: OwnSpec) -> OwnModel:
    """Build `package.module:Class`, and fill it with the tensors of a checkpoint.

    The class is looked for where Python finds it, and in the folder that the command is run in.

    Raises:
        SpecError: no such class, or the checkpoint is not of it; says what differs.
    """
    module = _built(name, own.arguments)
    weights = read_weights(checkpoint)
    expected = module.state_dict()
    weights = _renamed(weights, set(expected))
    if missing := [key for key in expected if key not in weights]:
        raise SpecError(
            f"{checkpoint}: {len(missing)} tensors of {name} are missing, as {missing[0]!r}; it "
            f"has {', '.join(sorted(weights)[:3]) or 'none'} ..."
        )
    if strange := sorted(set(weights) - set(expected)):
        raise SpecError(
            f"{checkpoint}: {len(strange)} tensors that {name} does not have, as {strange[0]!r}; "
            "is it of another class, or built with other [model] arguments?"
        )
    for key, tensor in expected.items():
        if weights[key].is_floating_point() != tensor.is_floating_point():
            raise SpecError(f"{checkpoint}: tensor {key!r} is of {weights[key].dtype}")
        if weights[key].shape != tensor.shape:
            raise SpecError(
                f"{checkpoint}: tensor {key!r} is {tuple(weights[key].shape)}, {name} has "
                f"{tuple(tensor.shape)}; give its sizes under [model] of the spec"
            )
    module.load_state_dict(weights)
    return OwnModel(module.float(), own.spec)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one by `torch.save`, which runs no code here.

    Raises:
        SpecError: no such file, none of the two, or more than tensors in it.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as e:
            raise SpecError(f"{path}: not a safetensors file ({e})") from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle that it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as e:
        if "GLOBAL" not in str(e) and "Unsupported" not in str(e):
            raise SpecError(f"{path}: not a checkpoint that torch reads") from e
        raise SpecError(
            f"{path}: holds more than tensors, which can run code when loaded; save "
            "model.state_dict() alone"
        ) from e
    except Exception as e:  # whatever bytes that are no pickle lead it to
        raise SpecError(f"{path}: not a checkpoint that torch reads") from e
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = found if isinstance(found, Mapping) else {}
    kept = {
        key: value
        for key, value in tensors.items()
        if isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
    }
    if not kept:
        raise SpecError(f"{path}: no tensors in it; save model.state_dict()")
    return kept


def _built(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    package, _, class_name = name.partition(":")
    if not package or not class_name:
        raise SpecError(f"{name}: expected package.module:Class")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(package), class_name)
    except ModuleNotFoundError as e:
        raise SpecError(f"{name}: no module {e.name!r} here or where Python looks") from e
    except AttributeError as e:
        raise SpecError(f"{name}: no {class_name!r} in {package}") from e
    except (Exception, SystemExit) as e:  # whatever importing it raises; a script may end
        raise SpecError(f"{name}: cannot be imported ({type(e).__name__}: {first_line(e)})") from e
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SpecError(f"{name}: not a class of torch.nn.Module")
    try:
        module = found(**arguments)
    except Exception as e:  # whatever its constructor raises
        raise SpecError(
            f"{name}: cannot be built with the [model] of the spec ({first_line(e)})"
        ) from e
    return module


def _renamed(weights: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Without a prefix that all names have, if that makes them fit better.

    Where all that is expected has one, other names are of what a trainer keeps beside the model.
    """
    while not weights.keys() & expected:
        for prefix in _PREFIXES:
            under = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            if under and (len(under) == len(weights) or expected <= under.keys()):
                weights = under
                break
        else:
            break
    return weights
