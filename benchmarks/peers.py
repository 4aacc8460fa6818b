"""Our INT8 model beside what the peers make of the same weights, on one thread, in one run.

    python benchmarks/peers.py [--data DIR] [--task NAME] [--json FILE] [--markdown FILE]

For the shipped model and one with a larger GRU: the latency of a step (one chunk, the state in and
out) and of a clip (1 s), the size of the file, the share of the weights that it holds in INT8, and
the accuracy. All that calibrate do so on the same recordings of DIR. The rows of OpenVINO need
`pip install openvino nncf`; what is not installed is left out.
"""

import copy
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from backends import FLOAT_ONNX, MODELS, OURS, PEERS, TRAINED, Case, Engine, build
from rich import box
from rich.console import Console
from rich.table import Table

from cnngru_edge.calibration.corpus.read import (
    DEMO,
    EVAL,
    calibration_clips,
    match_labels,
    read_corpus,
)
from cnngru_edge.calibration.ranges.choose import MIN_CLIPS
from cnngru_edge.export.chain.pipeline import parity_clips, trace
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Array, Feed, initial_state
from cnngru_edge.runtime.stream import clip_feed, flushed

CALLS = {"step": 50, "clip": 10}  # in a row, in each round
UNCACHED = 2**28  # bytes that no cache holds
WARMUP_CALLS = 3  # bring a backend's weights back into the cache, as in a stream of its own
SQNR_CLIPS = 8


@dataclass(frozen=True)
class Row:
    """One backend's figures for one model in one form."""

    model: str
    form: str
    backend: str
    latency_us: float
    file_bytes: int
    weights_int8: float
    accuracy: float
    accuracy_unit: str  # fraction: of right answers; sqnr_db: at the logits


def clip_logits(engine: Engine, clip: Samples) -> Array:
    """Logits (T, C) of a clip from zeros, with its flush."""
    logits: Array = engine.run(clip_feed(engine.spec, clip))["logits"][0]
    return logits


def label_of(engine: Engine, clip: Samples) -> str:
    """What a backend answers to a clip, as `cnngru-edge run` reads it."""
    scores = clip_scores(engine.spec, clip_logits(engine, clip))
    return engine.spec.labels[int(scores.argmax())]


