"""The matrices of the front-end, computed by the graph from a few KB of constants."""

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_CONSTANTS, FRONTEND_NODES
from cnngru_edge.export.graph.qdq import named
from cnngru_edge.models.nets.log_mel import LogMel, half_window, heard_bins
from cnngru_edge.models.nets.mel import mel_edges


def compute_frontend_constants(graph: ir.Model, log_mel: LogMel) -> None:
    """Replace the DFT and mel matrices (0.5 MB at n_fft 512) by nodes that compute them.

    From a few KB of constants, in float operators that every target has; a runtime folds them when
    it loads the graph. Angles are reduced to half a turn first, so that single precision is enough.
    """
    spec = log_mel.spec
    first_bin, last_bin = heard_bins(spec)
    bins = np.arange(first_bin, last_bin + 1, dtype=np.float32)
    offsets, weights = (values[:, None].numpy() for values in half_window(spec))
    edges = mel_edges(spec)
    tape = ir.tape.Tape(graph.graph)

    def constant(name: str, value: npt.ArrayLike) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, np.float32)), name=f"log_mel.{name}")

    def node(op: str, *inputs: ir.Value) -> ir.Value:
        name = f"{FRONTEND_CONSTANTS}{op}_{len(tape.nodes)}"
        return named(tape.op(op, inputs), name)

    period = constant("n_fft", spec.n_fft)
    turns = node("Mul", constant("offsets", offsets), constant("bins", bins))
    whole_turns = node("Mul", node("Round", node("Div", turns, period)), period)
    step = constant("angle", 2 * math.pi / spec.n_fft)
    angle = node("Mul", node("Sub", turns, whole_turns), step)
    window = constant("window", weights)
    cosine = node("Mul", node("Cos", angle), window)
    sine = node("Mul", node("Sin", angle), window)
    frequency = constant("frequencies", bins[:, None] * (spec.sample_rate / spec.n_fft))
    low, centre, high = (
        constant(name, edges[i : i + spec.n_mels])
        for i, name in enumerate(("mel_low", "mel_centre", "mel_high"))
    )
    rising = node("Div", node("Sub", frequency, low), node("Sub", centre, low))
    falling = node("Div", node("Sub", high, frequency), node("Sub", high, centre))
    mel = node("Relu", node("Min", rising, falling))
    products = [
        made
        for made in graph.graph
        if made.op_type == "MatMul" and (made.name or "").startswith(FRONTEND_NODES)
    ]
    for product, matrix in zip(products, (cosine, sine, mel), strict=False):
        stored = product.inputs[1]
        assert stored is not None
        assert stored.name is not None
        product.replace_input_with(1, matrix)
        del graph.graph.initializers[stored.name]
    graph.graph.insert_before(graph.graph[0], tape.nodes)
