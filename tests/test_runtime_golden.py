import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import half_of, make_noise, make_nothing, with_head_times

from cnngru_edge.calibration.corpus.read import DEMO
from cnngru_edge.export.artefacts import FLOAT, INT8, INT8_FORMS, TORCHSCRIPT
from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.cli import main
from cnngru_edge.export.targets.trt.build import BuildConfig
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import CorpusError, SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.check.golden import GOLDEN, read_golden, selftest, write_golden
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.recognize import recognize
from cnngru_edge.runtime.stream import clip_logits

RATE = 16_000


def eval_paths(demo):
    return [clip.path for clip in demo.of("eval")]


@pytest.fixture(scope="module")
def golden(exported, demo, tmp_path_factory):
    """The golden set of an export."""
    path = tmp_path_factory.mktemp("golden") / GOLDEN
    forms = [exported / name for name in INT8_FORMS]
    assert write_golden(path, exported / FLOAT, forms, eval_paths(demo)) == 16
    return path


@pytest.fixture
def damaged(golden, tmp_path):
    """A copy of it with some arrays replaced, or left out where they are None."""

    def write(**replaced):
        with np.load(golden) as file:
            arrays = dict(file) | replaced
        path = tmp_path / "damaged.npz"
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return write


# What is in it.


def test_it_holds_what_the_float_model_says(golden, exported):
    found = read_golden(golden)
    assert found.sha256 == file_sha256(exported / FLOAT)
    assert 25 < found.sqnr_db < 60
    with open_session(exported / FLOAT) as session:
        assert found.spec == session.spec
        for clip in found.clips:
            samples = clip.given.astype(np.float32) / 2**15
            np.testing.assert_array_equal(clip_logits(session, samples), clip.logits)
            path = DEMO / clip.name
            np.testing.assert_array_equal(read_audio(path, RATE).samples, samples)
            answer = recognize(session, path)
            assert answer.label == clip.label
            second, best = sorted(answer.scores.values())[-2:]
            assert best - second > 0.5  # there are enough clips that are clear


def test_it_has_every_label(golden):
    found = read_golden(golden)
    counts = [sum(clip.label == label for clip in found.clips) for label in found.spec.labels]
    assert set(counts) <= {1, 2}


def test_it_is_small_and_the_same_each_time(golden, exported, demo, tmp_path):
    again = tmp_path / "again.npz"
    write_golden(again, exported / FLOAT, [exported / n for n in INT8_FORMS], eval_paths(demo))
    assert again.read_bytes() == golden.read_bytes()
    assert len(again.read_bytes()) < 500_000


def test_the_worst_form_sets_the_floor(golden, exported):
    sqnrs = [selftest(exported / name, golden).sqnr_db for name in INT8_FORMS]
    assert read_golden(golden).sqnr_db == pytest.approx(min(sqnrs))


def test_clips_that_int8_hears_otherwise_are_not_in_it(golden, exported, demo, tmp_path):
    quiet = with_head_times(0.5, exported / INT8, tmp_path / "quiet.onnx")  # less sure, or wrong
    path = tmp_path / GOLDEN
    assert write_golden(path, exported / FLOAT, [exported / INT8, quiet], eval_paths(demo)) > 0
    clips = read_golden(path).clips
    assert {clip.name for clip in clips} != {clip.name for clip in read_golden(golden).clips}
    with open_session(quiet) as session:
        answers = [recognize(session, DEMO / clip.name) for clip in clips]
    assert [answer.label for answer in answers] == [clip.label for clip in clips]
    assert all(answer.score > 0.25 for answer in answers)


def test_recordings_that_cannot_be_read_are_passed_over(exported, demo, wav, tmp_path, rng):
    long = wav("long.wav", rng.uniform(-0.1, 0.1, 10 * RATE))
    paths = [tmp_path / "none.wav", long, *eval_paths(demo)[:3]]
    assert write_golden(tmp_path / GOLDEN, exported / FLOAT, [exported / INT8], paths) == 4
    lengths = {clip.name: len(clip.given) for clip in read_golden(tmp_path / GOLDEN).clips}
    assert lengths[f"{tmp_path.name}/long.wav"] == 3 * RATE


