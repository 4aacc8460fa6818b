"""The receipt: in which precision each layer of a built artefact really computes.

Never read from the plan that the artefact was made after, only from what a runtime made of it: here
ONNX Runtime's optimized graph and profile, in `coverage_tensorrt` what TensorRT shows.
"""

import json
import math
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from cnngru_edge.calibration.collect import FRONTEND_NODES
from cnngru_edge.export.onnx_graph import module_of
from cnngru_edge.models.receipt import INT8, Coverage, Layer
from cnngru_edge.models.spec import METADATA_KEY, ModelSpec
from cnngru_edge.runtime.ort_session import DISABLED_OPTIMIZERS

_INTEGER = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
_FLOAT = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gemm", "MatMul"}
_DISABLED = {*DISABLED_OPTIMIZERS, "NchwcTransformer"}
"""Those of the runtime, and the one that pads the weights of float convolutions."""
_DTYPES = {"float": "fp32", "float16": "fp16"}
_UNKNOWN = "(not found)"
_SUFFIXES = re.compile(r"(_int8|_quantized|_dequantized|_half)+$")


def onnxruntime_coverage(path: Path) -> Coverage:
    """Of an ONNX file on this machine's CPU: from the graph that ONNX Runtime runs, and a run."""
    source = (
        f"onnxruntime {onnxruntime.__version__} on {platform.machine()}: optimized graph, profile"
    )
    return Coverage(source, layers_as_run(path, optimized=True))


def layers_as_run(path: Path, *, optimized: bool) -> tuple[Layer, ...]:
    """Layers as ONNX Runtime ran them on a second of audio, with its optimizations or without."""
    levels = onnxruntime.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        )
        options.optimized_model_filepath = str(saved)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
        )
        metadata = session.get_modelmeta().custom_metadata_map
        spec = ModelSpec.from_json(metadata[METADATA_KEY])
        whole = spec.features.sample_rate // spec.chunk_length * spec.chunk_length
        feed = {
            i.name: np.zeros([{"N": 1, "S": whole}.get(size, size) for size in i.shape], np.float32)
            for i in session.get_inputs()
        }
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        del session
        model = ir.from_proto(onnx.load(saved))
    seconds = feed["audio"].shape[1] / spec.features.sample_rate
    ran: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            ran.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["args"])
    found: dict[str, Layer] = {}
    for node, name, weight in weighted_products(model):
        executions = ran.get(node.name or "", [])
        count = _count(node, weight)
        macs = sum(count * _positions(node, weight, args) for args in executions)
        layer = Layer(
            name,
            _precision(node, weight, executions),
            count,
            _stored_bytes(weight),
            round(macs / seconds),
        )
        if before := found.get(name):  # the same weight in several frames
            precisions = {*before.precision.split("+"), layer.precision}
            layer = replace(
                layer, precision="+".join(sorted(precisions)), macs=layer.macs + before.macs
            )
        found[name] = layer
    if missing := spec.weights - sum(layer.weights for layer in found.values()):
        # Of operators that are not known here: whatever they are, they are no proof of INT8.
        found[_UNKNOWN] = Layer(_UNKNOWN, "not known", abs(missing), 0, 0)
    return tuple(found.values())


def weighted_products(model: ir.Model) -> Iterator[tuple[ir.Node, str, ir.Value]]:
    """Operators with weights outside the front-end, loops' bodies included: each weight once."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in _INTEGER | _FLOAT | {"MatMulNBits"}:
            continue
        if (node.name or "").startswith(FRONTEND_NODES):
            continue
        indices = (1, 2) if node.op_type == "GRU" else range(len(node.inputs))
        for index in indices:
            value = node.inputs[index]
            weight = value and _stored(value)
            if weight is not None and len(weight.shape or ()) > 1:
                yield node, _name(node, index, weight), weight
                if node.op_type != "GRU":
                    break


def _stored(value: ir.Value) -> ir.Value | None:
    """The constant behind a weight, looking through its quantization."""
    node = value.producer()
    while node is not None and node.op_type in {"DequantizeLinear", "QuantizeLinear", "Cast"}:
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return value if value.const_value is not None else None


def _name(node: ir.Node, index: int, weight: ir.Value) -> str:
    module = module_of(node)
    name = _SUFFIXES.sub("", weight.name or "")
    if node.op_type == "GRU":
        return f"{module}.weight_{'ih' if index == 1 else 'hh'}_l0"
    # ONNX Runtime names weights that it lays out anew after itself.
    return name.removesuffix(".weight") if "." in name else module or node.name or name


def _count(node: ir.Node, weight: ir.Value) -> int:
    if node.op_type == "MatMulNBits":  # stored in blocks, the last one padded
        return node.attributes.get_int("N", 0) * node.attributes.get_int("K", 0)
    assert weight.const_value is not None
    return int(weight.const_value.size)


def _stored_bytes(weight: ir.Value) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.nbytes)


def _positions(node: ir.Node, weight: ir.Value, args: dict[str, Any]) -> int:
    """How often an execution goes through all of the weights."""
    if node.op_type == "GRU":
        (x,) = args["input_type_shape"][0].values()
        return int(x[0] * x[1])  # (T, N, I)
    written: list[int]
    (written,) = args["output_type_shape"][0].values()
    outputs = written[-1]
    if node.op_type.endswith("Conv"):
        assert weight.shape is not None
        outputs = weight.shape.numpy()[0]
    return math.prod(written) // outputs


def _precision(node: ir.Node, weight: ir.Value, executions: list[dict[str, Any]]) -> str:
    if not executions:
        return "not run"
    if node.op_type in _INTEGER:
        return INT8
    (dtype,) = executions[0]["input_type_shape"][0]
    arithmetic = _DTYPES.get(dtype, dtype)
    if node.op_type == "MatMulNBits":
        bits = node.attributes.get_int("bits", 4)
        level = node.attributes.get_int("accuracy_level", 0)
        if bits == 8 and multiplies_integers(level):
            return INT8
    assert weight.dtype is not None
    integers = weight.dtype in {ir.DataType.INT8, ir.DataType.UINT8}
    return f"{arithmetic} (int8 weights)" if integers else arithmetic


@cache
def multiplies_integers(accuracy_level: int) -> bool:
    """Whether MatMulNBits rounds what it multiplies with to integers, on this processor.

    It is free not to, where it has no kernel for it, and no log tells: a value of less than half a
    step next to one of 127 steps has to vanish.
    """
    size, outputs = 128, 16
    weights = np.full((outputs, 1, size), 129, np.uint8)  # all one
    weights[:, 0, 0] = 128  # zero
    x = np.full((1, size), 0.4, np.float32)
    x[0, 0] = 127
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "weights", "scales"],
        ["y"],
        domain="com.microsoft",
        K=size,
        N=outputs,
        bits=8,
        block_size=size,
        accuracy_level=accuracy_level,
    )
    graph = onnx.helper.make_graph(
        [node],
        "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, size])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, outputs])],
        [
            onnx.numpy_helper.from_array(weights, "weights"),
            onnx.numpy_helper.from_array(np.ones((outputs, 1), np.float32), "scales"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return not session.run(None, {"x": x})[0].any()
    except Exception:  # without a kernel for it; its exceptions have no common base but this
        return False
