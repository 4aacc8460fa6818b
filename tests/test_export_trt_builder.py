"""Builds by every version of TensorRT, all simulated; see simulated_gpu for what that can show."""

import shutil
import signal
import sys

import onnx
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
import simulated_gpu
from simulated_gpu import BOTH, ONE_OF_EACH, RTX, STRONG_ONLY, VERSIONS, WEAK_ONLY

from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.targets.trt.build import BuildConfig, build, can_build, target_of
from cnngru_edge.models.errors import BackendMissing, ExportError, SessionError
from cnngru_edge.models.receipt import HIDDEN, INT8
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.engine_file import manifest_path, read_engine, read_header
from cnngru_edge.runtime.machine import jetson

TENSORRT = [version for version in VERSIONS if version != RTX]
ORIN = "Orin (16 multiprocessors)"
OLD, FP16 = "model.int8.tensorrt.{}.onnx", "model.int8.tensorrt-fp16.{}.onnx"
MIB = 1 << 20


@pytest.fixture
def simulate(monkeypatch):
    """Let the adapter find a simulated TensorRT and GPU; both."""

    def install(version="10.3.0", **device):
        return simulated_gpu.install(monkeypatch, version, **device)

    return install


def built_by(trt, graph, *, timing_cache=None, progress=None, **options):
    """What a build makes, and what the builder was given."""
    more = {} if progress is None else {"progress": progress}
    config = BuildConfig(library=trt.__name__, **options)
    made = build(graph, config, timing_cache=timing_cache, **more)
    return made, trt.builds[-1]


# Typing.


@pytest.mark.parametrize("version", WEAK_ONLY)
@pytest.mark.parametrize("form", ["clip", "chunk"])
def test_before_strong_typing_flags_choose_and_the_front_end_stays_float(
    exported, simulate, version, form
):
    _, trt = simulate(version)
    made, given = built_by(trt, exported / OLD.format(form))
    assert (made.typing, made.flags) == ("weak", ("INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"))
    assert given.flags == set(made.flags)
    assert given.network_flags == {"EXPLICIT_BATCH"}
    nodes = onnx.load(exported / OLD.format(form)).graph.node
    products = [n.name for n in nodes if n.name.startswith("/log_mel/") and n.op_type == "MatMul"]
    assert len(products) == 3
    for name in products:
        assert given.precisions[name] == {"precision": "FLOAT", 0: "FLOAT"}
    assert all(name.startswith("/log_mel/") for name in given.precisions)


@pytest.mark.parametrize("version", WEAK_ONLY)
def test_without_fp16_what_is_not_int8_is_float(exported, simulate, version):
    _, trt = simulate(version)
    made, given = built_by(trt, exported / OLD.format("chunk"), fp16=False)
    assert given.flags == set(made.flags) == {"INT8"}
    assert given.precisions == {}


@pytest.mark.parametrize("name", [OLD, FP16])
@pytest.mark.parametrize("version", BOTH)
def test_where_both_typings_are_the_strong_one_is_taken(exported, simulate, version, name):
    _, trt = simulate(version)
    made, given = built_by(trt, exported / name.format("chunk"))
    assert (made.typing, made.flags, made.notes) == ("strong", (), ())
    assert given.network_flags == {"EXPLICIT_BATCH", "STRONGLY_TYPED"}
    assert given.flags == set()
    assert given.precisions == {}
    assert len(trt.builds) == 1


@pytest.mark.parametrize("name", [OLD, FP16])
def test_where_the_strong_typing_fails_the_weak_one_is_taken_and_said(
    exported, simulate, tmp_path, name
):
    _, trt = simulate("10.3.0")
    trt.quirks.strong_error = "Error Code 10: Internal Error (no implementation for node)"
    graph, out = exported / name.format("chunk"), tmp_path / "a.engine"
    manifest, notes = write_engine(graph, out, BuildConfig())
    (note,) = notes
    assert note == (
        f"weakly typed, since strongly typed it fails: {graph}: TensorRT 10.3.0 does not "
        "build it: Error Code 10: Internal Error (no implementation for node)"
    )
    assert manifest.builder.typing == "weak"
    assert manifest.builder.flags == ("INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS")
    strong, weak = trt.builds
    assert "STRONGLY_TYPED" in strong.network_flags
    assert weak.network_flags == {"EXPLICIT_BATCH"}
    assert "/log_mel/MatMul" in weak.precisions


