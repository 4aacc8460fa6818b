"""Error of the INT8 GRU against float, by gate and by time, over one long stream: does it drift?

    python benchmarks/gru_error.py [--data DIR] [--task NAME] [--seconds 60] [--laps 1]
        [--method entropy]... [--target cpu] [--json FILE] [--markdown FILE]

Evaluation recordings in a drawn order, one after the other, go through the float graph, its GRU an
explicit cell, and through the INT8 graph, each with its own state; both show what is in the cell.

A second INT8 stream takes over the float state at the start of each window. When the two have come
as close as their rounding lets them, nothing is left of what was wrong before the window: errors
do not add up. The slope of the error is a second look. What is heard moves the error far more than
time does, so that a minute shows nothing of it (`not seen`); with --laps 60, the same minute again
and again for an hour, a growth of NEGLIGIBLE can be excluded (`no`).
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
import torch
from backends import MODELS, TRAINED
from onnx import helper
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from cnngru_edge.calibration.corpus.read import DEMO, EVAL, Clip, calibration_clips, read_corpus
from cnngru_edge.calibration.ranges.choose import METHODS, MIN_CLIPS, CalibrateConfig, Method
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.artefacts import FLOAT, INT8, RANGES
from cnngru_edge.export.chain.pipeline import parity_clips, trace
from cnngru_edge.export.lower.recurrent import lower_recurrent
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets.base import CPU
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples, read_audio
from cnngru_edge.runtime.session import Array, Session, initial_state

WINDOWS = 6
CONFIDENCE = 0.95
NEGLIGIBLE = 0.01
"""Growth in an hour, as a share of the RMS error."""
LOGITS = "logits"
TARGETS = (CPU, "tensorrt")  # of the Scan form, in FP32

Key = tuple[str, str]  # layer and tensor: Wx (projected input and bias), z, r, n, h


@dataclass(frozen=True)
class TensorError:
    """A tensor in INT8 against float, over the whole stream."""

    layer: str  # "" for the logits
    tensor: str
    rms: float
    max: float
    sqnr_db: float
    sqnr_about_mean_db: float  # each unit's mean is no signal: gates, about 0.5, compare with n


@dataclass(frozen=True)
class Drift:
    """A layer's error of h in time; all errors are RMS."""

    layer: str
    rms: float
    windows: tuple[float, ...]
    resynced: tuple[float, ...]  # of the stream that has the float state at each window's start
    apart: float  # the two INT8 streams, in the later halves of the windows: rounding alone
    forgotten_s: float  # until they are no further apart than twice that power
    older: float  # error over that of the resynced stream, less one, in the later halves
    growth_per_hour: float  # slope of the error by least squares, as a share of it
    growth_low: float  # its confidence interval
    growth_high: float
    drifts: str  # yes, no (growth is excluded), or not seen (the interval is too wide for that)


@dataclass(frozen=True)
class Report:
    """All figures of one INT8 graph."""

    model: str
    target: str
    method: Method
    duration_s: int
    tensors: tuple[TensorError, ...]
    drifts: tuple[Drift, ...]
    agreement: float  # share of the frames in which both give the same label


@dataclass
class Squares:
    """Of one tensor and each frame: means over its units. First the pieces, then the whole."""

    signal: list[Array] = field(default_factory=list)
    error: list[Array] = field(default_factory=list)
    resynced: list[Array] = field(default_factory=list)
    between: list[Array] = field(default_factory=list)  # the two INT8 streams
    largest: float = 0.0
    total: Array = field(default_factory=lambda: np.zeros(1))  # of the float values, (units,)

    def add(self, exact: Array, int8: Array, resynced: Array) -> None:
        """A piece of each stream, (T, units)."""
        parts = (exact, int8 - exact, resynced - exact, int8 - resynced)
        kept = (self.signal, self.error, self.resynced, self.between)
        for squares, part in zip(kept, parts, strict=True):
            squares.append(np.mean(part.astype(np.float64) ** 2, axis=1))
        self.total = self.total + exact.sum(axis=0, dtype=np.float64)
        self.largest = max(self.largest, float(np.abs(parts[1]).max()))


