"""The command line: one group, a command for each stage, in the order of the pipeline.

Results go to stdout; progress, notes and warnings to stderr. Exit 0: done and passed. 1: a stated
failure, in one line. 2: usage.
"""

import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from cnngru_edge.calibration.audit.command import audit
from cnngru_edge.calibration.corpus.command import demo
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.export.commands.options import (
    FiniteRange,
    calibrate_options,
    command_line,
    data_option,
    min_coverage_option,
    plan_option,
    task_option,
)
from cnngru_edge.export.commands.source import Source, load_source, source_options
from cnngru_edge.export.commands.train import train
from cnngru_edge.export.commands.verdict import compare, inspect, sensitivity
from cnngru_edge.export.targets.base import CPU, MAX_FRAMES, TARGETS
from cnngru_edge.models.errors import EdgeError
from cnngru_edge.runtime.backends.trt.engine_file import LIBRARIES
from cnngru_edge.runtime.cli import FILE, bench, doctor, report_skipped, run, selftest
from cnngru_edge.runtime.machine.libraries import import_fault
from cnngru_edge.runtime.progress import advance_of, progress_bars


class Group(click.Group):
    """The one place where an error becomes a line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what the user can mend is one line without a traceback."""
        try:
            return super().invoke(ctx)
        except EdgeError as e:
            raise click.ClickException(str(e)) from e
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as e:
            if fault := import_fault(e):
                raise click.ClickException(str(fault)) from e
            if not isinstance(e, OSError):
                raise
            where = f"{e.filename}: " if e.filename else ""
            raise click.ClickException(f"{where}{e.strerror or e}") from e

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the pipeline, not of the alphabet."""
        return list(self.commands)


_STOPS = (signal.SIGINT, signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    """A kill cleans up as Ctrl-C does, so that nothing half-written stays behind.

    A second stop would interrupt the cleaning, and might leave a lock taken that it waits for.
    """
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@click.group(cls=Group, context_settings={"show_default": True})
@click.version_option(package_name="cnngru-edge")
def main() -> None:
    """Take a trained CNN-GRU speech model to an edge device: trace, calibrate, quantize, run."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it needs no more
    for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell script
            signal.signal(number, _stop)


main.add_command(demo)
main.add_command(train)


@main.command()
@source_options
@click.option("--out", type=FILE, required=True, help="Folder to write to.")
@data_option
@task_option
@calibrate_options
@click.option(
    "--max-drop",
    type=FiniteRange(0, min_open=True),
    help="Percentage points of accuracy (ctc: WER) that INT8 may cost; as few layers as that takes "
    "are kept in float.  [default: all in INT8, and no more than 0.5 points proven to be lost]",
)
@plan_option
@min_coverage_option
@click.option(
    "--chunk-frames",
    type=click.IntRange(1, MAX_FRAMES),
    default=1,
    help="Output frames that the chunk forms take at a time.",
)
@click.option("--force", is_flag=True, help="Go on with recordings that the audit calls unfit.")
def export(
    source: Source,
    out: Path,
    data: Path | None,
    task: str | None,
    max_drop: float | None,
    plan: Path | None,
    min_coverage: float,
    chunk_frames: int,
    force: bool,
    **options: Any,
) -> None:
    """Trace, calibrate, quantize, build and compare a CHECKPOINT: all is written or nothing.

    Without a CHECKPOINT it takes the keyword model that comes with the package. --model takes a
    module of your own, --onnx a float ONNX file.
    """
    if plan and max_drop is not None:
        raise click.UsageError(
            "--plan says what is kept in float, --max-drop searches it; give one"
        )
    from cnngru_edge.calibration.corpus.read import demo_for, read_corpus
    from cnngru_edge.export.chain import pipeline
    from cnngru_edge.export.report.tables import print_summary

    model, name, known = load_source(source)
    corpus = read_corpus(data or demo_for(model.spec), task)
    with progress_bars() as bar:
        report = pipeline.export(
            model,
            corpus,
            out,
            CalibrateConfig(**options),
            max_drop=max_drop,
            plan=plan,
            min_coverage=min_coverage,
            chunk_frames=chunk_frames,
            force=force,
            name=name,
            notes=known,
            command=command_line(),
            progress=advance_of(bar),
        )
    print_summary(report, Console(markup=False))
    report_skipped(report.errors)


