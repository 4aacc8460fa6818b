"""A module that its owner did not write for us: loaded, wrapped, and what is known about it.

The module is an ordinary `nn.Module` that takes a clip, phrase or image whole. Around it go the
features that it expects and the order of axes that the rest of the package has.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.own_features import ClipFeatures
from cnngru_edge.models.whole import WholeModel
from cnngru_edge.models.whole_spec import OWN, AudioInput, TokenInput, WholeSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LENGTHS = {"length", "lengths", "lens", "input_lengths", "x_len", "x_lens", "seq_len", "seq_lens"}
_STATES = {"h", "h0", "hx", "hidden", "hidden_state", "state", "states"}
_NESTED = ("model_state_dict", "state_dict", "model", "net", "weights")
"""Where checkpoints of trainers keep a model's tensors."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and trainers put before the names."""
_CELLS = (nn.GRUCell, nn.LSTMCell, nn.RNNCell)
_PADDED = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class OwnSpec:
    """A TOML file: the model's spec, and what its class is called with."""

    spec: WholeSpec
    arguments: Mapping[str, Any]  # of the class

    @classmethod
    def load(cls, path: Path) -> "OwnSpec":
        """Read the file.

        Raises:
            SpecError: no such file, no TOML, or something in it is missing or wrong.
        """
        if not path.is_file():
            raise SpecError(f"{path}: no such file")
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise SpecError(f"{path}: not a TOML file ({e})") from e
        arguments = raw.pop("model", {})
        try:
            if family := {"family", "layers", "why_whole"} & set(raw):
                raise SpecError(f"{', '.join(sorted(family))} is not for modules of one's own")
            return cls(WholeSpec.from_dict(raw | {"family": OWN}), arguments)
        except SpecError as e:
            raise SpecError(f"{path}: {e}") from e


class OwnModel(WholeModel):
    """A module with its features before it, and logits (N, T, C) after it."""

    def __init__(self, module: nn.Module, spec: WholeSpec) -> None:
        super().__init__()
        self.module, self.spec = module.eval(), spec
        kind = spec.input
        self.log_mel = (
            ClipFeatures(kind.features) if isinstance(kind, AudioInput) and kind.features else None
        )
        self._wants = _wanted(module)
        self.time_first = False  # whether the logits are (T, N, C), as nn.CTCLoss takes them
        self.free_batch = True  # whether it takes any number of clips at a time

    def given_to_module(self, given: Tensor) -> Tensor:
        """Audio in the features and the order of axes that the module takes; all else as it is."""
        kind = self.spec.input
        if not isinstance(kind, AudioInput):
            return given
        x = given if self.log_mel is None else self.log_mel(given)  # (N, S) or (N, T, M)
        if "MT" in kind.layout:
            x = x.transpose(1, 2)
        return x[:, None] if "1" in kind.layout else x

    def forward(self, given: Tensor) -> Tensor:
        """Logits (N, T, C) of what `spec.input` describes."""
        return self.logits_of(self.answered(self.given_to_module(given)))

    def logits_of(self, answer: Tensor) -> Tensor:
        """Logits (N, T, C) of what the module itself gives."""
        if answer.dim() == 2:
            return answer[:, None]
        return answer.transpose(0, 1) if self.time_first else answer

    def answered(self, x: Tensor) -> Tensor:
        """What the module itself gives: (N, C), (N, T, C) or (T, N, C).

        Args:
            x: what `given_to_module` gives.
        """
        more: list[Any] = []
        if self._wants in _LENGTHS:
            # A sum, so that a tracer sees where the number comes from.
            more = [x.new_ones(x.shape[0], x.shape[self.time_axis]).sum(1).long()]
        elif self._wants in _STATES:
            make = getattr(self.module, "init_hidden", None)
            more = [make(x.shape[0]) if callable(make) else None]
        found = self.module(x, *more)
        if isinstance(found, tuple | list) and found:
            found = found[0]  # what follows is a state, or attention weights
        if not isinstance(found, Tensor):
            raise SpecError(
                f"the module gives a {type(found).__name__}, expected a tensor of logits or a "
                "tuple that begins with one"
            )
        return found

    def for_export(self) -> "OwnModel":
        """Itself: batch norms are folded in the graph, whatever they follow."""
        return self.eval()

    @property
    def time_axis(self) -> int:
        """Of what the module takes, the axis that is as long as the input is."""
        kind = self.spec.input
        if isinstance(kind, AudioInput):
            return kind.layout.index("S" if kind.features is None else "T")
        return 1 if isinstance(kind, TokenInput) else 3


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
        if "Unsupported" not in str(e) and "WeightsUnpickler" not in str(e):
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
    kept = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not kept:
        raise SpecError(f"{path}: no tensors in it; save model.state_dict()")
    return kept


def why_whole(model: OwnModel) -> str:
    """What keeps a module from being a stream, in a clause, its layers named."""
    reasons = [
        f"{name} is bidirectional"
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.RNNBase) and layer.bidirectional
    ]
    reasons += [
        f"{name} attends to all of its input"
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
    ]
    ahead = [
        name
        for name, layer in model.module.named_modules()
        if isinstance(layer, _PADDED) and (layer.padding == "same" or any(_sizes(layer.padding)))
    ]
    if ahead and isinstance(model.spec.input, AudioInput):
        others = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
        reasons.append(f"{ahead[0]}{others} may look ahead, for it pads both ends")
    return "; ".join([*reasons, "it has no state to carry from chunk to chunk"])


