"""The receipt: in which precision each layer of a built artefact really computes.

Never read from the plan that the artefact was made after, only from what a runtime made of it: here
ONNX Runtime's optimized graph and profile, in `coverage_tensorrt` what TensorRT shows.
"""

import json
import math
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import RECURRENT_OPS, module_of
from cnngru_edge.models.receipt import INT8, Coverage, Layer
from cnngru_edge.models.spec.stream import METADATA_KEY
from cnngru_edge.models.spec.whole import Spec, WholeSpec, read_spec, sample_rate_of
from cnngru_edge.runtime.backends.onnx import DISABLED_OPTIMIZERS
from cnngru_edge.runtime.inputs.read import example_input
from cnngru_edge.runtime.session import input_names

_INTEGER = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
_FLOAT = {
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    *RECURRENT_OPS,
}
_PRODUCTS = _INTEGER | _FLOAT | {"MatMulNBits"}
_WITHOUT_WEIGHTS = {
    "Add",
    "Cast",
    "Clip",
    "Concat",
    "DequantizeLinear",
    "Div",
    "Equal",
    "Expand",
    "Gather",
    "If",
    "Loop",
    "Max",
    "Min",
    "Mul",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "Reshape",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Slice",
    "Sub",
    "Transpose",
    "Where",
}
"""What may read a constant of more than one dimension that is no layer's weight."""
_FREE = 64
"""Of a dimension that may be of any size, but for the batch: frames, tokens or pixels."""
_TYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}
_DISABLED = {*DISABLED_OPTIMIZERS, "NchwcTransformer"}
"""Those of the runtime, and the one that pads the weights of float convolutions."""
_DTYPES = {"float": "fp32", "float16": "fp16"}
_UNKNOWN = "(not found)"
_SUFFIXES = re.compile(r"((_int8|_quantized|_dequantized|_half)_*)+$")


Feed = Mapping[str, npt.NDArray[Any]]


def onnxruntime_coverage(path: Path, feed: Feed | None = None) -> Coverage:
    """Of an ONNX file on this machine's CPU: from the graph that ONNX Runtime runs, and a run.

    On `feed`, or else on `example_feed`.
    """
    source = (
        f"onnxruntime {onnxruntime.__version__} on {platform.machine()}: optimized graph, profile"
    )
    return Coverage(source, layers_as_run(path, optimized=True, feed=feed))


