"""Placeholder until the real one is merged."""

import onnx_ir as ir


def normalize(model: ir.Model) -> None:
    """Nothing yet."""