def test_where_both_typings_fail_the_second_says_why(exported, simulate):
    _, trt = simulate("10.3.0")
    trt.quirks.strong_error, trt.quirks.build_error = "the first", "Error Code 1: Myelin (second)"
    with pytest.raises(ExportError) as error:
        built_by(trt, exported / OLD.format("chunk"))
    assert str(error.value) == (
        f"{exported / OLD.format('chunk')}: TensorRT 10.3.0 does not build it: Error Code 1: "
        "Myelin (second) (its compiler does not take this graph; try the other TensorRT target)"
    )


def test_where_the_strong_typing_gives_too_little_in_int8_the_weak_one_is_taken(
    exported, simulate, tmp_path
):
    _, trt = simulate("10.3.0")
    names = {f"/convs.{i}/conv/Conv" for i in range(4)}
    trt.quirks.float_nodes = names

    def restore(log):
        if len(trt.builds) > 1:
            trt.quirks.float_nodes = set()

    trt.quirks.on_build = restore
    graph = exported / FP16.format("chunk")
    manifest, (note,) = write_engine(graph, tmp_path / "a.engine", BuildConfig())
    assert manifest.builder.typing == "weak"
    assert "since strongly typed it fails: " in note
    assert "of its weights compute in INT8, asked are 95.0%" in note


@pytest.mark.parametrize("version", STRONG_ONLY)
def test_where_only_strong_typing_is_there_are_no_flags(exported, simulate, version):
    _, trt = simulate(version)
    made, given = built_by(trt, exported / FP16.format("chunk"))
    assert (made.typing, made.flags) == ("strong", ())
    assert given.network_flags == set()
    assert given.flags == {"REQUIRE_USER_ALLOCATION"} & set(trt.BuilderFlag.__members__)
    assert given.precisions == {}


