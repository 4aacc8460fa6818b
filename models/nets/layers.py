"""The sizes that a WholeSpec's `layers` hold, read and checked."""

from collections.abc import Iterable
from typing import Any

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.spec.whole import WholeSpec


def check_layers(spec: WholeSpec, family: str, names: Iterable[str]) -> None:
    """Refuse a spec of another family, or whose layers are not those of these names."""
    if spec.family != family:
        raise SpecError(f"family: this model is of {family!r}, got {spec.family!r}")
    names = list(names)
    if missing := [name for name in names if name not in spec.layers]:
        raise SpecError(f"layers: {', '.join(missing)} is missing")
    if unknown := sorted(set(spec.layers) - set(names)):
        raise SpecError(f"layers: unknown {', '.join(unknown)}, expected {', '.join(names)}")


def size_in(spec: WholeSpec, name: str) -> int:
    """One size, at least 1."""
    return _size(name, spec.layers[name])


def sizes_in(spec: WholeSpec, name: str) -> tuple[int, ...]:
    """One size or more, each at least 1."""
    found = spec.layers[name]
    if not isinstance(found, list | tuple) or not found:
        raise SpecError(f"layers: {name} are a list of whole numbers from 1, got {found!r}")
    return tuple(_size(name, size) for size in found)


def pairs_in(spec: WholeSpec, name: str) -> tuple[tuple[int, int], ...]:
    """One pair of sizes or more, each at least 1."""
    found = spec.layers[name]
    if not isinstance(found, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in found
    ):
        raise SpecError(f"layers: {name} are a list of pairs of whole numbers, got {found!r}")
    return tuple((_size(name, first), _size(name, second)) for first, second in found)


def _size(name: str, found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise SpecError(f"layers: {name} needs whole numbers from 1, got {found!r}")
    return found
