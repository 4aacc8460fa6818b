"""The command `audit`. It imports no torch, and onnx only with --graph."""

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from cnngru_edge.calibration.ranges.choose import MIN_CLIPS, CalibrateConfig
from cnngru_edge.runtime.cli import FILE, as_json_option
from cnngru_edge.runtime.progress import advance_of, progress_bars


@click.command()
@click.argument("data", type=FILE)
@click.option("--task", help="Which task of a manifest.csv that lists several.")
@click.option(
    "--graph",
    type=FILE,
    help="Float graph (.onnx) to calibrate, if they are fit: tells whether its scales are stable.",
)
@click.option(
    "--min-clips", type=click.IntRange(1), default=MIN_CLIPS, help="Refuse fewer recordings."
)
@as_json_option
def audit(data: Path, task: str | None, graph: Path | None, min_clips: int, as_json: bool) -> None:
    """Say whether the recordings in DATA are fit to calibrate with; exit 1 if they are not.

    DATA is a corpus or a folder of recordings without labels. Heard are the clips that calibrate
    and those that evaluate.
    """
    from cnngru_edge.calibration.audit.run import audit as run_audit
    from cnngru_edge.calibration.audit.run import print_audit, with_scales
    from cnngru_edge.calibration.corpus.read import EVAL, calibration_clips, find_recordings
    from cnngru_edge.models.errors import CorpusError, SpecError
    from cnngru_edge.models.spec.stream import FeatureSpec
    from cnngru_edge.models.spec.whole import sample_rate_of
    from cnngru_edge.runtime.backends.open import open_session

    corpus = find_recordings(data, task)
    if any(clip.is_phrase for clip in corpus.clips):
        raise CorpusError(f"{corpus.root}: phrases; recordings are what is audited")
    clips = calibration_clips(corpus, min_clips)
    rate = FeatureSpec.sample_rate
    if graph:
        with open_session(graph) as session:
            found_rate = sample_rate_of(session.spec)
        if found_rate is None:
            raise SpecError(f"{graph}: this model takes no recordings, which are what is audited")
        rate = found_rate
    total = len(clips) + len(corpus.of(EVAL))
    with progress_bars() as bar:
        advance = advance_of(bar)
        found = run_audit(
            corpus,
            least=min_clips,
            sample_rate=rate,
            progress=lambda n: advance("audit", n, total),
        )
        if graph and not found.refused:
            from cnngru_edge.calibration.ranges.collect import calibrate

            ranges, _ = calibrate(
                graph,
                [clip.path for clip in clips],
                CalibrateConfig(min_clips=min_clips),
                lambda n: advance("calibrate", n, len(clips)),
            )
            found = with_scales(found, ranges)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_audit(found, Console(markup=False))
    if found.refused:
        sys.exit(1)
