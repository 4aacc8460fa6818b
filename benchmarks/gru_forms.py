"""Forms of one GRU layer in ONNX Runtime, side by side: which is fastest at which size.

    python benchmarks/gru_forms.py

One thread, batch 1, random weights; microseconds for T frames, the median over rounds in
which every form has its turn.
"""

import time

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from cnngru_edge.calibration.ranges.choose import Range
from cnngru_edge.export.graph.files import drop_unused
from cnngru_edge.export.lower.recurrent import lower_recurrent
from cnngru_edge.export.targets import cpu as quantize_cpu

SIZES = [(320, 128), (640, 128), (320, 256), (512, 512)]
FRAMES = [1, 50]


def gru(inputs: int, hidden: int, *, int8_weights: bool = False) -> onnx.ModelProto:
    """The operator: x (T, 1, inputs) and h to y (T, 1, 1, hidden) and h."""
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(0, inputs**-0.5, (1, 3 * hidden, inputs)).astype(np.float32),
        "R": rng.normal(0, hidden**-0.5, (1, 3 * hidden, hidden)).astype(np.float32),
        "B": rng.normal(0, 0.1, (1, 6 * hidden)).astype(np.float32),
    }
    nodes, constants = [], dict(weights)
    if int8_weights:
        for name in "WR":
            scale = np.abs(weights[name]).max(axis=(0, 2)) / 127
            constants[f"{name}_int8"] = np.rint(weights[name] / scale[None, :, None]).astype("i1")
            constants[f"{name}_scale"] = scale
            del constants[name]
            parts = [f"{name}_int8", f"{name}_scale"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [name], axis=1))
    nodes.append(
        helper.make_node(
            "GRU",
            ["x", "W", "R", "B", "", "h"],
            ["y", "h_next"],
            name="/gru/GRU",
            hidden_size=hidden,
            linear_before_reset=1,
        )
    )
    state = (TensorProto.FLOAT, [1, 1, hidden])
    graph = helper.make_graph(
        nodes,
        "gru",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 1, inputs]),
            helper.make_tensor_value_info("h", *state),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 1, 1, hidden]),
            helper.make_tensor_value_info("h_next", *state),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def lowered(inputs: int, hidden: int, frames: int | None, *, int8: bool) -> onnx.ModelProto:
    """The explicit cell, in a Scan or written out."""
    model = ir.from_proto(gru(inputs, hidden))
    lower_recurrent(model, frames)
    if int8:
        quantize_cpu.quantize(model, lambda _: Range(-1, 1, -1, 1, 0, 0, 0))
        drop_unused(model)
    return ir.to_proto(model)


def forms(inputs: int, hidden: int, frames: int) -> dict[str, onnx.ModelProto]:
    """All that is compared."""
    return {
        "GRU operator, FP32": gru(inputs, hidden),
        "GRU operator, INT8 weights": gru(inputs, hidden, int8_weights=True),
        "Scan, FP32": lowered(inputs, hidden, None, int8=False),
        "Scan, integers": lowered(inputs, hidden, None, int8=True),
        "written out, integers": lowered(inputs, hidden, frames, int8=True),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
def main(rounds: int) -> None:
    """Print a table."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    names = list(forms(1, 1, 1))
    table = Table("sizes, frames", *names)
    for inputs, hidden in SIZES:
        for frames in FRAMES:
            feed = {
                "x": np.random.default_rng(1).uniform(-1, 1, (frames, 1, inputs)).astype("f"),
                "h": np.zeros((1, 1, hidden), np.float32),
            }
            sessions = {
                name: onnxruntime.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
                for name, model in forms(inputs, hidden, frames).items()
            }
            took: dict[str, list[float]] = {name: [] for name in sessions}
            calls = 100 if frames == 1 else 10
            for _ in range(rounds):
                for name, session in sessions.items():
                    session.run(None, feed)
                    start = time.perf_counter()
                    for _ in range(calls):
                        session.run(None, feed)
                    took[name].append((time.perf_counter() - start) / calls)
            row = (f"{np.median(took[name]) * 1e6:.0f}" for name in names)
            table.add_row(f"{inputs} to {hidden}, {frames}", *row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
