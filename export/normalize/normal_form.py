"""Any float graph as what lowering and quantizing take, whoever exported it."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from cnngru_edge.export.graph.files import drop_unused, replace_value
from cnngru_edge.export.graph.layer_names import name_nodes, name_weights, rename_initializer
from cnngru_edge.export.graph.qdq import stored, values_of
from cnngru_edge.export.normalize.folding import fold_batch_norms, fold_constants
from cnngru_edge.export.normalize.front_end import mark_front_end
from cnngru_edge.export.normalize.opset import bring_to_opset
from cnngru_edge.models.errors import ExportError

_REWRITTEN = "_rewritten"
_OTHER_FLOATS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def normalize(model: ir.Model, *, of_samples: bool = True) -> None:
    """Bring a float graph to normal form, in place; it computes the same.

    Opset 17; constants are initializers; nothing is computed of constants alone; no Identity, no
    Dropout; a BatchNormalization is part of the layer before it where it can be; a linear layer is
    a MatMul with its weight on the right, and an Add of its bias; every node has a name, and
    weights are called `<module>.weight`; weights that are shared stay so; nodes of a front-end
    have its prefix. Graphs of torch's exporters, of tf2onnx and made by hand are taken; one in
    normal form stays as it is.

    Args:
        model: a float graph.
        of_samples: whether it may begin with a front-end, because it takes a waveform.

    Raises:
        ExportError: it is not in float32, it is quantized already, or its opset cannot be brought
            to 17.
    """
    _check_types(model)
    if model.functions:
        common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    _lift_constants(model)
    name_nodes(model.graph)  # the converter of opsets forgets where torch says that a node was
    bring_to_opset(model)
    _lift_constants(model)
    _remove_what_does_nothing(model)
    fold_constants(model)
    _infer_shapes(model)
    _rewrite_products(model)
    _infer_shapes(model)
    fold_batch_norms(model)
    name_nodes(model.graph)
    if of_samples:
        mark_front_end(model)
    name_weights(model.graph)
    name_nodes(model.graph)  # of two layers in one module, the second one's weight has another name
    drop_unused(model)
    _infer_shapes(model)


def _check_types(model: ir.Model) -> None:
    name = model.graph.name or "the graph"
    quantized = next(
        (n for n in model.graph.all_nodes() if n.op_type.endswith("QuantizeLinear")), None
    )
    if quantized is not None or any(
        node.op_type == "DequantizeLinear" for node in model.graph.all_nodes()
    ):
        raise ExportError(f"{name}: already quantized; give the float graph")
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        is_weight = value.is_graph_input() or len(value.shape or ()) > 1
        if is_weight and value.dtype in _OTHER_FLOATS:
            raise ExportError(
                f"{name}: {value.name} is {value.dtype.name.lower()}, expected float32; export the "
                "model in float32"
            )


def _lift_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _infer_shapes(model: ir.Model) -> None:
    common.ShapeInferencePass(strict_mode=False, data_prop=True)(model)


def _remove_what_does_nothing(model: ir.Model) -> None:
    """Dropout in inference, and Identity."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Dropout" or node.domain:
            continue
        training = node.inputs[2] if len(node.inputs) > 2 else None
        is_off = training is None or (
            training.const_value is not None and not values_of(training).any()
        )
        has_mask = len(node.outputs) > 1 and (
            bool(list(node.outputs[1].uses())) or node.outputs[1].is_graph_output()
        )
        if is_off and not has_mask:
            data, graph = node.inputs[0], node.graph
            assert data is not None
            assert graph is not None
            tape = ir.tape.Tape(graph)
            same = tape.op("Identity", [data])
            same.name = f"{node.outputs[0].name}_kept"
            graph.insert_before(node, tape.nodes)
            replace_value(node.outputs[0], same)
            graph.remove(node, safe=True)
    common.IdentityEliminationPass()(model)


