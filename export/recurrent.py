"""Lowerings of the GRU operator: an explicit cell, whose products can be quantized one by one.

No ONNX runtime has an integer GRU: whatever its weights, the operator computes in float. Here it
becomes one product over all frames for the input, and a cell for each frame with its own.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from cnngru_edge.export.integer import Floats, named, stored, values_of
from cnngru_edge.export.onnx_graph import drop_unused, module_of, replace_value
from cnngru_edge.models.errors import ExportError

HIDDEN = "cnngru_edge.hidden"
"""Mark in `Value.meta` of a GRU's hidden state: in [-1, 1], whatever the data, for it is a mean of
tanh values and of itself."""

RECURRENT = "cnngru_edge.recurrent"
"""Mark in `Value.meta` of a product that is made for one frame at a time."""

_DEFAULT_ACTIVATIONS = ("Sigmoid", "Tanh")


GATES = ("z", "r", "n")
"""Update, reset and new gate, in ONNX's order: columns of the weights of a cell."""


def lower_grus(model: ir.Model, frames: int | None = None, *, by_gate: bool = False) -> None:
    """Replace every GRU operator in place by an explicit cell that computes the same in float.

    Forward and bidirectional, `linear_before_reset` 0 and 1, any batch and hidden size
    (https://onnx.ai/onnx/operators/onnx__GRU.html).

    Args:
        model: an ONNX graph of opset 13 or later.
        frames: None for a `Scan` over any number of frames; a number T to write the cell out T
            times, without a loop, for inputs of exactly T frames.
        by_gate: give every gate a product of its own, `weight_ih_l0.z` and so on, to quantize or
            not; slower, and the same otherwise.

    Raises:
        ExportError: weights that are no float32 constants, sequence lengths, a clip, batch-first
            layout, or other activations than sigmoid and tanh.
    """
    layers: Counter[str] = Counter()
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for number, node in enumerate([node for node in model.graph if node.op_type == "GRU"]):
        node.name = node.name or f"gru_{number}"
        module = module_of(node) or node.name.strip("/")
        directions = _read(node, f"{module}.{{}}_l{layers[module]}")
        layers[module] += 1
        tape = ir.tape.Tape(model.graph)
        _lower(_Builder(tape, f"{node.name}/", by_gate), node, directions, frames)
        model.graph.insert_before(node, tape.nodes)
        model.graph.remove(node, safe=True)
    drop_unused(model)


@dataclass(frozen=True)
class _Direction:
    """One direction of a GRU; gates in ONNX's order: update z, reset r, new n."""

    weight_name: str  # to be filled with weight_ih, weight_hh, bias_ih or bias_hh
    backward: bool
    input_weight: Floats  # (I, 3 H)
    input_bias: Floats  # (3 H,), with all of the recurrent bias that needs no product with r
    hidden_weight: Floats  # (H, 3 H)
    hidden_bias: Floats  # (H,), inside the product with r
    linear_before_reset: bool

    @property
    def hidden_size(self) -> int:
        return len(self.hidden_weight)

    def name(self, parameter: str) -> str:
        return self.weight_name.format(parameter)


def _read(node: ir.Node, weight_name: str) -> list[_Direction]:
    """The directions of a GRU operator, or the reason why it cannot be lowered."""
    inputs = [*node.inputs, *[None] * 6][:6]
    _, w, r, b, lengths, _ = inputs
    attributes = node.attributes
    direction = attributes.get_string("direction", "forward")
    activations = attributes.get_strings("activations", ())
    unusual = {
        "sequence_lens": lengths is not None,
        "layout": attributes.get_int("layout", 0) != 0,
        "clip": "clip" in attributes,
        "activations": any(
            name != _DEFAULT_ACTIVATIONS[i % 2] for i, name in enumerate(activations or ())
        ),
        "direction": direction not in {"forward", "reverse", "bidirectional"},
        "W": w is None or w.const_value is None,
        "R": r is None or r.const_value is None,
        "type": w is not None and w.dtype not in {None, ir.DataType.FLOAT},
        "B": b is not None and b.const_value is None,
    }
    if any(unusual.values()):
        found = ", ".join(name for name, is_unusual in unusual.items() if is_unusual)
        raise ExportError(
            f"{node.name}: this GRU cannot be lowered because of its {found}; supported are "
            "constant float32 weights, sigmoid and tanh, (T, N, I) layout, no clip and no "
            "sequence lengths"
        )
    assert w is not None
    assert r is not None
    weights, hidden_weights = values_of(w), values_of(r)
    count, rows, hidden_size = hidden_weights.shape
    biases = values_of(b) if b is not None else np.zeros((count, 2 * rows), np.float32)
    linear_before_reset = bool(attributes.get_int("linear_before_reset", 0))
    # Only the new gate's recurrent bias has to wait for its product with r, and only if that
    # product comes after R.
    waits = hidden_size if linear_before_reset else 0
    directions = []
    for i, (weight, hidden_weight, bias) in enumerate(
        zip(weights, hidden_weights, biases, strict=True)
    ):
        input_bias, hidden_bias = bias[:rows].copy(), bias[rows:]
        input_bias[: rows - waits] += hidden_bias[: rows - waits]
        backward = direction == "reverse" or i == 1
        directions.append(
            _Direction(
                weight_name + "_reverse" * backward,
                backward,
                weight.T,
                input_bias,
                hidden_weight.T,
                hidden_bias[rows - waits :],
                linear_before_reset,
            )
        )
    return directions


