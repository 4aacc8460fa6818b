"""The float ONNX graph of a model: waveform and state in, logits and state out."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from cnngru_edge.calibration.collect import FRONTEND_NODES
from cnngru_edge.export.torchscript import example_inputs
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.frontend import LogMel
from cnngru_edge.models.spec import METADATA_KEY
from cnngru_edge.runtime.session import PRECISION_KEY

OPSET = 17
"""What every TensorRT since 8.6 parses (its operator table)."""


def export_onnx(model: CnnGru, path: Path) -> None:
    """Write `model` as ONNX: free batch N and samples S, every state a named input and output."""
    states = model.spec.state
    inputs = ["audio", *(state.name for state in states)]
    outputs = ["logits", *(state.next_name for state in states)]
    free = {name: {0: "N"} for name in (*inputs, *outputs)}
    free["audio"][1], free["logits"][1] = "S", "T"
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # This exporter keeps nn.GRU as one GRU node at opset 17; the newer one does neither.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        warnings.filterwarnings("ignore", message="Exporting a model to ONNX with a batch_size")
        torch.onnx.export(
            model,
            example_inputs(model),
            buffer,  # type: ignore[arg-type]  # a file object works, and is not in its types
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=free,
        )
    graph = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
    tidy(graph)
    # Shape inference cannot see that a chunk shorter than its context leaves the state's size.
    for value, state in zip(graph.graph.outputs[1:], states, strict=True):
        value.shape = ir.Shape(("N", *state.shape))
    look_up_dft_kernel(graph, model.log_mel)
    graph.metadata_props.update({METADATA_KEY: model.spec.to_json(), PRECISION_KEY: "fp32"})
    save(graph, path)


def load(path: Path) -> ir.Model:
    """Read a graph, or say why not.

    Raises:
        ExportError: no such file, no ONNX, or without a model spec in it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        graph = ir.load(path)
    except Exception as e:  # protobuf's errors have no common base but this
        raise ExportError(f"{path}: not an ONNX file") from e
    if METADATA_KEY not in graph.metadata_props:
        raise ExportError(
            f"{path}: no model spec inside (metadata {METADATA_KEY!r}), so it was not written by "
            "cnngru-edge; make one with 'cnngru-edge trace'"
        )
    return graph


def save(graph: ir.Model, path: Path) -> None:
    """Check a graph against the ONNX standard and write it, whole or not at all."""
    graph.producer_name = "cnngru-edge"
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    write_file(path, proto.SerializeToString(deterministic=True))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def module_of(node: ir.Node) -> str:
    """The PyTorch module that a node was traced from: `/convs.0/conv/Conv` is of `convs.0.conv`."""
    return ".".join((node.name or "").strip("/").split("/")[:-1])


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
        for role, value in zip(roles.get(node.op_type, ()), node.inputs, strict=False):
            if role and value is not None and value.is_initializer():
                rename_initializer(graph.graph, value, f"{module_of(node)}.{role}")


def rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an initializer another name, unless another one has it."""
    if name not in graph.initializers:
        assert value.name is not None
        del graph.initializers[value.name]
        value.name = name
        graph.initializers[name] = value


def look_up_dft_kernel(graph: ir.Model, log_mel: LogMel) -> None:
    """Replace the DFT kernel (1 MB at n_fft 512) by its look-up in one period of a cosine.

    The same arithmetic as `LogMel.dft_kernel`, in nodes that a runtime folds as it loads them.
    """
    conv = next(node for node in graph.graph if node.name == f"{FRONTEND_NODES}Conv")
    kernel = conv.inputs[1]
    assert kernel is not None
    n_fft = log_mel.spec.n_fft
    bins = n_fft // 2 + 1
    tape = ir.tape.Tape(graph.graph)

    def constant(name: str, value: npt.ArrayLike) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value)), name=f"log_mel.{name}")

    def node(op: str, *inputs: ir.Value) -> ir.Value:
        value = tape.op(op, inputs)
        value.name = f"{FRONTEND_NODES}kernel/{op}_{len(tape.nodes)}"
        return value

    zero, one = constant("zero", 0), constant("one", 1)
    period = constant("n_fft", n_fft)
    k = node("Range", zero, constant("bins", bins), one)
    n = node("Range", zero, period, one)
    column = node("Unsqueeze", k, constant("column", [1]))
    cosine_phase = node("Mod", node("Mul", column, n), period)
    quarter = constant("three_quarters", 3 * n_fft // 4)
    sine_phase = node("Mod", node("Add", cosine_phase, quarter), period)
    phase = tape.op("Concat", [cosine_phase, sine_phase], {"axis": 0})
    phase.name = f"{FRONTEND_NODES}kernel/phase"
    table = constant("cosine", log_mel.cosine.numpy())
    basis = node("Mul", node("Gather", table, phase), constant("window", log_mel.window.numpy()))
    looked_up = node("Unsqueeze", basis, constant("channel", [1]))
    for made in tape.nodes:
        made.name = made.outputs[0].name
    graph.graph.insert_before(conv, tape.nodes)
    conv.replace_input_with(1, looked_up)
    assert kernel.name is not None
    graph.graph.initializers.pop(kernel.name, None)
