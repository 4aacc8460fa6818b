"""Engines in a session, on a simulated GPU; see simulated_gpu for what that can show."""

import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
import simulated_gpu
from simulated_cuda import SimulatedCuda
from simulated_gpu import ONE_OF_EACH, RTX, VERSIONS, WEAK_ONLY

from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.targets.trt.build import BuildConfig
from cnngru_edge.models.errors import BackendMissing, EdgeError, SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.engine_file import manifest_path
from cnngru_edge.runtime.backends.trt.session import GraphFallback
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import initial_state
from cnngru_edge.runtime.stream import Stream, clip_logits

CHUNK = 320
STEP = ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"]


@dataclass
class Engine:
    path: Path
    graph: Path  # that it was built from
    cuda: SimulatedCuda
    trt: ModuleType

    def open(self, **options):
        return open_session(self.path, **options)


@pytest.fixture(scope="module")
def built():
    """The files of the engines that were built, by what they were built from."""
    return {}


@pytest.fixture
def build(exported, tmp_path, monkeypatch, built):
    """Build an exported graph on a simulated GPU."""

    def build(form="chunk", version="10.3.0", batch=1, **device):
        if version == RTX:
            device.setdefault("capability", (8, 6))
        cuda, trt = simulated_gpu.install(monkeypatch, version, **device)
        target = "tensorrt" if version in WEAK_ONLY else "tensorrt-fp16"
        graph = exported / f"model.int8.{target}.{form}.onnx"
        out = tmp_path / "model.engine"
        key = (form, version, batch, *sorted(device.items()))
        files = [out, manifest_path(out)]
        if key in built:
            for file, data in zip(files, built[key], strict=True):
                file.write_bytes(data)
        else:
            write_engine(graph, out, BuildConfig(library=trt.__name__, batch=batch))
            built[key] = [file.read_bytes() for file in files]
            assert cuda.leaks() == []
        return Engine(out, graph, cuda, trt)

    return build


