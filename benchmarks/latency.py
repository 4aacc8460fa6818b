r"""What a chunk costs here, INT8 beside float in turn, and what a start costs.

    python benchmarks/latency.py --engine build/kws12/model.int8.chunk.onnx \
        --reference build/kws12/model.fp32.onnx

One thread. From samples in a numpy array to logits in one, the state carried: chunk after chunk of
clips, of which each model takes the same one in turn. Cold start is of a process of its own, from
its start to the first label of `cnngru-edge run`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import DEMO, EVAL, read_corpus
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.stream import Stream, fixed_length

WARM_UP = 500


@click.command()
@click.option("--engine", type=click.Path(path_type=Path), required=True)
@click.option("--reference", type=click.Path(path_type=Path), required=True)
@click.option("--chunks", type=click.IntRange(1000), default=50_000, help="To measure.")
@click.option("--starts", type=click.IntRange(1), default=5, help="Cold ones, of each.")
def main(engine: Path, reference: Path, chunks: int, starts: int) -> None:
    """Print two tables."""
    clips = [clip.path for clip in read_corpus(DEMO).of(EVAL)]
    paths = {"INT8": engine, "float": reference}
    with open_session(engine) as a, open_session(reference) as b:
        rate = a.spec.features.sample_rate
        length = fixed_length(a) or a.spec.chunk_length
        audio = np.concatenate([read_audio(path, rate).samples for path in clips])
        took: dict[str, list[float]] = {name: [] for name in paths}
        with Stream(a) as first, Stream(b) as second:
            streams = list(zip(took, (first, second), strict=True))
            for i in range(WARM_UP + chunks):
                start = i * length % (len(audio) - length)
                chunk = audio[None, start : start + length]
                for name, stream in streams if i % 2 else reversed(streams):
                    began = time.perf_counter()
                    stream.push(chunk)
                    took[name].append(1e6 * (time.perf_counter() - began))
    chunk_ms = 1000 * length / rate
    print(f"{chunks:,} chunks of {chunk_ms:g} ms, microseconds each\n")
    print(
        "| | p50 | p99 | p99.9 | longest | mean | real-time factor |\n|---|---|---|---|---|---|---|"
    )
    for name, values in took.items():
        measured = np.array(values[WARM_UP:])
        p50, p99, p999 = np.percentile(measured, (50, 99, 99.9))
        mean = measured.mean()
        print(
            f"| {name} | {p50:.0f} | {p99:.0f} | {p999:.0f} | {measured.max():.0f} | {mean:.0f} | "
            f"{mean / 1000 / chunk_ms:.5f} |"
        )
    print("\n| | cold start, s | resident at most, MiB |\n|---|---|---|")
    for name, path in paths.items():
        seconds, mib = zip(*(_run(path, clips[0]) for _ in range(starts)), strict=True)
        print(f"| {name} | {np.median(seconds):.2f} | {np.median(mib):.0f} |")


def _run(engine: Path, clip: Path) -> tuple[float, float]:
    """Seconds that `run` takes in a process of its own, and its memory in MiB."""
    code = "from cnngru_edge.export.cli import main; main()"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--engine", engine, clip], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.perf_counter() - began  # to the first label
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(process.returncode)
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
