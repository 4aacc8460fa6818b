"""Results as tables for people."""

import resource
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from cnngru_edge.export.compare import Comparison
from cnngru_edge.export.pipeline import FLOAT, INT8, TORCHSCRIPT, ExportReport

_FLIPS_SHOWN = 10


def print_summary(report: ExportReport, console: Console) -> None:
    """One screen: what was made, how good it is, how long it took."""
    comparison = report.comparison
    assert comparison is not None  # an export without one has raised
    accuracy = {
        FLOAT: f"{comparison.reference_accuracy:.2%}",
        INT8: f"{comparison.candidate_accuracy:.2%}",
    }
    parity = {p.path.name: f"within {p.max_abs_error:.0e} of torch" for p in report.parity}
    table = Table("file", "size", "accuracy", "parity", title=str(report.out), title_justify="left")
    for name in (TORCHSCRIPT, FLOAT, INT8):
        size = f"{(report.out / name).stat().st_size / 1000:.0f} KB"
        table.add_row(name, size, accuracy.get(name, ""), parity.get(name, ""))
    console.print(table)
    print_comparison(comparison, console)
    stages = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.stage_s.items())
    console.print(f"{stages}; peak memory {_peak_memory_mib():.0f} MiB", highlight=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Both accuracies, the difference and the first of the clips that flipped."""
    console.print(
        f"{comparison.clips} clips: reference {comparison.reference_accuracy:.2%}, candidate "
        f"{comparison.candidate_accuracy:.2%} ({comparison.delta:+.2f} points), agreement "
        f"{comparison.agreement:.2%}: {comparison.verdict}",
        highlight=False,
        soft_wrap=True,
    )
    if not comparison.flips:
        return
    table = Table("flipped clip", "true", "reference", "candidate")
    for flip in comparison.flips[:_FLIPS_SHOWN]:
        table.add_row(flip.path, flip.true, flip.reference, flip.candidate)
    console.print(table)
    if len(comparison.flips) > _FLIPS_SHOWN:
        console.print(f"and {len(comparison.flips) - _FLIPS_SHOWN} more; --json lists them all")


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """What is inside an artefact."""
    for key in ("format", "sha256", "size_bytes", "backend", "precision"):
        console.print(f"{key}: {found[key]}", highlight=False, soft_wrap=True)
    console.print(f"labels: {', '.join(found['spec']['labels'])}", highlight=False, soft_wrap=True)
    for key in ("inputs", "outputs"):
        table = Table(key.removesuffix("s"), "dtype", "shape")
        for tensor in found[key]:
            table.add_row(tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["shape"])))
        console.print(table)
    if "coverage" in found:
        table = Table("layer", "operator", "weights stored as", "weights", "bytes")
        for layer in found["coverage"]["layers"]:
            numbers = (f"{layer['weights']:,}", f"{layer['bytes']:,}")
            table.add_row(layer["name"], layer["op"], layer["precision"], *numbers)
        console.print(table)
        console.print(f"{found['coverage']['weights_int8']:.1%} of the weights in INT8")


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)
