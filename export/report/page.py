"""The report of an export or a comparison: one page to show to a colleague, and its numbers."""

import base64
import io
import json
import math
import wave
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cnngru_edge.export.artefacts import REPORT_HTML, REPORT_JSON
from cnngru_edge.export.report import plots, svg
from cnngru_edge.export.verdict.error_rate import Edit
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.inputs.audio import Recording

Hear = Callable[[str, str], Recording]
"""The clip of a flip as the models heard it, by its path and its condition.

It raises AudioError or OSError where it cannot be read any more.
"""

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_SECTIONS = {  # of the report: anchors and headings on the page
    "comparison": {"accuracy": "Accuracy", "confusion": "Confusion", "flips": "Changed answers"},
    "coverage": {"coverage": "Coverage"},
    "sensitivity": {"sensitivity": "Sensitivity", "ranges": "Ranges"},
    "latency": {"latency": "Latency"},
    "files": {"files": "Files"},
    "streaming": {"streaming": "Streams"},
    "audit": {"audit": "Calibration audio"},
    "search": {"search": "Plan"},
}
_PLAYED = 20  # flips to listen to; a second of one is 43 KB of the page
_PLAYED_S = 10
_OUTCOMES = ("lost", "wrong both times", "won")
_TEXT_OUTCOMES = ("with more errors", "with as many errors", "with fewer errors")
_ESCAPED = "backslashreplace"  # bytes of a path that are no text
_PRECISIONS = {"fp32": "float", "fp16": "FP16", "int8": "INT8"}
_NONE = "\N{EN DASH}"


def write_report(folder: Path, report: Mapping[str, Any], hear: Hear) -> None:
    """Write `report.html`, and as `report.json` the numbers in it, into a folder."""
    page = render_report(report, hear)
    text = json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(folder / REPORT_JSON, f"{text}\n".encode(errors=_ESCAPED))
    write_file(folder / REPORT_HTML, page.encode(errors=_ESCAPED))


