"""Lowerings of the GRU operator: what becomes of it in each precision and for each target."""

import onnx_ir as ir

from cnngru_edge.export.integer import dequantized_weight

W, R = 1, 2  # inputs of the ONNX GRU operator: input weights, recurrent weights
_GATE_ROWS = 1  # axis of both: (directions, 3 H, input or H)


def quantize_gru_weights(tape: ir.tape.Tape, node: ir.Node) -> None:
    """Store a GRU's two weight matrices as INT8, one scale for each row of each gate.

    The operator itself computes in float: ONNX Runtime has no integer GRU, so this saves size and
    memory traffic and rounds the weights only.
    """
    for index in (W, R):
        weight = node.inputs[index]
        assert weight is not None
        node.replace_input_with(index, dequantized_weight(tape, weight, axis=_GATE_ROWS))
