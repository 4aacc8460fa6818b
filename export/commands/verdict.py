"""The commands that judge a model: compare, sensitivity, inspect."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from cnngru_edge.calibration.corpus.read import (
    DEMO,
    Clip,
    Corpus,
    audio_files,
    demo_for,
    read_corpus,
    spread,
)
from cnngru_edge.export.commands.options import (
    FiniteRange,
    command_line,
    data_option,
    set_option,
    task_option,
    workers_option,
)
from cnngru_edge.export.verdict import compare as of_clips
from cnngru_edge.export.verdict import flips
from cnngru_edge.export.verdict.answers import RESULTS_SUFFIX, Conditions, Results
from cnngru_edge.export.verdict.statistics import NOT_ENOUGH, WORSE
from cnngru_edge.models.errors import CorpusError, InputError
from cnngru_edge.runtime.cli import FILE, as_json_option, given, report_skipped
from cnngru_edge.runtime.progress import advance_of, progress_bars

SNRS_DB = (20.0, 10.0, 5.0, 0.0)

_WRITTEN = ("save_results", "save_flips", "report")
_NOT_SETTLED = 3
"""Exit code where there is not enough data for a verdict."""


@click.command()
@click.argument("reference", type=FILE)
@click.argument("candidate", type=FILE, required=False)
@data_option
@task_option
@set_option
@click.option(
    "--streaming",
    is_flag=True,
    help="Hear them as clips and as streams, cut and begun in several ways, after another clip and "
    "alone, and strung together; exit 1 also if a stream does not answer as its clip.",
)
@click.option(
    "--margin",
    type=FiniteRange(0, min_open=True),
    default=of_clips.MARGIN,
    help="Percentage points of accuracy (ctc: WER) within which the two count as equal.",
)
@click.option("--noise", type=FILE, help="Folder of noises to mix the recordings with; see --snr.")
@click.option(
    "--snr",
    "snrs_db",
    type=FiniteRange(-100, 100),
    multiple=True,
    help="Hear them also so many dB over noise: of --noise, or of the corpus, those of the same "
    "set; may be given several times.  [default: with --noise 20, 10, 5 and 0]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="The same seed mixes the same noise."
)
@workers_option
@click.option("--save-results", type=FILE, help="Keep the answers of the last artefact (.json).")
@click.option("--save-flips", type=FILE, help="Put what the two answer differently in a folder.")
@click.option("--report", type=FILE, help="Write report.html and report.json to a folder.")
@as_json_option
def compare(
    reference: Path,
    candidate: Path | None,
    data: Path | None,
    task: str | None,
    set_name: str,
    streaming: bool,
    margin: float,
    noise: Path | None,
    snrs_db: tuple[float, ...],
    seed: int,
    workers: int,
    save_results: Path | None,
    save_flips: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Let two artefacts answer the same labelled recordings: a verdict, and what it rests on.

    Each may be a .onnx, .engine or .ts, or a .json of answers that --save-results kept, so
    that an engine on its device is compared with a float model that is not there. Without CANDIDATE
    the answers of REFERENCE are saved.

    Exit 0: equal or better. 1: worse. 3: not enough data.
    """
    if candidate is None and not save_results:
        raise click.UsageError("give a CANDIDATE too, or --save-results to keep the answers of one")
    if streaming and given("noise", "snrs_db", "seed", "workers", *_WRITTEN):
        raise click.UsageError("--streaming takes only --margin, --data, --task and --set with it")
    if save_results and save_results.suffix != RESULTS_SUFFIX:
        raise click.UsageError(f"--save-results: a name that ends with {RESULTS_SUFFIX}")
    if save_flips:
        flips.check_unused(save_flips)
    artefacts = [path for path in (reference, candidate) if path]
    corpus = read_corpus(data or _demo_for(artefacts), task)
    clips = corpus.of(set_name)
    if streaming and candidate:
        noises = corpus.noises_of(set_name)
        _compare_streaming(reference, candidate, clips, noises, margin, as_json)
        return
    conditions = _conditions(corpus, set_name, noise, snrs_db, seed)
    answers, errors = _answers(artefacts, corpus, clips, conditions, workers)
    if save_results:
        answers[-1].save(save_results)
        # The command's result, unless that is a comparison.
        click.echo(f"{save_results}: {len(answers[-1].clips)} clips", err=candidate is not None)
    if candidate:
        comparison = of_clips.compare_results(*answers, margin=margin)
        if save_flips:
            flips.save_flips(comparison, corpus.root, save_flips, conditions)
        if report:
            _report(comparison, corpus, conditions, report)
        _show(comparison, as_json)
    report_skipped(errors)
    if candidate and not comparison.passed:
        sys.exit(1 if comparison.verdict == WORSE else _NOT_SETTLED)


