"""Adaptive pools of inputs of any length, which torch's exporter does not take."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cnngru_edge.export.onnx_trace import replaced

_WHOLE: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "avg": lambda x, axes: x.mean(axes, keepdim=True),
    "max": lambda x, axes: x.amax(axes, keepdim=True),
}
_KEPT = None
"""Of an adaptive pool, the size of an axis that stays as it is."""


@contextmanager
def pools_of_any_length() -> Iterator[None]:
    """While it lasts, adaptive pools down to one are means and maxima over axes.

    An axis of free length may then stay, as in `AdaptiveAvgPool2d((1, None))`.
    """
    with ExitStack() as stack:
        for kind, pooled in _WHOLE.items():
            for axes in (1, 2):
                name = f"adaptive_{kind}_pool{axes}d"
                instead = _over_axes(getattr(nn.functional, name), pooled, axes)
                stack.enter_context(replaced(nn.functional, name, instead))
        yield


def _over_axes(
    adaptive: Callable[..., Any], pooled: Callable[[Tensor, list[int]], Tensor], axes: int
) -> Callable[..., Any]:
    def pool(x: Tensor, output_size: Any, *more: Any, **options: Any) -> Any:
        is_one = isinstance(output_size, int)
        sizes = (output_size,) * axes if is_one else tuple(output_size)
        if set(sizes) - {1, _KEPT} or any(more) or any(options.values()):
            return adaptive(x, output_size, *more, **options)
        over = [place - axes for place, size in enumerate(sizes) if size == 1]
        return pooled(x, over) if over else x

    return pool