@pytest.fixture(scope="module")
def speech(demo):
    """A minute of recordings, in a row."""
    clips = [read_audio(clip.path, 16_000).samples for clip in demo.clips[:: len(demo.clips) // 60]]
    samples = np.concatenate(clips)
    return samples[: len(samples) // CHUNK * CHUNK]


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def rows_of(speech, rows, samples):
    """Different speech for each row (N, S)."""
    return np.stack([speech[row * 16_000 :][:samples] for row in range(rows)])


def chunks_of(audio):
    return (audio[:, start : start + CHUNK] for start in range(0, audio.shape[1], CHUNK))


# Versions, memory.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["clip", "chunk"])
def test_an_engine_answers_as_its_graph_does(build, demo, form, version):
    engine = build(form, version)
    with engine.open() as session, open_session(engine.graph) as reference:
        for clip in demo.clips[:: len(demo.clips) // 2][:2]:
            samples = read_audio(clip.path, 16_000).samples
            same(clip_logits(session, samples), clip_logits(reference, samples))
        assert session.backend == f"{engine.trt.__name__} {engine.trt.__version__}"
        assert session.spec == reference.spec
    assert engine.cuda.leaks() == []


def test_however_the_audio_is_cut_the_logits_are_the_same(build, speech, tmp_path):
    audio = speech[None, : 20 * CHUNK]
    with build("clip").open() as session, Stream(session) as stream:
        pieces = [stream.push(audio[:, start:end]) for start, end in ((0, 960), (960, 6400))]
    with build("chunk").open() as session, Stream(session) as stream:
        np.testing.assert_allclose(
            stream.push(audio), np.concatenate(pieces, axis=1), rtol=0, atol=0.05
        )


@pytest.mark.parametrize(("integrated", "cuda_graph"), [(False, True), (True, True), (True, False)])
def test_a_long_stream_answers_as_its_graph_does(build, speech, integrated, cuda_graph):
    engine = build(integrated=integrated)
    audio = speech[None, : 500 * CHUNK]
    with (
        engine.open(cuda_graph=cuda_graph) as session,
        open_session(engine.graph) as reference,
        Stream(session) as stream,
        Stream(reference) as expected,
    ):
        for chunk in chunks_of(audio):
            same(stream.push(chunk), expected.push(chunk))
        for name, value in expected.state.items():
            same(stream.state[name], value)
    assert engine.cuda.leaks() == []
    assert ("cudaGraphLaunch" in engine.cuda.calls) is cuda_graph


def test_on_an_integrated_gpu_neither_audio_nor_logits_are_copied(build, speech):
    engine = build(integrated=True)
    with engine.open() as session, Stream(session) as stream:
        for chunk in chunks_of(speech[None, : 8 * CHUNK]):
            stream.push(chunk)
        engine.cuda.calls.clear()
        stream.push(speech[None, :CHUNK])
        assert engine.cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    sizes = {"mapped" in copy for copy in engine.cuda.copies}
    assert sizes == {False}  # what was copied are states, to compare a graph's with


# CUDA graphs.


def test_after_the_warm_up_a_step_is_one_launch_and_no_state_is_copied(build, speech):
    engine = build()
    with engine.open() as session, Stream(session) as stream:
        steps = []
        for chunk in chunks_of(speech[None, : 6 * CHUNK]):
            engine.cuda.calls.clear()
            stream.push(chunk)
            steps.append(list(engine.cuda.calls))
        assert steps[0] == ["cudaMemcpyAsync", "execute", "cudaMemcpyAsync", STEP[-1]]
        for step in steps[1:3]:  # a graph for either buffer of the state
            assert step.count("execute") == 2  # once for real, once into the graph
            assert step.count("cudaGraphInstantiate") == step.count("cudaGraphLaunch") == 1
        assert steps[3:] == [STEP] * 3
        audio, logits = engine.cuda.copies[-2:]
        assert audio == ("pinned", "device", 4 * CHUNK)
        assert logits == ("device", "pinned", 4 * len(session.spec.labels))


def test_streams_say_when_all_further_steps_are_launched(build, speech):
    with build("clip").open() as session:
        streams = session.streams(1)
        found = []
        for length in (1, 1, 1, 1, 2, 2, 2):
            streams.advance(speech[None, : length * CHUNK])
            found.append(streams.has_graph)
        assert found == [False, False, True, True, False, False, True]


def test_without_a_graph_every_step_is_enqueued(build, speech):
    engine = build()
    with engine.open(cuda_graph=False) as session, Stream(session) as stream:
        stream.push(speech[None, : 5 * CHUNK])
    assert engine.cuda.calls.count("execute") == 5
    assert "cudaStreamBeginCapture" not in engine.cuda.calls


def assert_falls_back(engine, speech, reason):
    """Once, with a warning; all answers are right."""
    audio = speech[None, : 8 * CHUNK]
    with engine.open() as session, open_session(engine.graph) as reference:
        stream, expected = Stream(session), Stream(reference).push(audio)
        with pytest.warns(GraphFallback) as caught:
            same(stream.push(audio), expected)
        (warning,) = caught
        assert re.fullmatch(
            f"the engine runs without a CUDA graph, which is slower: {reason}",
            str(warning.message),
        )
        with Stream(session) as other:  # does not try again
            same(other.push(audio), expected)
        engine.cuda.calls.clear()
        stream.push(audio[:, :CHUNK])
        assert "cudaGraphLaunch" not in engine.cuda.calls
        assert not session.cuda_graph
    assert engine.cuda.leaks() == []


@pytest.mark.parametrize("call", [1, 2], ids=["first side", "second side"])
@pytest.mark.parametrize(
    "failing",
    ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"],
)
def test_a_graph_that_cannot_be_made_is_done_without(build, speech, failing, call):
    engine = build()
    engine.cuda.fail(failing, call)
    assert_falls_back(engine, speech, rf"{failing}: .+ \(CUDA error 999\)")


def test_an_engine_that_cannot_be_captured_is_run_without(build, speech):
    engine = build()
    engine.trt.quirks.capturable = False
    reason = (
        r"tensorrt 10\.3\.0 does not run the engine: .*not permitted when stream is capturing.*"
    )
    assert_falls_back(engine, speech, reason)


def test_a_graph_that_gives_something_else_is_not_used(build, speech):
    engine = build()
    engine.trt.quirks.graph_offset = 0.25
    assert_falls_back(engine, speech, "with one, logits is off by 0.25")


def test_a_new_length_makes_new_graphs(build, speech):
    engine = build("clip")
    with (
        engine.open() as session,
        open_session(engine.graph) as reference,
        Stream(session) as stream,
        Stream(reference) as expected,
    ):
        start = 0
        for chunks, steps in ((1, 5), (3, 5), (2, 1), (1, 4)):
            for _ in range(steps):
                audio = speech[None, start : start + chunks * CHUNK]
                same(stream.push(audio), expected.push(audio))
                start += audio.shape[1]
    assert engine.cuda.calls.count("cudaGraphInstantiate") == 3 * 2
    assert engine.cuda.leaks() == []


# Rows and streams.


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_rows_are_streams_of_their_own(build, speech, cuda_graph):
    engine = build(batch=8)
    audio = rows_of(speech, 8, 12 * CHUNK)
    resets = {3: [5], 6: [0, 7], 7: [-3], 9: None}
    with engine.open(cuda_graph=cuda_graph) as session, open_session(engine.graph) as reference:
        stream, expected = Stream(session, batch=8), Stream(reference, batch=8)
        alone = [Stream(reference) for _ in range(8)]
        for step, chunk in enumerate(chunks_of(audio)):
            if step in resets:
                stream.reset(resets[step])
                expected.reset(resets[step])
                for row in range(8) if resets[step] is None else resets[step]:
                    alone[row].reset()
            found = stream.push(chunk)
            same(found, expected.push(chunk))
            separate = [alone[row].push(chunk[row][None]) for row in range(8)]
            np.testing.assert_allclose(found, np.concatenate(separate), rtol=0, atol=0.05)


def test_fewer_rows_than_it_was_built_for(build, speech):
    engine = build(batch=8)
    audio = rows_of(speech, 3, 4 * CHUNK)
    with engine.open() as session, open_session(engine.graph) as reference:
        same(Stream(session, batch=3).push(audio), Stream(reference, batch=3).push(audio))


def test_streams_of_one_session_do_not_meet(build, speech):
    engine = build(batch=2)
    with engine.open() as session, open_session(engine.graph) as reference:
        sizes = (1, 1, 2)
        streams = [Stream(session, batch=size) for size in sizes]
        expected = [Stream(reference, batch=size) for size in sizes]
        for step in range(8):
            for index in (0, 2, 1) if step % 2 else (1, 2, 0, 0):
                audio = rows_of(speech[(step + index) * CHUNK :], sizes[index], CHUNK)
                same(streams[index].push(audio), expected[index].push(audio))
    assert engine.cuda.leaks() == []


def test_what_a_stream_held_serves_the_next_one(build, speech):
    engine = build()
    audio = speech[None, : 4 * CHUNK]
    with engine.open() as session:
        with Stream(session) as stream:
            first = stream.push(audio)
        engine.cuda.calls.clear()
        with Stream(session) as stream:
            np.testing.assert_array_equal(stream.push(audio), first)  # from the initial state
        assert {"cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate"}.isdisjoint(engine.cuda.calls)


def test_a_stream_that_is_closed_twice_serves_one_only(build, speech):
    engine = build()
    audio = speech[None, : 4 * CHUNK]
    with engine.open() as session:
        with Stream(session) as stream:
            expected = stream.push(audio)
            stream.close()
        one, other = Stream(session), Stream(session)
        for start in range(0, audio.shape[1], CHUNK):
            found = [s.push(audio[:, start : start + CHUNK]) for s in (one, other)]
            np.testing.assert_array_equal(*found)
            same(found[0][0], expected[0, start // CHUNK][None])


def test_run_is_as_onnx_runtimes_and_keeps_no_state(build, speech, rng):
    engine = build("clip", batch=2)
    with engine.open() as session, open_session(engine.graph) as reference:
        for rows in (1, 2, 1, 1, 1):
            state = initial_state(session.spec, rows)
            feed = {n: rng.standard_normal(v.shape, np.float32) * 0.1 for n, v in state.items()}
            feed["audio"] = rows_of(speech, rows, 3 * CHUNK)
            found, expected = session.run(feed), reference.run(feed)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                same(found[name], value)
    assert engine.cuda.leaks() == []


def test_a_state_that_was_given_may_be_changed_afterwards(build, speech):
    engine = build()
    with engine.open() as session, open_session(engine.graph) as reference:
        with Stream(reference) as stream:
            stream.push(speech[None, : 3 * CHUNK])
            state = {name: value.copy() for name, value in stream.state.items()}
            expected = stream.push(speech[None, 3 * CHUNK : 4 * CHUNK])
        streams = session.streams(1)
        streams.write_state(state)
        for value in state.values():
            value[:] = 7
        same(streams.advance(speech[None, 3 * CHUNK : 4 * CHUNK]), expected)


def test_audio_longer_than_it_was_built_for_is_cut(build, speech):
    engine = build("clip")
    audio = speech[None, : 3 * 16_000]
    with engine.open() as session, open_session(engine.graph) as reference:
        assert session.max_samples == 16_960  # the longest clip of the demo, a second, and 60 ms
        found = Stream(session).push(audio)
        assert found.shape == (1, 150, len(session.spec.labels))
        expected = Stream(reference)
        cuts = [audio[:, start : start + 16_960] for start in range(0, 48_000, 16_960)]
        same(found, np.concatenate([expected.push(cut) for cut in cuts], axis=1))
        with pytest.raises(SessionError, match=r"does not take audio of shape \(1, 48000\): "):
            session.run({"audio": audio, **initial_state(session.spec, 1)})


def test_what_it_does_not_take_is_said_and_harms_nothing(build, speech):
    engine = build("clip", batch=2)
    with engine.open() as session, open_session(engine.graph) as reference:
        with pytest.raises(SessionError, match="at most 2 streams, not for 3"):
            Stream(session, batch=3)
        stream = Stream(session)
        with pytest.raises(SessionError, match="takes 1 rows of whole chunks, and not 2 of 320"):
            stream.push(rows_of(speech, 2, CHUNK))
        with pytest.raises(IndexError):
            stream.reset([1])
        state = initial_state(session.spec, 2)
        with pytest.raises(SessionError, match=r"audio_tail is of shape .*, not of 1 rows"):
            session.run({"audio": speech[None, :CHUNK], **state})
        audio = speech[None, : 4 * CHUNK]
        same(stream.push(audio), Stream(reference).push(audio))
    assert engine.cuda.leaks() == []


# What is given back.


def test_streams_that_nobody_closed_are_freed_with_the_session(build, speech):
    engine = build()
    with engine.open() as session:
        Stream(session).push(speech[None, : 4 * CHUNK])
        assert engine.cuda.leaks() != []
    assert engine.cuda.leaks() == []


@pytest.mark.parametrize("failing", ["cudaMalloc", "cudaHostAlloc", "cudaMemset"])
def test_too_little_memory_for_a_stream_leaves_none_of_it(build, failing):
    engine = build()
    with engine.open() as session:
        before = engine.cuda.leaks()
        with Stream(session):
            count = engine.cuda.calls.count(failing)
        assert count >= 2
        held = engine.cuda.leaks()
        for call in range(1, count + 1):
            engine.cuda.fail(failing, call, "cudaErrorMemoryAllocation")
            with pytest.raises(SessionError, match=rf"{failing}: out of memory \(CUDA error 2\)"):
                session.streams(2)
            assert engine.cuda.leaks() == held != before
    assert engine.cuda.leaks() == []


def push_after(engine, speech, fail):
    """A step, and another once something has failed."""
    with engine.open() as session:
        stream = Stream(session)
        stream.push(speech[None, :CHUNK])
        fail()
        stream.push(speech[None, :CHUNK])


def test_an_error_in_a_step_is_told_and_all_is_given_back(build, speech):
    engine = build()

    def fail():
        engine.trt.quirks.execute_error = "Error Code 2: OutOfMemory (out of memory)"

    reason = r"^tensorrt 10\.3\.0 does not run the engine: .*out of memory.* \(perhaps too little "
    with pytest.raises(SessionError, match=reason):
        push_after(engine, speech, fail)
    assert engine.cuda.leaks() == []


def test_of_a_device_that_has_failed_the_first_error_is_told(build, speech):
    engine = build()

    def fail():
        for name in ("cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
            engine.cuda.fail(name, None, "cudaErrorIllegalAddress")

    with pytest.raises(SessionError, match=r"^cudaStreamSynchronize: an illegal memory access"):
        push_after(engine, speech, fail)


def test_a_device_that_fails_at_the_end_is_told(build):
    engine = build()
    session = engine.open()
    Stream(session)
    engine.cuda.fail("cudaFree", 2, "cudaErrorIllegalAddress")
    with pytest.raises(SessionError, match="cudaFree: an illegal memory access"):
        session.__exit__(None, None, None)
    assert len(engine.cuda.leaks()) == 1  # all the rest is given back


# What is refused.


def opening(engine):
    with pytest.raises(EdgeError) as error:
        engine.open()
    assert engine.cuda.leaks() == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_engine_of_another_version_is_refused(build, monkeypatch):
    engine = build(version="10.3.0")
    simulated_gpu.install(monkeypatch, "10.13.3.9")
    assert opening(engine) == (
        f"{engine.path}: built by TensorRT 10.3.0, and here is 10.13.3.9; an engine runs in the "
        f"version that built it: run 'cnngru-edge build {engine.graph.name} --out {engine.path}' "
        "here"
    )


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors"),
    [("Thor", (11, 0), 16), ("Orin Nano", (8, 7), 16), ("Orin", (11, 0), 16), ("Orin", (8, 7), 8)],
)
def test_an_engine_for_another_gpu_is_refused(
    build, monkeypatch, name, capability, multiprocessors
):
    engine = build(batch=4)
    device = {"name": name, "capability": capability, "multiprocessors": multiprocessors}
    simulated_gpu.install(monkeypatch, "10.3.0", **device)
    assert opening(engine) == (
        f"{engine.path}: built for Orin (16 multiprocessors) of compute capability 8.7, and here "
        f"is {name} ({multiprocessors} multiprocessors) of {capability[0]}.{capability[1]}: run "
        f"'cnngru-edge build {engine.graph.name} --out {engine.path} --batch 4' here"
    )


def test_an_engine_of_rtx_runs_on_any_gpu_that_it_was_built_for(build, monkeypatch):
    engine = build(version=RTX)
    simulated_gpu.install(monkeypatch, RTX, name="RTX 5090", capability=(12, 0))
    with engine.open() as session:
        assert session.device == "RTX 5090 (compute capability 12.0)"
    simulated_gpu.install(monkeypatch, RTX, capability=(8, 7))
    built = f"{engine.path}: built for GPUs of compute capability 8.6, 8.9, 12.0, and here is Orin "
    assert opening(engine) == (
        f"{built}(16 multiprocessors) of 8.7: TensorRT-RTX has no kernels for that, build it with "
        "TensorRT"
    )
    simulated_gpu.install(monkeypatch, RTX, capability=(12, 1))
    assert opening(engine) == (
        f"{built}(16 multiprocessors) of 12.1: run 'cnngru-edge build {engine.graph.name} --out "
        f"{engine.path} --target tensorrt-rtx --capability 12.1'"
    )


def test_a_stream_that_is_closed_twice_takes_nothing_from_another(build):
    with build().open() as session:
        first = Stream(session)
        first.close()
        second = Stream(session)
        first.close()
        third = Stream(session)
        assert second._streams is not third._streams


@pytest.mark.parametrize("version", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"driver": 0}, "no NVIDIA driver is installed here"),
        ({"driver": 12060}, "the NVIDIA driver runs CUDA up to 12.6, and cuda-bindings is for 13"),
        ({"devices": 0}, "CUDA finds no GPU here"),
    ],
    ids=["no-driver", "old-driver", "no-device"],
)
def test_without_a_gpu_it_says_so_before_tensorrt_is_touched(
    build, monkeypatch, version, device, message
):
    engine = build(version=version)
    simulated_gpu.install(monkeypatch, version, **device)
    assert opening(engine).startswith(message)


def test_without_tensorrt_its_package_is_named(build, monkeypatch):
    engine = build()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendMissing, match=r"^TensorRT cannot be imported \(.+\): pip install "):
        engine.open()


def test_a_tensorrt_that_does_not_start_is_said(build):
    engine = build()
    engine.trt.quirks.no_objects = (
        "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    )
    assert opening(engine) == (
        "TensorRT 10.3.0 does not start: cudaError 35: CUDA driver version is insufficient for "
        "CUDA runtime version (no NVIDIA driver, or one too old for this library; 'cnngru-edge "
        "doctor' says which)"
    )


def test_a_context_that_cannot_be_made_is_said(build):
    engine = build()
    engine.trt.quirks.context_error = "Error Code 9: something new"
    reason = r"^tensorrt 10\.3\.0 makes no execution context: Error Code 9: something new$"
    with engine.open() as session, pytest.raises(SessionError, match=reason):
        Stream(session)
    assert engine.cuda.leaks() == []


def change(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change_engine", "message"),
    [
        (lambda data: b"", "empty; copy or build it again"),
        (lambda data: data[:1000], r"cut short, 1000 of \d+ bytes"),
        (lambda data: data[:20], "cut short at 20 bytes"),
        (lambda data: b"\x08\x08onnx" + data, r"not a TensorRT engine \(an ONNX file\?\)"),
        (lambda data: data[:-1] + b"?", r"not the engine that model\.engine\.json was written for"),
    ],
    ids=["empty", "cut", "cut early", "onnx", "changed"],
)
def test_a_file_that_is_not_the_engine_is_refused_unopened(build, change_engine, message):
    engine = build()
    change(engine.path, change_engine)
    calls = len(engine.cuda.calls)
    assert re.match(rf"{re.escape(str(engine.path))}: {message}", opening(engine))
    assert len(engine.cuda.calls) == calls


def test_an_engine_of_another_library_than_its_manifest_says_is_refused(build):
    engine = build()
    manifest = engine.path.with_name("model.engine.json")
    raw = json.loads(manifest.read_text())
    raw["builder"]["library"] = "tensorrt_rtx"
    manifest.write_text(json.dumps(raw))
    assert opening(engine) == (
        f"{engine.path}: an engine of TensorRT, and its manifest says TensorRT-RTX 10.3.0"
    )


def test_an_engine_without_its_manifest_is_refused(build):
    engine = build()
    engine.path.with_name("model.engine.json").unlink()
    assert opening(engine).startswith(f"{engine.path}.json: no such file; an engine is opened only")


OTHER_VERSION = "the engine is of another version; build it again here"
OTHER_DEVICE = "the engine is of another kind of GPU or system; build it on the device that runs it"
SAID = {
    "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.Trying to load an "
    "engine created with incompatible serialization version (1 != 2). Check that the engine was "
    "not created using safety runtime": OTHER_VERSION,
    "Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.": OTHER_VERSION,
    "Serialization assertion stdVersionRead == serializationVersion failed.": OTHER_VERSION,
    "Version tag does not match. Note: Current Version: 1, Serialized Engine Version: 2": (
        OTHER_VERSION
    ),
    "The engine plan file is not compatible with this version of TensorRT, expecting library "
    "version 10.3.0": OTHER_VERSION,
    "TensorRT plan major version does not match runtime major version.": OTHER_VERSION,
    "Engine Version Forward Compatibility supported starting TensorRT 8.6": OTHER_VERSION,
    "The engine header does not conform to the expected format for TensorRT-RTX.": OTHER_VERSION,
    "The engine has been created with TensorRT-RTX version 1.6, but the current runtime is "
    "TensorRT-RTX version 1.7. Rebuild": OTHER_VERSION,
    "The engine plan file is generated on an incompatible device, expecting compute 8.7": (
        OTHER_DEVICE
    ),
    "Using an engine plan file across different models of devices is not supported and is likely "
    "to affect performance or even cause errors or deadlock.": OTHER_DEVICE,
    "Platform specific tag mismatch detected. TensorRT plan files are only supported on the target "
    "runtime platform they were created on.": OTHER_DEVICE,
    "The current device is not compatible with this hardware-compatible engine. Expected compute "
    "capability >= 8.0": OTHER_DEVICE,
    "The engine cannot run on this GPU, which has compute capability 8.7. Supported compute "
    "capabilities: 8.6": OTHER_DEVICE,
    "Cannot deserialize engine with lean runtime since IRuntime::getEngineHostCodeAllowed() is "
    "false.": (
        "the engine was built version-compatible, which needs code from inside it; build it here"
    ),
    "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for "
    "it.": "TensorRT-RTX has no kernels for this GPU; use TensorRT",
    "cudaError 35: CUDA driver version is insufficient for CUDA runtime version": (
        "no NVIDIA driver, or one too old for this library; 'cnngru-edge doctor' says which"
    ),
}


@pytest.mark.parametrize(("text", "hint"), SAID.items(), ids=[text[:40] for text in SAID])
def test_what_tensorrt_says_becomes_what_to_do(engine_of_hints, text, hint):
    engine_of_hints.trt.quirks.open_error = text
    message = opening(engine_of_hints)
    assert message.startswith(
        f"{engine_of_hints.path}: tensorrt 10.3.0 does not open this engine: "
    )
    assert text in message
    assert message.endswith(f" ({hint})")


def test_what_is_not_known_is_told_as_it_is(engine_of_hints):
    engine_of_hints.trt.quirks.open_error = "something\n  new"
    assert opening(engine_of_hints).endswith("Error Code 1: something new")


@pytest.fixture
def engine_of_hints(build):
    return build()


def test_no_graph_is_missed_where_none_was_asked_for(build, speech):
    engine = build()
    engine.trt.quirks.capturable = False
    with warnings.catch_warnings(), engine.open(cuda_graph=False) as session:
        warnings.simplefilter("error")
        Stream(session).push(speech[None, : 4 * CHUNK])
