"""The plots of the report: parts of report.json in, SVG out."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from cnngru_edge.export.report import svg
from cnngru_edge.export.report.svg import BELOW, LINE, PLOT, SMALL, WIDE, Axis

ROWS = 20
"""Rows of a plot at most; the table below it has all."""
CURVES = 6
"""Lines of a plot at most: as many as there are colours and dashes."""

_LABELS = 140.0  # width of those before the rows at most
_BINS = 48  # bars of a histogram at most
_MANY = 18  # labels, from where a matrix is wide

Part = Mapping[str, Any]


class Interval(NamedTuple):
    """A row of an interval plot."""

    label: str
    value: float
    low: float
    high: float


class Bar(NamedTuple):
    """A bar; those that follow each other under one label stand together."""

    label: str
    value: float | None  # None: nothing to draw, and the text says why
    text: str
    series: int = 0


class Curve(NamedTuple):
    """A line; None is a gap in it."""

    name: str
    points: Sequence[tuple[float, float | None]]


def conditions_plot(comparison: Part, names: Sequence[str]) -> Markup:
    """How much accuracy, or WER, differs in each condition, with the interval."""
    if found := comparison.get("error_rates"):
        rates = [(one["condition"], one["rates"]) for one in found["conditions"]]
        rows = [Interval(name, r["delta"], *r["delta_ci"]) for name, r in rates]
        margin = comparison["margin"]
        return interval_plot("WER, all clips", rows, margin, names, is_error=True)
    rows = [Interval(c["condition"], c["delta"], *c["delta_ci"]) for c in comparison["conditions"]]
    if len(rows) < 2:
        rows = [Interval("all clips", comparison["delta"], *comparison["delta_ci95"])]
    return interval_plot("Accuracy, all clips", rows, comparison["margin"], names)


def groups_plot(
    title: str, groups: Sequence[Part], margin: float, names: Sequence[str], most: int = ROWS
) -> Markup:
    """The same for classes or speakers: all, or those that lose most."""
    if len(groups) > most:
        groups = sorted(groups, key=lambda group: group["delta"])[:most]
    rows = [Interval(group["group"], group["delta"], *group["delta_ci95"]) for group in groups]
    return interval_plot(title, rows, margin, names)


def speakers_plot(comparison: Part, names: Sequence[str], most: int) -> Markup:
    """How much WER differs, of the speakers who lose most."""
    rows = [
        Interval(one["speaker"], one["rates"]["delta"], *one["rates"]["delta_ci"])
        for one in comparison["error_rates"]["by_speaker"][:most]
    ]
    return interval_plot("WER by speaker", rows, comparison["margin"], names, is_error=True)


def coverage_plot(name: str, receipt: Part) -> Markup:
    """Multiply-accumulates by layer, hollow where they are not of integers."""
    bars = [
        Bar(
            layer["name"],
            layer["macs"] / 1e6,
            f"{layer['macs'] / 1e6:,.2f} {layer['precision']}",
            int(layer["precision"] != "int8"),
        )
        for layer in receipt["layers"]
    ]
    kinds = ("in INT8", "in another precision") if any(bar.series for bar in bars) else ()
    axis = "million multiply-accumulates in a second of audio"
    return bar_plot(f"Arithmetic of {name} by layer", bars, axis, kinds)


def sensitivity_plot(sensitivity: Part) -> Markup:
    """SQNR with one layer in INT8 and with all but that one."""
    bars = [
        Bar(layer["layer"], layer[key], _decibels(layer[key]), series)
        for layer in sensitivity["layers"][:ROWS]
        for series, key in enumerate(("alone_sqnr_db", "restored_sqnr_db"))
    ]
    kinds = ("only this layer in INT8", "all but this layer in INT8")
    whole = sensitivity["sqnr_db"]
    mark = None if whole is None else (whole, f"all in INT8: {whole:.1f} dB")
    return bar_plot(
        "Error by layer", bars, "SQNR of the logits (dB): higher is better", kinds, mark
    )


def gates_plot(gates: Sequence[Part]) -> Markup:
    """SQNR with one gate's matrix in INT8."""
    bars = []
    for gate in gates[:ROWS]:
        name = f"{gate['layer']} {gate['matrix']} {gate['gate']}"
        bars.append(Bar(name, gate["sqnr_db"], _decibels(gate["sqnr_db"])))
    return bar_plot("Error by gate of a GRU", bars, "SQNR of the logits (dB): higher is better")


