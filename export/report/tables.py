"""Results as tables for people."""

import resource
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from cnngru_edge.export.artefacts import (
    ENGINES,
    FLOAT,
    INT8,
    REPORT_HTML,
    ExportReport,
)
from cnngru_edge.export.verdict.compare import Comparison, interval_text
from cnngru_edge.export.verdict.error_rate import ErrorRates
from cnngru_edge.export.verdict.streaming import (
    CANDIDATE,
    CARRIED,
    REFERENCE,
    Row,
    StreamingComparison,
)
from cnngru_edge.models.spec.stream import CTC, is_of_words
from cnngru_edge.runtime.decode.agreement import sqnr_text

if TYPE_CHECKING:
    from cnngru_edge.export.verdict.sensitivity import (
        Sensitivity,  # of onnx, which a device may not have
    )

_FLIPS_SHOWN = 10
_GROUPS_SHOWN = 5
_FAILURES_SHOWN = 5


def print_summary(report: ExportReport, console: Console) -> None:
    """One screen: what was made, how good it is, how long it took."""
    comparisons = report.comparisons
    right = {name: _right(c)[1] for name, c in comparisons.items()}
    right[FLOAT] = _right(comparisons[INT8])[0]
    measure = "accuracy" if comparisons[INT8].error_rates is None else "WER"
    parity = {p.path.name: f"{p.max_abs_error:.0e}" for p in report.parity}
    table = Table(Column("file", no_wrap=True), "KB", "in INT8", measure, "from torch")
    built = [name for name in ENGINES if name in report.coverages]
    traced = [parity.path.name for parity in report.parity]  # an ONNX file has no TorchScript
    for name in (*traced, *report.forms, *built):
        path = report.out / name
        receipt = report.coverages.get(name)
        table.add_row(
            name,
            f"{path.stat().st_size / 1000:,.0f}",
            f"{receipt.weights_int8:.1%}" if receipt else "",
            f"{right[name]:.2%}" if name in right else "",
            parity.get(name, ""),
        )
    console.print(f"{report.out / REPORT_HTML}", highlight=False, soft_wrap=True)
    console.print(table)
    comparison = comparisons[INT8]
    print_comparison(comparison, console)
    for name, streaming in report.streaming.items():
        console.print(
            f"{name} as a stream: {_stream_line(streaming)}", highlight=False, soft_wrap=True
        )
    if kept := [name for name in report.plan.layers if name in report.plan.kept_in_float]:
        console.print(f"kept in float: {', '.join(kept)}", highlight=False, soft_wrap=True)
    for finding in report.audit.findings if report.audit else ():
        if finding.severity != "note":
            line = f"{finding.severity}: {finding.check}: {finding.text}"
            console.print(line, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    stages = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.stage_s.items())
    console.print(f"{stages}; peak memory {_peak_memory_mib():.0f} MiB", highlight=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The verdict, each condition, who loses most, and the first of the clips that flipped."""
    console.print(comparison.summary, highlight=False, soft_wrap=True)
    clean = comparison.clean
    if comparison.error_rates:
        _print_error_rates(comparison.error_rates, console)
    what = "whole texts right: McNemar's" if comparison.error_rates else "McNemar's"
    console.print(
        f"{what} exact p {clean.mcnemar_p:.3g}, Cohen's kappa of agreement {clean.kappa:.3f}",
        highlight=False,
    )
    if comparison.left_out:
        console.print(f"{comparison.left_out} clips that only one has heard are left out")
    several = len(comparison.conditions) > 1
    if several and comparison.error_rates is None:
        table = Table("heard", "reference", "candidate", "points", "agrees", "", highlight=False)
        for c in comparison.conditions:
            table.add_row(
                c.condition,
                f"{c.reference_accuracy:.2%}",
                f"{c.candidate_accuracy:.2%}",
                interval_text(c.delta, c.delta_ci),
                f"{c.agreement:.2%}",
                c.verdict,
            )
        console.print(table)
    if several:
        console.print(f"intervals of {clean.confidence:.1%}, so that all hold together at 95 %")
    for what, groups in (("class", comparison.by_class), ("speaker", comparison.by_speaker)):
        lost = {g: round(-g.delta * g.clips / 100) for g in groups if g.delta < 0}
        if lost:
            worst = sorted(lost, key=lambda g: -lost[g])
            text = ", ".join(f"{g.group} {lost[g]} of {g.clips}" for g in worst[:_GROUPS_SHOWN])
            more = len(worst) - _GROUPS_SHOWN
            text += f" and {more} more" if more > 0 else ""
            console.print(f"clips lost by {what}: {text}", highlight=False, soft_wrap=True)
    if not comparison.flips:
        return
    path = Column("flipped clip", overflow="fold")
    sure = "margin" if comparison.error_rates is None else "score"
    table = Table(
        path, "heard", "true", f"reference, {sure}", f"candidate, {sure}", highlight=False
    )
    edits = _edits(comparison)
    for flip in comparison.flips[:_FLIPS_SHOWN]:
        first, second = edits.get((flip.path, flip.condition), ("", ""))
        table.add_row(
            flip.path,
            flip.condition,
            flip.true,
            f"{flip.reference} {flip.reference_margin:.2f}{first}",
            f"{flip.candidate} {flip.candidate_margin:.2f}{second}",
        )
    console.print(table)
    if edits:
        console.print("a>b: replaced, -a: left out, +b: put in")
    if len(comparison.flips) > _FLIPS_SHOWN:
        console.print(f"and {len(comparison.flips) - _FLIPS_SHOWN} more; --json lists them all")


def _edits(comparison: Comparison) -> dict[tuple[str, str], tuple[str, str]]:
    """What is wrong in the words of both texts that a clip flipped between, a line each."""
    found = {}
    for flip in comparison.error_rates.flips if comparison.error_rates else ():
        first, second = (" ".join(map(str, side)) for side in (flip.reference, flip.candidate))
        found[flip.path, flip.condition] = f"\n{first}", f"\n{second}"
    return found


def _right(comparison: Comparison) -> tuple[float, float]:
    """Accuracy of both, or WER of a CTC model."""
    if comparison.error_rates is None:
        return comparison.clean.reference_accuracy, comparison.clean.candidate_accuracy
    rates = comparison.error_rates.conditions[0].rates
    return rates.reference_wer, rates.candidate_wer


def _print_error_rates(found: ErrorRates, console: Console) -> None:
    """Both models' words and characters by condition, speakers who lose, and what they flipped."""
    table = Table("heard", "", "reference", "candidate", "points", "", highlight=False)
    for one in found.conditions:
        rates = one.rates
        table.add_row(
            one.condition,
            "WER",
            f"{rates.reference_wer:.2%}",
            f"{rates.candidate_wer:.2%}",
            interval_text(rates.delta, rates.delta_ci),
            one.verdict,
        )
        table.add_row(
            "",
            "CER",
            f"{rates.reference_cer:.2%}",
            f"{rates.candidate_cer:.2%}",
            interval_text(rates.delta_cer, rates.delta_cer_ci),
        )
    console.print(table)
    clean = found.conditions[0].rates
    for name, words in (("reference", clean.reference_words), ("candidate", clean.candidate_words)):
        console.print(
            f"{name}: {words.substitutions} of {words.length} words replaced, "
            f"{words.deletions} left out, {words.insertions} put in",
            highlight=False,
        )
    losers = [one for one in found.by_speaker if one.rates.delta > 0]
    if losers:
        text = ", ".join(
            f"{one.speaker} {one.rates.delta:+.1f} ({one.rates.reference_words.length} words)"
            for one in losers[:_GROUPS_SHOWN]
        )
        more = len(losers) - _GROUPS_SHOWN
        text += f" and {more} more" if more > 0 else ""
        console.print(f"points of WER lost by speaker: {text}", highlight=False, soft_wrap=True)


def print_streaming(comparison: StreamingComparison, console: Console) -> None:
    """A row for each way to cut the clips, over all offsets; the verdict, and what fails."""
    table = Table(
        "model", "chunks", "state", "accuracy", "agrees", "to clip", "to float", highlight=False
    )
    ways: dict[tuple[str, str, str], list[Row]] = {}
    for row in comparison.rows:
        chunks = "clip" if row.chunk_ms is None else f"{row.chunk_ms:g} ms"
        ways.setdefault((row.model, chunks, row.state), []).append(row)
    for way, rows in ways.items():
        right = sorted(row.accuracy for row in rows)
        table.add_row(
            *way,
            "-".join(dict.fromkeys(f"{100 * share:.2f}" for share in (right[0], right[-1]))) + "%",
            f"{min(row.agreement for row in rows):.2%}",
            f"{max(row.max_abs_clip_error for row in rows):.2g}",
            f"{max(row.max_abs_error for row in rows):.2g}",
        )
    console.print(table)
    offsets = dict.fromkeys(f"{row.offset_ms:g}" for row in comparison.rows)
    console.print(
        f"offsets {', '.join(offsets)} ms: the range of the accuracy, the least agreement with the "
        "reference's clip, the largest difference of a logit to the model's own clip and to the "
        "reference's",
        highlight=False,
        soft_wrap=True,
    )
    if comparison.events:
        console.print(str(comparison.events), highlight=False, soft_wrap=True)
    console.print(_stream_line(comparison), highlight=False, soft_wrap=True)
    failures = [*comparison.differences, *comparison.losses]
    for failure in failures[:_FAILURES_SHOWN]:
        console.print(failure, highlight=False, soft_wrap=True)
    if len(failures) > _FAILURES_SHOWN:
        console.print(f"and {len(failures) - _FAILURES_SHOWN} more; --json lists them all")


def _stream_line(comparison: StreamingComparison) -> str:
    streams = [row for row in comparison.rows if row.model == CANDIDATE]
    largest = max(row.max_abs_clip_error for row in streams)
    carried = min(row.accuracy for row in streams if row.state == CARRIED)
    loss = comparison.context_loss
    return (
        f"{comparison.clips} clips: stream and clip {largest:.2g} apart, at least {carried:.2%} "
        f"right after another clip, which loses {loss[CANDIDATE]:.2f} points at most (float "
        f"{loss[REFERENCE]:.2f}): {comparison.verdict}"
    )


def print_sensitivity(found: "Sensitivity", console: Console) -> None:
    """Layers and gates with the worst first, and how the tensors use their ranges."""
    console.print(
        f"{found.clips} clips: all in INT8 {sqnr_text(found.sqnr_db)} SQNR at the logits, "
        f"{found.flips} answered differently",
        highlight=False,
    )
    if not found.is_explained:
        console.print(
            f"its layers alone make {sqnr_text(found.rebuilt_sqnr_db)} of it: something else in "
            "the graph is not as in the float graph",
            highlight=False,
            soft_wrap=True,
        )
    table = Table("layer", "weights", "alone in INT8", "flips", "if restored", "flips")
    for layer in found.layers:
        table.add_row(
            layer.layer,
            f"{layer.weights:,}",
            sqnr_text(layer.alone_sqnr_db),
            str(layer.alone_flips),
            sqnr_text(layer.restored_sqnr_db),
            str(layer.restored_flips),
        )
    console.print(table)
    if found.gates:
        table = Table("GRU", "matrix", "gate", "alone in INT8", "flips")
        for gate in found.gates:
            row = (gate.layer, gate.matrix, gate.gate, sqnr_text(gate.sqnr_db), str(gate.flips))
            table.add_row(*row)
        console.print(table)
    table = Table("read by", "quantized between", "takes on", "clipped", "effective bits")
    for use in found.tensors:
        table.add_row(
            use.read_by,
            f"{use.low:.3g} to {use.high:.3g}",
            f"{use.minimum:.3g} to {use.maximum:.3g}",
            f"{use.clipped:.3%}",
            f"{use.effective_bits:.1f}",
        )
    console.print(table)


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """What is inside an artefact."""
    for key in ("format", "sha256", "size_bytes", "backend", "target", "precision"):
        console.print(f"{key}: {found[key]}", highlight=False, soft_wrap=True)
    labels = ", ".join(found["spec"]["labels"])
    if found["spec"]["family"] == CTC:
        written = found["spec"]["labels"][1:]
        if is_of_words(found["spec"]["labels"]):
            labels = f"a blank and {', '.join(word.strip() for word in written)}"
        else:
            labels = f"a blank and {''.join(written)!r}"
    console.print(f"labels: {labels}", highlight=False, soft_wrap=True)
    for key in ("inputs", "outputs"):
        table = Table(key.removesuffix("s"), "dtype", "shape")
        for tensor in found[key]:
            table.add_row(tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["shape"])))
        console.print(table)
    if not (coverage := found["coverage"]):
        console.print("coverage: not known here", highlight=False)
        return
    of_what = "/s of audio" if found["inputs"][0]["name"] == "audio" else " of a usual input"
    table = Table("layer", "computes in", "weights", "bytes", f"MAC{of_what}")
    for layer in coverage["layers"]:
        numbers = (f"{layer[key]:,}" for key in ("weights", "bytes", "macs"))
        table.add_row(layer["name"], layer["precision"], *numbers)
    console.print(table)
    console.print(
        f"{coverage['weights_int8']:.1%} of the weights and {coverage['macs_int8']:.1%} of the "
        f"multiply-accumulates in INT8 (read from {coverage['source']})",
        highlight=False,
        soft_wrap=True,
    )


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)