@pytest.mark.parametrize("version", WEAK_ONLY)
def test_fp16_scales_are_not_for_a_parser_that_reads_them_as_fp32(exported, simulate, version):
    _, trt = simulate(version)
    graph = exported / FP16.format("chunk")
    with pytest.raises(ExportError) as error:
        built_by(trt, graph)
    assert str(error.value) == (
        f"{graph}: made for strong typing, which TensorRT 8.6.1 does not have; give it the graph "
        "of --target tensorrt"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_which_target_a_version_takes(simulate, version):
    _, trt = simulate(version)
    expected = "tensorrt" if version in WEAK_ONLY else "tensorrt-fp16"
    assert target_of(trt.__name__) == expected
    assert can_build(trt.__name__)


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_a_float_graph_builds_too_and_the_receipt_says_so(exported, simulate, version):
    _, trt = simulate(version)
    made, _ = built_by(trt, exported / "model.fp32.onnx")
    assert made.coverage.weights_int8 == 0
    with pytest.raises(ExportError, match=r"0\.0% of its weights compute in INT8"):
        made.coverage.check("float", 0.95)


# Limits.


@pytest.mark.parametrize("version", VERSIONS)
def test_limits_and_what_is_turned_off(exported, simulate, version):
    _, trt = simulate(version)
    name = OLD if version in WEAK_ONLY else FP16
    _, given = built_by(trt, exported / name.format("chunk"), workspace_mib=64)
    assert "TF32" not in given.flags
    assert given.limits == {"WORKSPACE": 64 * MIB}
    assert given.tactics == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    assert given.verbosity == "DETAILED"
    assert given.level == 3  # TensorRT's
    previews = {"PROFILE_SHARING_0806", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"}
    assert given.previews == previews & set(trt.PreviewFeature.__members__)


def test_on_an_integrated_gpu_half_of_what_is_free_is_for_tactics(exported, simulate, monkeypatch):
    _, trt = simulate("10.3.0", integrated=True)
    monkeypatch.setattr(jetson, "available_bytes", lambda: 3 << 30)
    graph = exported / FP16.format("chunk")
    assert built_by(trt, graph)[1].limits["TACTIC_DRAM"] == 1536 * MIB
    _, given = built_by(trt, graph, tactic_memory_mib=512, optimization_level=5)
    assert given.limits == {"WORKSPACE": 256 * MIB, "TACTIC_DRAM": 512 * MIB}
    assert given.level == 5


# Shapes.


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_a_chunk_for_one_stream_has_no_free_dimension(exported, simulate, version):
    _, trt = simulate(version)
    name = OLD if version in WEAK_ONLY else FP16
    made, given = built_by(trt, exported / name.format("chunk"))
    assert not given.has_profile
    assert given.shapes["audio"] == [(1, 320)] * 3
    assert given.shapes["conv0_context"] == [(1, 1, 3, 40)] * 3
    assert (made.max_batch, made.max_samples) == (1, 320)


def test_a_chunk_for_many_streams_has_a_free_batch(exported, simulate):
    _, trt = simulate("11.4.0.106")
    made, given = built_by(trt, exported / FP16.format("chunk"), batch=8)
    assert given.has_profile
    assert given.shapes["audio"] == [(1, 320), (8, 320), (8, 320)]
    assert given.shapes["gru0_hidden"] == [(1, 128), (8, 128), (8, 128)]
    assert (made.max_batch, made.max_samples) == (8, 320)


@pytest.mark.parametrize(
    ("lengths", "seconds", "expected"),
    [
        # From the graph: a chunk, the median and the longest clip, each with 60 ms of silence.
        (None, None, (320, 16_960, 16_960)),
        ("100,8000,16001", None, (320, 8_960, 17_280)),
        ("100,8000,16001", 3.0, (320, 8_960, 48_960)),
        ("100,8000,16001", 0.1, (320, 2_560, 2_560)),
        ("", None, (320, 16_960, 480_960)),
    ],
)
def test_a_clip_is_as_long_as_those_that_it_was_calibrated_with(
    exported, simulate, tmp_path, lengths, seconds, expected
):
    _, trt = simulate("10.13.3.9")
    graph = onnx.load(exported / FP16.format("clip"))
    (key,) = (p for p in graph.metadata_props if p.key == "cnngru_edge.clip_samples")
    if lengths == "":
        graph.metadata_props.remove(key)
    elif lengths:
        key.value = lengths
    onnx.save(graph, tmp_path / "clip.onnx")
    made, given = built_by(trt, tmp_path / "clip.onnx", max_seconds=seconds)
    assert given.shapes["audio"] == [(1, samples) for samples in expected]
    assert made.max_samples == expected[-1]


def test_a_graph_for_another_number_of_streams_is_refused(exported, simulate, tmp_path):
    _, trt = simulate("10.3.0")
    graph = onnx.load(exported / FP16.format("chunk"))
    for value in graph.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(graph, tmp_path / "one.onnx")
    with pytest.raises(ExportError, match=r"one\.onnx: for 1 streams, not for the batch asked"):
        built_by(trt, tmp_path / "one.onnx", batch=4)


# Capabilities.


def test_tensorrt_builds_for_the_gpu_here(exported, simulate):
    _, trt = simulate("10.3.0", capability=(11, 0))
    graph = exported / FP16.format("chunk")
    assert built_by(trt, graph)[0].capabilities == ("11.0",)
    with pytest.raises(ExportError, match="builds for the GPU it runs on; --capability is for"):
        built_by(trt, graph, capabilities=("8.7",))


def test_rtx_builds_for_gpus_that_are_not_here(exported, simulate):
    cuda, trt = simulate(RTX, driver=0)
    graph = exported / FP16.format("chunk")
    made, given = built_by(trt, graph)
    assert made.capabilities == ("8.6", "8.9", "12.0")
    assert given.capabilities == {0: "SM86", 1: "SM89", 2: "SM120"}
    assert made.gpu is None
    assert built_by(trt, graph, capabilities=("12.1", "12.1"))[1].capabilities == {0: "SM121"}
    with pytest.raises(
        ExportError,
        match=r"TensorRT-RTX 1\.7\.1\.116 does not build for compute capability '8\.7'; it does "
        r"for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1",
    ):
        built_by(trt, graph, capabilities=("8.7",))
    assert cuda.calls == []


# Without a GPU, a library, a graph.


@pytest.mark.parametrize("version", TENSORRT)
def test_without_a_driver_tensorrt_is_not_touched(exported, simulate, version):
    _, trt = simulate(version, driver=0)
    name = OLD if version in WEAK_ONLY else FP16
    with pytest.raises(BackendMissing, match="no NVIDIA driver is installed here"):
        built_by(trt, exported / name.format("chunk"))
    assert not can_build("tensorrt")


def test_a_tensorrt_that_does_not_start_is_said(exported, simulate):
    _, trt = simulate("8.6.1")
    trt.quirks.no_objects = "CUDA initialization failure with error: cudaError 35"
    with pytest.raises(
        SessionError, match=r"^TensorRT 8\.6\.1 does not start: CUDA init.* \(no NV"
    ):
        built_by(trt, exported / OLD.format("chunk"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.",
            "this version does not read the graph; quantize it with --target tensorrt",
        ),
        (
            "TensorRT requires 3 inputs for the INT8 QuantizeLinear/DequantizeLinear operator",
            "this version does not read the graph; quantize it with --target tensorrt",
        ),
    ],
)
def test_why_a_graph_does_not_parse_is_said(exported, simulate, text, hint):
    _, trt = simulate("8.6.1")
    trt.quirks.parse_error = text
    with pytest.raises(ExportError) as error:
        built_by(trt, exported / OLD.format("chunk"))
    assert str(error.value).endswith(f": TensorRT 8.6.1 does not parse it: {text} ({hint})")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "Error Code 2: OutOfMemory (no further information)",
            "perhaps too little memory;",
        ),
        (
            "Requested amount of GPU memory (9 bytes) could not be allocated.",
            "perhaps too little memory;",
        ),
        (
            "Error Code 1: Myelin (no results returned from cublas heuristic search)",
            "its compiler does not take this graph; try the other TensorRT target",
        ),
    ],
)
def test_why_a_graph_does_not_build_is_said(exported, simulate, text, hint):
    _, trt = simulate("8.6.1")
    trt.quirks.build_error = text
    with pytest.raises(ExportError) as error:
        built_by(trt, exported / OLD.format("chunk"))
    assert f": TensorRT 8.6.1 does not build it: {text} ({hint}" in str(error.value)


