import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from cnngru_edge.export.cli import main
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets.cpu_receipt import (
    INT8,
    Coverage,
    Layer,
    multiplies_integers,
    onnxruntime_coverage,
)
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.models.errors import ExportError

NAMES = [
    *(f"convs.{i}.conv" for i in range(4)),
    "grus.0.weight_ih_l0",
    "grus.0.weight_hh_l0",
    "head",
]


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8.chunk.onnx"])
def test_the_whole_network_computes_in_int8(exported, kws12, name):
    receipt = onnxruntime_coverage(exported / name)
    assert sorted(layer.name for layer in receipt.layers) == sorted(NAMES)
    assert {layer.precision for layer in receipt.layers} == {INT8}
    assert receipt.weights_int8 == receipt.macs_int8 == 1
    sizes = {layer.name: (layer.weights, layer.bytes, layer.macs) for layer in receipt.layers}
    frames = 50  # a second
    for i, block in enumerate(kws12.for_export().convs):
        count = block.conv.weight.numel()
        (_, bins) = kws12.spec.conv_shapes[i + 1]
        assert sizes[f"convs.{i}.conv"] == (count, count, count * bins * frames)
    for matrix in ("ih", "hh"):
        count = getattr(kws12.grus[0], f"weight_{matrix}_l0").numel()
        assert sizes[f"grus.0.weight_{matrix}_l0"] == (count, count, count * frames)
    assert sizes["head"] == (12 * 128, 12 * 128, 12 * 128 * frames)


def test_a_float_model_computes_in_float(exported):
    receipt = onnxruntime_coverage(exported / "model.fp32.onnx")
    assert {layer.precision for layer in receipt.layers} == {"fp32"}
    assert receipt.weights_int8 == receipt.macs_int8 == 0
    found = {layer.name: layer for layer in receipt.layers}
    assert found["grus.0.weight_ih_l0"].macs == 384 * 320 * 50
    assert found["grus.0.weight_hh_l0"].bytes == 4 * 384 * 128
    with pytest.raises(
        ExportError,
        match=r"^float: 0\.0% of its weights compute in INT8, asked are 95\.0%; not in INT8: .*"
        r"grus\.0\.weight_hh_l0 \(fp32\)",
    ):
        receipt.check("float", 0.95)


def test_int8_weights_in_front_of_a_float_operator_are_not_taken_for_int8(exported, tmp_path):
    """What other quantizers leave of a GRU: small on disk, and float."""
    proto = onnx.load(exported / "model.fp32.onnx")
    weight = next(i for i in proto.graph.initializer if i.name == "grus.0.W")
    values = numpy_helper.to_array(weight)
    integers = (values / abs(values).max() * 127).round().astype("int8")
    weight.CopyFrom(numpy_helper.from_array(integers, "integers"))
    scale = numpy_helper.from_array((abs(values).max() / 127).astype("float32"), "scale")
    proto.graph.initializer.append(scale)
    node = onnx.helper.make_node("DequantizeLinear", ["integers", "scale"], ["grus.0.W"])
    proto.graph.node.insert(0, node)
    onnx.save(proto, tmp_path / "weights.onnx")
    receipt = onnxruntime_coverage(tmp_path / "weights.onnx")
    (found,) = (layer for layer in receipt.layers if layer.name == "grus.0.weight_ih_l0")
    assert found.precision == "fp32 (int8 weights)"
    assert found.bytes == found.weights
    assert receipt.weights_int8 == 0


def test_float_products_in_a_loop_are_found(exported, tmp_path):
    """MatMulNBits without its accuracy level is free to compute in float, and does."""
    proto = onnx.load(exported / "model.int8.onnx")
    (scan,) = (node for node in proto.graph.node if node.op_type == "Scan")
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    (product,) = (node for node in body.node if node.op_type == "MatMulNBits")
    for attribute in product.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    onnx.save(proto, tmp_path / "float.onnx")
    assert not multiplies_integers(1)
    receipt = onnxruntime_coverage(tmp_path / "float.onnx")
    precisions = {layer.name: layer.precision for layer in receipt.layers}
    assert precisions.pop("grus.0.weight_hh_l0") == "fp32 (int8 weights)"
    assert set(precisions.values()) == {INT8}


