import json
import shutil
import signal
import sys
from dataclasses import replace

import onnx
import pytest
from click.testing import CliRunner

from cnngru_edge.export.artefacts import INT8_FORMS
from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.chain.inspection import inspect
from cnngru_edge.export.cli import main
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets.trt.build import RTX_DEFAULT, BuildConfig, build
from cnngru_edge.models.errors import BackendMissing, ExportError
from cnngru_edge.models.receipt import INT8
from cnngru_edge.runtime.backends.trt.engine_file import read_engine, read_manifest

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")

CHUNK = "model.int8.tensorrt-fp16.chunk.onnx"
RTX = BuildConfig("tensorrt_rtx")

# Of kws12: four convolutions, the head, and the GRU's product over all frames and that of a frame,
# which the compiler unrolls eight times and keeps once more for the frames that are left over.
INT8_LAYERS = {"clip": 4 + 1 + 1 + 9, "chunk": 4 + 1 + 1 + 1}


@pytest.mark.parametrize("capability", RTX_DEFAULT)
@pytest.mark.parametrize("name", [name for name in INT8_FORMS if "tensorrt" in name])
def test_every_form_is_built_in_int8_for_every_gpu(exported, name, capability):
    built = build(exported / name, BuildConfig("tensorrt_rtx", capabilities=(capability,)))
    assert {layer.precision for layer in built.coverage.layers} == {INT8}
    assert built.capabilities == (capability,)
    assert len(built.engine) > 500_000
    # From the log itself, beside the receipt that is made of it.
    layers = [
        line
        for line in built.log.splitlines()
        if line.startswith("Name: ")
        and ("LayerType: gemm" in line or "LayerType: correlation" in line)
    ]
    in_int8 = [line for line in layers if line.count("Datatype: Int8") >= 2]  # data and weights
    assert len(in_int8) == len(layers) == INT8_LAYERS["clip" if "clip" in name else "chunk"]


@pytest.mark.parametrize("frames", [2, 8])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp16"])
def test_longer_chunks_are_built_in_int8_too(exported, tmp_path, target, frames):
    path = tmp_path / "chunk.onnx"
    quantize_onnx(exported / "model.fp32.onnx", exported / "ranges.json", path, target, frames)
    assert build(path, RTX).coverage.weights_int8 == 1


@pytest.mark.parametrize("name", [name for name in INT8_FORMS if "tensorrt" in name])
def test_streams_side_by_side_are_built_in_int8_too(exported, name):
    built = build(exported / name, replace(RTX, batch=8))
    assert built.max_batch == 8
    assert built.coverage.weights_int8 == 1


def test_a_float_graph_is_built_in_float_and_the_receipt_says_so(exported):
    receipt = build(exported / "model.fp32.onnx", RTX).coverage
    assert receipt.weights_int8 == 0
    assert {layer.precision for layer in receipt.layers if "conv" in layer.name} == {"fp32"}


def test_a_product_without_its_pair_is_named(exported, tmp_path):
    proto = onnx.load(exported / CHUNK)
    head = next(node for node in proto.graph.node if node.name == "/head/MatMul")
    pair = next(node for node in proto.graph.node if node.output[0] == head.input[0])
    quantize = next(node for node in proto.graph.node if node.output[0] == pair.input[0])
    head.input[0] = quantize.input[0]
    onnx.save(proto, tmp_path / "broken.onnx")
    receipt = build(tmp_path / "broken.onnx", RTX).coverage
    found = {layer.name: layer.precision for layer in receipt.layers}
    assert found.pop("head") != INT8
    assert set(found.values()) == {INT8}
    with pytest.raises(ExportError, match=r"broken: 99\.\d% .* not in INT8: head \("):
        receipt.check("broken", 0.999)


def test_an_engine_has_a_manifest_with_its_receipt(exported):
    name = "model.int8.chunk.rtx.engine"
    data, manifest = read_engine(exported / name)
    assert manifest == read_manifest(exported / name)
    assert manifest.builder.capabilities == RTX_DEFAULT
    assert manifest.builder.name == f"TensorRT-RTX {rtx.__version__}"
    assert (manifest.builder.gpu, manifest.builder.driver) == (None, None)
    assert (manifest.max_batch, manifest.max_samples) == (1, manifest.spec.chunk_length)
    assert manifest.precision == INT8
    assert manifest.source == CHUNK
    assert manifest.coverage.weights_int8 == 1
    found = inspect(exported / name)
    assert found["coverage"] == manifest.coverage.to_json()
    assert found["sha256"] == manifest.sha256
    assert found["size_bytes"] == (exported / name).stat().st_size == len(data)


def test_a_gpu_that_the_builder_does_not_know_is_named(exported):
    with pytest.raises(ExportError, match=r"compute capability '8\.7'; it does for .*8\.6"):
        build(exported / CHUNK, replace(RTX, capabilities=("8.7",)))