def frames_plot(frames: Part) -> Markup:
    """SQNR in the course of a clip."""
    curves = [
        Curve(
            curve["name"],
            [(i * frames["frame_ms"] / 1000, value) for i, value in enumerate(curve["sqnr_db"])],
        )
        for curve in frames["curves"][:CURVES]
    ]
    return line_plot(
        "Error by frame", curves, "time in the clip (s)", "SQNR (dB), higher is better"
    )


def latency_plot(rows: Sequence[Part]) -> Markup:
    """Share of the steps that were done within a time; logarithmic where the times differ much."""
    curves = []
    for row in rows[:CURVES]:
        points = [(ms, i) for i, ms in enumerate(row["quantiles_ms"]) if ms is not None]
        curves.append(Curve(f"{row['artefact']}, {row['what']}", points))
    found = [ms for curve in curves for ms, _ in curve.points]
    is_log = bool(found) and min(found) > 0 and max(found) > 8 * min(found)
    return line_plot("Latency", curves, "time (ms)", "done within the time (%)", is_log=is_log)


def sizes_plot(files: Sequence[Part]) -> Markup:
    """Size of each file."""
    sizes = [(file["name"], file["bytes"] / 1000) for file in files]
    bars = [Bar(name, size, f"{size:,.1f}") for name, size in sizes]
    return bar_plot("Size of the files", bars, "KB")


def interval_plot(
    title: str,
    rows: Sequence[Interval],
    margin: float,
    names: Sequence[str],
    *,
    is_error: bool = False,
) -> Markup:
    """Differences and their intervals in percentage points; the margin is a band around zero.

    Of errors, more than zero is the loss.
    """
    rows = [row for row in rows if None not in row]  # of no clips
    top = 16.0
    bottom = top + len(rows) * LINE + 4
    ends = [end for row in rows for end in row[1:]]
    axis = _row_axis([row.label for row in rows], [*ends, -margin, margin], 44)
    left, right = axis(-margin), axis(margin)
    parts = [
        svg.rect(left, top, right - left, bottom - top, "band"),
        svg.line(axis(0), top, axis(0), bottom, "zero"),
        svg.beside(axis(0), 10, f"margin ±{margin:g}", (axis.start, axis.end)),
        *svg.x_axis(axis, top, bottom, f"{names[1]} less {names[0]} (percentage points)"),
    ]
    for i, row in enumerate(rows):
        y = top + LINE * (i + 0.5) + 2
        low, high = axis(row.low), axis(row.high)
        is_lost = row.value > margin if is_error else row.value < -margin
        dot = "dot lost" if is_lost else "dot"
        parts += [
            svg.label(axis.start - 6, y + 4, row.label, _LABELS),
            *(svg.line(end, y - 3, end, y + 3, "whisker") for end in (low, high)),
            svg.line(low, y, high, y, "whisker"),
            svg.element("circle", class_=dot, cx=axis(row.value), cy=y, r=4),
            svg.text_at(PLOT - 1, y + 4, svg.signed(row.value), "number", "end"),
        ]
    described = (
        "A dot for each difference and a line for its interval. The band is the margin of "
        f"{margin:g} points; a hollow dot lies {'above' if is_error else 'below'} it."
    )
    return svg.drawing(title, described, bottom + BELOW, parts)