def _lower(
    build: "_Builder", node: ir.Node, directions: list[_Direction], frames: int | None
) -> None:
    x = node.inputs[0]
    assert x is not None
    h0 = node.inputs[5] if len(node.inputs) > 5 else None
    if h0 is None:
        h0 = build.zeros(x, len(directions), directions[0].hidden_size)
    sequences, finals = [], []
    for i, direction in enumerate(directions):
        at = build.within("backward/" if direction.backward else "")
        h = _without_axis(h0, 0) or at.op("Gather", h0, at.ints("direction", i), axis=0)
        h.meta[HIDDEN] = True
        projected = at.linear(
            x, direction, "ih", direction.input_weight, direction.input_bias
        )  # (T, N, 3 H)
        if frames is None:
            sequence, final = _scan(at, direction, projected, h)
        else:
            sequence, final = _unrolled(at, direction, projected, h, frames)
        sequence.meta[HIDDEN] = True
        sequences.append(at.unsqueeze(sequence, 1))  # (T, 1, N, H)
        finals.append(at.unsqueeze(final, 0))  # (1, N, H)
    for output, parts, axis in ((0, sequences, 1), (1, finals, 0)):
        if len(node.outputs) > output and node.outputs[output].name:
            whole = build.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]
            _replace(node.outputs[output], whole)


