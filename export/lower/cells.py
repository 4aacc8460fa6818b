"""One frame of a GRU or LSTM as ordinary operators, and what writes them down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from cnngru_edge.export.graph.qdq import RECURRENT, Floats, named, stored

HIDDEN = "cnngru_edge.hidden"
"""Mark in `Value.meta` of a hidden state: in [-1, 1], whatever the data. That of a GRU is a mean of
tanh values and of itself, that of an LSTM a tanh value times a sigmoid."""


@dataclass(frozen=True)
class Cell:
    """A direction of a recurrent operator; columns of its weights in the order of its gates."""

    gates: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]]

    weight_name: str  # to be filled with weight_ih, weight_hh, bias_ih or bias_hh
    backward: bool
    input_weight: Floats  # (I, G H)
    input_bias: Floats  # (G H,), with all of the recurrent bias that can be added to it
    hidden_weight: Floats  # (H, G H)

    @property
    def hidden_size(self) -> int:
        """H."""
        return len(self.hidden_weight)

    @property
    def parts(self) -> dict[str, int]:
        """What the projected input of a frame is taken apart into: names and columns."""
        raise NotImplementedError

    def name(self, parameter: str) -> str:
        """Of a parameter of this direction."""
        return self.weight_name.format(parameter)

    def step(
        self, at: "Builder", projected: Sequence[ir.Value], states: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """The next states, of the parts of the projected input and the states, (N, H) each."""
        raise NotImplementedError


@dataclass(frozen=True)
class GruCell(Cell):
    """Gates in ONNX's order: update z, reset r, new n."""

    gates = ("z", "r", "n")
    states = ("h",)

    hidden_bias: Floats  # (H,), inside the product with r
    linear_before_reset: bool

    @property
    def parts(self) -> dict[str, int]:
        """Update and reset gate, which take a sigmoid, and the new gate."""
        return {"x_zr": 2 * self.hidden_size, "x_n": self.hidden_size}

    def step(
        self, at: "Builder", projected: Sequence[ir.Value], states: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """(1 - z) n + z h."""
        (x_zr, x_n), (h,) = projected, states
        size = self.hidden_size
        zr_weight, n_weight = np.split(self.hidden_weight, [2 * size], axis=1)
        if self.linear_before_reset:
            bias = np.concatenate([np.zeros(2 * size, np.float32), self.hidden_bias])
            product = at.linear(h, self, "hh", self.hidden_weight, bias)
            h_zr, h_n = at.split(product, [2 * size, size], axis=1)
        else:
            h_zr = at.linear(h, self, "hh", zr_weight, part=".zr")
        z, r = at.split(at.op("Sigmoid", at.op("Add", x_zr, h_zr)), [size, size], axis=1)
        if self.linear_before_reset:
            h_n = at.op("Mul", r, h_n)
        else:
            reset = at.op("Mul", r, h)
            reset.meta[HIDDEN] = True  # smaller than h
            h_n = at.linear(reset, self, "hh", n_weight, part=".n")
        n = at.op("Tanh", at.op("Add", x_n, h_n))
        # In one product less.
        return [at.op("Add", n, at.op("Mul", z, at.op("Sub", h, n)))]


@dataclass(frozen=True)
class LstmCell(Cell):
    """Gates in ONNX's order: input i, output o, forget f, cell c."""

    gates = ("i", "o", "f", "c")
    states = ("h", "c")

    @property
    def parts(self) -> dict[str, int]:
        """All gates together."""
        return {"x_iofc": 4 * self.hidden_size}

    def step(
        self, at: "Builder", projected: Sequence[ir.Value], states: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """O tanh(f c + i c'), and what the tanh is of."""
        (x,), (h, c) = projected, states
        size = self.hidden_size
        total = at.op("Add", x, at.linear(h, self, "hh", self.hidden_weight))
        of_sigmoid, of_tanh = at.split(total, [3 * size, size], axis=1)
        i, o, f = at.split(at.op("Sigmoid", of_sigmoid), [size] * 3, axis=1)
        new = at.op("Mul", i, at.op("Tanh", of_tanh))
        c_next = at.op("Add", at.op("Mul", f, c), new)
        return [at.op("Mul", o, at.op("Tanh", c_next)), c_next]


@dataclass(frozen=True)
class Builder:
    """Nodes on a tape, all named below one prefix."""

    tape: ir.tape.Tape
    prefix: str
    by_gate: bool

    def within(self, part: str) -> "Builder":
        """The same below a longer prefix."""
        return Builder(self.tape, self.prefix + part, self.by_gate)

    def name(self, part: str) -> str:
        """Below the prefix."""
        return self.prefix + part

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """The output of a node."""
        return named(
            self.tape.op(op_type, inputs, attributes),
            self.name(f"{op_type}_{len(self.tape.nodes)}"),
        )

    def ints(self, name: str, value: int | list[int]) -> ir.Value:
        """A constant of int64."""
        return self.constant(self.name(name), np.array(value, np.int64))

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer of the graph that the tape is for; one for the same name and value."""
        return stored(self.tape, name, value)

    def linear(
        self,
        x: ir.Value,
        cell: Cell,
        matrix: str,
        weight: Floats,
        bias: Floats | None = None,
        part: str = "",
    ) -> ir.Value:
        """A product with a weight, and an Add if the bias says anything."""
        name = cell.name(f"weight_{matrix}")
        parts = {part: weight}
        if self.by_gate and part != ".n":
            gates = np.split(weight, weight.shape[1] // cell.hidden_size, axis=1)
            parts = {f".{gate}": columns for gate, columns in zip(cell.gates, gates, strict=False)}
        products = []
        for suffix, columns in parts.items():
            products.append(self.op("MatMul", x, self.constant(name + suffix, columns)))
            if matrix == "hh":
                products[-1].meta[RECURRENT] = True
        product = self.op("Concat", *products, axis=-1) if len(products) > 1 else products[0]
        if bias is None or not bias.any():
            return product
        return self.op("Add", product, self.constant(cell.name(f"bias_{matrix}"), bias))

    def split(self, value: ir.Value, sizes: list[int], axis: int) -> list[ir.Value]:
        """Parts of these sizes."""
        if len(sizes) == 1:
            return [value]
        name = self.name(f"Split_{len(self.tape.nodes)}")
        split = self.constant(f"{name}_sizes", np.array(sizes, np.int64))
        parts = self.tape.op_multi_out(
            "Split", [value, split], {"axis": axis}, num_outputs=len(sizes), name=name
        )
        for i, part in enumerate(parts):
            part.name = f"{name}_{i}"
        return list(parts)

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        """With a dimension of size 1."""
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
