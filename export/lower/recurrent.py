"""Lowerings of GRU and LSTM: an explicit cell, whose products can be quantized one by one.

No ONNX runtime has an integer GRU: whatever its weights, the operator computes in float. Here it
becomes one product over all frames for the input, and a cell for each frame with its own.
"""

from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from cnngru_edge.export.graph.files import drop_unused, module_of, replace_value
from cnngru_edge.export.graph.qdq import LAYOUT, values_of
from cnngru_edge.export.lower.cells import HIDDEN, Builder, Cell, GruCell, LstmCell

LOWERED = {"GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
"""What can be lowered, and the only activations with which it can."""


def lower_recurrent(
    model: ir.Model, frames: int | None = None, *, by_gate: bool = False
) -> dict[str, str]:
    """Replace GRU and LSTM operators in place by explicit cells that compute the same in float.

    Forward, reverse and bidirectional, `linear_before_reset` 0 and 1, either layout, any batch and
    hidden size (https://onnx.ai/onnx/operators/onnx__GRU.html, onnx__LSTM.html).

    Args:
        model: an ONNX graph of opset 13 or later.
        frames: None for a `Scan` over any number of frames; a number T to write the cell out T
            times, without a loop, for inputs of exactly T frames.
        by_gate: give every gate a product of its own, `weight_ih_l0.z` and so on, to quantize or
            not; slower, and the same otherwise.

    Returns:
        Modules whose operators were left as they are, and why: see `reason_in_float`.
    """
    layers: Counter[str] = Counter()
    reasons = {}
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = [node for node in model.graph if node.op_type in LOWERED and not node.domain]
    for number, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{number}"
        module = module_of(node) or node.name.strip("/")
        layer = f"{module}.{{}}_l{layers[module]}"
        layers[module] += 1
        if reason := reason_in_float(node):
            reasons[module] = reason
            continue
        tape = ir.tape.Tape(model.graph)
        _lower(Builder(tape, f"{node.name}/", by_gate), node, _cells(node, layer), frames)
        model.graph.insert_before(node, tape.nodes)
        model.graph.remove(node, safe=True)
    drop_unused(model)
    return reasons


def reason_in_float(node: ir.Node) -> str | None:
    """Why a GRU or LSTM cannot be lowered, in one line; None if it can."""
    _, w, r, b, lengths, _, _, peepholes = [*node.inputs, *[None] * 8][:8]
    attributes = node.attributes
    unusual = {
        "sequence_lens": lengths is not None,
        "peepholes": peepholes is not None,
        "input_forget": attributes.get_int("input_forget", 0) != 0,
        "clip": "clip" in attributes,
        "activations": _has_other_activations(node),
        "direction": _direction(node) not in {"forward", "reverse", "bidirectional"},
        "W": w is None or w.const_value is None,
        "R": r is None or r.const_value is None,
        "type": w is not None and w.dtype not in {None, ir.DataType.FLOAT},
        "B": b is not None and b.const_value is None,
    }
    if not any(unusual.values()):
        start = node.inputs[5] if len(node.inputs) > 5 else None
        if start is None or _is_within_one(start):
            return None
        return "its initial state may be beyond -1 to 1, between which hidden states are quantized"
    found = ", ".join(name for name, is_unusual in unusual.items() if is_unusual)
    return (
        f"this {node.op_type} cannot be lowered because of its {found}; supported are constant "
        "float32 weights, sigmoid and tanh, no clip and no sequence lengths"
    )


def _has_other_activations(node: ir.Node) -> bool:
    usual = LOWERED[node.op_type]
    found = node.attributes.get_strings("activations", ()) or ()
    return any(name != usual[i % len(usual)] for i, name in enumerate(found))


def _is_within_one(value: ir.Value) -> bool:
    """Whether no number of an initial state is beyond -1 to 1, as far as its graph tells."""
    if HIDDEN in value.meta:
        return True
    if value.const_value is not None:
        return bool((np.abs(values_of(value)) <= 1).all())
    node = value.producer()
    if node is None:  # a state that is carried from chunk to chunk, and none of what is heard
        graph = value.graph
        return value.is_graph_input() and graph is not None and len(graph.inputs) > 1
    if node.domain or node.op_type in {"Sigmoid", "Softmax", "Tanh"}:
        return not node.domain
    if node.op_type in LOWERED:
        start = node.inputs[5] if len(node.inputs) > 5 else None
        is_state = value in node.outputs[:2] and not _has_other_activations(node)
        return is_state and (start is None or _is_within_one(start))
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get_tensor("value") if "value" in node.attributes else None
        return filled is None or bool((np.abs(filled.numpy()) <= 1).all())
    if node.op_type == "Concat":
        return all(part is not None and _is_within_one(part) for part in node.inputs)
    moves = LAYOUT | {"Cast", "Expand", "Gather", "Identity", "Slice", "Split", "Tile"}
    return node.op_type in moves and node.inputs[0] is not None and _is_within_one(node.inputs[0])


def _direction(node: ir.Node) -> str:
    return node.attributes.get_string("direction", "forward") or "forward"


def _cells(node: ir.Node, weight_name: str) -> list[Cell]:
    """The directions of an operator that can be lowered."""
    _, w, r, b = [*node.inputs, None][:4]
    assert w is not None
    assert r is not None
    weights, hidden_weights = values_of(w), values_of(r)
    count, rows, hidden_size = hidden_weights.shape
    biases = values_of(b) if b is not None else np.zeros((count, 2 * rows), np.float32)
    linear_before_reset = bool(node.attributes.get_int("linear_before_reset", 0))
    # Only a GRU's new gate has a recurrent bias that must wait for its product with r, and only if
    # that product comes after R.
    waits = hidden_size if linear_before_reset else 0
    cells: list[Cell] = []
    for i, (weight, hidden_weight, bias) in enumerate(
        zip(weights, hidden_weights, biases, strict=True)
    ):
        input_bias, hidden_bias = bias[:rows].copy(), bias[rows:]
        input_bias[: rows - waits] += hidden_bias[: rows - waits]
        backward = _direction(node) == "reverse" or i == 1
        name = weight_name + "_reverse" * backward
        shared = (name, backward, weight.T, input_bias, hidden_weight.T)
        if node.op_type == "GRU":
            cells.append(GruCell(*shared, hidden_bias[rows - waits :], linear_before_reset))
        else:
            cells.append(LstmCell(*shared))
    return cells


def _lower(build: Builder, node: ir.Node, cells: list[Cell], frames: int | None) -> None:
    x = node.inputs[0]
    assert x is not None
    batch_first = bool(node.attributes.get_int("layout", 0))
    if batch_first:
        x = build.op("Transpose", x, perm=[1, 0, 2])
    starts = []
    for i, _ in enumerate(cells[0].states, 5):
        given = node.inputs[i] if len(node.inputs) > i else None
        if given is None:
            given = build.zeros(x, len(cells), cells[0].hidden_size)
        elif batch_first:
            given = build.op("Transpose", given, perm=[1, 0, 2])
        starts.append(given)
    sequences, finals = [], []
    for i, cell in enumerate(cells):
        at = build.within("backward/" if cell.backward else "")
        states = [
            _without_axis(start, 0) or at.op("Gather", start, at.ints("direction", i), axis=0)
            for start in starts
        ]
        states[0].meta[HIDDEN] = True
        projected = at.linear(x, cell, "ih", cell.input_weight, cell.input_bias)  # (T, N, G H)
        if frames is None:
            sequence, final = _scan(at, cell, projected, states)
        else:
            sequence, final = _unrolled(at, cell, projected, states, frames)
        sequence.meta[HIDDEN] = final[0].meta[HIDDEN] = True
        sequences.append(at.unsqueeze(sequence, 1))  # (T, 1, N, H)
        finals.append([at.unsqueeze(state, 0) for state in final])  # (1, N, H)
    wholes = [(1, sequences), *((0, list(parts)) for parts in zip(*finals, strict=True))]
    for output, (axis, parts) in zip(node.outputs, wholes, strict=False):
        if output.name:
            whole = build.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]
            if batch_first:  # (N, T, D, H) or (N, D, H)
                whole = build.op("Transpose", whole, perm=[2, 0, 1, 3] if axis else [1, 0, 2])
            _replace(output, whole)


