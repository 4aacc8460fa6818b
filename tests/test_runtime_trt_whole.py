"""Engines of models that take their input whole; on a simulated GPU, see simulated_gpu."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
import simulated_gpu
from simulated_gpu import ONE_OF_EACH, RTX, WEAK_ONLY

from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import calibrate
from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.chain.inspection import inspect
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.export.targets.trt.build import BuildConfig
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.engine_file import manifest_path, read_engine, read_manifest
from cnngru_edge.runtime.check.golden import GOLDEN, read_golden, selftest, write_golden
from cnngru_edge.runtime.inputs.read import Tokens, tokens_of
from cnngru_edge.runtime.recognize import recognize
from cnngru_edge.runtime.stream import Stream, clip_logits

PHRASES = ["turn the light on", "light off", "what time is it", "turn it off what is the time"]


@pytest.fixture
def images(tmp_path):
    """Lines 8 pixels high, of several widths."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for width in (20, 33, 64, 41):
        paths.append(tmp_path / f"{width}.png")
        Image.fromarray(rng.integers(0, 255, (8, width), np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def graphs(tiny_text, tiny_crnn, images, tmp_path):
    """Graphs of a model for a version of TensorRT: float, INT8."""
    models = {"text": (tiny_text, PHRASES), "crnn": (tiny_crnn, images)}

    def make(kind, target):
        model, sources = models[kind]
        paths = [tmp_path / f"{kind}.{name}.onnx" for name in ("fp32", target)]
        export_onnx(model.for_export(), paths[0])
        ranges, _ = calibrate(paths[0], sources * 4, CalibrateConfig(min_clips=16))
        ranges.save(tmp_path / "ranges.json")
        quantize_onnx(paths[0], tmp_path / "ranges.json", paths[1], target)
        return paths

    return make


@pytest.fixture
def build(graphs, tmp_path, monkeypatch):
    """An engine, the graph that it was built from, the GPU and its TensorRT."""

    def build(kind="text", version="10.3.0", batch=1):
        device = {"capability": (8, 6)} if version == RTX else {}
        cuda, trt = simulated_gpu.install(monkeypatch, version, **device)
        graph = graphs(kind, "tensorrt" if version in WEAK_ONLY else "tensorrt-fp16")[1]
        engine = tmp_path / "model.engine"
        write_engine(graph, engine, BuildConfig(library=trt.__name__, batch=batch), min_coverage=0)
        assert cuda.leaks() == []
        return engine, graph, cuda, trt

    return build


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_phrases_of_any_length_are_answered_as_by_the_graph(build, tiny_text, version):
    engine, graph, cuda, trt = build("text", version)
    with open_session(engine) as session, open_session(graph) as reference:
        for phrase in PHRASES:  # growing and shrinking
            tokens = tokens_of(phrase, tiny_text.spec.input)
            same(clip_logits(session, tokens), clip_logits(reference, tokens))
        assert session.spec == tiny_text.spec
        assert session.backend == f"{trt.__name__} {trt.__version__}"
        found, expected = (recognize(one, PHRASES[0]) for one in (session, reference))
        assert found.label == expected.label
        assert recognize(session, Tokens((2, 3))).path == "2 3"
    assert cuda.leaks() == []


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_token_ids_are_handed_over_as_32_bit_integers(build, version):
    engine, *_ = build("text", version)  # 8.6 has no others
    with open_session(engine) as session:
        assert session.input_dtype("tokens") == np.int32
        feed = {kind: {"tokens": np.array([[2, 3]], kind)} for kind in (np.int32, np.int64)}
        found = [session.run(one)["logits"] for one in feed.values()]
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("version", ONE_OF_EACH)
def test_images_of_any_width_are_read_as_by_the_graph(build, images, version):
    engine, graph, cuda, _ = build("crnn", version)
    with open_session(engine) as session, open_session(graph) as reference:
        for path in images:
            found, expected = (recognize(one, path) for one in (session, reference))
            assert found.text == expected.text
        rng = np.random.default_rng(1)
        for width in (20, 64, 24, 50):
            image = rng.random((1, 8, width), np.float32)
            same(clip_logits(session, image), clip_logits(reference, image))
    assert cuda.leaks() == []


def test_several_inputs_at_a_time(build, rng):
    engine, graph, cuda, _ = build("text", batch=4)
    with open_session(engine) as session, open_session(graph) as reference:
        assert session.max_batch == 4
        for rows in (1, 4, 2):
            feed = {"tokens": rng.integers(0, 11, (rows, 5))}
            same(session.run(feed)["logits"], reference.run(feed)["logits"])
    assert cuda.leaks() == []


def test_an_answer_stays_when_another_is_asked_for(build):
    engine, *_ = build("text")
    with open_session(engine) as session:
        first = session.run({"tokens": np.array([[2, 3, 4]])})["logits"]
        kept = first.copy()
        assert not np.array_equal(session.run({"tokens": np.array([[8, 9]])})["logits"], first)
        np.testing.assert_array_equal(first, kept)


def test_one_context_and_as_much_memory_as_the_longest_takes(build, images):
    engine, _, cuda, _ = build("crnn")
    with open_session(engine) as session:
        for path in images:
            recognize(session, path)
        cuda.calls.clear()
        for path in images:  # the longest has been there
            recognize(session, path)
        assert {"cudaMalloc", "cudaHostAlloc", "cudaMallocHost"}.isdisjoint(cuda.calls)


def test_what_an_engine_was_not_built_for_is_refused_and_harms_nothing(build):
    engine, graph, cuda, _ = build("text")
    with open_session(engine) as session, open_session(graph) as reference:
        longest = session.max_samples
        for shape in ((1, longest + 1), (2, 3)):
            why = f"does not take tokens of shape {shape}, built for 1 of {longest} at most: "
            with pytest.raises(SessionError, match=re.escape(why)):
                session.run({"tokens": np.ones(shape, np.int64)})
        feed = {"tokens": np.array([[2, 3, 4]])}
        same(session.run(feed)["logits"], reference.run(feed)["logits"])
    assert cuda.leaks() == []


@pytest.mark.parametrize("kind", ["text", "crnn"])
@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_it_passes_its_self_test_on_inputs_that_it_is_built_for(
    build, images, tmp_path, kind, version
):
    engine, graph, cuda, _ = build(kind, version)
    others, sources = [" ".join(["turn", "light"] * 9), "light"], PHRASES
    if kind == "crnn":
        from PIL import Image

        others, sources = [tmp_path / "long.png", tmp_path / "short.png"], images
        for path, width in zip(others, (65, 14), strict=True):
            Image.open(images[2]).resize((width, 8)).save(path)
    golden = tmp_path / GOLDEN
    write_golden(golden, tmp_path / f"{kind}.fp32.onnx", [graph], [*others, *sources])
    names = {clip.name for clip in read_golden(golden).clips}
    assert names
    assert names <= {x if kind == "text" else f"{x.parent.name}/{x.name}" for x in sources}
    found = selftest(engine, golden)
    assert found.passed, list(found.lines)
    assert found.backend == f"tensorrt {version}"
    assert cuda.leaks() == []


def test_a_phrase_may_be_shorter_than_any_that_was_calibrated_with(build, tiny_text):
    engine, graph, cuda, _ = build("text")
    given = tokens_of("light", tiny_text.spec.input)  # the shortest there was one word more
    with open_session(engine) as session, open_session(graph) as reference:
        same(clip_logits(session, given), clip_logits(reference, given))
    assert cuda.leaks() == []


def test_an_engine_that_fails_is_told(build):
    engine, _, cuda, trt = build("text")
    with open_session(engine) as session:
        trt.quirks.execute_error = "Error Code 1: out of luck"
        with pytest.raises(SessionError, match=r"does not run the engine: .*out of luck"):
            session.run({"tokens": np.array([[2, 3, 4]])})
        trt.quirks.execute_error = ""
        assert session.run({"tokens": np.array([[2, 3, 4]])})["logits"].shape == (1, 1, 3)
    assert cuda.leaks() == []


def test_there_are_no_streams_of_it(build):
    engine, _, cuda, _ = build("text")
    with (
        open_session(engine) as session,
        pytest.raises(Exception, match="this model cannot be a stream: its GRU is bidirectional"),
    ):
        Stream(session)
    assert cuda.leaks() == []


# The manifest.


@pytest.mark.parametrize("kind", ["text", "crnn"])
def test_a_manifest_is_written_and_read_again(graphs, tmp_path, kind):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")
    source, graph = graphs(kind, "tensorrt-fp16")
    engine = tmp_path / "model.rtx.engine"
    written, _ = write_engine(graph, engine, BuildConfig("tensorrt_rtx"), min_coverage=0.95)
    data, manifest = read_engine(engine)
    assert manifest == written == read_manifest(engine)
    assert manifest.coverage.weights_int8 == 1
    assert len(data) == engine.stat().st_size
    with open_session(source) as session:
        assert manifest.spec == session.spec
        assert [tensor.name for tensor in manifest.inputs] == [session.inputs[0].name]
        assert [tensor.name for tensor in manifest.outputs] == ["logits"]
    longest = max(len(phrase.split()) for phrase in PHRASES) if kind == "text" else 64
    assert manifest.max_batch == 1
    assert manifest.max_samples >= longest
    shown = inspect(engine)
    assert shown["coverage"]["weights_int8"] == 1
    assert shown["spec"] == json.loads(manifest.spec.to_json())
    # Another kind of input than its spec says is no manifest.
    raw = json.loads(manifest_path(engine).read_text())
    raw["inputs"][0]["name"] = "audio"
    manifest_path(engine).write_text(json.dumps(raw))
    with pytest.raises(SessionError, match="not the manifest of an engine; build it again"):
        read_engine(engine)