def _scan(
    at: "_Builder", direction: _Direction, projected: ir.Value, h0: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """(T, N, 3 H) and (N, H) to (T, N, H) and (N, H) by a Scan over any T."""
    size = direction.hidden_size
    gates = at.split(projected, [2 * size, size], axis=2)
    state, *parts = (
        ir.Value(name=at.name(name), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in {
            "h": ("N", size),
            "x_zr": ("N", 2 * size),
            "x_n": ("N", size),
        }.items()
    )
    body = ir.Graph([state, *parts], [], nodes=(), name=at.name("cell"), opset_imports={"": 17})
    inside = _Builder(ir.tape.Tape(body), at.name("cell/"), at.by_gate)
    state.meta[HIDDEN] = True
    h = _cell(inside, direction, parts, state)
    for value, name in ((h, "h_next"), (inside.op("Identity", h), "y")):
        value.name = at.name(name)
        value.type, value.shape = state.type, state.shape
        body.outputs.append(value)
    body.extend(inside.tape.nodes)
    backward = [int(direction.backward)]
    final, sequence = at.tape.op_multi_out(
        "Scan",
        [h0, *gates],
        {
            "body": body,
            "num_scan_inputs": 2,
            "scan_input_directions": 2 * backward,
            "scan_output_directions": backward,
        },
        num_outputs=2,
        name=at.name("Scan"),
    )
    final.name, sequence.name = at.name("Scan_h"), at.name("Scan_y")
    return sequence, final


def _unrolled(
    at: "_Builder", direction: _Direction, projected: ir.Value, h: ir.Value, frames: int
) -> tuple[ir.Value, ir.Value]:
    """The same, for just `frames` frames, without a loop."""
    size = direction.hidden_size
    order = range(frames)[::-1] if direction.backward else range(frames)
    found: list[ir.Value] = []
    for t in order:
        step = at.within(f"frame_{t}/")
        frame = step.op("Gather", projected, step.ints("frame", t), axis=0)
        h = _cell(step, direction, step.split(frame, [2 * size, size], 1), h)
        found.append(step.unsqueeze(h, 0))
    if direction.backward:
        found.reverse()
    return (at.op("Concat", *found, axis=0) if len(found) > 1 else found[0]), h


def _cell(
    at: "_Builder", direction: _Direction, projected: list[ir.Value], h: ir.Value
) -> ir.Value:
    """One frame: the projected input, (N, 2 H) of z and r and (N, H) of n, and h to the next h."""
    x_zr, x_n = projected
    size = direction.hidden_size
    zr_weight, n_weight = np.split(direction.hidden_weight, [2 * size], axis=1)
    if direction.linear_before_reset:
        bias = np.concatenate([np.zeros(2 * size, np.float32), direction.hidden_bias])
        product = at.linear(h, direction, "hh", direction.hidden_weight, bias)
        h_zr, h_n = at.split(product, [2 * size, size], axis=1)
    else:
        h_zr = at.linear(h, direction, "hh", zr_weight, part=".zr")
    z, r = at.split(at.op("Sigmoid", at.op("Add", x_zr, h_zr)), [size, size], axis=1)
    if direction.linear_before_reset:
        h_n = at.op("Mul", r, h_n)
    else:
        reset = at.op("Mul", r, h)
        reset.meta[HIDDEN] = True  # smaller than h
        h_n = at.linear(reset, direction, "hh", n_weight, part=".n")
    n = at.op("Tanh", at.op("Add", x_n, h_n))
    # (1 - z) n + z h in one product less.
    h_next = at.op("Add", n, at.op("Mul", z, at.op("Sub", h, n)))
    h_next.meta[HIDDEN] = True
    return h_next


@dataclass(frozen=True)
class _Builder:
    """Nodes on a tape, all named below one prefix."""

    tape: ir.tape.Tape
    prefix: str
    by_gate: bool

    def within(self, part: str) -> "_Builder":
        return _Builder(self.tape, self.prefix + part, self.by_gate)

    def name(self, part: str) -> str:
        return self.prefix + part

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return named(
            self.tape.op(op_type, inputs, attributes),
            self.name(f"{op_type}_{len(self.tape.nodes)}"),
        )

    def ints(self, name: str, value: int | list[int]) -> ir.Value:
        return self.constant(self.name(name), np.array(value, np.int64))

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer of the graph that the tape is for; one for the same name and value."""
        return stored(self.tape, name, value)

    def linear(
        self,
        x: ir.Value,
        direction: _Direction,
        matrix: str,
        weight: Floats,
        bias: Floats | None = None,
        part: str = "",
    ) -> ir.Value:
        """A product with a weight, and an Add if the bias says anything."""
        name = direction.name(f"weight_{matrix}")
        parts = {part: weight}
        if self.by_gate and part != ".n":
            gates = np.split(weight, weight.shape[1] // direction.hidden_size, axis=1)
            parts = {f".{gate}": columns for gate, columns in zip(GATES, gates, strict=False)}
        products = []
        for suffix, columns in parts.items():
            products.append(self.op("MatMul", x, self.constant(name + suffix, columns)))
            if matrix == "hh":
                products[-1].meta[RECURRENT] = True
        product = self.op("Concat", *products, axis=-1) if len(products) > 1 else products[0]
        if bias is None or not bias.any():
            return product
        return self.op("Add", product, self.constant(direction.name(f"bias_{matrix}"), bias))

    def split(self, value: ir.Value, sizes: list[int], axis: int) -> list[ir.Value]:
        name = self.name(f"Split_{len(self.tape.nodes)}")
        split = self.constant(f"{name}_sizes", np.array(sizes, np.int64))
        parts = self.tape.op_multi_out(
            "Split", [value, split], {"axis": axis}, num_outputs=len(sizes), name=name
        )
        for i, part in enumerate(parts):
            part.name = f"{name}_{i}"
        return list(parts)

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Unsqueeze", value, self.constant(f"axis_{axis}", np.array([axis])))

    def zeros(self, x: ir.Value, directions: int, size: int) -> ir.Value:
        """(directions, N, size) for x (T, N, I)."""
        batch = self.op("Gather", self.op("Shape", x), self.ints("batch", [1]), axis=0)
        shape = self.op(
            "Concat",
            self.ints("directions", [directions]),
            batch,
            self.ints("size", [size]),
            axis=0,
        )
        return self.op("ConstantOfShape", shape)


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
