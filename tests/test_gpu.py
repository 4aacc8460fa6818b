"""What only a GPU can show; `make test-gpu` runs it with the TensorRT that is installed."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from cnngru_edge.calibration.corpus.read import EVAL
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.decode.answer import clip_answer
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.inputs.read import read_input
from cnngru_edge.runtime.stream import Stream, clip_logits

pytestmark = pytest.mark.gpu

RATE = 16_000
# In logits. Other kernels round elsewhere: ten times what two CPU forms of a graph differ by.
ROUNDING = 0.5


@pytest.fixture(scope="module")
def library():
    """TensorRT if it is installed, or else TensorRT-RTX."""
    if trt_library.is_installed("tensorrt"):
        return "tensorrt"
    trt_library.load("tensorrt_rtx")
    return "tensorrt_rtx"


@pytest.fixture(scope="module")
def target(library):
    from cnngru_edge.export.targets.trt.build import target_of

    return target_of(library)


@pytest.fixture(scope="module")
def engine(exported, library, tmp_path_factory):
    """Build a graph of the export, once for each way that it is asked for; the engine's path."""
    from cnngru_edge.export.chain.engine import write_engine
    from cnngru_edge.export.targets.trt.build import BuildConfig

    folder, built = tmp_path_factory.mktemp("engines"), {}

    def build(graph, again=0, **options):
        key = (graph, again, *options.items())
        if key not in built:
            capabilities = ()
            if library == "tensorrt_rtx":
                from cnngru_edge.runtime.backends.trt.cuda import Cuda

                capabilities = (Cuda().gpu.capability,)
            path = folder / f"{len(built)}.engine"
            config = BuildConfig(library, capabilities=capabilities, **options)
            write_engine(exported / graph, path, config, min_coverage=0)
            built[key] = path
        return built[key]

    return build


@pytest.fixture(scope="module")
def chunk(engine, target):
    return engine(f"model.int8.{target}.chunk.onnx")


@pytest.fixture(scope="module")
def clip(engine, target):
    return engine(f"model.int8.{target}.clip.onnx")


@pytest.fixture(scope="module")
def clips(demo):
    return [read_audio(c.path, RATE).samples for c in demo.of(EVAL)]


@pytest.fixture(scope="module")
def minutes(clips):
    """Ten minutes of one recording after the other, and at several levels."""
    rng, parts = np.random.default_rng(0), []
    while sum(map(len, parts)) < 600 * RATE:
        parts.append(clips[rng.integers(len(clips))] * rng.uniform(0.2, 1.5))
    return np.clip(np.concatenate(parts)[: 600 * RATE], -1, 1).astype(np.float32)


def logits_of(path, clips, **options):
    with open_session(path, **options) as session:
        return [clip_logits(session, samples) for samples in clips]


def labels_of(path, clips):
    with open_session(path) as session:
        scores = [clip_scores(session.spec, clip_logits(session, c)) for c in clips]
    return [int(s.argmax()) for s in scores]


def in_chunks(stream, audio, length):
    """Logits (T, C) of a long recording (S,) through a stream of one row."""
    pieces = [stream.push(audio[None, i : i + length])[0] for i in range(0, len(audio), length)]
    return np.concatenate(pieces)


@pytest.mark.parametrize("name", ["intent", "digits"])
def test_an_engine_of_a_whole_input_answers_as_the_float_model(name, library, target, tmp_path):
    from cnngru_edge.calibration.corpus.read import calibration_clips, demo_for, read_corpus
    from cnngru_edge.calibration.ranges.choose import CalibrateConfig
    from cnngru_edge.calibration.ranges.collect import calibrate
    from cnngru_edge.export.chain.engine import write_engine
    from cnngru_edge.export.quantize.run import quantize_onnx
    from cnngru_edge.export.targets.trt.build import BuildConfig
    from cnngru_edge.export.trace.model import export_onnx
    from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint
    from cnngru_edge.runtime.backends.trt.cuda import Cuda

    model = load_checkpoint(PRETRAINED / f"{name}.safetensors")
    corpus = read_corpus(demo_for(model.spec))
    export_onnx(model.for_export(), tmp_path / "float.onnx")
    config = CalibrateConfig(min_clips=100)
    sources = [clip.source for clip in calibration_clips(corpus, config.min_clips)]
    ranges, _ = calibrate(tmp_path / "float.onnx", sources, config)
    ranges.save(tmp_path / "ranges.json")
    graph = tmp_path / "int8.onnx"
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "ranges.json", graph, target)
    capabilities = (Cuda().gpu.capability,) if library == "tensorrt_rtx" else ()
    config = BuildConfig(library, capabilities=capabilities)
    write_engine(graph, tmp_path / "int8.engine", config, min_coverage=0)
    given = [read_input(model.spec, clip.source) for clip in corpus.of(EVAL)]
    with open_session(tmp_path / "float.onnx") as a, open_session(tmp_path / "int8.engine") as b:
        answers = [[clip_answer(s.spec, clip_logits(s, one)) for one in given] for s in (a, b)]
    same = sum(x == y for x, y in zip(*answers, strict=True))
    assert same >= 0.95 * len(given)