def _scan(
    at: Builder, cell: Cell, projected: ir.Value, starts: list[ir.Value]
) -> tuple[ir.Value, list[ir.Value]]:
    """(T, N, G H) and (N, H) to (T, N, H) and (N, H) by a Scan over any T."""
    size = cell.hidden_size
    gates = at.split(projected, list(cell.parts.values()), axis=2)
    states, parts = (
        [
            ir.Value(
                name=at.name(name),
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=ir.Shape(("N", columns)),
            )
            for name, columns in sizes.items()
        ]
        for sizes in (dict.fromkeys(cell.states, size), cell.parts)
    )
    body = ir.Graph([*states, *parts], [], nodes=(), name=at.name("cell"), opset_imports={"": 17})
    inside = Builder(ir.tape.Tape(body), at.name("cell/"), at.by_gate)
    states[0].meta[HIDDEN] = True
    following = cell.step(inside, parts, states)
    following[0].meta[HIDDEN] = True
    written = dict(zip((f"{name}_next" for name in cell.states), following, strict=True))
    written["y"] = inside.op("Identity", following[0])
    for name, value in written.items():
        value.name = at.name(name)
        value.type, value.shape = states[0].type, states[0].shape
        body.outputs.append(value)
    body.extend(inside.tape.nodes)
    backward = [int(cell.backward)]
    *final, sequence = at.tape.op_multi_out(
        "Scan",
        [*starts, *gates],
        {
            "body": body,
            "num_scan_inputs": len(gates),
            "scan_input_directions": len(gates) * backward,
            "scan_output_directions": backward,
        },
        num_outputs=len(starts) + 1,
        name=at.name("Scan"),
    )
    for name, value in zip((*cell.states, "y"), (*final, sequence), strict=True):
        value.name = at.name(f"Scan_{name}")
    return sequence, final


