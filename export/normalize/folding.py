"""Arithmetic that can be done once: with constants alone, and with the weights before it."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import drop_unused, replace_value
from cnngru_edge.export.graph.qdq import Floats, stored, values_of

_NOT_FOLDED = frozenset(
    {
        "Bernoulli",
        "DequantizeLinear",
        "Dropout",
        "If",
        "Loop",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Scan",
    }
)
_MOST = 2**24
"""Numbers that a constant may have; one that is larger is better computed than stored."""


def fold_constants(model: ir.Model) -> None:
    """Replace what is computed of constants alone by what it is, but in the front-end."""
    inside: set[ir.Node] = set()
    constant: set[ir.Value] = set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if (
            inputs
            and node.op_type not in _NOT_FOLDED
            and not node.domain
            and not (node.name or "").startswith(FRONTEND_NODES)
            and all(value.is_initializer() or value in constant for value in inputs)
        ):
            inside.add(node)
            constant.update(node.outputs)
    read = [
        value
        for node in model.graph
        if node in inside
        for value in node.outputs
        if not value.is_graph_output() and any(use.node not in inside for use in value.uses())
    ]
    names = [value.name or "" for value in read]
    if not names:
        return
    part = ir.Model(ir.convenience.extract(model.graph, [], names), ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for value, found in zip(read, session.run(names, {}), strict=True):
        if isinstance(found, np.ndarray) and found.size <= _MOST:
            name, value.name = value.name, f"{value.name}_computed"
            tensor = ir.tensor(found)
            kind = ir.TensorType(tensor.dtype)
            made = ir.Value(name=name, type=kind, shape=ir.Shape(found.shape), const_value=tensor)
            model.graph.register_initializer(made)
            replace_value(value, made)
    drop_unused(model)


def fold_batch_norms(model: ir.Model) -> None:
    """Put the scale and shift of a BatchNormalization into the layer that alone it reads.

    Jacob et al. 2018, 3.2. Layers are a Conv, or a MatMul of a matrix with its bias. A weight that
    another layer reads as well stays as it is, and so does the normalization.
    """
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and not node.domain:
            _fold_batch_norm(model.graph, node)
    drop_unused(model)


def _fold_batch_norm(graph: ir.Graph, node: ir.Node) -> None:
    parameters = [value.const_value for value in node.inputs[1:] if value is not None]
    if any(tensor is None for tensor in parameters) or bool(
        node.attributes.get_int("training_mode", 0)
    ):
        return
    gamma, beta, mean, variance = (values_of(v) for v in node.inputs[1:] if v is not None)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shift = beta - mean * scale
    data = node.inputs[0]
    layer = _only_writer(data)
    add = None
    if layer is not None and layer.op_type == "Add":
        add, layer = (
            layer,
            _only_writer(next((v for v in layer.inputs if v and v.producer()), None)),
        )
    if layer is None or not _can_take(layer, len(scale)):
        return
    weight = layer.inputs[1]
    assert weight is not None
    bias = layer.inputs[2] if layer.op_type == "Conv" and len(layer.inputs) > 2 else None
    if add is not None:
        bias = next((v for v in add.inputs if v is not None and v.is_initializer()), None)
        is_of_product = bias is not None and values_of(bias).shape in {(), (1,), (len(scale),)}
        if layer.op_type != "MatMul" or not is_of_product:
            return
    if bias is not None and not bias.is_initializer():
        return
    axis = 0 if layer.op_type == "Conv" else 1
    shape = [1] * len(values_of(weight).shape)
    shape[axis] = -1
    tape = ir.tape.Tape(graph)
    folded = _own(tape, weight, values_of(weight) * scale.reshape(shape))
    before = values_of(bias) if bias is not None else np.float32(0)
    shifted = np.asarray(before * scale + shift, np.float32)
    own_bias = (
        _own(tape, bias, shifted) if bias is not None else stored(tape, _bias_name(weight), shifted)
    )
    layer.replace_input_with(1, folded)
    if layer.op_type == "Conv":
        layer.resize_inputs(3)
        layer.replace_input_with(2, own_bias)
        replace_value(node.outputs[0], layer.outputs[0])
    elif add is not None:
        index = next(i for i, v in enumerate(add.inputs) if v is bias)
        add.replace_input_with(index, own_bias)
        replace_value(node.outputs[0], add.outputs[0])
    else:
        total = tape.op("Add", [layer.outputs[0], own_bias])
        total.name = f"{layer.outputs[0].name}_normalized"
        graph.insert_after(layer, tape.nodes)
        replace_value(node.outputs[0], total)


def _only_writer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, if just one reads that."""
    if value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    return value.producer()


def _can_take(layer: ir.Node, channels: int) -> bool:
    if layer.op_type not in {"Conv", "MatMul"} or layer.domain:
        return False
    weight = layer.inputs[1]
    if weight is None or not weight.is_initializer() or len(list(weight.uses())) != 1:
        return False
    shape = values_of(weight).shape
    if layer.op_type == "Conv":
        return bool(shape[0] == channels)
    written = layer.outputs[0].shape
    return len(shape) == 2 and shape[1] == channels and written is not None and len(written) == 2


def _own(tape: ir.tape.Tape, value: ir.Value, values: npt.NDArray[np.float32]) -> ir.Value:
    """An initializer with other numbers, under the same name where nothing else reads it."""
    if len(list(value.uses())) == 1:
        numbers: Floats = np.ascontiguousarray(values, np.float32)
        value.const_value = ir.tensor(numbers)
        value.shape = ir.Shape(numbers.shape)
        return value
    return stored(tape, value.name or "", values.astype(np.float32))


def _bias_name(weight: ir.Value) -> str:
    return f"{(weight.name or '').removesuffix('.weight')}.bias"
