"""A front-end inside a graph that somebody else exported: found, so that it stays in float."""

import onnx_ir as ir

from cnngru_edge.calibration.collect import FRONTEND_NODES

_FEATURES = frozenset({"Log", "STFT", "DFT", "MelWeightMatrix"})
_OF_NETWORKS = frozenset(
    {
        "BatchNormalization",
        "Elu",
        "Erf",
        "GRU",
        "Gelu",
        "HardSwish",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "LogSoftmax",
        "PRelu",
        "RNN",
        "Relu",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Tanh",
    }
)
"""What comes after features, and never before a logarithm or a transform that makes them."""


def mark_front_end(model: ir.Model) -> None:
    """Name all that leads to a logarithm or a Fourier transform as the front-end's nodes are named.

    If nothing of a network is before it. A power spectrum overflows FP16, and INT8 leaves nothing
    of what a logarithm reads: so whoever made the front-end, it stays in FP32.
    """
    for node in list(model.graph):
        if node.op_type not in _FEATURES or (node.name or "").startswith(FRONTEND_NODES):
            continue
        before = _ancestors(node)
        if any(found.op_type in _OF_NETWORKS for found in before) or not any(
            value is not None and value.is_graph_input()
            for found in before
            for value in found.inputs
        ):
            continue
        for found in before:
            if not (found.name or "").startswith(FRONTEND_NODES):
                found.name = f"{FRONTEND_NODES}{(found.name or '').lstrip('/')}"


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """The node, and all that it depends on."""
    found: set[ir.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            writers = (value.producer() for value in node.inputs if value is not None)
            left += [writer for writer in writers if writer is not None]
    return found