def test_a_graph_for_a_cpu_is_refused(exported, tmp_path):
    with pytest.raises(ExportError, match=r"model\.int8\.onnx: quantized for a CPU; .*--target"):
        write_engine(exported / "model.int8.onnx", tmp_path / "a.engine", RTX)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_breaks_a_rule_does_not_reach_the_builder(exported, tmp_path):
    proto = onnx.load(exported / CHUNK)
    proto.ir_version = 12
    onnx.save(proto, tmp_path / "new.onnx")
    with pytest.raises(ExportError, match="ir-version"):
        build(tmp_path / "new.onnx", RTX)


def test_an_engine_does_not_take_the_place_of_its_graph(exported, tmp_path):
    graph = tmp_path / CHUNK
    graph.write_bytes((exported / CHUNK).read_bytes())
    with pytest.raises(ExportError, match=r"an engine's name ends with \.engine"):
        write_engine(graph, graph, RTX)
    assert graph.read_bytes() == (exported / CHUNK).read_bytes()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_it_builds_is_a_stop(exported, tmp_path, stop, monkeypatch):
    """It swallows what a logger or a monitor raises, a signal's exception too."""

    class Stopped(BaseException):
        pass

    def handler(number, frame):
        raise Stopped

    before = signal.signal(stop, handler)
    try:
        with pytest.raises(Stopped):
            write_engine(
                exported / CHUNK,
                tmp_path / "a.rtx.engine",
                RTX,
                progress=lambda *_: signal.raise_signal(stop),
            )
        assert signal.getsignal(stop) is handler
    finally:
        signal.signal(stop, before)
    assert list(tmp_path.iterdir()) == []


def test_the_matrices_of_the_front_end_are_constants(exported):
    """TensorRT would compute them in each step."""
    log = build(exported / CHUNK, RTX).log
    layers = [line for line in log.splitlines() if line.startswith("Name: ")]
    assert any("/log_mel/MatMul" in line for line in layers)
    assert not any("/log_mel/constants/" in line for line in layers)


def test_too_little_in_int8_leaves_no_engine(exported, tmp_path):
    result = CliRunner().invoke(
        main, ["build", str(exported / "model.fp32.onnx"), "--out", str(tmp_path / "a.rtx.engine")]
    )
    assert result.exit_code == 1
    assert "0.0% of its weights compute in INT8, asked are 95.0%" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.rtx.engine", "a.engine"])
def test_build_writes_an_engine(exported, tmp_path, name):
    out = tmp_path / name
    arguments = ["build", str(exported / CHUNK), "--out", str(out), "--capability", "8.9"]
    if not name.endswith(".rtx.engine"):
        arguments += ["--target", "tensorrt-rtx"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "100.0% of the weights in INT8" in result.stdout
    inspected = CliRunner().invoke(main, ["inspect", "--json", str(out)])
    assert json.loads(inspected.stdout)["target"] == "compute capability 8.9"


def test_an_engine_that_is_there_is_built_again_only_if_something_differs(exported, tmp_path):
    out = tmp_path / "a.rtx.engine"
    first, notes = write_engine(exported / CHUNK, out, RTX)
    assert notes == ()
    written = out.stat().st_mtime_ns
    assert write_engine(exported / CHUNK, out, RTX) == (first, (f"{out} is up to date",))
    assert out.stat().st_mtime_ns == written
    with pytest.raises(ExportError, match="asked are"):
        write_engine(exported / CHUNK, out, RTX, min_coverage=1.1)
    second, notes = write_engine(exported / CHUNK, out, replace(RTX, batch=4))
    assert second.max_batch == 4
    assert read_engine(out)[1] == second
    assert [note.startswith(f"{out} is built again: its options was") for note in notes] == [True]
    out.write_bytes(b"vtrt")
    third, notes = write_engine(exported / CHUNK, out, replace(RTX, batch=4))
    assert [note.startswith(f"{out} is built again: {out}: ") for note in notes] == [True]
    assert read_engine(out)[1] == third


def test_without_the_builder_its_package_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendMissing, match=r"cnngru-edge\[tensorrt-rtx\]"):
        build(exported / CHUNK, RTX)
    assert inspect(exported / CHUNK)["coverage"] is None


def test_an_export_without_the_builder_leaves_no_engine_of_an_earlier_one(
    exported, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    result = CliRunner().invoke(main, ["export", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "pip install 'cnngru-edge[tensorrt-rtx]'" in result.stdout
    assert not [path.name for path in out.iterdir() if ".engine" in path.name]
    assert json.loads((out / "coverage.json").read_text()).keys() == {
        "model.int8.onnx",
        "model.int8.chunk.onnx",
    }
