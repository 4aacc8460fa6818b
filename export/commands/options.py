"""Options of the command line that several commands share."""

import math
import shlex
import sys
from typing import Any

import click

from cnngru_edge.calibration.corpus.read import ALL, CALIB, EVAL, TRAIN
from cnngru_edge.calibration.ranges.choose import METHODS, CalibrateConfig
from cnngru_edge.export.targets.base import MIN_COVERAGE
from cnngru_edge.runtime.cli import FILE


class FiniteRange(click.FloatRange):
    """A number in a range, and NaN in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As a FloatRange does it."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return float(number)


data_option = click.option(
    "--data",
    type=FILE,
    help="Recordings: a folder with one folder per label, or with a manifest.csv.  "
    "[default: the synthesized demo clips]",
)
task_option = click.option("--task", help="Which task of a manifest.csv that lists several.")
set_option = click.option(
    "--set",
    "set_name",
    type=click.Choice([TRAIN, CALIB, EVAL, ALL]),
    default=EVAL,
    help="Which recordings of the corpus.",
)
min_coverage_option = click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=MIN_COVERAGE,
    help="Share of the weights that are to be in INT8 which has to compute in it.",
)
plan_option = click.option(
    "--plan",
    type=FILE,
    help="Precision of each layer, as export writes it to plan.json; may be edited.",
)


workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    help="Processes to share the recordings; the result does not depend on it.",
)


def command_line() -> str:
    """What was typed, for the reports that it makes."""
    return shlex.join(["cnngru-edge", *sys.argv[1:]])


def calibrate_options(command: Any) -> Any:
    """The options that `export` and `calibrate` share, one for each field of CalibrateConfig."""
    default = CalibrateConfig()
    for option in (
        workers_option,
        click.option(
            "--min-clips",
            type=click.IntRange(1),
            default=default.min_clips,
            help="Fail with fewer recordings.",
        ),
        click.option(
            "--percentile",
            type=click.FloatRange(50, 100),
            default=default.percentile,
            help="Share of the magnitudes that the percentile method keeps.",
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            default=default.method,
            help="How a range is chosen from what was seen.",
        ),
    ):
        command = option(command)
    return command