def warnings_about(model: OwnModel, given: Tensor) -> Iterator[str]:
    """What a user should know of a module before it is deployed.

    Args:
        model: the module.
        given: one input, with the batch axis.
    """
    if not model.free_batch:
        yield "it takes one input at a time, for it does not run on several; so does what is made"
        return
    sizes = _recurrent_sizes(model, given)
    mixed = [name for name, seen in sizes.items() if [frames for frames, _ in seen] == [2, 3]]
    for name in mixed:
        yield (
            f"{name} reads the batch as time: what it is given has the clips where its frames "
            "should be, so that a clip's answer depends on the others beside it, and one alone is "
            "one frame; batch_first, or a view() before it, is not what was meant"
        )
    for name, seen in sizes.items():
        if seen == [(1, 2), (1, 3)]:
            yield (
                f"{name} reads one frame: the whole clip was flattened into it by a view() or "
                "reshape() before it, so nothing recurs"
            )
    if mixed:
        return
    with torch.inference_mode():
        other = given.flip(given.dim() - 1)
        together = model(torch.cat([given, other, given]))  # first and last: some look back only
        alone = model(given)
    if together.shape[1:] == alone.shape[1:]:
        error = float((together[[0, 2]] - alone).abs().max())
        if error > 1e-3 * max(1.0, float(alone.abs().max())):
            yield (
                "a clip's answer depends on the others in its batch (by "
                f"{error:.2g}): something in forward mixes the batch"
            )


def check_runs(model: OwnModel, given: Tensor) -> None:
    """Run a module once, and refuse it where what comes out is not what its spec says.

    One that does not run on several inputs is for one at a time from then on.

    Raises:
        SpecError: it does not run on its input, or gives something else than logits.
    """
    spec = model.spec
    for count in (1, 3) if model.free_batch else (1,):
        x = given.expand(count, *given.shape[1:]).clone()
        with torch.inference_mode():
            x = model.given_to_module(x)
            try:
                logits = model.answered(x)
            except SpecError:
                raise
            except Exception as e:  # whatever the module raises
                if count > 1:
                    model.free_batch = False
                    return
                raise SpecError(
                    f"the module does not run on an input of shape {tuple(x.shape)} "
                    f"({_first_line(e)}); kind, layout and features of [input] say what it is given"
                ) from e
        if logits.dim() not in (2, 3):
            raise SpecError(
                f"the module gives logits of shape {tuple(logits.shape)}, expected (N, C) or "
                "(N, T, C); a squeeze() takes the batch away too if that is one"
            )
        if logits.shape[-1] != len(spec.labels):
            raise SpecError(
                f"the module gives {logits.shape[-1]} logits, the spec has {len(spec.labels)} "
                "labels"
            )
        is_one_frame = logits.dim() == 3 and tuple(logits.shape[:2]) == (count, 1)
        if spec.writes_text != (logits.dim() == 3) and not is_one_frame:
            wanted = "(N, T, C) for a text" if spec.writes_text else "(N, C) for a label"
            raise SpecError(
                f"the module gives logits of shape {tuple(logits.shape)}, expected {wanted}; "
                "answers in the spec is 'label' or 'text'"
            )
        if count not in logits.shape[: logits.dim() - 1]:
            raise SpecError(
                f"the module gives logits of shape {tuple(logits.shape)} for {count} inputs"
            )
        if spec.writes_text and logits.shape[0] != logits.shape[1]:
            # Of one alone and of three alike, the axis that has as many is the batch.
            model.time_first = logits.shape[1] == count


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
        raise SpecError(f"{name}: cannot be imported ({type(e).__name__}: {_first_line(e)})") from e
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SpecError(f"{name}: not a class of torch.nn.Module")
    try:
        module = found(**arguments)
    except Exception as e:  # whatever its constructor raises
        raise SpecError(
            f"{name}: cannot be built with the [model] of the spec ({_first_line(e)})"
        ) from e
    return module


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _renamed(weights: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Without a prefix that all names have, if that makes them fit better."""
    while not weights.keys() & expected:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _wanted(module: nn.Module) -> str | None:
    """The one argument that forward needs after its input, if any."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
    strange = [name for name in needed if name not in _LENGTHS | _STATES]
    if strange or len(needed) > 1:
        raise SpecError(
            f"forward needs {', '.join(needed)} besides its input; expected lengths or a hidden "
            "state at the most"
        )
    return needed[0] if needed else None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _recurrent_sizes(model: OwnModel, given: Tensor) -> dict[str, list[tuple[int, int]]]:
    """Frames and clips that each recurrent layer sees, of two clips and of three."""
    seen: dict[str, list[tuple[int, int]]] = {}

    def watch(name: str, layer: nn.RNNBase) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if isinstance(x, Tensor):  # a packed sequence has its lengths, and no mistake in axes
                clips, frames = (x.shape[1], x.shape[0]) if x.dim() == 3 else (1, x.shape[0])
                if layer.batch_first and x.dim() == 3:
                    clips, frames = frames, clips
                seen.setdefault(name, []).append((int(frames), int(clips)))

        return layer.register_forward_pre_hook(hook)

    hooks = [
        watch(name, layer)
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.RNNBase)
    ]
    try:
        with torch.inference_mode():
            for count in (2, 3):
                model(given.expand(count, *given.shape[1:]).clone())
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _sizes(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    return () if isinstance(padding, str) else padding


def has_cells(model: OwnModel) -> bool:
    """Whether it has cells, which can only be called in a loop over frames in Python."""
    return any(isinstance(layer, _CELLS) for layer in model.module.modules())