def layers_as_run(path: Path, *, optimized: bool, feed: Feed | None = None) -> tuple[Layer, ...]:
    """Layers as ONNX Runtime ran them on `feed`, with its optimizations or without.

    Multiply-accumulates are of a second, if there is audio to tell, and else of the run.
    """
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
        feed = example_feed(session) if feed is None else feed
        # The types of the float graph may be others: token ids are int32 for TensorRT.
        types = {value.name: _TYPES.get(value.type, np.float32) for value in session.get_inputs()}
        session.run(None, {name: feed[name].astype(dtype) for name, dtype in types.items()})
        seconds = _seconds(session, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        del session
        model = ir.from_proto(onnx.load(saved))
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
    if missing := _weights_elsewhere(model):
        # Of operators that are not known here: whatever they are, they are no proof of INT8.
        found[_UNKNOWN] = Layer(_UNKNOWN, "not known", missing, 0, 0)
    return tuple(found.values())


def example_feed(session: onnxruntime.InferenceSession) -> dict[str, npt.NDArray[Any]]:
    """Zeros for every input of a graph (ones for integers): a second of audio where that is one.

    Of a model that takes its input whole, what is usual of that.
    A first dimension that is free is taken for the batch, and is 1; others that are free are of one
    size each.
    """
    spec, sizes = _spec(session), {"N": 1}
    if isinstance(spec, WholeSpec):
        given = example_input(spec)[None]
        return {spec.input.name: given.astype(_TYPES[session.get_inputs()[0].type])}
    if spec is not None:
        sizes["S"] = spec.features.sample_rate // spec.chunk_length * spec.chunk_length
    feed: dict[str, npt.NDArray[Any]] = {}
    for value in session.get_inputs():
        shape = [
            size if isinstance(size, int) else sizes.get(size, 1 if axis == 0 else _FREE)
            for axis, size in enumerate(value.shape)
        ]
        dtype = _TYPES.get(value.type, np.float32)
        make = np.zeros if np.issubdtype(dtype, np.floating) else np.ones
        feed[value.name] = make(shape, dtype)
    return feed


def _spec(session: onnxruntime.InferenceSession) -> Spec | None:
    """The spec in a graph, if it has the input that its spec says."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    spec = read_spec(text) if text else None
    if spec is None or input_names(spec)[0] not in {one.name for one in session.get_inputs()}:
        return None
    return spec


def _seconds(session: onnxruntime.InferenceSession, feed: Feed) -> float:
    """Of audio in a feed; 1 if there is none."""
    spec = _spec(session)
    rate = sample_rate_of(spec) if spec else None
    return feed["audio"].shape[-1] / rate if rate else 1.0


def _weights_elsewhere(model: ir.Model) -> int:
    """How many numbers of matrices and the like operators read that are not known here."""
    found: dict[ir.Value, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _PRODUCTS | _WITHOUT_WEIGHTS or _is_of_frontend(node):
            continue
        for value in node.inputs:
            weight = value and _stored(value)
            if weight is not None and len(weight.shape or ()) > 1 and _is_number(weight):
                found[weight] = math.prod(weight.shape.numpy() if weight.shape else ())
    return sum(found.values())


def _is_number(weight: ir.Value) -> bool:
    """Whether a constant is of floats or what they were quantized to, not of indices."""
    integers = {ir.DataType.INT8, ir.DataType.UINT8}
    return weight.dtype in integers or (
        weight.dtype is not None and weight.dtype.is_floating_point()
    )


def _is_of_frontend(node: ir.Node) -> bool:
    return (node.name or "").startswith(FRONTEND_NODES)


def weighted_products(model: ir.Model) -> Iterator[tuple[ir.Node, str, ir.Value]]:
    """Operators with weights outside the front-end, loops' bodies included: each weight once.

    Embeddings are among them, for their weights: they multiply nothing.
    """
    layers: Counter[str] = Counter()  # of recurrent operators in one module
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in _PRODUCTS | {"Gather"} or _is_of_frontend(node):
            continue
        if node.op_type in RECURRENT_OPS:
            module = module_of(node)
            number = layers[module]
            layers[module] += 1
            for index, matrix in ((1, "ih"), (2, "hh")):
                value = node.inputs[index]
                weight = value and _stored(value)
                if weight is not None:
                    yield node, f"{module}.weight_{matrix}_l{number}", weight
            continue
        is_table = node.op_type == "Gather"
        for value in node.inputs[:1] if is_table else node.inputs:
            weight = value and _stored(value)
            rank = 0 if weight is None else len(weight.shape or ())
            if weight is None or rank < 2:
                continue
            looked_up = rank == 2 and node.attributes.get_int("axis", 0) == 0 and _is_number(weight)
            if not is_table or looked_up:
                yield node, _name(node, weight), weight
            break


def _stored(value: ir.Value) -> ir.Value | None:
    """The constant behind a weight, looking through its quantization."""
    node = value.producer()
    while node is not None and node.op_type in {"DequantizeLinear", "QuantizeLinear", "Cast"}:
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return value if value.const_value is not None else None


def _name(node: ir.Node, weight: ir.Value) -> str:
    module = module_of(node)
    name = _SUFFIXES.sub("", weight.name or "")
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
    read: list[int]
    (read,) = args["input_type_shape"][0].values()
    if node.op_type == "Gather":
        return 0
    if node.op_type in RECURRENT_OPS:
        return read[0] * read[1]  # (T, N, I)
    if node.op_type == "ConvTranspose":
        return math.prod(read) // read[1]
    written: list[int]
    (written,) = args["output_type_shape"][0].values()
    outputs = written[-1]
    if "Conv" in node.op_type:
        assert weight.shape is not None
        outputs = weight.shape.numpy()[0]
    return math.prod(written) // outputs


def _precision(node: ir.Node, weight: ir.Value, executions: list[dict[str, Any]]) -> str:
    if not executions:
        return "not run"
    if node.op_type in _INTEGER or (node.op_type == "Gather" and weight.dtype == ir.DataType.INT8):
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
