"""Mixed precision within an accuracy budget: as few layers in float as hold it."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from cnngru_edge.calibration.ranges.choose import Ranges
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.quantize.plan import Plan, Step
from cnngru_edge.export.quantize.run import layers_of, lower, quantize_lowered
from cnngru_edge.export.verdict.error_rate import align
from cnngru_edge.export.verdict.logit_error import FloatAnswers, saved
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.inputs.audio import Samples

Progress = Callable[[int, int], None]
"""Told how many more plans were tried, of how many there are at the most."""


def search_plan(
    graph: Path,
    ranges: Ranges,
    clips: Sequence[tuple[Samples, str]],
    max_drop: float,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Find a plan that loses no more than `max_drop` points of accuracy, or WER, on these clips.

    Everything in INT8 first. While that loses too much, the layer goes to float that brings back
    most: each of the others is tried. In the end each that was kept is tried in INT8 again, so that
    none is in float for nothing. One layer is then the fewest there can be; where it takes more,
    there may be fewer others.

    Args:
        graph: the float ONNX file.
        ranges: its ranges.
        clips: samples at the model's rate, and what the model should answer. Not those that the
            result is judged by.
        max_drop: percentage points.
        progress: see Progress.
    """
    exact = FloatAnswers(graph, [samples for samples, _ in clips])
    true = [label for _, label in clips]
    model = onnx_graph.load(graph)
    lower(model)
    layers = list(layers_of(model))
    right = percent_right(exact.spec, exact.labels, true)
    log: list[Step] = []
    total = 1 + len(layers) * (len(layers) + 1) // 2

    def tried(kept: Collection[str]) -> Step:
        names = [name for name in layers if name in kept]
        model = onnx_graph.load(graph)
        lower(model)
        quantize_lowered(model, ranges.tensors, kept_in_float=names)
        with saved(model) as path:
            error = exact.error(path)
        drop = right - percent_right(exact.spec, error.labels, true)
        log.append(Step(tuple(names), drop, error.flips, error.sqnr_db))
        progress(1, total)
        return log[-1]

    best = fewest_in_float(layers, tried, max_drop)
    progress(total - len(log), total)
    return Plan(tuple(layers), frozenset(best.kept_in_float), tuple(log))


def fewest_in_float(
    layers: Sequence[str], tried: Callable[[Collection[str]], Step], max_drop: float
) -> Step:
    """The plan that `search_plan` ends with; `tried` measures one that keeps these layers."""
    best = tried(())
    while best.drop > max_drop and len(best.kept_in_float) < len(layers):
        kept = best.kept_in_float
        best = min((tried((*kept, name)) for name in layers if name not in kept), key=_cost)
    for name in best.kept_in_float if len(best.kept_in_float) > 1 else ():
        step = tried([other for other in best.kept_in_float if other != name])
        best = step if step.drop <= max_drop else best
    return best


def percent_right(spec: Spec, said: Sequence[str], true: Sequence[str]) -> float:
    """Of the clips, by their labels; of a CTC model the words less all errors in them."""
    if spec.writes_text:
        words = [one.words for one in align(true, said)]
        return 100 - 100 * sum(w.total for w in words) / max(1, sum(w.length for w in words))
    return 100 * sum(a == b for a, b in zip(said, true, strict=True)) / len(true)


def _cost(step: Step) -> tuple[float, float]:
    """The smaller loss first, then the smaller error."""
    return step.drop, -(step.sqnr_db if step.sqnr_db is not None else float("inf"))