@pytest.mark.parametrize("form", ["clip", "chunk"])
def test_an_int8_engine_answers_as_the_float_model(exported, engine, target, clips, form):
    path = engine(f"model.int8.{target}.{form}.onnx")
    expected = labels_of(exported / "model.fp32.onnx", clips)
    agreement = np.mean(np.array(labels_of(path, clips)) == expected)
    assert agreement >= 0.98


@pytest.mark.parametrize("form", ["clip", "chunk"])
def test_an_int8_engine_computes_what_its_graph_says(exported, engine, target, clips, form):
    graph = f"model.int8.{target}.{form}.onnx"
    for found, expected in zip(
        logits_of(engine(graph), clips), logits_of(exported / graph, clips), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


def test_a_float_engine_computes_in_fp32(exported, engine, clips):
    path = engine("model.fp32.onnx", fp16=False)
    for found, expected in zip(
        logits_of(path, clips), logits_of(exported / "model.fp32.onnx", clips), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("level", [0.0, 1e-4, 1.0])
def test_the_front_end_stands_silence_and_full_scale(exported, chunk, target, level):
    """In FP16 the power of a full-scale tone is infinite, and that of a whisper is zero."""
    tone = (level * np.sign(np.sin(np.arange(RATE) * 0.05))).astype(np.float32)
    (found,) = logits_of(chunk, [tone])
    (expected,) = logits_of(exported / f"model.int8.{target}.chunk.onnx", [tone])
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


def test_a_chunk_engine_gives_what_a_clip_engine_gives(chunk, clip, clips):
    for a, b in zip(logits_of(chunk, clips), logits_of(clip, clips), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)


def test_the_state_is_carried_for_ten_minutes(exported, chunk, target, minutes):
    """As far from ONNX Runtime at the end as at the beginning."""
    found = []
    for path in (chunk, exported / f"model.int8.{target}.clip.onnx"):
        with open_session(path) as session, Stream(session) as stream:
            length = session.max_samples or RATE
            found.append(in_chunks(stream, minutes, length))
    error = np.abs(found[0] - found[1]).reshape(10, -1)  # a row for each minute
    assert error.max() < 4 * ROUNDING
    assert np.sqrt((error[-1] ** 2).mean()) < 1.5 * np.sqrt((error[0] ** 2).mean()) + 1e-3


def test_with_a_graph_and_without_are_the_same(chunk, minutes):
    found = []
    for cuda_graph in (True, False):
        with open_session(chunk, cuda_graph=cuda_graph) as session, Stream(session) as stream:
            found.append(in_chunks(stream, minutes[: 10 * RATE], session.max_samples))
            assert session.cuda_graph is cuda_graph  # and no fallback
    np.testing.assert_array_equal(*found)


def test_sixty_four_streams_as_one_batch_are_sixty_four_alone(engine, target, clips):
    length, rows = 20, 64
    path = engine(f"model.int8.{target}.chunk.onnx", batch=rows)
    with open_session(path) as session:
        size = session.spec.chunk_length
        audio = np.stack([np.resize(clips[i % len(clips)], length * size) for i in range(rows)])
        audio = np.roll(audio, 7, axis=0).astype(np.float32)
        with Stream(session, rows) as together:
            found = np.concatenate(
                [together.push(audio[:, i * size : (i + 1) * size]) for i in range(length)], axis=1
            )
        for row in range(rows):
            with Stream(session) as alone:
                expected = in_chunks(alone, audio[row], size)
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=ROUNDING)


def test_one_of_many_streams_starts_anew(engine, target, clips):
    path = engine(f"model.int8.{target}.chunk.onnx", batch=64)
    with open_session(path) as session, Stream(session, 3) as stream:
        audio = np.stack([clips[0][: session.max_samples]] * 3)
        first = stream.push(audio)
        stream.reset([1])
        again = stream.push(audio)
    np.testing.assert_array_equal(again[1], first[1])
    assert np.abs(again[0] - first[0]).max() > 0
    np.testing.assert_array_equal(again[0], again[2])


def test_an_engine_that_is_built_again_gives_the_same_labels(engine, target, clips):
    graph = f"model.int8.{target}.chunk.onnx"
    assert labels_of(engine(graph), clips) == labels_of(engine(graph, again=1), clips)


def test_a_damaged_engine_with_a_matching_manifest_is_an_error(chunk, tmp_path):
    """What the library itself makes of it, in a process that it may take with it."""
    manifest_of_chunk = chunk.with_name(f"{chunk.name}.json")
    data, manifest = chunk.read_bytes(), json.loads(manifest_of_chunk.read_text())
    damaged = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    manifest["sha256"] = hashlib.sha256(damaged).hexdigest()
    (tmp_path / "a.engine").write_bytes(damaged)
    (tmp_path / "a.engine.json").write_text(json.dumps(manifest))
    script = (
        "import sys; from pathlib import Path\n"
        "from cnngru_edge.models.errors import SessionError\n"
        "from cnngru_edge.runtime.session import open_session\n"
        "try: open_session(Path(sys.argv[1]))\n"
        "except SessionError as e: print(e)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.engine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not open this engine" in done.stdout


def test_memory_does_not_grow(chunk, minutes):
    with open_session(chunk) as session:
        sizes = []
        for _ in range(5):
            for _ in range(20):
                with Stream(session) as stream:
                    stream.push(minutes[None, : 4 * session.max_samples])
            sizes.append(session.cuda.free_bytes())
    assert sizes[-1] >= sizes[0] - (1 << 20)