def test_without_a_clip_there_is_none(exported, tmp_path):
    path = tmp_path / GOLDEN
    with pytest.raises(CorpusError) as caught:
        write_golden(path, exported / FLOAT, [exported / INT8], [tmp_path / "none.wav"])
    assert str(caught.value) == (
        f"{path}: no clip that model.fp32.onnx and its INT8 forms hear alike"
    )
    assert not path.exists()


# What passes.


@pytest.mark.parametrize("name", [*INT8_FORMS, FLOAT, TORCHSCRIPT])
def test_what_was_exported_passes(golden, exported, name):
    found = selftest(exported / name, golden)
    assert found.passed, list(found.lines)
    assert (found.clips, found.failures) == (16, ())
    (line,) = found.lines
    assert re.fullmatch(
        rf"{re.escape(str(exported / name))}: passed: 16 of 16 answers as the float model's, SQNR "
        rf"(\d+\.\d|inf) dB, expected \d+\.\d dB or more; (onnxruntime|torch) .+",
        line,
    )
    assert "Infinity" not in found.to_json()


@pytest.mark.parametrize(("form", "index"), [("clip", 0), ("chunk", 1)])
def test_an_engine_passes(golden, exported, tmp_path, monkeypatch, form, index):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    import simulated_gpu

    version = simulated_gpu.VERSIONS[index]
    cuda, trt = simulated_gpu.install(monkeypatch, version)
    target = "tensorrt" if version in simulated_gpu.WEAK_ONLY else "tensorrt-fp16"
    engine = tmp_path / "model.engine"
    graph = exported / f"model.int8.{target}.{form}.onnx"
    write_engine(graph, engine, BuildConfig(library=trt.__name__))
    found = selftest(engine, golden)
    assert found.passed, list(found.lines)
    assert found.backend == f"tensorrt {version}"
    assert cuda.leaks() == []


# What does not.


def test_a_damaged_model_is_found(golden, exported, tmp_path):
    negated = with_head_times(-1, exported / INT8, tmp_path / "negated.onnx")
    found = selftest(negated, golden)
    assert not found.passed
    assert len(found.failures) == 16
    assert found.sqnr_db < 0
    expected = {clip.name: clip.label for clip in read_golden(golden).clips}
    *lines, last = found.lines
    assert lines[0] == (
        f"{found.failures[0].clip}: expected {expected[found.failures[0].clip]}, got "
        f"{found.failures[0].found}"
    )
    assert ": failed: 0 of 16 answers as the float model's, SQNR -" in last


def test_a_little_damage_is_found_by_its_noise(golden, exported, tmp_path):
    louder = with_head_times(1.1, exported / INT8, tmp_path / "louder.onnx")
    found = selftest(louder, golden)
    assert found.failures == ()
    assert found.sqnr_db < found.min_sqnr_db
    assert not found.passed


def test_an_answer_that_is_no_number_is_refused(golden, exported, tmp_path):
    engine = with_head_times(np.float32(np.nan), exported / FLOAT, tmp_path / "nan.onnx")
    with pytest.raises(SessionError, match=r"nan\.onnx: answers NaN to .+; it is damaged, export"):
        selftest(engine, golden)


def test_another_model_is_refused(golden, exported, tiny_onnx, damaged):
    with pytest.raises(SessionError) as caught:
        selftest(tiny_onnx, golden)
    assert str(caught.value) == (
        f"{golden}: of another model than {tiny_onnx}; give its own --golden"
    )
    retrained = damaged(sha256=np.array("0" * 64))
    with pytest.raises(SessionError, match=f"{retrained}: of another model than "):
        selftest(exported / INT8, retrained)


# Files that are none.


def make_pickle(path):
    path.write_bytes(pickle.dumps({"audio": [1, 2, 3]}))


def make_array(path):
    data = io.BytesIO()
    np.save(data, np.zeros(3))
    path.write_bytes(data.getvalue())