@main.command()
@source_options
@click.option("--out", type=FILE, required=True, help="Folder to write to.")
@data_option
@task_option
def trace(
    source: Source,
    out: Path,
    data: Path | None,
    task: str | None,
) -> None:
    """Write TorchScript, .pt2 and float ONNX of a CHECKPOINT, checked against it on recordings."""
    from cnngru_edge.calibration.corpus.read import demo_for, read_corpus
    from cnngru_edge.export.chain import pipeline

    model, _, known = load_source(source)
    for note in known:
        click.echo(f"warning: {note}", err=True)
    corpus = read_corpus(data or demo_for(model.spec), task)
    clips = pipeline.parity_clips(corpus.clips, model.spec)
    found = pipeline.trace(model, out, clips, lambda why: click.echo(f"note: {why}", err=True))
    if why := getattr(model, "why_one", ""):
        click.echo(f"warning: the graph takes one input at a time: {why}", err=True)
    for parity in found:
        click.echo(
            f"{out / parity.path.name}: equals torch within {parity.max_abs_error:.1e} "
            f"(the most: {parity.tensor})"
        )


@main.command()
@click.argument("graph", type=FILE)
@click.option("--out", type=FILE, required=True, help="Ranges to write (.json).")
@data_option
@task_option
@calibrate_options
def calibrate(graph: Path, out: Path, data: Path | None, task: str | None, **options: Any) -> None:
    """Run a float GRAPH over recordings, phrases or images and write its tensors' ranges.

    DATA may also be a folder of recordings without labels. Of a corpus with sets, those for
    calibration are used.
    """
    from cnngru_edge.calibration.corpus.read import calibration_sources, demo_for
    from cnngru_edge.calibration.ranges.collect import calibrate as run_calibration
    from cnngru_edge.runtime.backends.open import open_session

    config = CalibrateConfig(**options)
    if data is None:
        with open_session(graph) as session:
            data = demo_for(session.spec)
    paths = calibration_sources(data, task, config.min_clips)
    with progress_bars() as bar:
        advance = advance_of(bar)
        ranges, errors = run_calibration(
            graph, paths, config, lambda n: advance("calibrate", n, len(paths))
        )
    ranges.save(out)
    click.echo(f"{out}: {len(ranges.tensors)} tensors, {ranges.clips} clips, {ranges.method}")
    report_skipped(errors)


@main.command()
@click.argument("graph", type=FILE)
@click.option("--ranges", type=FILE, required=True, help="Written by calibrate for this graph.")
@click.option("--out", type=FILE, required=True, help="INT8 graph to write (.onnx).")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default=CPU,
    help="cpu: ONNX Runtime.  tensorrt: TensorRT 8.6 to 10, FP32 scales.  tensorrt-fp16: strongly "
    "typed, TensorRT from 10.12 on and TensorRT-RTX.",
)
@click.option(
    "--frames",
    type=click.IntRange(1, MAX_FRAMES),
    help="Take just so many output frames at a time, without a loop.  [default: any length]",
)
@plan_option
@min_coverage_option
def quantize(
    graph: Path,
    ranges: Path,
    out: Path,
    target: str,
    frames: int | None,
    plan: Path | None,
    min_coverage: float,
) -> None:
    """Write the INT8 form of a float GRAPH, for ONNX Runtime on a CPU or for TensorRT."""
    from cnngru_edge.export.quantize.plan import Plan
    from cnngru_edge.export.quantize.run import quantize_checked

    loaded = Plan.load(plan) if plan else None
    receipt = quantize_checked(graph, ranges, out, target, frames, min_coverage, loaded)
    size = f"{out.stat().st_size / 1000:.0f} KB"
    if receipt is None:
        click.echo(f"{out}: {size}; INT8 not proven, for TensorRT-RTX is not installed")
    else:
        click.echo(f"{out}: {receipt.weights_int8:.1%} of the weights in INT8, {size}")