def bar_plot(
    title: str,
    bars: Sequence[Bar],
    name: str,
    series: Sequence[str] = (),
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Bars from zero, one label for all that belong together.

    Args:
        title: of the plot.
        bars: from top to bottom.
        name: of the axis, with its unit.
        series: what filled and hollow bars are, where there are both.
        mark: a number to see the bars against, and what it is.
    """
    groups = [(label, list(group)) for label, group in groupby(bars, lambda bar: bar.label)]
    height = 12 if len(bars) > len(groups) else LINE
    parts, top = svg.legend(series, lambda i, y: svg.rect(0, y - 9, 18, 9, f"bar s{i}"))
    top += LINE if mark else 4
    is_above = any(svg.width_of(label) > _LABELS for label, _ in groups)
    bottom = top + len(bars) * height + (5 + LINE * is_above) * len(groups) + 2
    values = [bar.value for bar in bars if bar.value is not None] + ([mark[0]] if mark else [])
    room = max((svg.width_of(bar.text) for bar in bars), default=0.0) + 5
    labels = [] if is_above else [label for label, _ in groups]
    axis = _row_axis(labels, [0.0, *values], room)
    parts += svg.x_axis(axis, top, bottom, name)
    if mark:
        x = axis(mark[0])
        parts.append(svg.line(x, top, x, bottom, "mark"))
        parts.append(svg.beside(x, top - 5, mark[1], (0, PLOT)))
    y = top + 3.0
    for label, group in groups:
        if is_above:
            y += LINE
            parts.append(svg.label(axis.start, y - 3, label, PLOT - axis.start, anchor="start"))
        else:
            middle = y + len(group) * height / 2
            parts.append(svg.label(axis.start - 6, middle + 4, label, _LABELS))
        for bar in group:
            start, end = sorted((axis(0), axis(bar.value or 0.0)))
            if bar.value is not None:
                shape = f"bar s{bar.series}"
                parts.append(svg.rect(start, y + 1, end - start, height - 2, shape))
            parts.append(svg.text_at(end + 5, y + height / 2 + 4, bar.text, "number"))
            y += height
        y += 5
    return svg.drawing(title, f"A bar for each: {name}.", bottom + BELOW, parts)


def line_plot(
    title: str, curves: Sequence[Curve], x_name: str, y_name: str, *, is_log: bool = False
) -> Markup:
    """Lines over one axis, which is linear or logarithmic."""
    drawn = [(x, y) for curve in curves for x, y in curve.points if y is not None]
    parts, top = svg.legend(
        [curve.name for curve in curves],
        lambda i, y: svg.line(0, y - 4, 22, y - 4, f"curve l{i}"),
    )
    top += 18
    bottom = top + 170
    y_axis = Axis.over([y for _, y in drawn], bottom, top)
    left = 6 + max(svg.width_of(svg.tick_text(tick)) for tick in y_axis.ticks)
    x_axis = Axis.over([x for x, _ in drawn], left, PLOT - 12, is_log=is_log)
    parts += [svg.text_at(0, top - 7, y_name, "quiet"), *svg.x_axis(x_axis, top, bottom, x_name)]
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(svg.line(left, y, PLOT - 12, y, "grid"))
        parts.append(svg.text_at(left - 4, y + 4, svg.tick_text(tick), "quiet", "end"))
    for i, curve in enumerate(curves):
        parts.append(svg.element("path", class_=f"curve l{i}", d=_path(curve, x_axis, y_axis)))
    described = f"{y_name}, by {x_name}: {', '.join(curve.name for curve in curves)}."
    return svg.drawing(title, described, bottom + BELOW, parts)


def confusion_plot(
    title: str, labels: Sequence[str], counts: Sequence[Sequence[int]], changes: bool = False
) -> Markup:
    """A matrix, rows truth and columns answer; shaded by the share of a row, or signed changes."""
    size, most = (PLOT, 90.0) if len(labels) <= _MANY else (WIDE, 140.0)
    room = 8 + min(most, max(svg.width_of(label) for label in labels))
    cell = min(40.0, (size - room - 1) / len(labels))
    font = min(11.0, cell * 0.95)
    end = room + cell * len(labels)
    parts = [svg.rect(room, room, end - room, end - room, "frame")]
    for i, label in enumerate(labels):
        y = room + cell * (i + 0.5) + font / 3
        turned = f"translate({svg.number(y)} {svg.number(room - 5)}) rotate(-90)"
        parts.append(svg.label(room - 5, y, label, most, font))
        above = svg.label(0, 0, label, most, font, "start")
        parts.append(svg.element("g", above, transform=turned))
    largest = max(abs(count) for row in counts for count in row)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                x, y = room + cell * j, room + cell * i
                share = abs(count) / (largest if changes else sum(row))
                shade = "worse" if changes and (i == j) != (count > 0) else "better"
                text = svg.signed(count, 0) if changes else f"{count}"
                hover = f"{labels[i]}, answered {labels[j]}: {text}"
                parts += _cell(x, y, cell, shade, share, text, hover)
    described = f"{len(labels)} labels: rows are what was said, columns what was answered."
    return svg.drawing(title, described, end + 1, parts, size)


def histogram_plot(title: str, histogram: Part, low: float, high: float) -> Markup:
    """How often a tensor takes on which value (logarithmic), and the range that was chosen."""
    bins = _rebinned(histogram)
    top, bottom = 18.0, 92.0
    edges = [edge for start, end, _ in bins for edge in (start, end)]
    axis = Axis.over([low, high, *edges], 6, 234)
    most = max((count for *_, count in bins), default=1)
    height = Axis(0, math.log1p(most), bottom, top + 4)
    bars = "".join(
        f"M{svg.number(axis(start))} {svg.number(bottom)}"
        f"V{svg.number(height(math.log1p(count)))}H{svg.number(axis(end))}V{svg.number(bottom)}z"
        for start, end, count in bins
    )
    parts = [
        svg.rect(axis.start, top, axis(low) - axis.start, bottom - top, "outside"),
        svg.rect(axis(high), top, axis.end - axis(high), bottom - top, "outside"),
        *svg.x_axis(axis, top, bottom, ""),
        svg.element("path", class_="bar s0", d=bars)
        if bars
        else svg.text_at(80, 60, "no values", "quiet"),
    ]
    for value, side in ((low, (0.0, 118.0)), (high, (122.0, 240.0))):
        x = axis(value)
        parts += [
            svg.line(x, top - 3, x, bottom, "mark"),
            svg.beside(x, 11, svg.tick_text(value), side),
        ]
    described = f"The range is {low:g} to {high:g}; values in the shaded parts are clipped."
    return svg.drawing(title, described, bottom + 18, parts, SMALL)


def _row_axis(labels: Sequence[str], values: Sequence[float], room: float) -> Axis:
    """The axis of rows that have a label before it and `room` for a number behind it."""
    before = min(_LABELS, max((svg.width_of(label) for label in labels), default=-4.0)) + 8
    return Axis.over(values, before, PLOT - room - 2)


def _path(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    steps, move = "", "M"
    for x, y in curve.points:
        if y is not None:
            steps += f"{move}{svg.number(x_axis(x))} {svg.number(y_axis(y))}"
        move = "M" if y is None else "L"
    return steps


def _cell(
    x: float, y: float, size: float, shade: str, share: float, text: str, hover: str
) -> list[Markup]:
    """A square of a matrix, with its number where that has room."""
    square = svg.element(
        "rect",
        svg.element("title", hover),
        x=x,
        y=y,
        width=size,
        height=size,
        class_=shade,
        fill_opacity=0.08 + 0.42 * share,
    )
    if size < 3 + 5.5 * len(text):
        return [square]
    return [square, svg.text_at(x + size / 2, y + size / 2 + 3, text, "cell", "middle")]


def _rebinned(histogram: Part) -> list[tuple[float, float, int]]:
    """From, to and count of the bins with a value in them, of a few that are wide enough to see."""
    counts, width, low = histogram["counts"], histogram["width"], histogram["low"]
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return []
    step = -(-(filled[-1] + 1 - filled[0]) // _BINS)
    starts = range(filled[0], filled[-1] + 1, step)
    bins = [(low + i * width, low + (i + step) * width, sum(counts[i : i + step])) for i in starts]
    return [one for one in bins if one[2]]


def _decibels(value: float | None) -> str:
    return "no error" if value is None else svg.minus(f"{value:.1f}")
