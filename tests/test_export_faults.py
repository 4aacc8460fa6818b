"""ONNX files that torch's newer exporter has damaged, and files that only look so."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnngru_edge.export.commands.source import Source, load_source
from cnngru_edge.export.trace.faults import frozen_time_of, wrong_answers_of
from cnngru_edge.models.errors import SpecError

MELS, HIDDEN, FRAMES = 40, 8, 51
SPEC = """
labels = ["yes", "no", "other"]
[input]
kind = "audio"
layout = "NTM"
least_samples = 8000
[input.features]
n_fft = 512
win_length = 400
hop_length = 160
n_mels = 40
"""


def weights(rng, **shapes):
    return [
        numpy_helper.from_array(0.3 * rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]


def gru_file(path, producer="pytorch", tail=(), **attributes):
    """A GRU and a linear layer as torch's newer exporter writes them."""
    make = helper.make_node
    rng = np.random.default_rng(0)
    gru = make(
        "GRU",
        ["steps", "W", "R", "B"],
        ["found", "last"],
        "node_GRU_47",
        hidden_size=HIDDEN,
        **attributes,
    )
    gru.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'gru', 'gru']")
    nodes = [
        make("Transpose", ["x"], ["steps"], "node_Transpose_8", perm=[1, 0, 2]),
        gru,
        *(tail or [make("Squeeze", ["last", "first"], ["hidden"], "node_Squeeze_9")]),
        make("Gemm", ["hidden", "fc.weight", "fc.bias"], ["logits"], "node_linear", transB=1),
    ]
    kept = weights(
        rng,
        W=(1, 3 * HIDDEN, MELS),
        R=(1, 3 * HIDDEN, HIDDEN),
        B=(1, 6 * HIDDEN),
        **{"fc.weight": (3, HIDDEN), "fc.bias": (3,)},
    )
    numbers = {"first": [0], "second": [1], "frames": [FRAMES], "width": [HIDDEN], "last_axis": [2]}
    kept += [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in numbers.items()]
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", MELS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        kept,
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10, producer_name=producer)
    model.producer_version = "2.11.0"
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def frozen_tail():
    """`lengths.expand_as(found)` with the frames of the example in its shape."""
    make = helper.make_node
    return [
        make("Squeeze", ["last", "first"], ["of_last"], "node_Squeeze_9"),
        make("Unsqueeze", ["of_last", "second"], ["unsqueeze_1"], "node_unsqueeze_1"),
        make("Shape", ["x"], ["val_0"], "node_Shape_0", start=0, end=1),
        make("Concat", ["val_0", "frames", "width"], ["val_86"], "node_Concat_86", axis=0),
        make("Expand", ["unsqueeze_1", "val_86"], ["expand"], "node_expand"),
        make("Squeeze", ["found", "second"], ["one_way"], "node_Squeeze_10"),
        make("Transpose", ["one_way"], ["rows"], "node_Transpose_51", perm=[1, 0, 2]),
        make("Add", ["rows", "expand"], ["sum"], "node_add"),
        make("ReduceMean", ["sum", "second"], ["hidden"], "node_mean", keepdims=0),
    ]


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    return path


@pytest.mark.parametrize("attributes", [{}, {"linear_before_reset": 0}])
def test_a_gru_that_torch_has_never_had_is_named(tmp_path, spec, attributes):
    path = gru_file(tmp_path / "a.onnx", **attributes)
    _, _, known = load_source(Source(onnx=path, spec=spec))
    assert known == [
        "node_GRU_47 (gru): linear_before_reset is 0, as torch's nn.GRU never is, so the file "
        "answers otherwise than the module did, by a fault of torch's newer exporter with "
        "onnxscript 0.6; export it again with torch.onnx.export(..., dynamo=False), or with "
        "onnxscript 0.7.2 or newer, or give the module itself with --model"
    ]


@pytest.mark.parametrize(
    ("producer", "attributes"), [("pytorch", {"linear_before_reset": 1}), ("tf2onnx", {}), ("", {})]
)
def test_a_gru_as_its_exporter_meant_it_is_not_warned_of(tmp_path, spec, producer, attributes):
    path = gru_file(tmp_path / "a.onnx", producer, **attributes)
    assert load_source(Source(onnx=path, spec=spec))[2] == []
    assert wrong_answers_of(ir.load(path)) is None


def test_all_that_are_wrong_are_named_those_in_functions_too(tmp_path):
    model = ir.load(gru_file(tmp_path / "a.onnx"))
    gru = next(node for node in model.graph if node.op_type == "GRU")
    inner = ir.Node("", "GRU", [], num_outputs=1, name="inner_gru")
    body = ir.Graph([], [], nodes=[inner])
    function = ir.Function("own", "f", "", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    found = wrong_answers_of(model)
    assert found.startswith("node_GRU_47 (gru), inner_gru: linear_before_reset is 0")
    gru.attributes["linear_before_reset"] = ir.AttrInt64("linear_before_reset", 1)
    assert wrong_answers_of(model).startswith("inner_gru: ")


def test_time_that_is_frozen_is_the_reason_of_what_does_not_run(tmp_path, spec):
    path = gru_file(tmp_path / "a.onnx", tail=frozen_tail(), linear_before_reset=1)
    with pytest.raises(SpecError) as found:
        load_source(Source(onnx=path, spec=spec))
    assert str(found.value).endswith(
        f"; node_expand expands to {FRAMES} frames however long the input is, by a fault of "
        "torch's newer exporter before 2.15; export it again with torch.onnx.export(..., "
        "dynamo=False), or with torch 2.15 or newer"
    )


def test_another_reason_is_given_alone(tmp_path, spec):
    spec.write_text(SPEC.replace('"other"]', '"other", "more"]'))
    path = gru_file(tmp_path / "a.onnx", linear_before_reset=1)
    with pytest.raises(SpecError, match=r"3 logits, the spec has 4 labels$"):
        load_source(Source(onnx=path, spec=spec))
    assert frozen_time_of(ir.load(path)) is None


def test_a_shape_of_constants_alone_is_not_frozen_time(tmp_path):
    path = gru_file(tmp_path / "a.onnx", tail=frozen_tail(), producer="tf2onnx")
    assert frozen_time_of(ir.load(path)) is None


def test_the_command_line_warns_in_one_line(cli, tmp_path, spec):
    path = gru_file(tmp_path / "a.onnx")
    done = cli("trace", "--onnx", path, "--spec", spec, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: node_GRU_47 (gru): linear_before_reset is 0, ")
    assert done.stderr.count("\n") == 1
