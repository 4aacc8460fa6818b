"""The whole chain from a checkpoint to checked artefacts, written all together or not at all."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from cnngru_edge.calibration.audit import Audit, audit, with_scales
from cnngru_edge.calibration.collect import calibrate
from cnngru_edge.calibration.corpus import (
    EVAL,
    Clip,
    Corpus,
    calibration_clips,
    spread,
)
from cnngru_edge.calibration.ranges import CalibrateConfig
from cnngru_edge.export import onnx_graph
from cnngru_edge.export.answers import Conditions, truth_of
from cnngru_edge.export.artefacts import (
    CHUNK,
    COMPARISON,
    COVERAGE,
    ENGINES,
    FLOAT,
    INT8,
    INT8_FORMS,
    PLAN,
    RANGES,
    STREAMING,
    TORCHSCRIPT,
    ExportReport,
)
from cnngru_edge.export.compare import (
    MARGIN,
    answers_of,
    compare_results,
    comparison_fields,
)
from cnngru_edge.export.engine import remove_engine, write_engine
from cnngru_edge.export.evidence import described_files, evidence, latencies
from cnngru_edge.export.flips import hear_again
from cnngru_edge.export.float_layers import float_reasons, weights_in_float
from cnngru_edge.export.inspection import coverage
from cnngru_edge.export.long_streams import load
from cnngru_edge.export.onnx_export import export_onnx
from cnngru_edge.export.own_onnx import OnnxModel
from cnngru_edge.export.parity import Parity, check_parity
from cnngru_edge.export.plan import Plan, search_fields
from cnngru_edge.export.quantize import layers_in, quantize_onnx
from cnngru_edge.export.report import write_report
from cnngru_edge.export.search import search_plan
from cnngru_edge.export.sensitivity import sensitivity
from cnngru_edge.export.statistics import WORSE
from cnngru_edge.export.streaming import (
    StreamingConfig,
    compare_streaming,
    streaming_fields,
)
from cnngru_edge.export.targets import CPU, MIN_COVERAGE
from cnngru_edge.export.torchscript import export_torchscript
from cnngru_edge.export.trt_builder import BuildConfig, can_build, target_of
from cnngru_edge.models.atomic import staged, write_file
from cnngru_edge.models.checkpoint import load_checkpoint
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.errors import CorpusError, EdgeError, ExportError, InputError
from cnngru_edge.models.own import OwnModel
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec import ModelSpec
from cnngru_edge.models.whole import WholeModel
from cnngru_edge.models.whole_spec import OWN, Spec, WholeSpec, sample_rate_of
from cnngru_edge.runtime.golden import GOLDEN, write_golden
from cnngru_edge.runtime.inputs import read_input, source_sha256
from cnngru_edge.runtime.session import Array

Model: TypeAlias = CnnGru | WholeModel

_PARITY_CLIPS = 8
_STREAMED_CLIPS = 48
_MEASURED_CLIPS = 64
_SEARCHED_CLIPS = 1000
_SAID_LATER = {"count", "unreadable"}
_STREAMED = StreamingConfig(chunks_ms=(20, 160), offsets_ms=(7.3125,), events=False)
"""`compare --streaming` in short: an offset of an odd number of samples, 117 at 16 kHz."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps newly done and the steps in all."""


