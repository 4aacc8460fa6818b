"""What torch's exporter writes for one length only, or not at all, so that it takes any."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnngru_edge.export.trace.tracer import replaced

_WHOLE: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "avg": lambda x, axes: x.mean(axes, keepdim=True),
    "max": lambda x, axes: x.amax(axes, keepdim=True),
}
_KEPT = None
"""Of an adaptive pool, the size of an axis that stays as it is."""
_ATTEND = nn.functional.multi_head_attention_forward
_UNUSUAL = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "attn_mask")
"""Arguments of attention with which it stays as torch traces it."""


@contextmanager
def of_any_length() -> Iterator[None]:
    """While it lasts, adaptive pools and attention are traced for inputs of any length.

    Pools down to one are means and maxima over axes, where an axis of free length may stay, as in
    `AdaptiveAvgPool2d((1, None))`; attention reads its sizes from what it is given.
    """
    with ExitStack() as stack:
        for kind, pooled in _WHOLE.items():
            for axes in (1, 2):
                name = f"adaptive_{kind}_pool{axes}d"
                instead = _over_axes(getattr(nn.functional, name), pooled, axes)
                stack.enter_context(replaced(nn.functional, name, instead))
        stack.enter_context(replaced(nn.functional, _ATTEND.__name__, _attend))
        # Of frozen weights torch would call one operator that ONNX does not have.
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
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


def _attend(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`nn.functional.multi_head_attention_forward` of (L, N, E); torch's unflattens, which fixes L.

    A. Vaswani et al., arXiv:1706.03762 (2017).
    """
    bound = inspect.signature(_ATTEND).bind(*args, **options)
    bound.apply_defaults()
    a = bound.arguments
    query, key, value = a["query"], a["key"], a["value"]
    is_unusual = any(a[name] is not None and a[name] is not False for name in _UNUSUAL)
    if is_unusual or a["use_separate_proj_weight"] or a["training"] or query.dim() != 3:
        found: tuple[Tensor, Tensor | None] = _ATTEND(*args, **options)
        return found
    weight, bias, heads = a["in_proj_weight"], a["in_proj_bias"], a["num_heads"]
    width = a["embed_dim_to_check"]
    if query is key and key is value:
        parts = nn.functional.linear(query, weight, bias).chunk(3, -1)
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        weights = zip((query, key, value), weight.chunk(3), biases, strict=True)
        parts = tuple(nn.functional.linear(*of_one) for of_one in weights)
    q, k, v = (x.reshape(x.shape[0], -1, heads, width // heads).permute(1, 2, 0, 3) for x in parts)
    shares = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // heads), -1)
    mixed = (shares @ v).permute(2, 0, 1, 3).reshape(query.shape[0], -1, width)
    answer = nn.functional.linear(mixed, a["out_proj_weight"], a["out_proj_bias"])
    if not a["need_weights"]:
        return answer, None
    return answer, shares.mean(1) if a["average_attn_weights"] else shares
