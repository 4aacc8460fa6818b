"""The whole chain from a checkpoint to checked artefacts, written all together or not at all."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from cnngru_edge.calibration.audit.run import with_scales
from cnngru_edge.calibration.corpus.read import (
    EVAL,
    Clip,
    Corpus,
    calibration_clips,
    spread,
)
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.artefacts import (
    CHUNK,
    COMPARISON,
    COVERAGE,
    ENGINES,
    FLOAT,
    INT8,
    INT8_FORMS,
    PLAN,
    PROGRAM,
    RANGES,
    STREAMING,
    TORCHSCRIPT,
    ExportReport,
)
from cnngru_edge.export.chain.engine import remove_engine
from cnngru_edge.export.chain.evidence import described_files, evidence, latencies
from cnngru_edge.export.chain.gates import (
    MEASURED_CLIPS,
    Progress,
    audited,
    check_apart,
    compare_answers,
    compare_streams,
    receipts_of,
)
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.lower.float_layers import float_reasons, weights_in_float
from cnngru_edge.export.quantize.plan import Plan, search_fields
from cnngru_edge.export.quantize.run import layers_in, quantize_onnx
from cnngru_edge.export.report.page import write_report
from cnngru_edge.export.targets.base import MIN_COVERAGE
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.export.trace.own_onnx import OnnxModel
from cnngru_edge.export.trace.parity import Parity, check_parity
from cnngru_edge.export.trace.program import export_program
from cnngru_edge.export.trace.torchscript import export_torchscript
from cnngru_edge.export.verdict.answers import Conditions, truth_of
from cnngru_edge.export.verdict.compare import (
    MARGIN,
    comparison_fields,
)
from cnngru_edge.export.verdict.doubt import doubt_about
from cnngru_edge.export.verdict.flips import hear_again
from cnngru_edge.export.verdict.long_streams import load
from cnngru_edge.export.verdict.search import search_plan
from cnngru_edge.export.verdict.sensitivity import sensitivity
from cnngru_edge.export.verdict.streaming import (
    streaming_fields,
)
from cnngru_edge.models.atomic import staged, write_file
from cnngru_edge.models.errors import CorpusError, EdgeError, InputError
from cnngru_edge.models.nets.checkpoint import load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, sample_rate_of
from cnngru_edge.runtime.check.golden import GOLDEN, write_golden
from cnngru_edge.runtime.inputs.read import read_input
from cnngru_edge.runtime.session import Array

Model: TypeAlias = CnnGru | WholeModel

_PARITY_CLIPS = 8
_SEARCHED_CLIPS = 1000


def trace(
    model: Model,
    out: Path,
    clips: Sequence[Array],
    note: Callable[[str], None] = lambda why: None,
) -> list[Parity]:
    """Write TorchScript, float ONNX and a program of torch, if they equal torch on these clips.

    A module that is not ours is for one input at a time if several are not what it answers alike;
    an ONNX file has neither TorchScript nor program. Where there can be no program, the others are
    written.

    Args:
        model: the trained model.
        out: the folder to write to.
        clips: what they are to answer alike.
        note: told why there is no program, where there is none.
    """
    folded = model.for_export()
    with staged(out) as stage:
        found = _traced(model, folded, stage, clips)
        if not isinstance(model, OnnxModel):
            try:
                export_program(folded, stage / PROGRAM)
                found.insert(1, check_parity(model, stage / PROGRAM, clips))
            except EdgeError as e:
                note(f"no {PROGRAM}: {e}")
                (stage / PROGRAM).unlink(missing_ok=True)
        has_program = (stage / PROGRAM).exists()
    if not has_program:
        (out / PROGRAM).unlink(missing_ok=True)  # of another model
    return found


def _traced(model: Model, folded: Model, stage: Path, clips: Sequence[Array]) -> list[Parity]:
    """TorchScript, where it can be had, and float ONNX."""
    if isinstance(model, OnnxModel):
        names = [FLOAT]
    else:
        names = [TORCHSCRIPT, FLOAT]
        export_torchscript(folded, stage / TORCHSCRIPT)
    try:
        export_onnx(folded, stage / FLOAT)
        # Against the model as it was trained: folding batch norms is part of what is checked.
        return [check_parity(model, stage / name, clips) for name in names]
    except EdgeError as e:
        if not isinstance(model, OwnModel) or not model.free_batch:
            raise
        model.why_one = f"side by side its graph does not answer alike ({e})"
    model.free_batch = False
    export_onnx(folded, stage / FLOAT)
    return [check_parity(model, stage / name, clips) for name in names]


def export(
    source: Path | Model,
    corpus: Corpus,
    out: Path,
    config: CalibrateConfig,
    *,
    max_drop: float | None = None,
    plan: Path | None = None,
    min_coverage: float = MIN_COVERAGE,
    chunk_frames: int = 1,
    force: bool = False,
    name: str = "",
    notes: Sequence[str] = (),
    command: str = "",
    progress: Progress = lambda stage, done, total: None,
) -> ExportReport:
    """Trace, calibrate, quantize, build and compare; `out` gets everything once all has passed.

    Args:
        source: the trained model, or its checkpoint.
        corpus: recordings, phrases or images for calibration and evaluation.
        out: the folder to write to.
        config: see CalibrateConfig.
        max_drop: percentage points of accuracy that INT8 may cost on the calibration clips; layers
            are kept in float until that holds. None for INT8 throughout.
        plan: a file that says which layers are kept in float.
        min_coverage: share of the weights that are to be in INT8 which has to compute in it.
        chunk_frames: output frames that the chunk forms take at a time.
        force: go on with recordings that the audit calls unfit.
        name: of the model, in the report.
        notes: what is known of the model, for the report.
        command: that the report says it was made by.
        progress: see Progress.

    Raises:
        CorpusError: the recordings are not fit to calibrate or evaluate with.
        ParityError: a float artefact differs from the model.
        ExportError: an INT8 model answers worse than the float one, or less of it is in INT8 than
            was planned.
        EdgeError: any other stage's own.
    """
    report = ExportReport(out, notes=[*notes])
    model = load_checkpoint(source) if isinstance(source, Path) else source
    name = name or (source.stem if isinstance(source, Path) else "")
    spec: Spec = model.spec
    is_stream = isinstance(spec, ModelSpec)
    report.forms = {name: form for name, form in INT8_FORMS.items() if is_stream or form[1]}
    calibration, evaluation = calibration_clips(corpus, config.min_clips), corpus.of(EVAL)
    if not evaluation:
        raise CorpusError(f"{corpus.root}: no clips in the set 'eval' to compare on")
    # Before the long part, not after it.
    truth = truth_of(corpus.clips, spec)
    given = replace(Plan.load(plan), log=()) if plan else None  # the log is of another search
    margin = MARGIN if max_drop is None else max_drop
    with staged(out) as stage:
        if rate := sample_rate_of(spec):
            with _timed(report, "audit"):
                report.audit = audited(corpus, config, rate, force, progress)
        elif not force:
            check_apart(corpus, calibration, evaluation)
        with _timed(report, "trace"):
            parity = parity_clips(calibration, spec)
            report.parity = trace(model, stage, parity, report.notes.append)
            has_program = (stage / PROGRAM).exists()
            if isinstance(model, OwnModel) and model.why_one:
                report.notes.append(f"the graph takes one input at a time: {model.why_one}")
            progress("trace", 1, 1)
        with _timed(report, "calibrate"):
            ranges, errors = calibrate(
                stage / FLOAT,
                [clip.source for clip in calibration],
                config,
                lambda n: progress("calibrate", n, len(calibration)),
            )
            ranges.save(stage / RANGES)
            if report.audit:
                report.audit = with_scales(report.audit, ranges)
            report.errors += errors
        with _timed(report, "plan"):
            if given is None and max_drop is not None:
                searched, samples, _ = load(spread(calibration, _SEARCHED_CLIPS), spec)
                given = search_plan(
                    stage / FLOAT,
                    ranges,
                    [(s, truth[clip.path]) for clip, s in zip(searched, samples, strict=True)],
                    max_drop,
                    lambda done, total: progress("plan", done, total),
                )
            layers = layers_in(stage / FLOAT)
            report.plan = given or Plan(tuple(layers))
            report.plan.check(layers)
            report.plan.save(stage / PLAN)
        with _timed(report, "quantize"):
            for form, (target, is_clip) in report.forms.items():
                frames = None if is_clip else chunk_frames
                quantize_onnx(
                    stage / FLOAT, stage / RANGES, stage / form, target, frames, report.plan
                )
            progress("quantize", 1, 1)
        with _timed(report, "build"):
            graph = onnx_graph.load(stage / FLOAT)
            report.notes += [
                f"{n} stays in float: {why}" for n, why in float_reasons(graph).items()
            ]
            planned = report.plan.share_int8(layers, weights_in_float(graph))
            report.coverages = receipts_of(report, stage, spec, min_coverage * planned)
            progress("build", 1, 1)
        with _timed(report, "compare"):
            compare_answers(
                report, stage, spec, corpus, evaluation, margin, config.workers, progress
            )
            if isinstance(model, OwnModel) and (doubt := doubt_about(report.comparisons[INT8])):
                report.notes.append(doubt)
        if isinstance(spec, ModelSpec):
            with _timed(report, "stream"):
                compare_streams(report, stage, evaluation, margin, progress)
        else:
            report.notes.append(f"no stream: {spec.why_whole}")
        with _timed(report, "evidence"):
            report.sensitivity = sensitivity(
                stage / FLOAT,
                stage / INT8,
                load(spread(evaluation, MEASURED_CLIPS), spec)[1],
                lambda done, total: progress("evidence", done, total),
            )
            forms = [stage / form for form in report.clip_forms]
            try:
                sources = [clip.source for clip in evaluation]
                write_golden(stage / GOLDEN, stage / FLOAT, forms, sources)
            except CorpusError as e:
                report.notes.append(f"no {GOLDEN}: {e}")
            has_golden = (stage / GOLDEN).exists()
            streams = {form: streaming_fields(found) for form, found in report.streaming.items()}
            receipts = {form: found.to_json() for form, found in report.coverages.items()}
            comparison = comparison_fields(report.comparisons[INT8])
            if is_stream:
                _write_json(stage / STREAMING, streams)
            _write_json(stage / COMPARISON, comparison)
            _write_json(stage / COVERAGE, receipts)
            sections = {
                "comparison": comparison,
                **({"streaming": streams} if is_stream else {}),
                "coverage": receipts,
                "sensitivity": report.sensitivity.to_json(),
                "search": search_fields(report.plan, max_drop),
                **({"audit": report.audit.to_json()} if report.audit else {}),
                "latency": latencies(
                    stage / form for form in (FLOAT, INT8, CHUNK) if (stage / form).exists()
                ),
                "files": described_files(sorted(stage.iterdir())),
            }
            hear = hear_again(report.comparisons[INT8], corpus.root, Conditions())
            write_report(stage, evidence(name, command, sections), hear)
    # What is left of an earlier export was made from other graphs.
    for engine in ENGINES.keys() - report.coverages.keys():
        remove_engine(out / engine)
    if not has_golden:
        (out / GOLDEN).unlink(missing_ok=True)
    if not is_stream:
        for left in (STREAMING, *(INT8_FORMS.keys() - report.forms.keys())):
            (out / left).unlink(missing_ok=True)
    if not has_program:
        (out / PROGRAM).unlink(missing_ok=True)
    if isinstance(model, OnnxModel):
        (out / TORCHSCRIPT).unlink(missing_ok=True)
    return report


def parity_clips(clips: Iterable[Clip], spec: Spec) -> list[Array]:
    """A few inputs that can be read; calibration reports those that cannot."""
    found: list[Array] = []
    why = ""
    for clip in clips:
        try:
            found.append(read_input(spec, clip.source))
        except InputError as e:
            why = why or f": {e}"
        if len(found) == _PARITY_CLIPS:
            break
    if not found:
        raise CorpusError(f"nothing for calibration can be read{why}")
    return found


def _write_json(path: Path, fields: object) -> None:
    write_file(path, f"{json.dumps(fields, indent=1)}\n".encode())


@contextmanager
def _timed(report: ExportReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.stage_s[stage] = time.perf_counter() - start