def accuracy(
    case: Case, engine: Engine, clips: Sequence[Samples], truth: Sequence[str]
) -> tuple[float, str]:
    """The share of right answers; for random weights, the SQNR at the logits.

    That is against torch in float64, so that float32 has a figure too.
    """
    if case.name == TRAINED:
        right = [label_of(engine, c) == t for c, t in zip(clips, truth, strict=True)]
        return sum(right) / len(right), "fraction"
    exact = copy.deepcopy(case.model).double()
    signal, noise = 0.0, 0.0
    for clip in clips[:: max(1, len(clips) // SQNR_CLIPS)]:
        audio = torch.from_numpy(flushed(engine.spec, clip))[None].double()
        expected = exact(audio, tuple(s.double() for s in exact.initial_state()))[0][0].numpy()
        signal += float(np.sum(expected**2))
        noise += float(np.sum((clip_logits(engine, clip) - expected) ** 2))
    return 10 * float(np.log10(signal / noise)), "sqnr_db"


def latencies_us(
    engines: dict[str, Engine], feed: Feed, calls: int, rounds: int
) -> dict[str, float]:
    """Median over the rounds of a call's mean; every backend has its turn in each of them."""
    means: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.run(feed)
    for _ in range(1 + rounds):
        for name, engine in engines.items():
            call = engine.bind(feed["audio"].shape[1])[2]
            for _ in range(WARMUP_CALLS):
                call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            means[name].append((time.perf_counter() - start) / calls)
    return {name: 1e6 * median(values[1:]) for name, values in means.items()}


def read_us(size: int) -> tuple[float, float]:
    """Time to read so many bytes once on one thread: from the caches, and from memory.

    The fastest of three ways to read the same bytes again and again; and the median over bytes that
    were not read before, from a block that no cache holds.
    """
    best = float("inf")
    block = np.random.default_rng(0).integers(1, 127, size=(UNCACHED // size + 1, size), dtype="i1")
    memory = block[0].tobytes()
    words = torch.from_numpy(block[0, : size // 8 * 8].copy()).view(torch.int64)
    for read in (lambda: memory.find(b"\x00"), block[0].max, words.sum) * 100:
        start = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - start)
    cold = []
    for row in block[1:]:
        start = time.perf_counter()
        row.max()
        cold.append(time.perf_counter() - start)
    return 1e6 * best, 1e6 * median(cold)


def measure(
    case: Case,
    engines: dict[str, Engine],
    clips: Sequence[Samples],
    truth: Sequence[str],
    rounds: int,
) -> Iterator[Row]:
    """All figures of a model."""
    spec = case.model.spec
    scores = {name: accuracy(case, engine, clips, truth) for name, engine in engines.items()}
    second = pad_to_multiple(clips[0], spec.features.sample_rate)[: spec.features.sample_rate]
    middle = len(second) // 2 // spec.chunk_length * spec.chunk_length
    heard = {"step": second[middle : middle + spec.chunk_length], "clip": second}
    for form, samples in heard.items():
        feed = {"audio": samples[None], **initial_state(spec, 1)}
        for name, latency_us in latencies_us(engines, feed, CALLS[form], rounds).items():
            size, int8 = engines[name].file_bytes, engines[name].weights_int8
            yield Row(case.name, form, name, latency_us, size, int8, *scores[name])


def table(rows: Sequence[Row]) -> Table:
    """One model in one form."""
    by_name = {row.backend: row for row in rows}

    def ratio(row: Row, reference: str, attribute: str) -> str:
        if reference not in by_name:
            return "-"
        return f"{getattr(row, attribute) / getattr(by_name[reference], attribute):.2f}"

    made = Table(box=box.MARKDOWN)
    made.add_column("backend")
    for header in ("latency, us", f"/ {OURS}", "file, KB", "/ fp32 ONNX", "in INT8", "accuracy"):
        made.add_column(header, justify="right")
    for row in rows:
        fraction = row.accuracy_unit == "fraction"
        made.add_row(
            row.backend,
            f"{row.latency_us:.0f}",
            ratio(row, OURS, "latency_us"),
            f"{row.file_bytes / 1000:.0f}",
            ratio(row, FLOAT_ONNX, "file_bytes"),
            f"{row.weights_int8:.1%}",
            f"{row.accuracy:.1%}" if fraction else f"{row.accuracy:.1f} dB",
        )
    return made


def report(rows: Sequence[Row], floors_us: dict[str, tuple[float, float]]) -> str:
    """All tables, as Markdown, with what they were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    found = [*names[:1], platform.machine(), "one thread"]
    for package in ("onnxruntime", "torch", "openvino", "nncf"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    console = Console(width=160)
    with console.capture() as capture:
        console.print(f"# Benchmarks\n\n{', '.join(found)}.\n")
        console.print(f"    python benchmarks/peers.py {shlex.join(sys.argv[1:])}")
        for model, (cached, uncached) in floors_us.items():
            for form in CALLS:
                chosen = [row for row in rows if (row.model, row.form) == (model, form)]
                console.print(f"\n## {model}, {form}", table(chosen))
                steps = [row.latency_us for row in chosen if row.backend == OURS]
                for step in steps if form == "step" else ():
                    console.print(
                        f"To read the INT8 weights once takes {cached:.0f} us where caches hold "
                        f"them, {uncached:.0f} us from memory: a step of {OURS} takes "
                        f"{step / cached:.2f} and {step / uncached:.2f} times that.",
                        soft_wrap=True,
                    )
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
@click.option("--task")
@click.option("--models", type=click.Choice(list(MODELS)), multiple=True, default=list(MODELS))
@click.option("--peers", type=click.Choice(list(PEERS)), multiple=True, default=list(PEERS))
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path))
def main(
    data: Path,
    task: str | None,
    models: Sequence[str],
    peers: Sequence[str],
    rounds: int,
    json_file: Path | None,
    markdown: Path | None,
) -> None:
    """Print a table for each model and form."""
    torch.set_num_threads(1)
    trained = load_checkpoint(PRETRAINED / f"{TRAINED}.safetensors")
    assert isinstance(trained, CnnGru)
    corpus = read_corpus(data, task)
    calibration = calibration_clips(corpus, MIN_CLIPS)
    truth = match_labels(corpus.of(EVAL), trained.spec.labels)
    clips = [read_audio(path, trained.spec.features.sample_rate).samples for path in truth]
    rows: list[Row] = []
    floors_us: dict[str, tuple[float, float]] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            model = MODELS[name](trained)
            trace(model, Path(folder), parity_clips(calibration, model.spec))
            paths = [clip.path for clip in calibration]
            case = Case(name, model.for_export(), Path(folder), paths)
            engines = build(case, peers)
            with torch.inference_mode():
                rows += measure(case, engines, clips, list(truth.values()), rounds)
            floors_us[name] = read_us(sum(case.weights))  # a byte each
    text = report(rows, floors_us)
    print(text, end="")
    if markdown:
        markdown.write_text(text)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