def _demo_for(artefacts: Sequence[Path]) -> Path:
    """What artefacts are given where there is no other data; answers are of recordings."""
    from cnngru_edge.runtime.backends.open import open_session

    for path in artefacts:
        if path.suffix != RESULTS_SUFFIX:
            with open_session(path) as session:
                return demo_for(session.spec)
    return DEMO


def _conditions(
    corpus: Corpus, set_name: str, noise: Path | None, snrs_db: Sequence[float], seed: int
) -> Conditions:
    if noise is None and not snrs_db:
        return Conditions()
    noises = audio_files(noise) if noise else [n.path for n in corpus.noises_of(set_name)]
    if not noises:
        where = f"{noise}: no recordings found" if noise else f"{corpus.root}: no noises in the set"
        raise CorpusError(f"{where}; give a folder of WAV, FLAC or Ogg with --noise")
    return Conditions(tuple(noises), tuple(dict.fromkeys(snrs_db)) or SNRS_DB, seed)


def _answers(
    artefacts: Sequence[Path],
    corpus: Corpus,
    clips: Sequence[Clip],
    conditions: Conditions,
    workers: int,
) -> tuple[list[Results], list[InputError]]:
    with progress_bars() as bar:
        advance = advance_of(bar)
        return of_clips.answers_of(
            artefacts,
            corpus.root,
            clips,
            conditions,
            workers=workers,
            progress=lambda n: advance("compare", n, len(artefacts) * len(clips)),
        )


def _report(
    comparison: of_clips.Comparison, corpus: Corpus, conditions: Conditions, folder: Path
) -> None:
    from cnngru_edge.export.chain.evidence import evidence
    from cnngru_edge.export.report.page import write_report

    title = f"{comparison.candidate.path} against {comparison.reference.path}"
    fields = evidence(title, command_line(), {"comparison": of_clips.comparison_fields(comparison)})
    write_report(folder, fields, flips.hear_again(comparison, corpus.root, conditions))


def _show(comparison: of_clips.Comparison, as_json: bool) -> None:
    from cnngru_edge.export.report.tables import print_comparison

    if as_json:
        click.echo(of_clips.comparison_json(comparison))
    else:
        print_comparison(comparison, Console(markup=False))


def _compare_streaming(
    reference: Path,
    candidate: Path,
    clips: Sequence[Clip],
    noises: Sequence[Clip],
    margin: float,
    as_json: bool,
) -> None:
    from cnngru_edge.export.report.tables import print_streaming
    from cnngru_edge.export.verdict.streaming import compare_streaming, streaming_json

    with progress_bars() as bar:
        advance = advance_of(bar)
        comparison, errors = compare_streaming(
            reference,
            candidate,
            clips,
            noises=noises,
            max_drop=margin,
            progress=lambda n: advance("compare", n, len(clips)),
        )
    if as_json:
        click.echo(streaming_json(comparison))
    else:
        print_streaming(comparison, Console(markup=False))
    report_skipped(errors)
    if not comparison.passed:
        sys.exit(1)
    if comparison.verdict == NOT_ENOUGH:
        sys.exit(_NOT_SETTLED)


@click.command()
@click.argument("reference", type=FILE)
@click.argument("candidate", type=FILE)
@data_option
@task_option
@set_option
@click.option("--clips", type=click.IntRange(1), default=200, help="The most to measure on.")
@as_json_option
def sensitivity(
    reference: Path,
    candidate: Path,
    data: Path | None,
    task: str | None,
    set_name: str,
    clips: int,
    as_json: bool,
) -> None:
    """Say which layer INT8 hurts: CANDIDATE is an INT8 .onnx, REFERENCE the float one it is of."""
    from cnngru_edge.export.report.tables import print_sensitivity
    from cnngru_edge.export.verdict import sensitivity as of_layers
    from cnngru_edge.export.verdict.long_streams import load
    from cnngru_edge.runtime.backends.open import open_session

    with open_session(reference) as session:
        spec = session.spec
    corpus = read_corpus(data or demo_for(spec), task)
    _, samples, errors = load(spread(corpus.of(set_name), clips), spec)
    with progress_bars() as bar:
        advance = advance_of(bar)
        found = of_layers.sensitivity(
            reference,
            candidate,
            samples,
            lambda done, total: advance("measure", done, total),
        )
    if as_json:
        click.echo(of_layers.sensitivity_json(found))
    else:
        print_sensitivity(found, Console(markup=False))
    report_skipped(errors)


@click.command()
@click.argument("artefact", type=FILE)
@as_json_option
def inspect(artefact: Path, as_json: bool) -> None:
    """Show what is inside an ARTEFACT: inputs, outputs, spec, and the precision of every layer."""
    from cnngru_edge.export.chain.inspection import inspect as look_inside
    from cnngru_edge.export.report.tables import print_inspection

    found = look_inside(artefact)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_inspection(found, Console(markup=False))