class Tapped:
    """A graph with Scans that shows what is in their cells."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.names: dict[Key, list[str]] = {("", LOGITS): [LOGITS]}
        for scan in [node for node in model.graph.node if node.op_type == "Scan"]:
            self._tap(scan)
        for (layer, _), names in self.names.items():
            if layer:
                model.graph.output.extend(_float_values(names))
        path.write_bytes(model.SerializeToString())
        self.session: Session = open_session(path)
        self.spec = streamable(self.session.spec)

    def _tap(self, scan: onnx.NodeProto) -> None:
        layer = scan.name.removesuffix("/Scan").strip("/")
        attributes = {a.name: a for a in scan.attribute}
        body, directions = attributes["body"].g, attributes["scan_output_directions"].ints
        sigmoid, tanh = (
            next(node.output[0] for node in body.node if node.op_type == op)
            for op in ("Sigmoid", "Tanh")
        )
        gates = next(node.output for node in body.node if sigmoid in node.input)
        self.names[layer, "Wx"] = list(scan.input[1:])
        for gate, value in zip("zrn", (*gates, tanh), strict=True):
            body.output.extend(_float_values([value]))
            scan.output.append(f"{scan.name}_{gate}")
            directions.append(directions[0])
            self.names[layer, gate] = [scan.output[-1]]
        self.names[layer, "h"] = [scan.output[1]]

    def run(
        self, audio: Samples, state: Mapping[str, Array]
    ) -> tuple[dict[Key, Array], Mapping[str, Array]]:
        """What (S,) samples of one stream make of each tensor, (T, units), and the next state."""
        outputs = self.session.run({"audio": audio[None], **state})
        frames = len(audio) // self.spec.chunk_length
        tensors = {
            key: np.concatenate([outputs[name].reshape(frames, -1) for name in names], axis=1)
            for key, names in self.names.items()
        }
        return tensors, {s.name: outputs[s.next_name] for s in self.spec.state}


def _float_values(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]


def listen(
    exact: Tapped, int8: Tapped, audio: Samples, piece: int, window: int
) -> Iterator[list[dict[Key, Array]]]:
    """Tensors of each piece: of float, INT8, and INT8 with the float state at windows' starts."""
    graphs = (exact, int8, int8)
    states: list[Mapping[str, Array]] = [initial_state(exact.spec, 1)] * 3
    for start in range(0, len(audio), piece):
        if start % window == 0:
            states[2] = states[0]
        heard = audio[start : start + piece]
        both = [graph.run(heard, state) for graph, state in zip(graphs, states, strict=True)]
        states = [state for _, state in both]
        yield [tensors for tensors, _ in both]


