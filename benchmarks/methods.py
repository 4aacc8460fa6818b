"""How close the INT8 model's logits are to the float model's, for each calibration method.

    python benchmarks/methods.py GRAPH [--data DIR] [--task NAME]

Calibrates on two thirds of the calibration recordings and measures on the rest; evaluation
recordings are left alone, so that the method can be chosen by this.
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import DEMO, calibration_sources
from cnngru_edge.calibration.ranges.choose import METHODS, CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.read import read_input
from cnngru_edge.runtime.session import Array
from cnngru_edge.runtime.stream import clip_logits


@click.command()
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
@click.option("--task")
def main(graph: Path, data: Path, task: str | None) -> None:
    """Print the signal-to-quantization-noise ratio at the logits, in dB."""
    paths = calibration_sources(data, task, 100)
    measured = paths[2::3]
    calibrated = [path for path in paths if path not in measured]

    def logits(model: Path) -> Array:
        with open_session(model) as session:
            parts = [clip_logits(session, read_input(session.spec, s)) for s in measured]
        return np.concatenate(parts)

    expected = logits(graph)
    with tempfile.TemporaryDirectory() as folder:
        ranges_file, quantized = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        for method in METHODS:
            config = CalibrateConfig(method=method, min_clips=1)
            calibrate(graph, calibrated, config)[0].save(ranges_file)
            quantize_onnx(graph, ranges_file, quantized)
            noise = np.mean((logits(quantized) - expected) ** 2)
            print(f"{method}: {10 * np.log10(np.mean(expected**2) / noise):.1f} dB", flush=True)


if __name__ == "__main__":
    main()
