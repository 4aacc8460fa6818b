"""The float ONNX graph of a model that takes its input whole, ours or its owner's."""

import onnx_ir as ir
import torch

from cnngru_edge.export.normalize.normal_form import normalize
from cnngru_edge.export.trace.own import own_graph
from cnngru_edge.export.trace.tracer import traced
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.own.wrapper import OwnModel
from cnngru_edge.models.spec.whole import LETTERS, fixed_length_of
from cnngru_edge.runtime.inputs.read import example_input


def whole_graph(model: WholeModel) -> ir.Model:
    """The graph in normal form, batch and length free where the model and its spec allow it.

    Raises:
        ExportError: a module that is not ours cannot be traced.
    """
    if isinstance(model, OwnModel):
        return own_graph(model)
    spec = model.spec
    example = torch.from_numpy(example_input(spec)[None])
    free = {spec.input.name: {0: "N"}, "logits": {0: "N"}}
    if spec.writes_text:
        free["logits"][1] = "T"
    if fixed_length_of(spec.input) is None:
        free[spec.input.name][example.dim() - 1] = LETTERS[spec.input.name]
    graph = traced(model, (example,), [spec.input.name], ["logits"], free)
    normalize(graph)
    return graph
