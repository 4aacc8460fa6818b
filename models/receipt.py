"""The receipt of a build: in which precision each weight really computes."""

from dataclasses import asdict, dataclass
from typing import Any

from cnngru_edge.models.errors import ExportError

INT8 = "int8"
HIDDEN = "not shown"
"""Of a weight in a block that its builder compiled as a whole and does not open (TensorRT 8.6)."""


@dataclass(frozen=True)
class Layer:
    """A weight, by the name of the PyTorch parameter or module that it came from."""

    name: str
    precision: str  # of the arithmetic: int8, fp16, fp32; "fp32 (int8 weights)" is float arithmetic
    weights: int
    bytes: int
    macs: int  # multiply-accumulates in a second of audio


@dataclass(frozen=True)
class Coverage:
    """All layers behind the front-end, and what they were read from."""

    source: str
    layers: tuple[Layer, ...]

    @property
    def weights_int8(self) -> float:
        """Share of the weights that compute in INT8."""
        return self._share("weights")

    @property
    def macs_int8(self) -> float:
        """Share of the multiply-accumulates that are of integers."""
        return self._share("macs")

    @property
    def weights_hidden(self) -> float:
        """Share of the weights whose precision the builder does not show."""
        return self._share("weights", HIDDEN)

    def _share(self, what: str, precision: str = INT8) -> float:
        total = sum(getattr(layer, what) for layer in self.layers)
        found = sum(getattr(layer, what) for layer in self.layers if layer.precision == precision)
        return found / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """For `inspect --json` and the manifest of an engine."""
        return {
            "source": self.source,
            "weights_int8": self.weights_int8,
            "macs_int8": self.macs_int8,
            "weights_hidden": self.weights_hidden,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def check(self, name: str, least: float) -> None:
        """Raise an ExportError that names what is not in INT8, if that is too much.

        What is hidden does not count as INT8 in any figure, and does not fail the check either: no
        build with that builder could pass.
        """
        if self.weights_int8 + self.weights_hidden >= least:
            return
        others = ", ".join(
            f"{layer.name} ({layer.precision})"
            for layer in self.layers
            if layer.precision not in {INT8, HIDDEN}
        )
        raise ExportError(
            f"{name}: {self.weights_int8:.1%} of its weights compute in INT8, asked are "
            f"{least:.1%}; not in INT8: {others} (read from {self.source})"
        )