def test_an_engine_that_does_not_open_has_no_receipt(exported, simulate):
    _, trt = simulate("10.3.0")
    trt.quirks.open_error = "Platform specific tag mismatch detected."
    with pytest.raises(ExportError, match=r"does not open what it built: .* \(the engine is of an"):
        built_by(trt, exported / FP16.format("chunk"))


# Timing cache.


@pytest.mark.parametrize("version", ONE_OF_EACH[:3])
def test_measurements_are_kept_for_the_next_build(exported, simulate, tmp_path, version):
    _, trt = simulate(version)
    graph = exported / (OLD if version in WEAK_ONLY else FP16).format("chunk")
    cache = tmp_path / "timing" / "cache"
    first, _ = built_by(trt, graph, timing_cache=cache)
    assert cache.read_bytes() == b"timing of Orin+measured"
    second, _ = built_by(trt, graph, timing_cache=cache)
    assert cache.read_bytes() == b"timing of Orin+measured+measured"
    assert first.notes == second.notes == ()


@pytest.mark.parametrize("kept", [b"timing of Thor", b"nothing of the kind"])
def test_measurements_of_another_gpu_are_made_anew_and_that_is_said(
    exported, simulate, tmp_path, kept
):
    _, trt = simulate("10.3.0")
    trt.quirks.strong_error = "no"  # so that it is tried twice, and said once
    cache = tmp_path / "cache"
    cache.write_bytes(kept)
    made, _ = built_by(trt, exported / FP16.format("chunk"), timing_cache=cache)
    assert cache.read_bytes() == b"timing of Orin+measured"
    note = f"{cache} is of another GPU or version; made anew"
    assert [n for n in made.notes if "timing" in n or "cache" in n] == [note]


