"""Whether the verdict and the sensitivity see damage: INT8 graphs spoiled on purpose.

    python benchmarks/damage.py EXPORT --data DIR [--task NAME] [--workers 2]

EXPORT is what `cnngru-edge export` wrote. Prints Markdown: for the graph as it is, with the scales
of the recurrent matrix four times too large (all of them, or one unit's), and with ranges from
white noise in place of speech, the verdict on the evaluation recordings, the layer that hurts most
and the tensor that uses its range worst.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import soundfile
from onnx import numpy_helper

from cnngru_edge.calibration.corpus.read import EVAL, read_corpus, spread
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.artefacts import FLOAT, INT8
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.verdict.compare import compare, interval_text
from cnngru_edge.export.verdict.long_streams import load
from cnngru_edge.export.verdict.sensitivity import sensitivity
from cnngru_edge.runtime.backends.open import open_session

SCALES = "grus.0.weight_hh_l0_scale"
FACTOR = 4
UNIT = 300
NOISES = 128
LEVELS_DB = (-20, -60)  # of speech, and of a quiet room


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def with_scales_off(source: Path, target: Path, unit: int | None) -> Path:
    """The recurrent matrix FACTOR times too large, all of it or one unit's column."""
    model = onnx.load(source)
    (stored,) = (i for g in graphs_of(model.graph) for i in g.initializer if i.name == SCALES)
    scales = numpy_helper.to_array(stored).copy()
    scales[... if unit is None else unit] *= FACTOR
    stored.CopyFrom(numpy_helper.from_array(scales, SCALES))
    onnx.save(model, target)
    return target


def with_ranges_of_noise(folder: Path, graph: Path, level_db: float) -> Path:
    """Ranges from white noise of a level in dB below full scale."""
    rng = np.random.default_rng(0)
    with open_session(graph) as session:
        rate = session.spec.features.sample_rate
    paths = [folder / f"{level_db}_{i}.wav" for i in range(NOISES)]
    for path in paths:
        soundfile.write(path, rng.normal(0, 10 ** (level_db / 20), rate).clip(-1, 1), rate)
    calibrate(graph, paths, CalibrateConfig())[0].save(folder / "ranges.json")
    out = folder / f"noise{level_db}.onnx"
    quantize_onnx(graph, folder / "ranges.json", out)
    return out


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
@click.option("--workers", type=int, default=1)
def main(export: Path, data: Path, task: str | None, workers: int) -> None:
    """Print a row for each graph."""
    corpus = read_corpus(data, task)
    clips = corpus.of(EVAL)
    graph = export / FLOAT
    with open_session(graph) as session:
        heard = load(spread(clips, 200), session.spec)[1]
    columns = (
        "INT8 graph | accuracy | points, 95 % | verdict | SQNR | hurts most | alone | restored"
    )
    print(f"| {columns} | least effective bits |\n{'|---' * 9}|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        spoiled = {
            "as it is": export / INT8,
            f"recurrent scales {FACTOR}x": with_scales_off(
                export / INT8, folder / "all.onnx", None
            ),
            f"one unit's recurrent scale {FACTOR}x": with_scales_off(
                export / INT8, folder / "one.onnx", UNIT
            ),
            **{
                f"ranges from white noise at {level} dB": with_ranges_of_noise(folder, graph, level)
                for level in LEVELS_DB
            },
        }
        for name, path in spoiled.items():
            found, _ = compare(graph, path, corpus.root, clips, workers=workers)
            hurt = sensitivity(graph, path, heard)
            worst = hurt.layers[0]
            use = min(hurt.tensors, key=lambda use: use.effective_bits)
            print(
                f"| {name} | {found.clean.candidate_accuracy:.2%} | "
                f"{interval_text(found.clean.delta, found.delta_ci95)} | {found.verdict} | "
                f"{hurt.sqnr_db:.1f} dB | `{worst.layer}` | {worst.alone_sqnr_db:.1f} dB | "
                f"{worst.restored_sqnr_db:.1f} dB | {use.effective_bits:.1f}, read by "
                f"`{use.read_by}` |",
                flush=True,
            )


if __name__ == "__main__":
    main()
