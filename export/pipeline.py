"""The whole chain from a checkpoint to checked artefacts, written all together or not at all."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cnngru_edge.calibration.collect import calibrate
from cnngru_edge.calibration.corpus import EVAL, Clip, Corpus, calibration_clips, match_labels
from cnngru_edge.calibration.ranges import CalibrateConfig
from cnngru_edge.export.artefacts import (
    COMPARISON,
    COVERAGE,
    ENGINES,
    FLOAT,
    INT8,
    INT8_FORMS,
    RANGES,
    STREAMING,
    TORCHSCRIPT,
    ExportReport,
)
from cnngru_edge.export.compare import MAX_DROP, compare, comparison_json
from cnngru_edge.export.engine import remove_engine, write_engine
from cnngru_edge.export.inspection import coverage
from cnngru_edge.export.onnx_export import export_onnx
from cnngru_edge.export.parity import Parity, check_parity
from cnngru_edge.export.quantize import quantize_onnx
from cnngru_edge.export.streaming import (
    StreamingComparison,
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
from cnngru_edge.models.errors import AudioError, CorpusError, ExportError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec import ModelSpec
from cnngru_edge.runtime.audio import Samples, read_audio

_PARITY_CLIPS = 8
_STREAMED_CLIPS = 48
_STREAMED = StreamingConfig(chunks_ms=(20, 160), offsets_ms=(7.3125,))
"""`compare --streaming` in short: an offset of an odd number of samples, 117 at 16 kHz."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps newly done and the steps in all."""


def trace(model: CnnGru, out: Path, clips: Sequence[Samples]) -> list[Parity]:
    """Write TorchScript and float ONNX of a model, if both equal torch on these clips."""
    folded = model.for_export()
    with staged(out) as stage:
        export_torchscript(folded, stage / TORCHSCRIPT)
        export_onnx(folded, stage / FLOAT)
        # Against the model as it was trained: folding the batch norms is part of what is checked.
        return [check_parity(model, stage / name, clips) for name in (TORCHSCRIPT, FLOAT)]


