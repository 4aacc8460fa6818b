"""Where INT8 pays most: a chunk of a large CTC model, INT8 beside ONNX Runtime's float, in turn.

    python benchmarks/large_ctc.py

Six convolutions and three GRU layers of 512 units with random weights, which costs what a trained
model costs; ranges from demo clips. A step is one chunk of audio, 40 ms, from samples in a numpy
array to logits in one, batch 1, one thread: our chunk form beside the float graph, both in ONNX
Runtime. In each round each takes a block of steps, so that a model finds in the caches what it left
there, as on a device that runs it alone. Prints Markdown.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from cnngru_edge.calibration.corpus.read import CALIB, DEMO, EVAL, read_corpus, spread
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.artefacts import CHUNK, FLOAT, RANGES
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets.cpu_receipt import onnxruntime_coverage
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.export.training.ctc import CTC_SPEC
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ConvSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Samples, read_audio
from cnngru_edge.runtime.session import Session
from cnngru_edge.runtime.stream import Stream

LARGE_SPEC = replace(
    CTC_SPEC,
    convs=(
        ConvSpec(32, (5, 5), (2, 2)),
        ConvSpec(64, (3, 3), (2, 2)),
        ConvSpec(96, (3, 3), (1, 1)),
        ConvSpec(128, (3, 3), (1, 2)),
        ConvSpec(128, (3, 3), (1, 1)),
        ConvSpec(128, (3, 3), (1, 1)),
    ),
    hidden_size=512,
    num_layers=3,
)
CLIPS = 32  # for the ranges
NAMES = ("INT8", "float")


def large_model() -> CnnGru:
    """Random weights, and the features of a model that is trained."""
    torch.manual_seed(0)
    model = CnnGru(LARGE_SPEC).eval()
    trained = load_checkpoint(PRETRAINED / "kws12.safetensors")
    model.feature_mean, model.feature_std = trained.feature_mean, trained.feature_std
    return model


def write_models(model: CnnGru, folder: Path) -> None:
    """The float graph and its INT8 chunk form."""
    export_onnx(model.for_export(), folder / FLOAT)
    clips = [clip.path for clip in spread(read_corpus(DEMO).of(CALIB), CLIPS)]
    calibrate(folder / FLOAT, clips, CalibrateConfig(min_clips=1))[0].save(folder / RANGES)
    quantize_onnx(folder / FLOAT, folder / RANGES, folder / CHUNK, frames=1)


def median_us(stream: Stream, audio: Samples, steps: int) -> float:
    """Of so many chunks, one after the other."""
    length, took = LARGE_SPEC.chunk_length, []
    for i in range(steps):
        start = i * length % (len(audio) - length)
        chunk = audio[None, start : start + length]
        began = time.perf_counter()
        stream.push(chunk)
        took.append(1e6 * (time.perf_counter() - began))
    return float(np.median(took))


def sqnr_db(sessions: tuple[Session, Session], audio: Samples) -> float:
    """Of the INT8 logits to those in float, on some audio."""
    length = LARGE_SPEC.chunk_length
    found = []
    for session in sessions:
        with Stream(session) as stream:
            starts = range(0, len(audio) - length + 1, length)
            pieces = [stream.push(audio[None, i : i + length]) for i in starts]
            found.append(np.concatenate(pieces, axis=1).astype(np.float64))
    int8, exact = found
    return float(10 * np.log10(np.square(exact).sum() / np.square(int8 - exact).sum()))


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15)
@click.option("--steps", type=click.IntRange(20), default=200, help="In a round, of each.")
def main(rounds: int, steps: int) -> None:
    """Print a table."""
    clips = [clip.path for clip in read_corpus(DEMO).of(EVAL)[::8]]
    rate = LARGE_SPEC.features.sample_rate
    audio = np.concatenate([read_audio(path, rate).samples for path in clips])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(large_model(), folder)
        receipt = onnxruntime_coverage(folder / CHUNK)
        sizes = [(folder / name).stat().st_size for name in (CHUNK, FLOAT)]
        with open_session(folder / CHUNK) as int8, open_session(folder / FLOAT) as exact:
            noise_db = sqnr_db((int8, exact), audio[: 10 * rate])
            with Stream(int8) as first, Stream(exact) as second:
                streams = dict(zip(NAMES, (first, second), strict=True))
                for stream in streams.values():
                    median_us(stream, audio, steps)  # warm-up
                took: dict[str, list[float]] = {name: [] for name in NAMES}
                for i in range(rounds):
                    for name in NAMES if i % 2 else NAMES[::-1]:
                        took[name].append(median_us(streams[name], audio, steps))
            backend = exact.backend
    ratios = np.divide(took["float"], took["INT8"])
    print(
        f"{LARGE_SPEC.weights / 1e6:.1f} million weights, {receipt.weights_int8:.1%} of them in "
        f"INT8; {backend}; {rounds} rounds of {steps} steps of "
        f"{1000 * LARGE_SPEC.chunk_length / rate:g} ms\n"
    )
    print("| | step, median, us | rounds | file, KB |\n|---|---|---|---|")
    for name, size in zip(NAMES, sizes, strict=True):
        rows = took[name]
        span = f"{min(rows):.0f} to {max(rows):.0f}"
        print(f"| {name} | {np.median(rows):.0f} | {span} | {size / 1000:,.0f} |")
    print(
        f"\nfloat / INT8: {np.median(ratios):.2f} in the median of the rounds ({ratios.min():.2f} "
        f"to {ratios.max():.2f}); SQNR of the INT8 logits {noise_db:.1f} dB"
    )


if __name__ == "__main__":
    main()