def render_report(report: Mapping[str, Any], hear: Hear) -> str:
    """The page: one file without scripts, always the same for the same report.

    Args:
        report: the content of report.json; a section that is missing or None is left out.
        hear: gives the audio of the flips.
    """
    known = dict.fromkeys(_SECTIONS) | _finite(report)
    comparison = known["comparison"]
    return _template().render(
        known,
        sections=_sections(known),
        names=_names(comparison),
        verdict=_verdict(comparison) if comparison else None,
        facts=_facts(known),
        flips=_heard(comparison, hear) if comparison else [],
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= _FILTERS
    environment.globals |= {"plots": plots, "played": _PLAYED, "played_s": _PLAYED_S}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sections(report: Mapping[str, Any]) -> dict[str, str]:
    """Anchors and headings of what there is to show."""
    found: dict[str, str] = {}
    for key, sections in _SECTIONS.items():
        if report[key]:
            found |= sections
    if "confusion" in found and not report["comparison"]["confusion"]:
        del found["confusion"]  # of texts
        found["accuracy"] = "Word errors"
    if "ranges" in found and not report["sensitivity"]["tensors"]:
        del found["ranges"]
    return found | {"made": "How it was made"}


def _names(comparison: Mapping[str, Any] | None) -> tuple[str, str]:
    """What the page calls reference and candidate: by their precision, if that tells them apart."""
    if comparison is None:
        return "float", "INT8"
    precisions = (comparison[which]["precision"] for which in ("reference", "candidate"))
    a, b = (_PRECISIONS.get(precision, precision) for precision in precisions)
    return (a, b) if a != b else ("the reference", "the candidate")


def _verdict(comparison: Mapping[str, Any]) -> dict[str, str]:
    """The verdict in a sentence, with the figures of the condition that decided it, and advice."""
    reference, candidate = _names(comparison)
    verdict = comparison["verdict"]
    row = next((c for c in comparison["conditions"] if c["verdict"] == verdict), None)
    row = row or {**comparison, "condition": "clean", "delta_ci": comparison["delta_ci95"]}
    confidence = row.get("confidence", 0.95)
    said = {
        "equal": f"answers as well as {reference}",
        "better": f"answers better than {reference}",
        "worse": f"answers worse than {reference}",
    }.get(verdict, f"may answer as well as {reference} or worse, there are too few clips to tell")
    where = "" if row["condition"] == "clean" else f" in noise ({row['condition']})"
    what = ""
    if rates := comparison.get("error_rates"):
        found = {one["condition"]: one["rates"] for one in rates["conditions"]}
        row, what = found[row["condition"]] | {"condition": row["condition"]}, " of WER"
    low, high = row["delta_ci"]
    text = (
        f"{candidate} {said}{where}: {_points(row['delta'])} points{what}, between {_points(low)} "
        f"and {_points(high)} ({100 * confidence:.3g}%), of {row['clips']:,} clips."
    )
    kind = {"worse": "fail", "not enough data": "open"}.get(verdict, "pass")
    return {"kind": kind, "text": _sentence(text), "advice": _advice(comparison)}


def _advice(comparison: Mapping[str, Any]) -> str:
    """What to do about a verdict that does not pass."""
    margin = f"{comparison['margin']:g} points"
    if comparison["verdict"] == "worse":
        return (
            f"More than the margin of {margin} is lost. Calibrate with more audio, or with audio "
            "more like that of the device; try another calibration method; or keep in float the "
            "layers that cost most."
        )
    if comparison["verdict"] != "not enough data":
        return ""
    if needed := comparison["clips_needed"]:
        return (
            f"Compare on more labelled clips: about {needed:,} would settle whether no more than "
            f"{margin} are lost."
        )
    return (
        f"The loss is so near to the margin of {margin} that ten million clips would not settle "
        "it: reduce the loss, or state a wider margin."
    )


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What else was found: an anchor; `pass`, `fail` or `note`; and a sentence."""
    facts = []
    if coverage := report["coverage"]:
        least = min(receipt["weights_int8"] for receipt in coverage.values())
        hidden = max(receipt["weights_hidden"] for receipt in coverage.values())
        more = f"; of up to {hidden:.1%} the builder does not tell" if hidden else ""
        text = (
            f"{least:.1%} of the weights compute in INT8, measured on {_n(len(coverage), 'file')}"
        )
        facts.append(("coverage", "note", f"{text}{more}"))
    if streaming := report["streaming"]:
        bad = [name for name, found in streaming.items() if not found["passed"]]
        good = "As a stream it answers what it answers to the whole clip"
        text = f"Not right as a stream: {', '.join(bad)}" if bad else good
        facts.append(("streaming", "fail" if bad else "pass", text))
    if audit := report["audit"]:
        found = [finding["severity"] for finding in audit["findings"]]
        kinds = [_n(found.count(kind), kind) for kind in ("error", "warning") if kind in found]
        text = ", ".join(kinds) or "nothing wrong found"
        kind = "fail" if audit["refused"] else "note" if kinds else "pass"
        facts.append(("audit", kind, f"Audio for calibration: {text}"))
    return facts


def _heard(comparison: Mapping[str, Any], hear: Hear) -> list[dict[str, Any]]:
    """The flips, what was lost first, and for those that can be listened to the audio or why not.

    `outcome` is one of _OUTCOMES, of texts of _TEXT_OUTCOMES, and `rank` its place; `audio` is a
    data URI, `silent` the reason why there is none; `edits` are the words that each has wrong, of
    texts.
    """
    rates = comparison.get("error_rates")
    edits = {(one["path"], one["condition"]): one for one in (rates["flips"] if rates else ())}
    found: list[dict[str, Any]] = []
    for flip in comparison["flips"]:
        lost, won = flip["reference"] == flip["true"], flip["candidate"] == flip["true"]
        outcomes, sides = _OUTCOMES, None
        if wrong := edits.get((flip["path"], flip["condition"])):
            first, second = wrong["reference"], wrong["candidate"]
            lost, won = len(first) < len(second), len(first) > len(second)
            outcomes, sides = _TEXT_OUTCOMES, [_edits(first), _edits(second)]
        rank = 0 if lost else 2 if won else 1
        found.append({**flip, "rank": rank, "outcome": outcomes[rank], "edits": sides})
    found.sort(key=lambda flip: flip["rank"])
    for flip in found[:_PLAYED]:
        flip |= {"audio": None, "silent": None}
        if comparison["sample_rate"] is None:  # nothing was heard
            continue
        try:
            flip["audio"] = _wav_uri(hear(flip["path"], flip["condition"]))
        except (AudioError, OSError) as e:
            flip["silent"] = str(e)
    return found


def _edits(edits: Sequence[Mapping[str, str]]) -> str:
    return " ".join(str(Edit(**edit)) for edit in edits)


def _wav_uri(recording: Recording) -> str:
    """The first seconds of a recording as a WAV of 16 bits, which every browser plays."""
    samples = recording.samples[: _PLAYED_S * recording.sample_rate]
    whole = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setparams((1, 2, recording.sample_rate, 0, "NONE", ""))
        f.writeframes(whole.tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(out.getvalue()).decode()}"


def _changes(confusion: Mapping[str, Sequence[Sequence[int]]]) -> list[list[int]]:
    """The candidate's matrix less the reference's."""
    pairs = zip(confusion["reference"], confusion["candidate"], strict=True)
    return [[b - a for a, b in zip(*rows, strict=True)] for rows in pairs]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(share: float | None, digits: int = 2) -> str:
    return _NONE if share is None else f"{100 * share:.{digits}f}%"


def _points(value: float | None, digits: int = 2) -> str:
    return _NONE if value is None else svg.signed(value, digits)


def _plain(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else svg.minus(f"{value:.{digits}g}")


_FILTERS = {
    "changes": _changes,
    "count": "{:,}".format,
    "decibels": lambda value: "no error" if value is None else svg.minus(f"{value:.1f}"),
    "ms": lambda value: _NONE if value is None else f"{value:.3f}",
    "n": _n,
    "percent": _percent,
    "plain": _plain,
    "points": _points,
    "sentence": _sentence,
    "span": lambda pair: f"{_points(pair[0])} to {_points(pair[1])}",
}
