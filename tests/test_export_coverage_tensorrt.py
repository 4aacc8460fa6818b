"""What of an engine inspector's words is taken for INT8, and what is not."""

import json

import pytest

from cnngru_edge.export.targets.trt.receipt import _BuiltLayer, tensorrt_coverage
from cnngru_edge.models.receipt import HIDDEN, INT8

HEAD = "/head/MatMul"
CONV = "/convs.1/conv/Conv"


def kernel(name=HEAD, **change):
    """A product of TensorRT 10, as NVIDIA/TensorRT#4397 shows one."""
    layer = {
        "Name": "/head/MatMul_myl0_7",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Dimensions": [1, 128], "Format/Datatype": "Int8"}],
        "TacticName": "",
        "Metadata": f"[ONNX Layer: {name}]",
    }
    return layer | change


def tensor(kind, *sizes, key="Format/Datatype"):
    return {"Name": "x", "Dimensions": list(sizes or (1, 128)), key: kind}


@pytest.fixture
def precision(exported):
    """In which precision a weight computes, of an engine with these layers."""

    def read(*layers, of="head"):
        graph = exported / "model.int8.tensorrt-fp16.chunk.onnx"
        receipt = tensorrt_coverage(graph, json.dumps({"Layers": layers}), "10.3.0")
        return {layer.name: layer.precision for layer in receipt.layers}[of]

    return read


@pytest.mark.parametrize(
    "key", ["Format/Datatype", "Datatype", "DataType", "Format/DataType", "datatype"]
)
def test_a_product_of_int8_is_found_however_its_type_is_called(precision, key):
    assert precision(kernel(Inputs=[tensor("Int8", key=key)])) == INT8
    assert precision(kernel(Inputs=[tensor("Half", key=key)])) == "fp16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format", INT8),
        ("Row major linear FP16 format", "fp16"),
        ("HALF", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
    ],
)
def test_types_are_read_as_versions_write_them(precision, text, expected):
    assert precision(kernel(Inputs=[tensor(text)])) == expected


def test_a_convolution_of_int8_has_weights_of_int8(precision):
    """NVIDIA/TensorRT#3737; its bias is in floats."""
    layer = {
        "Name": f"{CONV} + /convs.1/Relu",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("Row major Int8 format", 1, 32, 3, 20)],
        "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 13824},
        "Bias": {"Type": "Float", "Count": 48},
    }
    assert precision(layer, of="convs.1.conv") == INT8
    floats = layer | {"Weights": {"Type": "Half", "Count": 13824}}
    assert precision(floats, of="convs.1.conv") == "fp16"


def test_a_fused_product_of_the_compiler_is_one(precision):
    fused = kernel(Name="__myl_FcMulAdd_myl0_3", LayerType="runtime_fusion")
    assert precision(fused) == INT8
    assert precision(fused | {"LayerType": "kgen"}) == INT8
    assert precision(fused | {"Inputs": [tensor("Half")]}) == "fp16"


def test_what_it_reads_besides_is_no_objection_if_its_tactic_says_int8(precision):
    inputs = [tensor("Int8"), tensor("Half", 1, 12)]
    assert precision(kernel(Inputs=inputs, TacticName="sm80_xmma_gemm_i8i8_i8i32_f32_tn_n")) == INT8
    assert precision(kernel(Inputs=inputs)) == "fp16"


NOT_PROVEN = {
    "nothing": [],
    "names only": [HEAD],
    "a product without types": [kernel(Inputs=[])],
    "a product of types that are not known": [kernel(Inputs=[tensor("Int9")])],
    "another node's": [kernel("/head/MatMul_2")],
    "a cast": [kernel(LayerType="CastConvert")],
    "a copy": [kernel(LayerType="Reformat", Name="Reformatting CopyNode for /head/Add")],
    "arithmetic": [kernel(LayerType="kgen", Name="__myl_MulAdd_myl0_2")],
}


@pytest.mark.parametrize("kind", NOT_PROVEN)
def test_what_does_not_show_int8_is_not_taken_for_it(precision, kind):
    assert precision(*NOT_PROVEN[kind]) == "not proven"


def test_integers_that_are_only_stored_are_not_multiplied(precision):
    inputs = [tensor("Int8", 128, 12), tensor("Half")]
    assert precision(kernel(Inputs=inputs)) == "fp16"
    assert precision(kernel(Inputs=[tensor("Int8")], TacticName="sm80_gemm_f16f16_f32")) != INT8


@pytest.mark.parametrize(
    "block",
    [
        {"Name": "{ForeignNode[/grus.0/GRU/MatMul_1.../head/Add]}", "LayerType": "Myelin"},
        {"Name": "{ForeignNode[a...b]}", "LayerType": "ForeignNode"},
    ],
    ids=["8.6", "named"],
)
def test_only_a_block_that_is_not_opened_hides(precision, block):
    assert precision(block) == HIDDEN
    assert precision(block, kernel(), of="head") == INT8


@pytest.mark.parametrize(
    ("held", "weight", "expected"),
    [
        ("1,192,29", (192, 29), "Int8"),
        ("1,192,30", (192, 29), "Int8"),  # of which one is zeros
        ("30,192", (192, 29), "Int8"),
        ("1,6,16", (5, 15), "Int8"),
        ("1,192,31", (192, 29), None),
        ("1,192,32", (192, 30), None),
        ("1,96,30", (192, 29), None),
        ("64,48,3,3", (64, 48, 3, 3), "Int8"),
        ("64,64,3,3", (64, 48, 3, 3), "Int8"),
        ("32,48,3,3", (64, 48, 3, 3), None),
    ],
)
def test_a_weight_in_a_build_log_may_be_padded(held, weight, expected):
    """As TensorRT-RTX 1.7 does it."""
    line = (
        "Name: /head/MatMul_myl0_21, LayerType: gemm, Inputs: [ { Name: q, Dimensions: [1,1,192], "
        "Datatype: Int8, Format: (Linear) }], Constants: [ { Name: c, Dimensions: "
        f"[{held}], Strides: [1], Datatype: Int8, Format: (Transposed) Transposed format }}], "
        "Outputs: [ { Name: y, Dimensions: [1,1,30], Datatype: Half }], Metadata: [ONNX Layer: "
        "/head/MatMul]"
    )
    layer = _BuiltLayer.parse(line)
    assert layer.comes_from("/head/MatMul")
    assert layer.holding(weight) == expected