def test_a_build_that_fails_leaves_the_measurements_as_they_were(exported, simulate, tmp_path):
    _, trt = simulate("8.6.1")
    trt.quirks.build_error = "no"
    cache = tmp_path / "cache"
    cache.write_bytes(b"timing of Orin")
    with pytest.raises(ExportError):
        built_by(trt, exported / OLD.format("chunk"), timing_cache=cache)
    assert cache.read_bytes() == b"timing of Orin"


def test_rtx_measures_nothing(exported, simulate, tmp_path):
    _, trt = simulate(RTX)
    with pytest.raises(ExportError, match="TensorRT-RTX has no timing cache; leave --timing-cache"):
        built_by(trt, exported / FP16.format("chunk"), timing_cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


# Progress, and a stop.


@pytest.mark.parametrize("version", VERSIONS)
def test_phases_are_told_by_versions_that_tell(exported, simulate, version):
    _, trt = simulate(version)
    told = []
    graph = exported / (OLD if version in WEAK_ONLY else FP16).format("chunk")
    built_by(trt, graph, progress=lambda *step: told.append(step))
    steps = [("Building", 1, 3)] * 3
    assert told == ([] if version in WEAK_ONLY else steps)


@pytest.mark.parametrize("step", [1, 2, 3], ids=["first", "second", "at the end"])
def test_a_stop_while_progress_is_told_is_a_stop(exported, simulate, tmp_path, step):
    """TensorRT would swallow a signal's exception that comes up in its monitor."""
    _, trt = simulate("10.13.3.9")
    told = []

    def progress(*what):
        told.append(what)
        if len(told) == step:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "a.engine"
    with pytest.raises(KeyboardInterrupt):
        write_engine(exported / FP16.format("chunk"), out, BuildConfig(), progress=progress)
    (given,) = trt.builds  # and no weak one after it
    assert given.is_cancelled is (step < 3)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_progress_is_told(exported, simulate, tmp_path):
    simulate("10.13.3.9")

    def progress(*what):
        raise LookupError("a bar")

    with pytest.raises(LookupError, match="a bar"):
        write_engine(
            exported / FP16.format("chunk"), tmp_path / "a.engine", BuildConfig(), progress=progress
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["", "no"], ids=["built", "not built"])
def test_a_stop_while_tensorrt_builds_is_a_stop(exported, simulate, tmp_path, error):
    _, trt = simulate("8.6.1")
    trt.quirks.build_error = error
    trt.quirks.on_build = lambda log: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        write_engine(exported / OLD.format("chunk"), tmp_path / "a.engine", BuildConfig())
    assert len(trt.builds) == 1
    assert list(tmp_path.iterdir()) == []


# Receipts.


@pytest.mark.parametrize("version", VERSIONS)
def test_the_receipt_is_of_what_was_built(exported, simulate, version):
    _, trt = simulate(version)
    trt.quirks.opaque = False
    made, _ = built_by(trt, exported / (OLD if version in WEAK_ONLY else FP16).format("clip"))
    assert {layer.precision for layer in made.coverage.layers} == {INT8}
    assert len(made.coverage.layers) == 7
    assert all(layer.bytes == layer.weights for layer in made.coverage.layers)
    source = {True: "build log", False: "engine inspector"}[version == RTX]
    assert made.coverage.source == f"{trt.__name__} {trt.__version__}: {source}"


def test_what_a_builder_does_not_show_is_not_taken_for_int8(exported, simulate, tmp_path):
    simulate("8.6.1")
    out = tmp_path / "a.engine"
    manifest, _ = write_engine(exported / OLD.format("chunk"), out, BuildConfig())
    found = {layer.name: layer.precision for layer in manifest.coverage.layers}
    hidden = {"grus.0.weight_ih_l0": HIDDEN, "grus.0.weight_hh_l0": HIDDEN}
    assert found == dict.fromkeys(found, INT8) | hidden
    assert manifest.summary == (
        "31.9% of the weights in INT8 (68.1% are in blocks that it does not show), TensorRT 8.6.1, "
        "weak typing, for compute capability 8.7"
    )
    assert manifest.precision == f"{INT8}+{HIDDEN}"


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_a_float_layer_is_named_and_fails_the_gate(exported, simulate, tmp_path, version):
    _, trt = simulate(version)
    trt.quirks.float_nodes = ("/head/MatMul", "/convs.3/conv/Conv")
    graph = exported / (OLD if version in WEAK_ONLY else FP16).format("chunk")
    with pytest.raises(ExportError) as error:
        write_engine(graph, tmp_path / "a.engine", BuildConfig(library=trt.__name__))
    kind = "fp16"
    others = str(error.value).partition("not in INT8: ")[2].partition(" (read")[0]
    assert others == f"convs.3.conv ({kind}), head ({kind})"
    assert list(tmp_path.iterdir()) == []


def test_a_product_that_lost_its_pair_is_not_in_int8(exported, simulate, tmp_path):
    _, trt = simulate("10.3.0")
    proto = onnx.load(exported / OLD.format("chunk"))
    head = next(node for node in proto.graph.node if node.name == "/head/MatMul")
    pair = next(node for node in proto.graph.node if node.output[0] == head.input[0])
    quantize = next(node for node in proto.graph.node if node.output[0] == pair.input[0])
    head.input[0] = quantize.input[0]
    onnx.save(proto, tmp_path / "broken.onnx")
    made, _ = built_by(trt, tmp_path / "broken.onnx")
    assert [x.name for x in made.coverage.layers if x.precision != INT8] == ["head"]


# Engines, kept and built again.


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_an_engine_has_its_manifest(exported, simulate, tmp_path, version):
    _, trt = simulate(version, driver=13020)
    graph = exported / (OLD if version in WEAK_ONLY else FP16).format("clip")
    out = tmp_path / "a.engine"
    config = BuildConfig(library=trt.__name__, batch=2, max_seconds=0.5)
    manifest, notes = write_engine(graph, out, config)
    assert notes == ()
    data, read = read_engine(out)
    assert read == manifest
    header = read_header(data, out)
    assert (header.library, header.size) == (trt.__name__, out.stat().st_size)
    assert f"{trt.__version__}.0.0".startswith(header.version)
    builder, is_rtx = manifest.builder, version == RTX
    assert (builder.library, builder.version) == (trt.__name__, trt.__version__)
    assert (builder.gpu, builder.driver) == (
        (None, None) if is_rtx else ("Orin (16 multiprocessors)", "13.2")
    )
    assert builder.capabilities == (("8.6", "8.9", "12.0") if is_rtx else ("8.7",))
    assert builder.options["batch"] == manifest.max_batch == 2
    assert manifest.max_samples == 8_960
    assert manifest.source == graph.name
    assert manifest.inputs[0].shape == ("N", "S")
    with open_session(graph) as session:
        assert manifest.spec == session.spec
        assert [o.name for o in manifest.outputs] == [o.name for o in session.outputs]
        assert manifest.metadata["cnngru_edge.target"] == session.metadata["cnngru_edge.target"]


def test_for_one_stream_the_manifest_says_so(exported, simulate, tmp_path):
    simulate("10.3.0")
    out = tmp_path / "a.engine"
    manifest, _ = write_engine(exported / FP16.format("chunk"), out, BuildConfig())
    assert manifest.inputs[0].shape == (1, 320)
    assert manifest.inputs[-1].shape == (1, 128)
    assert manifest.outputs[-1].shape == (1, 128)


@pytest.fixture
def kept(exported, simulate, tmp_path):
    """An engine that is there, and a call that builds it if that is called for."""
    out, graph = tmp_path / "a.engine", tmp_path / "graph.onnx"
    shutil.copy(exported / FP16.format("chunk"), graph)
    _, trt = simulate("10.3.0")
    write_engine(graph, out, BuildConfig())

    def again(version="10.3.0", device=None, **options):
        _, trt = simulate(version, **device or {})
        _, notes = write_engine(graph, out, BuildConfig(**options))
        return len(trt.builds), *notes

    again.out, again.graph, again.trt = out, graph, trt
    return again


def test_an_engine_that_is_as_it_would_be_is_kept(kept):
    before = kept.out.read_bytes(), kept.out.stat().st_mtime_ns
    assert kept() == (0, f"{kept.out} is up to date")
    assert before == (kept.out.read_bytes(), kept.out.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "10.13.3.9"}, "its library was TensorRT 10.3.0 and is TensorRT 10.13.3.9"),
        (
            {"device": {"name": "Thor"}},
            f"its GPU was {ORIN} and is Thor (16 multiprocessors)",
        ),
        ({"device": {"driver": 13020}}, "its driver was 13.0 and is 13.2"),
        ({"batch": 2}, "its options was {"),
        ({"workspace_mib": 64}, "its options was {"),
        ({"max_seconds": 2.0}, "its options was {"),
    ],
    ids=["version", "gpu", "driver", "batch", "workspace", "seconds"],
)
def test_an_engine_that_would_be_another_is_built_again(kept, change, reason):
    builds, note = kept(**change)
    assert builds == 1
    assert note.startswith(f"{kept.out} is built again: {reason}")
    assert kept(**change) == (0, f"{kept.out} is up to date")


