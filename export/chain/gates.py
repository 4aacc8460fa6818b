"""What can refuse an export: each gate lets it go on, with what it found, or says why not."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cnngru_edge.calibration.audit.run import Audit, audit
from cnngru_edge.calibration.corpus.read import (
    EVAL,
    Clip,
    Corpus,
    calibration_clips,
    spread,
)
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.export.artefacts import (
    ENGINES,
    FLOAT,
    ExportReport,
)
from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.targets.base import CPU
from cnngru_edge.export.targets.receipt import coverage
from cnngru_edge.export.targets.trt.build import BuildConfig, can_build, target_of
from cnngru_edge.export.verdict.answers import Conditions
from cnngru_edge.export.verdict.compare import (
    answers_of,
    compare_results,
)
from cnngru_edge.export.verdict.long_streams import load
from cnngru_edge.export.verdict.sensitivity import sensitivity
from cnngru_edge.export.verdict.statistics import WORSE
from cnngru_edge.export.verdict.streaming import (
    StreamingConfig,
    compare_streaming,
)
from cnngru_edge.models.errors import CorpusError, ExportError
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.models.spec.whole import OWN, Spec, WholeSpec
from cnngru_edge.runtime.inputs.read import source_sha256

MEASURED_CLIPS = 64
"""That the sensitivity of each layer is measured on."""

_STREAMED_CLIPS = 48
_SAID_LATER = {"count", "unreadable"}
_STREAMED = StreamingConfig(chunks_ms=(20, 160), offsets_ms=(7.3125,), events=False)
"""`compare --streaming` in short: an offset of an odd number of samples, 117 at 16 kHz."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps newly done and the steps in all."""


def check_apart(corpus: Corpus, calibration: Sequence[Clip], evaluation: Sequence[Clip]) -> None:
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


def audited(
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


def compare_answers(
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
        heard = load(spread(clips, MEASURED_CLIPS), spec)[1]
        hurt = sensitivity(stage / FLOAT, stage / name, heard).layers
        blame = f"{hurt[0].layer} hurts most ({hurt[0].summary}); " if hurt else ""
        raise ExportError(
            f"{name}: worse than the float model by {comparison.change} on {comparison.clips} "
            f"clips, and {margin:g} may be lost; {blame}"
            "nothing was written; calibrate with more or other audio, or another --method; "
            "--max-drop keeps layers in float"
        )


def compare_streams(
    report: ExportReport, stage: Path, clips: Sequence[Clip], margin: float, progress: Progress
) -> None:
    """Refuse an INT8 model that does not answer as a stream what it answers to a clip."""
    streamed = spread(clips, _STREAMED_CLIPS)
    forms = [name for name, (target, _) in report.forms.items() if target == CPU]
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


def receipts_of(
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