def _rewrite_products(model: ir.Model) -> None:
    """Linear layers as a MatMul with its weight on the right."""
    originals = list(model.graph.initializers.values())
    for node in list(model.graph):
        if node.op_type == "Gemm" and not node.domain:
            _split_gemm(model.graph, node)
        elif node.op_type == "MatMul" and not node.domain:
            _turn_left_weight(model.graph, node)
    drop_unused(model)
    for value in originals:  # what was made of a weight that nobody reads any more has its name
        if value.name and value.name not in model.graph.initializers:
            made = model.graph.initializers.get(f"{value.name}{_REWRITTEN}")
            if made is not None:
                rename_initializer(model.graph, made, value.name)


def _split_gemm(graph: ir.Graph, node: ir.Node) -> None:
    """A MatMul and an Add of alpha A B + beta C, if B and C are constants."""
    a, b, c = [*node.inputs, None][:3]
    assert a is not None
    assert b is not None
    if not b.is_initializer() or (c is not None and not c.is_initializer()):
        return
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    is_turned = bool(node.attributes.get_int("transB", 0))
    tape = ir.tape.Tape(graph)
    if node.attributes.get_int("transA", 0):
        a = tape.op("Transpose", [a], {"perm": [1, 0]})
        a.name = f"{node.outputs[0].name}_turned"
    weight = b
    if is_turned or alpha != 1:
        values = values_of(b).T if is_turned else values_of(b)
        weight = _rewritten(tape, b, values * np.float32(alpha))
    result = tape.op("MatMul", [a, weight])
    result.name = f"{node.outputs[0].name}_product"
    if c is not None and (bias := values_of(c) * np.float32(beta)).any():
        if bias.ndim == 0 or bias.size == bias.shape[-1]:  # one for each output, or for all
            bias = np.broadcast_to(bias.reshape(-1), values_of(weight).shape[1:])
        is_same = bias.shape == values_of(c).shape and np.array_equal(bias, values_of(c))
        result = tape.op("Add", [result, c if is_same else _rewritten(tape, c, bias)])
        result.name = f"{node.outputs[0].name}_sum"
    _take_over(node, result, tape)


def _turn_left_weight(graph: ir.Graph, node: ir.Node) -> None:
    """W x as (x^T W^T)^T: the weight of a product is on its right."""
    weight, data = node.inputs
    assert weight is not None
    assert data is not None
    if not weight.is_initializer() or data.is_initializer() or data.shape is None:
        return
    rank = len(data.shape)
    if len(values_of(weight).shape) != 2 or rank < 2:
        return
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    tape = ir.tape.Tape(graph)
    turned = tape.op("Transpose", [data], {"perm": swapped})
    turned.name = f"{node.outputs[0].name}_turned"
    product = tape.op("MatMul", [turned, _rewritten(tape, weight, values_of(weight).T)])
    product.name = f"{node.outputs[0].name}_product"
    back = tape.op("Transpose", [product], {"perm": swapped})
    back.name = f"{node.outputs[0].name}_back"
    _take_over(node, back, tape)


def _rewritten(tape: ir.tape.Tape, value: ir.Value, values: np.ndarray) -> ir.Value:
    """An initializer with other numbers; layers that read one weight in one way still read one."""
    return stored(tape, f"{value.name}{_REWRITTEN}", values)


def _take_over(node: ir.Node, made: ir.Value, tape: ir.tape.Tape) -> None:
    """Let a value of the tape stand for a node's output, under its name, and at its place."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    path = (node.name or "").rpartition("/")[0] or node.name
    for written in tape.nodes:
        written.name = f"{path}/{written.op_type}"
    graph.insert_before(node, tape.nodes)
    output = node.outputs[0]
    if not output.is_graph_output():
        name, output.name = output.name, f"{output.name}_replaced"
        made.name, made.type, made.shape = name, output.type, output.shape
    replace_value(output, made)
    graph.remove(node, safe=True)