def test_one_float_frame_of_several_is_found(exported, tmp_path):
    path = tmp_path / "chunk.onnx"
    quantize_onnx(exported / "model.fp32.onnx", exported / "ranges.json", path, frames=3)
    proto = onnx.load(path)
    product = next(node for node in proto.graph.node if node.op_type == "MatMulNBits")
    for attribute in product.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    onnx.save(proto, path)
    receipt = onnxruntime_coverage(path)
    found = {layer.name: layer.precision for layer in receipt.layers}
    assert found["grus.0.weight_hh_l0"] == "fp32 (int8 weights)+int8"
    assert receipt.weights_int8 < 0.9


def test_weights_of_an_operator_that_is_not_known_are_not_taken_for_int8(exported, tmp_path):
    proto = onnx.load(exported / "model.int8.onnx")
    node = next(node for node in proto.graph.node if node.name == "/head/MatMul_int8")
    float_head = np.zeros((128, 12), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(float_head, "float_head"))
    quantize = next(n for n in proto.graph.node if n.output[0] == node.input[0])
    einsum = onnx.helper.make_node(
        "Einsum", [quantize.input[0], "float_head"], node.output, equation="tnh,hc->tnc"
    )
    position = list(proto.graph.node).index(node)
    proto.graph.node.remove(node)
    proto.graph.node.insert(position, einsum)
    onnx.save(proto, tmp_path / "einsum.onnx")
    receipt = onnxruntime_coverage(tmp_path / "einsum.onnx")
    missing = receipt.layers[-1]
    assert (missing.name, missing.precision, missing.weights) == ("(not found)", "not known", 1536)
    assert receipt.weights_int8 == pytest.approx(1 - 1536 / 252_704)


def test_every_layer_of_a_deeper_model_has_its_own_line(tiny, tmp_path):
    export_onnx(tiny.for_export(), tmp_path / "tiny.onnx")
    names = [layer.name for layer in onnxruntime_coverage(tmp_path / "tiny.onnx").layers]
    assert [name for name in names if "gru" in name] == [
        f"grus.{i}.weight_{matrix}_l0" for i in range(2) for matrix in ("ih", "hh")
    ]


def test_shares_are_of_weights_and_of_multiply_accumulates():
    layers = (Layer("a", INT8, 30, 30, 900), Layer("b", "fp32", 10, 40, 100))
    receipt = Coverage("somewhere", layers)
    assert (receipt.weights_int8, receipt.macs_int8) == (0.75, 0.9)
    receipt.check("model", 0.75)
    with pytest.raises(
        ExportError,
        match=r"model: 75\.0% of its weights compute in INT8, asked are 75\.1%; not in INT8: "
        r"b \(fp32\) \(read from somewhere\)",
    ):
        receipt.check("model", 0.751)


def test_inspect_shows_the_receipt(exported):
    result = CliRunner().invoke(main, ["inspect", str(exported / "model.int8.onnx")])
    assert result.exit_code == 0
    for name in NAMES:
        assert name in result.stdout
    assert "100.0% of the weights and 100.0% of the multiply-accumulates in INT8" in result.stdout


def test_an_export_writes_the_receipts_of_all_that_it_makes(exported):
    pytest.importorskip("tensorrt_rtx", reason="without TensorRT-RTX some have none")
    receipts = json.loads((exported / "coverage.json").read_text())
    made = {path.name for path in exported.iterdir()}
    int8 = {name for name in made if ".int8." in name and not name.endswith(".json")}
    assert receipts.keys() == int8
    assert all(receipt["weights_int8"] >= 0.95 for receipt in receipts.values())


def test_quantize_fails_below_the_coverage_that_is_asked(exported, tmp_path, monkeypatch):
    """A processor without the kernel: MatMulNBits then computes in float."""
    monkeypatch.setattr(
        "cnngru_edge.export.targets.cpu_receipt.multiplies_integers", lambda level: False
    )
    result = CliRunner().invoke(
        main,
        [
            "quantize",
            str(exported / "model.fp32.onnx"),
            "--ranges",
            str(exported / "ranges.json"),
            "--out",
            str(tmp_path / "out.onnx"),
        ],
    )
    assert result.exit_code == 1
    assert "not in INT8: grus.0.weight_hh_l0 (fp32 (int8 weights))" in result.stderr
    assert list(tmp_path.iterdir()) == []
