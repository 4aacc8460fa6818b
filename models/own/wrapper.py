"""A module that its owner did not write for us: wrapped, with the spec that its owner gives.

The module is an ordinary `nn.Module` that takes a clip, phrase or image whole. Around it go the
features that it expects and the order of axes that the rest of the package has.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.features import ClipFeatures
from cnngru_edge.models.spec.whole import OWN, AudioInput, TokenInput, WholeSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LENGTHS = {"length", "lengths", "lens", "input_lengths", "x_len", "x_lens", "seq_len", "seq_lens"}
_STATES = {"h", "h0", "hx", "hidden", "hidden_state", "state", "states"}
LEAST_PROBABILITY = 1e-6
"""Of which the logarithm is taken, in FP16 too, where a softmax gives less or nothing."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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
        self.gives_probabilities = False  # of all labels, as from a softmax at its end
        self.why_one = ""  # where its graph, other than itself, takes one only

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
        if self.gives_probabilities:
            answer = answer.clamp(min=LEAST_PROBABILITY).log()
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
