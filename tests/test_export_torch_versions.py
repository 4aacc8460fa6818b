"""The float graphs are the same with every torch: operators, names and shapes of weights."""

import json
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from cnngru_edge.export.trace import tracer as onnx_trace
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.own.weights import load_own
from cnngru_edge.models.own.wrapper import OwnSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
KEPT = Path(__file__).parent / "float_graphs.json"
"""Written by `python tests/test_export_torch_versions.py`, with torch 2.11."""
MODELS = ("kws12", "intent", "digits", "keyword_crnn")


def model_of(name):
    if name != "keyword_crnn":
        return load_checkpoint(PRETRAINED / f"{name}.safetensors")
    spec = OwnSpec.load(EXAMPLES / "keyword_crnn.toml")
    return load_own("examples.keyword_crnn:KeywordCrnn", EXAMPLES / "keyword_crnn.pt", spec)


def described(path):
    """A line for each node, and one for each weight."""
    graph = onnx.load(path).graph
    nodes = []
    for node in graph.node:
        options = " ".join(
            f"{one.name}={helper.get_attribute_value(one)}"
            for one in sorted(node.attribute, key=lambda one: one.name)
        )
        given, made = ", ".join(node.input), ", ".join(node.output)
        nodes.append(f"{node.op_type} {node.name}: {given} -> {made} {options}".strip())
    weights = sorted(f"{one.name} {list(one.dims)}" for one in graph.initializer)
    return {"nodes": nodes, "weights": weights}


@pytest.mark.parametrize("name", MODELS)
def test_the_float_graph_is_the_same_with_every_torch(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent)
    path = tmp_path / "model.onnx"
    export_onnx(model_of(name).for_export(), path)
    assert described(path) == json.loads(KEPT.read_text())[name]


class Gone(Exception):
    """What an exporter that is no more may raise."""


def test_an_exporter_that_is_gone_names_the_tested_versions(tiny, tmp_path, monkeypatch):
    def export(*args, **options):
        raise Gone("dynamo=False has been removed")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(Gone):  # of a tested version, the reason as it is
        export_onnx(tiny.for_export(), tmp_path / "a.onnx")
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    oldest, newest = onnx_trace.TESTED
    with pytest.raises(ExportError) as found:
        export_onnx(tiny.for_export(), tmp_path / "a.onnx")
    assert str(found.value) == (
        "torch 2.99.0+cpu cannot export it (Gone: dynamo=False has been removed); tested are torch "
        f"{oldest} to {newest}: pip install 'torch=={newest}.*'"
    )


def test_what_torch_says_of_its_old_exporter_stays_from_the_user(tiny, tmp_path, monkeypatch):
    export = torch.onnx.export

    def deprecated(*args, **options):
        for kind in (DeprecationWarning, FutureWarning):
            warnings.warn("`torch.jit.trace` is deprecated", kind, stacklevel=2)
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", deprecated)
    path = tmp_path / "a.onnx"
    export_onnx(tiny.for_export(), path)  # warnings are errors here
    assert [node.op_type for node in ir.load(path).graph].count("GRU") == 2


if __name__ == "__main__":
    made = {}
    for each in MODELS:
        where = Path(f"/tmp/{each}.onnx")
        export_onnx(model_of(each).for_export(), where)
        made[each] = described(where)
    KEPT.write_text(f"{json.dumps(made, indent=0)}\n")
