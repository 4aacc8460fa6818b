"""The float ONNX graph of a model that takes its input whole, ours or its owner's."""

import onnx_ir as ir
import torch

from cnngru_edge.export.normal_form import normalize
from cnngru_edge.export.onnx_trace import traced
from cnngru_edge.export.own_onnx import OnnxModel, graph_of
from cnngru_edge.models.errors import ExportError, SpecError
from cnngru_edge.models.own import OwnModel, has_cells
from cnngru_edge.models.whole import WholeModel
from cnngru_edge.models.whole_spec import LETTERS, fixed_length_of
from cnngru_edge.runtime.inputs import example_input

_RECURRENT = {"GRU", "LSTM", "RNN"}
_WRAPPED = "module"
"""What an OwnModel calls the module that it wraps; its layers should be named as its owner does."""


def whole_graph(model: WholeModel) -> ir.Model:
    """The graph in normal form, batch and length free where the model and its spec allow it.

    Raises:
        ExportError: torch cannot trace it.
    """
    if isinstance(model, OnnxModel):
        return graph_of(model)
    spec = model.spec
    example = torch.from_numpy(example_input(spec)[None])
    name = spec.input.name
    free: dict[str, dict[int, str]] = {name: {}, "logits": {}}
    if not isinstance(model, OwnModel) or model.free_batch:
        free[name][0] = free["logits"][0] = "N"
    if spec.writes_text:
        free["logits"][1] = "T"
    if fixed_length_of(spec.input) is None:
        free[name][example.dim() - 1] = LETTERS[name]
    if not isinstance(model, OwnModel):
        graph = traced(model, (example,), [name], ["logits"], free)
    else:
        graph = _traced_own(model, example, free)
    normalize(graph)
    return graph


def _traced_own(
    model: OwnModel, example: torch.Tensor, free: dict[str, dict[int, str]]
) -> ir.Model:
    try:
        graph = traced(model, (example,), list(free)[:1], ["logits"], free)
    except SpecError:
        raise
    except Exception as e:  # torch's exporter has no common base, and runs the owner's code
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ExportError(
            f"this module cannot be traced ({type(e).__name__}: {reason}); what is computed of "
            "audio belongs under [input.features] of the spec, and forward may use tensors only"
        ) from e
    for node in graph.graph.all_nodes():
        node.name = (node.name or "").replace(f"/{_WRAPPED}/", "/", 1)
        if node.op_type in _RECURRENT and len(node.inputs) > 4 and node.inputs[4] is not None:
            node.replace_input_with(4, None)  # lengths: every clip is whole here
    for value in list(graph.graph.initializers.values()):
        own = (value.name or "").removeprefix(f"{_WRAPPED}.")
        if own != value.name and own not in graph.graph.initializers:
            value.name = own
    return graph


def advice(model: WholeModel) -> str:
    """What may be the matter with a graph that does not answer as its module does."""
    if not isinstance(model, OwnModel) or isinstance(model, OnnxModel):
        return ""
    if has_cells(model) and fixed_length_of(model.spec.input) is None:
        return (
            "; its cells are called in a loop over frames in Python, so the graph is for one "
            "length: give that under [input] of the spec"
        )
    return "; forward may do in Python what depends on its input, which cannot be traced"