def make_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("audio.npy", bytes(1 << 27))


BAD_FILES = {
    "none.npz": (make_nothing, "no such file; 'cnngru-edge export' writes one beside the .+"),
    "noise.npz": (make_noise, r"not a golden set, or damaged \(File is not a zip file\); copy .+"),
    "pickle.npz": (make_pickle, r"not a golden set, or damaged \(File is not a zip file\); .+"),
    "array.npz": (make_array, r"not a golden set, or damaged \(File is not a zip file\); .+"),
    "bomb.npz": (make_bomb, r"not a golden set, or damaged \(134,217,728 bytes of arrays\); .+"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_golden_set_is_refused(refused, exported, tmp_path, name):
    make, message = BAD_FILES[name]
    path = tmp_path / name
    make(path)
    error = refused("selftest", "--engine", exported / INT8, "--golden", path)
    assert re.fullmatch(f"{re.escape(str(path))}: {message}", error)


def test_a_cut_file_is_refused(golden, tmp_path):
    path = tmp_path / GOLDEN
    path.write_bytes(golden.read_bytes())
    half_of(path)
    with pytest.raises(SessionError, match=r"damaged \(File is not a zip file\); copy it again"):
        read_golden(path)


def test_a_flipped_byte_is_refused(golden, tmp_path):
    data = bytearray(golden.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / GOLDEN
    path.write_bytes(data)
    with pytest.raises(SessionError, match="not a golden set, or damaged"):
        read_golden(path)


BAD_ARRAYS = {
    "objects": ({"names": np.array([{}], object)}, "Object arrays cannot be loaded when allow_"),
    "missing": ({"given": None}, "given is not a file in the archive"),
    "type": ({"given": np.zeros(9, np.float32)}, r"given is of type float32 and shape \(9,\)"),
    "shape": ({"logits": np.zeros(12, np.float32)}, r"logits is of type float32 and shape \(12,"),
    "format": ({"format": np.array(1), "given": None}, "format 1, expected 2"),
    "spec": ({"spec": np.array("{")}, "model spec: not JSON"),
    "given": ({"given": np.zeros(9, np.int16)}, r"given: \d+ expected, 9 found"),
    "names": ({"names": np.array(["a"])}, "16 lengths, 16 frames, 1 names, 16 labels"),
    "frames": ({"logits": np.zeros((9, 12), np.float32)}, r"logits: \d+ expected, 9 found"),
    "no frames": ({"frames": np.zeros(16, np.int64)}, r"logits: 0 expected, \d+ found"),
    "classes": (
        {"logits": np.zeros((16, 9), np.float32), "frames": np.ones(16, np.int64)},
        "logits of 9 labels, expected 12",
    ),
    "labels": ({"labels": np.array(["yes"] * 16)}, r".+\.flac is labelled yes, against its logits"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(damaged, name):
    replaced, message = BAD_ARRAYS[name]
    path = damaged(**replaced)
    with pytest.raises(SessionError) as caught:
        read_golden(path)
    found = str(caught.value)
    assert re.match(rf"{re.escape(str(path))}: not a golden set, or damaged \(.*{message}", found)
    assert found.endswith("; copy it again")


# The command.


def test_the_command_finds_the_golden_set_beside_the_engine(golden, exported, tmp_path):
    engine = tmp_path / "model.onnx"
    engine.symlink_to(exported / INT8)
    (tmp_path / GOLDEN).symlink_to(golden)
    result = CliRunner().invoke(main, ["selftest", "--engine", str(engine)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{engine}: passed: 16 of 16 answers")


def test_the_command_prints_json_and_fails(golden, exported, tmp_path):
    negated = with_head_times(-1, exported / INT8, tmp_path / "negated.onnx")
    args = ["selftest", "--engine", str(negated), "--golden", str(golden), "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert list(found) == [
        *("engine", "backend", "device", "precision", "clips", "failures", "sqnr_db"),
        *("min_sqnr_db", "passed"),
    ]
    assert found["passed"] is False
    assert found["failures"][0].keys() == {"clip", "expected", "found"}
