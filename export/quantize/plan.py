"""Which layer computes in which precision: a file that `export` writes, and that can be edited."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import ExportError

FLOAT_PRECISION, INT8_PRECISION = "float", "int8"

_FORMAT = 1


@dataclass(frozen=True)
class Step:
    """A plan that a search has tried, and what it cost on the clips of the search."""

    kept_in_float: tuple[str, ...]
    drop: float  # percentage points of accuracy lost
    flips: int  # clips with another label than float's
    sqnr_db: float | None  # at the logits; None if nothing differs


@dataclass(frozen=True)
class Plan:
    """The layers that stay in float; all others are in INT8."""

    layers: tuple[str, ...]  # all, in the order of the graph
    kept_in_float: frozenset[str] = frozenset()
    log: tuple[Step, ...] = ()

    def share_int8(self, weights: Mapping[str, int], others: int = 0) -> float:
        """Share of the weights that are to be in INT8; 0 of none.

        Args:
            weights: of the layers of this plan.
            others: weights of layers that can only be in float.
        """
        kept = sum(weights[name] for name in self.kept_in_float) + others
        total = sum(weights.values()) + others
        return 1 - kept / total if total else 0.0

    def save(self, path: Path) -> None:
        """Write as JSON: a precision for each layer, and how the search got there."""
        raw = {
            "format": _FORMAT,
            "layers": {
                name: FLOAT_PRECISION if name in self.kept_in_float else INT8_PRECISION
                for name in self.layers
            },
            "log": [asdict(step) for step in self.log],
        }
        write_file(path, f"{json.dumps(raw, indent=1)}\n".encode())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote, or what became of it in an editor.

        Raises:
            ExportError: no such file, not a plan, or a precision that is none.
        """
        if not path.is_file():
            raise ExportError(f"{path}: no such file; 'cnngru-edge export' writes plan.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != _FORMAT:
                raise ExportError(f"{path}: another version's format")
            layers: dict[str, Any] = dict(raw["layers"])
            log = tuple(
                Step(**step | {"kept_in_float": tuple(step["kept_in_float"])})
                for step in raw.get("log", ())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ExportError(f"{path}: not a plan ({type(e).__name__}: {e})") from e
        for name, precision in layers.items():
            if precision not in (FLOAT_PRECISION, INT8_PRECISION):  # of an editor: anything
                raise ExportError(
                    f"{path}: layer {name!r} is {precision!r}, expected {FLOAT_PRECISION!r} or "
                    f"{INT8_PRECISION!r}"
                )
        kept = frozenset(name for name, p in layers.items() if p == FLOAT_PRECISION)
        return cls(tuple(layers), kept, log)

    def check(self, layers: Iterable[str]) -> None:
        """Refuse a plan that does not name just the layers of a graph."""
        known = list(layers)
        if strange := sorted(set(self.layers) ^ set(known)):
            raise ExportError(
                f"the plan is of another model: {', '.join(strange)} only in one of the two; the "
                f"graph has {', '.join(known)}"
            )


def search_fields(plan: Plan, max_drop: float | None) -> dict[str, Any] | None:
    """What a search found, for the report; None if all is in INT8 because nobody asked."""
    if not plan.log and not plan.kept_in_float:
        return None
    return {
        "max_drop": max_drop,
        "kept_in_float": [name for name in plan.layers if name in plan.kept_in_float],
        "steps": [asdict(step) for step in plan.log],
    }