def export(
    checkpoint: Path,
    corpus: Corpus,
    out: Path,
    config: CalibrateConfig,
    *,
    max_drop: float = MAX_DROP,
    min_coverage: float = MIN_COVERAGE,
    chunk_frames: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> ExportReport:
    """Trace, calibrate, quantize, build and compare; `out` gets everything once all has passed.

    Raises:
        ParityError: a float artefact differs from the model.
        ExportError: an INT8 model answers worse than the float one, or less of it is in INT8 than
            `min_coverage` of the weights.
        EdgeError: any other stage's own.
    """
    report = ExportReport(out)
    model = load_checkpoint(checkpoint)
    calibration, evaluation = calibration_clips(corpus, config.min_clips), corpus.of(EVAL)
    if not evaluation:
        raise CorpusError(f"{corpus.root}: no clips in the set 'eval' to compare on")
    match_labels(corpus.clips, model.spec.labels)  # before the long part, not after it
    with staged(out) as stage:
        with _timed(report, "trace"):
            report.parity = trace(model, stage, parity_clips(calibration, model.spec))
            progress("trace", 1, 1)
        with _timed(report, "calibrate"):
            ranges, errors = calibrate(
                stage / FLOAT,
                [clip.path for clip in calibration],
                config,
                lambda n: progress("calibrate", n, len(calibration)),
            )
            ranges.save(stage / RANGES)
            report.errors += errors
        with _timed(report, "quantize"):
            ranges_file = stage / RANGES
            for name, (target, is_clip) in INT8_FORMS.items():
                frames = None if is_clip else chunk_frames
                quantize_onnx(stage / FLOAT, ranges_file, stage / name, target, frames)
            progress("quantize", 1, 1)
        with _timed(report, "build"):
            report.coverages = _receipts(stage, min_coverage, report.notes)
            progress("build", 1, 1)
        clips = [name for name, (_, is_clip) in INT8_FORMS.items() if is_clip]
        with _timed(report, "compare"):
            for name in clips:
                comparison, errors = compare(
                    stage / FLOAT,
                    stage / name,
                    evaluation,
                    max_drop=max_drop,
                    progress=lambda n: progress("compare", n, len(evaluation) * len(clips)),
                )
                report.comparisons[name] = comparison
                if not comparison.passed:
                    raise ExportError(
                        f"{name}: {-comparison.delta:.2f} points less accurate than the float "
                        f"model on {comparison.clips} clips, allowed are {max_drop:g}; nothing was "
                        "written; calibrate with more or other audio, or another --method; "
                        "--max-drop accepts more"
                    )
            report.errors += errors  # the same clips each time
        with _timed(report, "stream"):
            streamed = evaluation[:: -(-len(evaluation) // _STREAMED_CLIPS)]
            forms = [name for name, (target, _) in INT8_FORMS.items() if target == CPU]
            for name in forms:
                report.streaming[name], _ = compare_streaming(
                    stage / FLOAT,
                    stage / name,
                    streamed,
                    _STREAMED,
                    max_drop=max_drop,
                    progress=lambda n: progress("stream", n, len(streamed) * len(forms)),
                )
                _check_streaming(name, report.streaming[name])
        streams = {name: streaming_fields(found) for name, found in report.streaming.items()}
        write_file(stage / STREAMING, f"{json.dumps(streams, indent=1)}\n".encode())
        write_file(stage / COMPARISON, f"{comparison_json(report.comparisons[INT8])}\n".encode())
        receipts = {name: receipt.to_json() for name, receipt in report.coverages.items()}
        write_file(stage / COVERAGE, f"{json.dumps(receipts, indent=1)}\n".encode())
    for name in ENGINES.keys() - report.coverages.keys():
        # One of an earlier export was built from other graphs.
        remove_engine(out / name)
    return report


def _check_streaming(name: str, found: StreamingComparison) -> None:
    """Refuse a model that does not answer as a stream what it answers to a clip."""
    if found.passed:
        return
    first, *others = [*found.differences, *found.losses]
    more = f", and {len(others)} more ways to hear them" if others else ""
    raise ExportError(
        f"{name}: as a stream it does not answer as it should: {first}{more}; nothing was written"
    )


def _receipts(stage: Path, min_coverage: float, notes: list[str]) -> dict[str, Coverage]:
    """What each INT8 artefact computes in, checked; builds the engines where that is possible.

    An engine of TensorRT is for the GPU of this host, which may not be what it is exported for: one
    that does not build is noted, and fails nothing.
    """
    receipts = {}
    for name, library in ENGINES.items():
        if can_build(library):
            source = f"model.int8.{target_of(library)}.chunk.onnx"
            is_host = library == "tensorrt"
            try:
                manifest, more = write_engine(
                    stage / source,
                    stage / name,
                    BuildConfig(library),
                    min_coverage=min_coverage if is_host else 0,
                )
            except ExportError as e:
                if not is_host:
                    raise
                notes.append(f"no {name}: {e}")
                continue
            notes += more
            receipts[name] = receipts[source] = manifest.coverage
    for name, (target, _) in INT8_FORMS.items():
        if name not in receipts and (found := coverage(stage / name, target)):
            receipts[name] = found
    for name, receipt in receipts.items():
        receipt.check(name, min_coverage)
    return receipts


def parity_clips(clips: Iterable[Clip], spec: ModelSpec) -> list[Samples]:
    """A few recordings that can be read; calibration reports those that cannot."""
    found: list[Samples] = []
    for clip in clips:
        with suppress(AudioError):
            found.append(read_audio(clip.path, spec.features.sample_rate).samples)
        if len(found) == _PARITY_CLIPS:
            break
    if not found:
        raise CorpusError("no recording for calibration can be read")
    return found


@contextmanager
def _timed(report: ExportReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.stage_s[stage] = time.perf_counter() - start
