"""Resident memory of calibration, which must not grow with the number of clips.

    python benchmarks/calibration_memory.py GRAPH [--data DIR]

Calibrates with 100 and with 5,000 clips (those of DIR again and again), each in a fresh process;
with other numbers where --clips gives several.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import click

from cnngru_edge.calibration.corpus.read import DEMO, calibration_sources
from cnngru_edge.calibration.ranges.choose import CalibrateConfig


@click.command()
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
@click.option("--task")
@click.option(
    "--clips",
    "counts",
    type=click.IntRange(1),
    multiple=True,
    default=[100, 5_000],
    show_default=True,
    help="Calibrate with so many; if given once, here, and print the peak alone.",
)
def main(graph: Path, data: Path, task: str | None, counts: Sequence[int]) -> None:
    """Print the peak resident memory of each calibration and the growth from first to last."""
    if len(counts) == 1:
        from cnngru_edge.calibration.ranges.collect import calibrate

        paths = calibration_sources(data, task, 1)
        calibrate(graph, list(islice(cycle(paths), counts[0])), CalibrateConfig(min_clips=1))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    peaks = []
    for count in counts:
        command = [sys.executable, __file__, str(graph), "--data", str(data), "--clips", str(count)]
        start = time.perf_counter()
        peaks.append(
            float(subprocess.check_output([*command, *(["--task", task] if task else [])]))
        )
        print(f"{count} clips: {peaks[-1]:.0f} MiB, {time.perf_counter() - start:.0f} s")
    print(f"growth: {peaks[-1] - peaks[0]:.1f} MiB")


if __name__ == "__main__":
    main()