def measure(
    exact: Tapped, int8: Tapped, audio: Samples, piece: int, lap: int
) -> tuple[tuple[TensorError, ...], tuple[Drift, ...], float]:
    """Errors of all tensors, those of h in time, and the share of frames with the same label."""
    squares = {key: Squares() for key in exact.names}
    agreed: list[Array] = []
    for tensors in listen(exact, int8, audio, piece, len(audio) // WINDOWS):
        for key, kept in squares.items():
            kept.add(*(stream[key] for stream in tensors))
        labels = [stream["", LOGITS].argmax(axis=1) for stream in tensors]
        agreed.append(labels[0] == labels[1])
    errors = []
    for (layer, tensor), kept in squares.items():
        signal, error = (np.concatenate(part) for part in (kept.signal, kept.error))
        varying = signal.mean() - np.mean((kept.total / len(signal)) ** 2)
        sqnrs_db = (10 * float(np.log10(part / error.mean())) for part in (signal.mean(), varying))
        rms = float(error.mean() ** 0.5)
        errors.append(TensorError(layer, tensor, rms, kept.largest, *sqnrs_db))
    rate, chunk = exact.spec.features.sample_rate, exact.spec.chunk_length
    drifts = tuple(
        drift_of(layer, kept, lap // chunk, rate // chunk)
        for (layer, tensor), kept in squares.items()
        if tensor == "h"
    )
    return tuple(errors), drifts, float(np.concatenate(agreed).mean())


def drift_of(layer: str, kept: Squares, lap: int, frames_per_s: int) -> Drift:
    """Of the errors of laps, or of seconds if there is one lap."""
    error, resynced, between = (
        np.concatenate(part).reshape(WINDOWS, -1)
        for part in (kept.error, kept.resynced, kept.between)
    )
    rms = float(error.mean() ** 0.5)
    has_laps = lap < error.size
    span = lap if has_laps else frames_per_s
    # The first lap's first word comes after silence, and in all others after the last word.
    errors = np.sqrt(error.reshape(-1, span).mean(axis=1))[1 if has_laps else 0 :]
    line = stats.linregress(np.arange(len(errors)) * span / frames_per_s / 3600, errors / rms)
    growth = float(line.slope)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(errors) - 2) * line.stderr)
    drifts = "yes" if growth > margin and growth >= NEGLIGIBLE else "not seen"
    if growth + margin < NEGLIGIBLE:
        drifts = "no"
    later = slice(error.shape[1] // 2, None)
    # In the first window, the two are one.
    power = between[1:].mean(axis=0)
    floor = power[later].mean()
    older = error[1:, later].mean() / resynced[1:, later].mean()
    return Drift(
        layer=layer,
        rms=rms,
        windows=tuple(np.sqrt(error.mean(axis=1)).tolist()),
        resynced=tuple(np.sqrt(resynced.mean(axis=1)).tolist()),
        apart=float(floor**0.5),
        forgotten_s=int(np.argmax(power <= 2 * floor)) / frames_per_s,
        older=float(older**0.5) - 1,
        growth_per_hour=growth,
        growth_low=growth - margin,
        growth_high=growth + margin,
        drifts=drifts,
    )


def stream_of(clips: Sequence[Clip], rate: int, length: int) -> Samples:
    """So many samples of recordings in an order drawn once, over again where they end too soon."""
    parts: list[Samples] = []
    order = np.random.default_rng(0).permutation(len(clips))
    while sum(map(len, parts)) < length:
        parts.append(read_audio(clips[order[len(parts) % len(clips)]].path, rate).samples)
    return np.concatenate(parts)[:length]


def error_table(report: Report) -> Table:
    """One row for each tensor."""
    made = Table(box=box.MARKDOWN)
    made.add_column("layer")
    made.add_column("tensor")
    for header in ("RMS error", "largest", "SQNR, dB", "about its mean"):
        made.add_column(header, justify="right")
    for row in report.tensors:
        decibels = (f"{row.sqnr_db:.1f}", f"{row.sqnr_about_mean_db:.1f}")
        figures = (f"{row.rms:.5f}", f"{row.max:.3f}", *decibels)
        made.add_row(row.layer or "head", row.tensor, *figures)
    return made


def drift_table(report: Report) -> Table:
    """One row for each layer."""
    made = Table(box=box.MARKDOWN)
    made.add_column("error of h")
    headers = [f"{i + 1}/{WINDOWS}" for i in range(WINDOWS)]
    headers += [
        "forgotten in",
        "then apart",
        "older",
        f"growth in 1 h ({CONFIDENCE:.0%})",
        "drifts",
    ]
    for header in headers:
        made.add_column(header, justify="right")
    for row in report.drifts:
        made.add_row(
            row.layer,
            *(f"{rms:.5f}" for rms in row.windows),
            f"{row.forgotten_s:.2f} s",
            f"{row.apart / row.rms:.1%}",
            f"{row.older:+.2%}",
            f"{row.growth_low:+.1%} to {row.growth_high:+.1%}",
            row.drifts,
        )
    return made


def text_of(reports: Sequence[Report]) -> str:
    """All tables, as Markdown."""
    console = Console(width=160)
    with console.capture() as capture:
        console.print("# Error of the INT8 GRU\n")
        console.print(f"    python benchmarks/gru_error.py {shlex.join(sys.argv[1:])}")
        for report in reports:
            console.print(f"\n## {report.model}, {report.target}, {report.method}")
            console.print(error_table(report), end="")
            console.print(drift_table(report), end="")
            console.print(f"Same label in {report.agreement:.2%} of {report.duration_s} s.")
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
@click.option("--task")
@click.option("--models", type=click.Choice(list(MODELS)), multiple=True, default=list(MODELS))
@click.option("--method", type=click.Choice(METHODS), multiple=True, default=["entropy"])
@click.option("--target", type=click.Choice(TARGETS), default=CPU, show_default=True)
@click.option("--seconds", type=click.IntRange(WINDOWS), default=60, show_default=True)
@click.option("--laps", type=click.IntRange(1), default=1, help="Hear the same again; 1 or 6 n.")
@click.option("--by-chunk", is_flag=True, help="Push 20 ms at a time, not a second: the same.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path))
def main(
    data: Path,
    task: str | None,
    models: Sequence[str],
    method: Sequence[Method],
    target: str,
    seconds: int,
    laps: int,
    by_chunk: bool,
    json_file: Path | None,
    markdown: Path | None,
) -> None:
    """Print the errors of each model and method, and what they do in time."""
    if (seconds if laps == 1 else laps) % WINDOWS:
        raise click.UsageError(f"--seconds of one lap, or --laps: expected a multiple of {WINDOWS}")
    torch.set_num_threads(1)
    trained = load_checkpoint(PRETRAINED / f"{TRAINED}.safetensors")
    assert isinstance(trained, CnnGru)
    rate = trained.spec.features.sample_rate
    corpus = read_corpus(data, task)
    calibration = calibration_clips(corpus, MIN_CLIPS)
    lap = stream_of(corpus.of(EVAL), rate, seconds * rate)
    piece = trained.spec.chunk_length if by_chunk else rate
    reports: list[Report] = []
    for name in models:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            model = MODELS[name](trained)
            trace(model, folder, parity_clips(calibration, model.spec))
            lowered = ir.load(folder / FLOAT)
            lower_recurrent(lowered)
            exact = Tapped(ir.to_proto(lowered), folder / "tapped.fp32.onnx")
            for chosen in method:
                config = CalibrateConfig(method=chosen, min_clips=1)
                paths = [clip.path for clip in calibration]
                calibrate(folder / FLOAT, paths, config)[0].save(folder / RANGES)
                quantize_onnx(folder / FLOAT, folder / RANGES, folder / INT8, target)
                int8 = Tapped(onnx.load(folder / INT8), folder / "tapped.int8.onnx")
                found = measure(exact, int8, np.tile(lap, laps), piece, len(lap))
                reports.append(Report(name, target, chosen, seconds * laps, *found))
    text = text_of(reports)
    print(text, end="")
    if markdown:
        markdown.write_text(text)
    if json_file:
        json_file.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()
