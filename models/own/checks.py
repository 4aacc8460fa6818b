"""What is to be known of a module that is not ours before it is exported."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError, first_line
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.whole import AudioInput, fixed_length_of, least_length_of

_CELLS = (nn.GRUCell, nn.LSTMCell, nn.RNNCell)
_PADDED = (nn.Conv1d, nn.Conv2d)


def check_runs(model: OwnModel, given: Tensor) -> None:
    """Run a module, and refuse it where what comes out is not what its spec says.

    One that does not run on several inputs is for one at a time from then on.

    Raises:
        SpecError: it does not run on its input, or gives something else than logits.
    """
    spec = model.spec
    for count in (1, 2, 3) if model.free_batch else (1,):
        x = given.expand(count, *given.shape[1:]).clone()
        try:
            logits = _answer(model, x)
        except SpecError:
            if count == 1:
                raise
            model.free_batch = False
            break
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
        model.gives_probabilities = _are_probabilities(logits)
    _check_steady(model, given)
    least = least_length_of(spec.input)
    part = given[..., : max(least, given.shape[-1] * 5 // 8)]
    if fixed_length_of(spec.input) is None and part.shape[-1] < given.shape[-1]:
        try:
            _answer(model, part)
        except SpecError as e:
            field = {"audio": "samples", "tokens": "tokens", "image": "width"}[spec.input.name]
            raise SpecError(f"{e}; if it takes one length only, give {field} under [input]") from e


def _answer(model: OwnModel, given: Tensor) -> Tensor:
    """What the module gives, or the reason why not in a line."""
    with torch.inference_mode():
        try:
            x = model.given_to_module(given)
        except RuntimeError as e:  # a clip shorter than a frame
            raise SpecError(f"features of [input] cannot be had of it ({first_line(e)})") from e
        try:
            return model.answered(x)
        except SpecError:
            raise
        except Exception as e:  # whatever the module raises
            raise SpecError(
                f"the module does not run on an input of shape {tuple(x.shape)} "
                f"({first_line(e)}); kind, layout and features of [input] say what it is given"
            ) from e


def _check_steady(model: OwnModel, given: Tensor) -> None:
    """Refuse a module that answers NaN, or the same input otherwise each time."""
    first, second = (_answer(model, given.clone()) for _ in range(2))
    if not torch.isfinite(first).all():
        raise SpecError("the module answers NaN or infinity; are its weights damaged?")
    if first.shape != second.shape or not torch.allclose(first, second, atol=1e-5):
        raise SpecError(
            "the module answers the same input otherwise each time: chance, dropout or a state "
            "that it keeps in forward"
        )


def _are_probabilities(answer: Tensor) -> bool:
    """Whether they add up to one over the labels; then their logarithms are as good as logits.

    A softmax in FP16 does so to 1e-3.
    """
    sums = answer.sum(-1)
    return bool((answer >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=2e-3)


def warnings_about(model: OwnModel, given: Tensor) -> Iterator[str]:
    """What a user should know of a module before it is deployed.

    Args:
        model: the module.
        given: one input, with the batch axis.
    """
    if model.gives_probabilities:
        yield "it gives probabilities; what is made gives their logarithms, as logits"
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


def has_cells(model: OwnModel) -> bool:
    """Whether it has cells, which can only be called in a loop over frames in Python."""
    return any(isinstance(layer, _CELLS) for layer in model.module.modules())


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