def trace(model: Model, out: Path, clips: Sequence[Array]) -> list[Parity]:
    """Write TorchScript and float ONNX of a model, if both equal torch on these clips.

    A module that is not ours is for one input at a time if several are not what it answers alike;
    an ONNX file has no TorchScript.
    """
    folded = model.for_export()
    with staged(out) as stage:
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
                report.audit = _audited(corpus, config, rate, force, progress)
        elif not force:
            _check_apart(corpus, calibration, evaluation)
        with _timed(report, "trace"):
            report.parity = trace(model, stage, parity_clips(calibration, spec))
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
            report.coverages = _receipts(report, stage, spec, min_coverage * planned)
            progress("build", 1, 1)
        with _timed(report, "compare"):
            _compare(report, stage, spec, corpus, evaluation, margin, config.workers, progress)
        if isinstance(spec, ModelSpec):
            with _timed(report, "stream"):
                _stream(report, stage, evaluation, margin, progress)
        else:
            report.notes.append(f"no stream: {spec.why_whole}")
        with _timed(report, "evidence"):
            report.sensitivity = sensitivity(
                stage / FLOAT,
                stage / INT8,
                load(spread(evaluation, _MEASURED_CLIPS), spec)[1],
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
    if isinstance(model, OnnxModel):
        (out / TORCHSCRIPT).unlink(missing_ok=True)
    return report


def _check_apart(corpus: Corpus, calibration: Sequence[Clip], evaluation: Sequence[Clip]) -> None:
    """Refuse phrases and images that calibrate and evaluate; of recordings the audit finds them."""
    known = {source_sha256(clip.source) for clip in calibration if _is_there(clip)}
    twice = [c for c in evaluation if _is_there(c) and source_sha256(c.source) in known]
    if twice:
        raise CorpusError(
            f"{corpus.root}: {len(twice)} of {len(evaluation)} in the set 'eval' are in the "
            f"calibration too, as {twice[0].path.name}; keep the sets apart, --force goes on all "
            "the same"
        )


def _is_there(clip: Clip) -> bool:
    return clip.is_phrase or clip.path.is_file()  # of others calibration has its own to say


def _audited(
    corpus: Corpus, config: CalibrateConfig, rate: int, force: bool, progress: Progress
) -> Audit:
    """What the recordings are like; refuse those that a model should not be made with."""
    total = len(calibration_clips(corpus, config.min_clips)) + len(corpus.of(EVAL))
    found = audit(
        corpus,
        least=config.min_clips,
        sample_rate=rate,
        progress=lambda n: progress("audit", n, total),
    )
    # Of what cannot be read, and of too few, calibration has its own to say.
    errors = [f for f in found.findings if f.severity == "error" and f.check not in _SAID_LATER]
    if errors and not force:
        first = errors[0]
        raise CorpusError(
            f"{corpus.root}: {first.check}: {first.text}; {first.advice}; 'cnngru-edge audit' "
            "names the clips, --force goes on all the same"
        )
    return found


def _compare(
    report: ExportReport,
    stage: Path,
    spec: Spec,
    corpus: Corpus,
    clips: Sequence[Clip],
    margin: float,
    workers: int,
    progress: Progress,
) -> None:
    """Refuse an INT8 model that is proven to answer worse, and say which layer is to blame."""
    forms = report.clip_forms
    total = len(clips) * (1 + len(forms))
    answers, errors = answers_of(
        [stage / name for name in (FLOAT, *forms)],
        corpus.root,
        clips,
        Conditions(),
        workers=workers,
        progress=lambda n: progress("compare", n, total),
    )
    report.errors += errors
    for name, found in zip(forms, answers[1:], strict=True):
        comparison = report.comparisons[name] = compare_results(answers[0], found, margin=margin)
        if comparison.verdict != WORSE:
            continue
        heard = load(spread(clips, _MEASURED_CLIPS), spec)[1]
        hurt = sensitivity(stage / FLOAT, stage / name, heard).layers
        blame = f"{hurt[0].layer} hurts most ({hurt[0].summary}); " if hurt else ""
        raise ExportError(
            f"{name}: worse than the float model by {comparison.change} on {comparison.clips} "
            f"clips, and {margin:g} may be lost; {blame}"
            "nothing was written; calibrate with more or other audio, or another --method; "
            "--max-drop keeps layers in float"
        )


def _stream(
    report: ExportReport, stage: Path, clips: Sequence[Clip], margin: float, progress: Progress
) -> None:
    """Refuse an INT8 model that does not answer as a stream what it answers to a clip."""
    streamed = spread(clips, _STREAMED_CLIPS)
    forms = [name for name, (target, _) in INT8_FORMS.items() if target == CPU]
    for name in forms:
        found, _ = compare_streaming(
            stage / FLOAT,
            stage / name,
            streamed,
            _STREAMED,
            max_drop=margin,
            progress=lambda n: progress("stream", n, len(streamed) * len(forms)),
        )
        report.streaming[name] = found
        if not found.passed:
            first, *others = [*found.differences, *found.losses]
            more = f", and {len(others)} more ways to hear them" if others else ""
            raise ExportError(
                f"{name}: as a stream it does not answer as it should: {first}{more}; nothing was "
                "written"
            )


def _receipts(
    report: ExportReport, stage: Path, spec: Spec, min_coverage: float
) -> dict[str, Coverage]:
    """What each INT8 artefact computes in, checked; builds the engines where that is possible.

    An engine of TensorRT is for the GPU of this host, which may not be what it is exported for: one
    that does not build is noted, and fails nothing. Nor does a module that is not ours, whose
    operators TensorRT may not have: it still runs on a CPU.
    """
    receipts = {}
    if not any(can_build(library) for library, _ in ENGINES.values()):
        report.notes.append(
            "no engine, and no proof that the TensorRT graphs are INT8: no builder for them here "
            "(pip install 'cnngru-edge[tensorrt-rtx]' needs no GPU; 'cnngru-edge build' on the "
            "device)"
        )
    is_whole, is_own = isinstance(spec, WholeSpec), spec.family == OWN
    for name, (library, is_clip) in ENGINES.items():
        if is_clip == is_whole and can_build(library):
            form = "clip" if is_clip else "chunk"
            source = f"model.int8.{target_of(library)}.{form}.onnx"
            is_host = library == "tensorrt"
            try:
                manifest, more = write_engine(
                    stage / source,
                    stage / name,
                    BuildConfig(library),
                    min_coverage=min_coverage if is_host else 0,
                )
            except ExportError as e:
                if not is_host and not is_own:
                    raise
                report.notes.append(f"no {name}: {_in(stage, e)}")
                continue
            report.notes += more
            receipts[name] = receipts[source] = manifest.coverage
    for name, (target, _) in report.forms.items():
        try:
            found = None if name in receipts else coverage(stage / name, target)
        except ExportError as e:
            if target == CPU or not is_own:
                raise
            report.notes.append(f"not proven: {_in(stage, e)}")
            continue
        if found:
            receipts[name] = found
    for name, receipt in receipts.items():
        receipt.check(name, min_coverage)
    return receipts


def _in(stage: Path, error: ExportError) -> str:
    """What an error says, without the folder that is gone when it is read."""
    return str(error).replace(f"{stage}{os.sep}", "")


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