def _unrolled(
    at: Builder, cell: Cell, projected: ir.Value, states: list[ir.Value], frames: int
) -> tuple[ir.Value, list[ir.Value]]:
    """The same, for just `frames` frames, without a loop."""
    order = range(frames)[::-1] if cell.backward else range(frames)
    found: list[ir.Value] = []
    for t in order:
        step = at.within(f"frame_{t}/")
        frame = step.op("Gather", projected, step.ints("frame", t), axis=0)
        parts = step.split(frame, list(cell.parts.values()), axis=1)
        states = cell.step(step, parts, states)
        states[0].meta[HIDDEN] = True
        found.append(step.unsqueeze(states[0], 0))
    if cell.backward:
        found.reverse()
    return (at.op("Concat", *found, axis=0) if len(found) > 1 else found[0]), states


def _replace(value: ir.Value, lowered: ir.Value) -> None:
    """Let all read `lowered`; readers that undo its last step read what is before that step."""
    step = lowered.producer()
    assert step is not None
    if step.op_type == "Unsqueeze":
        plain, axes = step.inputs
        assert plain is not None
        assert axes is not None
        for reader in [use.node for use in value.uses()]:
            written = reader.outputs[0]
            is_second_output = written.is_graph_output() and plain.is_graph_output()
            if _removes(reader, int(values_of(axes).item())) and not is_second_output:
                replace_value(written, plain)
    replace_value(value, lowered)


def _removes(node: ir.Node, axis: int) -> bool:
    """Whether a node takes a dimension of size 1 away and nothing else."""
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    parameter = node.inputs[1].const_value.numpy()
    if node.op_type == "Squeeze":
        return bool(np.array_equal(parameter, [axis]))
    is_first = parameter.shape == () and parameter in (0, -1)
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == axis and is_first


def _without_axis(value: ir.Value, axis: int) -> ir.Value | None:
    """What was unsqueezed at `axis` to make `value`, if that is how it was made."""
    node = value.producer()
    if node is None or node.op_type != "Unsqueeze":
        return None
    axes = node.inputs[1]
    assert axes is not None
    is_same = axes.const_value is not None and np.array_equal(values_of(axes), [axis])
    return node.inputs[0] if is_same else None