@main.command()
@click.argument("graph", type=FILE)
@click.option("--out", type=FILE, required=True, help="Engine to write (.engine).")
@click.option(
    "--target",
    type=click.Choice([library.replace("_", "-") for library in LIBRARIES]),
    help="tensorrt: for the GPU here.  tensorrt-rtx: for desktop GPUs, needs none.  "
    "[default: tensorrt-rtx for a name that ends with .rtx.engine, else tensorrt]",
)
@click.option(
    "--batch", type=click.IntRange(1, 4096), default=1, help="The most streams at a time."
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(0, 3600, min_open=True),
    help="The longest audio at a time, of a graph of any length; longer is cut.  "
    "[default: the longest clip of the calibration]",
)
@click.option(
    "--fp16/--no-fp16",
    default=True,
    help="Where the builder chooses (weak typing): whether what is not in INT8 may be in FP16.",
)
@click.option(
    "--workspace",
    type=click.IntRange(1, 2**20),
    default=256,
    metavar="MIB",
    help="Memory for the scratch of one layer.",
)
@click.option(
    "--tactic-memory",
    type=click.IntRange(1, 2**20),
    metavar="MIB",
    help="Memory for trying kernels.  [default: TensorRT's; on a Jetson half of what is free]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="0 builds fastest, 5 makes the fastest engine.  [default: TensorRT's]",
)
@click.option("--timing-cache", type=FILE, help="Keep measured kernels here for the next build.")
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    help="For tensorrt-rtx: compute capability of a GPU to build for, as 8.6; may be given several "
    "times.  [default: 8.6, 8.9 and 12.0]",
)
@min_coverage_option
def build(
    graph: Path,
    out: Path,
    target: str | None,
    timing_cache: Path | None,
    min_coverage: float,
    workspace: int,
    tactic_memory: int | None,
    **options: Any,
) -> None:
    """Build an engine from a GRAPH for TensorRT: on the device that runs it, or for TensorRT-RTX.

    An engine that is there already and was built from the same GRAPH with the same options, version
    and GPU is kept.
    """
    from cnngru_edge.export.chain.engine import RTX_SUFFIX, write_engine
    from cnngru_edge.export.targets.trt.build import BuildConfig

    is_rtx = out.name.endswith(RTX_SUFFIX) if target is None else target == "tensorrt-rtx"
    config = BuildConfig(
        library="tensorrt_rtx" if is_rtx else "tensorrt",
        workspace_mib=workspace,
        tactic_memory_mib=tactic_memory,
        **options,
    )
    with progress_bars() as bar:
        manifest, notes = write_engine(
            graph,
            out,
            config,
            min_coverage=min_coverage,
            timing_cache=timing_cache,
            progress=advance_of(bar),
        )
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{out}: {manifest.summary}, {out.stat().st_size / 1000:.0f} KB")


@main.command()
@click.argument("checkpoint", type=FILE)
@click.option("--engine", type=FILE, required=True, help="Its INT8 artefact, which is to decide.")
@click.option("--data", type=FILE, required=True, help="Folder per label, or manifest.csv.")
@task_option
@click.option(
    "--background",
    type=FILE,
    multiple=True,
    help="Folder of speech and noise without any of the words; may be given several times.",
)
@click.option(
    "--false-accepts-per-hour",
    type=click.FloatRange(0),
    default=1.0,
    help="The most detections of what was not said.",
)
@click.option(
    "--hours",
    type=click.FloatRange(0, 100, min_open=True),
    default=1.0,
    help="Words in a row to listen to, about; the background comes on top.",
)
@click.option("--seed", type=int, default=0, help="The same seed gives the same decision.")
@click.option("--out", type=FILE, required=True, help="Checkpoint to write (.safetensors).")
def tune(
    checkpoint: Path,
    engine: Path,
    data: Path,
    task: str | None,
    background: tuple[Path, ...],
    out: Path,
    **options: Any,
) -> None:
    """Choose when a stream of a CHECKPOINT makes an event, and write that into its spec.

    What `export` makes of the new checkpoint carries it; the weights stay as they are.
    """
    from cnngru_edge.calibration.corpus.read import read_corpus
    from cnngru_edge.export.verdict.tune import TuneConfig, background_clips, check_has_events
    from cnngru_edge.export.verdict.tune import tune as run_tuning
    from cnngru_edge.models.nets.checkpoint import load_stream_checkpoint, save_checkpoint

    model = load_stream_checkpoint(checkpoint)
    check_has_events(model.spec, checkpoint)
    corpus = read_corpus(data, task)
    clips = [clip for folder in background for clip in background_clips(folder)]
    with progress_bars() as bar:
        advance = advance_of(bar)
        tuned, errors = run_tuning(
            model.spec,
            engine,
            corpus,
            clips,
            TuneConfig(**options),
            lambda done, total: advance("tune", done, total),
        )
    model.spec = replace(model.spec, decision=tuned.decision)
    save_checkpoint(model, out)
    click.echo(tuned.summary)
    click.echo(f"{out}: {tuned.decision.summary}")
    report_skipped(errors)


def _show_warning(message: Warning | str, *_: Any) -> None:
    """For a user, without the line of code that it came from."""
    click.echo(f"warning: {message}", err=True)


for command in (audit, compare, sensitivity, run, selftest, bench, inspect, doctor):
    main.add_command(command)
