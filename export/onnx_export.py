"""The float ONNX graph of a model: audio and state, or one whole input, to logits."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from cnngru_edge.calibration.collect import FRONTEND_CONSTANTS, FRONTEND_NODES
from cnngru_edge.export.integer import named
from cnngru_edge.export.onnx_graph import module_of, save
from cnngru_edge.export.onnx_trace import traced
from cnngru_edge.export.torchscript import example_inputs
from cnngru_edge.export.whole_export import whole_graph
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.frontend import LogMel, half_window, heard_bins
from cnngru_edge.models.spec import METADATA_KEY
from cnngru_edge.models.whole import WholeModel
from cnngru_edge.models.whole_spec import Spec
from cnngru_edge.runtime.session import PRECISION_KEY


def export_onnx(model: CnnGru | WholeModel, path: Path) -> None:
    """Write `model` as ONNX: free batch N and samples S, every state a named input and output.

    One that takes its input whole has that alone, of free length where its spec fixes none.
    """
    if isinstance(model, WholeModel):
        _save(whole_graph(model), model.spec, path)
        return
    states = model.spec.state
    inputs = ["audio", *(state.name for state in states)]
    outputs = ["logits", *(state.next_name for state in states)]
    free = {name: {0: "N"} for name in (*inputs, *outputs)}
    free["audio"][1], free["logits"][1] = "S", "T"
    graph = traced(model, example_inputs(model), inputs, outputs, free)
    tidy(graph)
    copy_leading_dimensions(graph)
    # Shape inference cannot see that a chunk shorter than its context leaves the state's size.
    for value, state in zip(graph.graph.outputs[1:], states, strict=True):
        value.shape = ir.Shape(("N", *state.shape))
    compute_frontend_constants(graph, model.log_mel)
    _save(graph, model.spec, path)


def _save(graph: ir.Model, spec: Spec, path: Path) -> None:
    graph.metadata_props.update({METADATA_KEY: spec.to_json(), PRECISION_KEY: "fp32"})
    save(graph, path)


def tidy(graph: ir.Model) -> None:
    """Fold the exporter's constants, and name weights after the module that they belong to."""
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    passes(graph)
    roles = {"GRU": (None, "W", "R", "B"), "MatMul": (None, "weight")}
    for node in graph.graph:
        if (node.name or "").startswith(FRONTEND_NODES):
            continue
        for role, value in zip(roles.get(node.op_type, ()), node.inputs, strict=False):
            if role and value is not None and value.is_initializer():
                rename_initializer(graph.graph, value, f"{module_of(node)}.{role}")


def copy_leading_dimensions(graph: ir.Model) -> None:
    """Let a Reshape keep its input's leading dimensions by a 0, where it reads them off a Shape.

    A target of constants saves three nodes a time, and a builder then knows the other dimensions.
    """
    for node in list(graph.graph):
        target = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] else None
        if target is None or target.op_type != "Concat":
            continue
        dimensions: list[int] = []
        for part in target.inputs:
            assert part is not None
            if part.const_value is not None:
                dimensions += part.const_value.numpy().tolist()
            else:
                dimensions += [0] * _leading_dimensions(part, node.inputs[0], len(dimensions))
        name = f"{node.name}_shape"
        shape = ir.Value(name=name, const_value=ir.tensor(np.array(dimensions, np.int64)))
        graph.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
    common.RemoveUnusedNodesPass()(graph)


def _leading_dimensions(part: ir.Value, data: ir.Value | None, position: int) -> int:
    """How many dimensions of `data` a part of a shape holds: [x.shape[i]], or x.shape[i:n]."""
    node = part.producer()
    if node is not None and node.op_type == "Unsqueeze" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    assert node is not None
    shape, index = node.inputs[:2]
    assert shape is not None
    assert index is not None
    assert index.const_value is not None
    source = shape.producer()
    same = source is not None and source.op_type == "Shape" and source.inputs[0] is data
    if not same or index.const_value.numpy().item() != position:
        raise ExportError(f"{part.name}: a Reshape to something else than its input's dimensions")
    if node.op_type == "Gather":
        return 1
    end = node.inputs[2]
    assert end is not None
    assert end.const_value is not None
    return int(end.const_value.numpy().item()) - position


def rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an initializer another name, unless another one has it."""
    if name not in graph.initializers:
        assert value.name is not None
        del graph.initializers[value.name]
        value.name = name
        graph.initializers[name] = value


def compute_frontend_constants(graph: ir.Model, log_mel: LogMel) -> None:
    """Replace the DFT and mel matrices (0.5 MB at n_fft 512) by nodes that compute them.

    From a few KB of constants, in float operators that every target has; a runtime folds them when
    it loads the graph. Angles are reduced to half a turn first, so that single precision is enough.
    """
    spec = log_mel.spec
    first_bin, last_bin = heard_bins(spec)
    bins = np.arange(first_bin, last_bin + 1, dtype=np.float32)
    offsets, weights = (values[:, None].numpy() for values in half_window(spec))
    first, last = (2595 * math.log10(1 + f / 700) for f in (spec.f_min, spec.f_max))
    # Rounded where torchaudio rounds: next to a loud bin, an edge's last bit can be seen.
    edges = 700 * (10 ** (torch.linspace(first, last, spec.n_mels + 2) / 2595) - 1)
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
        constant(name, edges[i : i + spec.n_mels].numpy())
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
    for product, matrix in zip(products, (cosine, sine, mel), strict=True):
        stored = product.inputs[1]
        assert stored is not None
        assert stored.name is not None
        product.replace_input_with(1, matrix)
        del graph.graph.initializers[stored.name]
    graph.graph.insert_before(graph.graph[0], tape.nodes)