def test_an_engine_of_another_graph_is_built_again(kept):
    proto = onnx.load(kept.graph)
    proto.doc_string = "another"
    onnx.save(proto, kept.graph)
    builds, note = kept()
    assert builds == 1
    assert note.startswith(f"{kept.out} is built again: its graph was ")


@pytest.mark.parametrize("damage", ["engine", "manifest", "no manifest"])
def test_an_engine_that_does_not_belong_to_its_manifest_is_built_again(kept, damage):
    path = kept.out if damage == "engine" else manifest_path(kept.out)
    if damage == "no manifest":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    builds, note = kept()
    assert builds == 1
    assert note.startswith(f"{kept.out} is built again: {path}: ")
    assert kept() == (0, f"{kept.out} is up to date")


def test_an_engine_that_is_kept_passes_the_gate_too(exported, simulate, tmp_path):
    simulate("10.3.0")
    graph, out = exported / "model.fp32.onnx", tmp_path / "a.engine"
    write_engine(graph, out, BuildConfig(), min_coverage=0)
    with pytest.raises(ExportError, match=r"0\.0% of its weights compute in INT8, asked are 95"):
        write_engine(graph, out, BuildConfig())
    assert out.exists()


def test_a_build_that_fails_leaves_the_engine_that_was_there(kept):
    before = kept.out.read_bytes()
    proto = onnx.load(kept.graph)
    proto.doc_string = "another"
    onnx.save(proto, kept.graph)
    kept.trt.quirks.build_error = kept.trt.quirks.strong_error = "no"
    sys.modules["tensorrt"] = kept.trt
    with pytest.raises(ExportError, match="does not build it: no"):
        write_engine(kept.graph, kept.out, BuildConfig())
    assert kept.out.read_bytes() == before


def test_the_versions_are_those_that_the_simulation_knows(exported, simulate):
    """A name that a version lacks is an AttributeError, one that is not simulated is not hidden."""
    _, trt = simulate("8.6.1")
    with pytest.raises(AttributeError, match="STRONGLY_TYPED"):
        _ = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert not hasattr(trt, "IProgressMonitor")
    config = trt.IBuilderConfig()
    with pytest.raises(AttributeError, match="no attribute 'progress_monitor'"):
        config.progress_monitor = None
    with pytest.raises(NotImplementedError, match="max_workspace_size is not simulated"):
        config.max_workspace_size = 1
    with pytest.raises(NotImplementedError, match="Refitter is not simulated"):
        _ = trt.Refitter
    _, trt = simulate("11.4.0.106")
    with pytest.raises(AttributeError, match="INT8"):
        config.set_flag(trt.BuilderFlag.INT8)
