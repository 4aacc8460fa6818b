import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import soxr
import torch
from click.testing import CliRunner
from conftest import TINY_SPEC
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from cnngru_edge.export.cli import main
from cnngru_edge.export.onnx_graph import export_onnx
from cnngru_edge.models.checkpoint import save_checkpoint
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.spec import METADATA_KEY

START = "from cnngru_edge.export.cli import main; main()"
NO_SPEC = (
    f"no model spec inside (metadata '{METADATA_KEY}'), so it was not written by cnngru-edge; "
    "make one with 'cnngru-edge export'"
)
UNREADABLE = r"not readable as audio \(.+\); WAV, FLAC and Ogg are"
JSON_FIELDS = ["path", "label", "score", "scores", "duration_s", "latency_ms"]
JSON_FIELDS += ["backend", "device", "precision"]
CHECK_FIELDS = ["reference_label", "agrees", "max_abs_error"]

_BAR = re.compile(r"(trace|calibrate|quantize|build|compare) +[━╸╺ ]* +\d+/\d+ .*\n")


class Outcome:
    def __init__(self, exit_code, stdout, stderr):
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = _BAR.sub("", stderr)  # without the progress bars


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run a command to its end: no traceback, nothing written around Python's stdout and stderr."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    on_kill = signal.getsignal(signal.SIGTERM)

    def run(*args):
        capfd.readouterr()
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert capfd.readouterr() == ("", "")
        assert list(temporary.iterdir()) == []
        return Outcome(result.exit_code, result.stdout, result.stderr)

    yield run
    signal.signal(signal.SIGTERM, on_kill)


@pytest.fixture
def refused(cli, tmp_path):
    """What a command ends with after `Error: `, its only line; it leaves all files as they were."""

    def run(*args):
        before = contents(tmp_path)
        result = cli(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert contents(tmp_path) == before
        assert re.fullmatch("Error: .+\n", result.stderr)
        return result.stderr.removeprefix("Error: ").removesuffix("\n")

    return run


@pytest.fixture
def old(tmp_path):
    """A folder with an older export in it."""
    out = tmp_path / "old"
    out.mkdir()
    for name in ("model.ts", "model.fp32.onnx", "model.int8.onnx", "ranges.json", "other.txt"):
        (out / name).write_text(f"the old {name}")
    return out


@pytest.fixture
def manifest(tmp_path):
    """Write the rows of a manifest.csv; the folder."""

    def write(*rows):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        with (folder / "manifest.csv").open("w", newline="") as f:
            csv.writer(f).writerows(rows)
        return folder

    return write


@pytest.fixture
def tiny_onnx(tiny, tmp_path):
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny.for_export(), path)
    return path


@pytest.fixture
def loose(demo, tmp_path):
    """A folder of so many recordings without labels."""

    def link(count):
        folder = tmp_path / "loose"
        folder.mkdir()
        for clip in demo.of("calib")[:count]:
            (folder / f"{clip.label}_{clip.path.name}").symlink_to(clip.path)
        return folder

    return link


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".ses"  # ONNX Runtime's telemetry, in the folder for temporary files
    }


def clip_of(demo, label):
    return next(clip.path for clip in demo.of("eval") if clip.label == label)


def half_of(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def with_head_times(factor, source, target):
    """Write a graph whose last linear layer has other weights."""
    model = onnx.load(source)
    weight = next(i for i in model.graph.initializer if i.name.startswith("head.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * factor, weight.name))
    onnx.save(model, target)
    return target


# Recordings.


def write_nothing(path, samples):
    pass


def write_empty(path, samples):
    path.touch()


def write_cut(path, samples):
    soundfile.write(path, samples, 16_000)
    half_of(path)


def write_text(path, samples):
    path.write_text("this is no recording\n" * 100)


def write_nan(path, samples):
    samples[7] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def write_integers(path, samples):
    soundfile.write(path, np.linspace(-3000, 3000, 100), 16_000, subtype="FLOAT")


def write_no_samples(path, samples):
    soundfile.write(path, samples[:0], 16_000)


def write_two_samples(path, samples):
    soundfile.write(path, samples[:2], 192_000)


def write_flac_to_pipe(path, samples):
    soundfile.write(path, samples, 16_000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that hold the number of samples
    data[22:26] = bytes(4)
    path.write_bytes(data)


BAD_RECORDINGS = {
    "missing.wav": (write_nothing, "no such file"),
    "empty.wav": (write_empty, "the file is empty"),
    "cut.wav": (write_cut, "truncated, 3978 of 8000 bytes of audio; copy it again"),
    "cut.aiff": (write_cut, "truncated, 3981 of 8008 bytes of audio; copy it again"),
    "cut.au": (write_cut, "truncated, 3988 of 8000 bytes of audio; copy it again"),
    "cut.flac": (write_cut, UNREADABLE),
    "text.wav": (write_text, UNREADABLE),
    "nan.wav": (write_nan, "sample 7 is nan; record or convert it again"),
    "integers.wav": (write_integers, r"samples up to 3000, expected full scale 1; scale it down"),
    "zero.wav": (write_no_samples, "no samples in the file"),
    "two.wav": (write_two_samples, "too short, 2 samples at 192000 Hz"),
    "pipe.flac": (
        write_flac_to_pipe,
        "written to a pipe, its length is unknown; convert it again",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDINGS)
def test_a_bad_recording_is_named_and_the_others_are_answered(
    cli, exported, demo, rng, tmp_path, name
):
    write, message = BAD_RECORDINGS[name]
    bad = tmp_path / name
    write(bad, rng.uniform(-0.5, 0.5, 4000))
    good = [clip_of(demo, "yes"), clip_of(demo, "no")]
    run = ["run", "--engine", exported / "model.int8.onnx"]
    alone, among = cli(*run, bad), cli(*run, good[0], bad, good[1])
    for result in (alone, among):
        assert result.exit_code == 1
        assert re.fullmatch(f"Error: {re.escape(str(bad))}: {message}\n", result.stderr)
    assert alone.stdout == ""
    assert [line.split()[0] for line in among.stdout.splitlines()] == [str(path) for path in good]


def test_several_bad_recordings_are_named_and_counted(cli, exported, tmp_path):
    missing = [tmp_path / "a.wav", tmp_path / "b.wav"]
    result = cli("run", "--engine", exported / "model.int8.onnx", *missing)
    assert result.exit_code == 1
    assert result.stderr == (
        f"skipped {missing[0]}: no such file\nskipped {missing[1]}: no such file\n"
        "Error: recordings left out: 2, see above\n"
    )


def test_a_folder_is_no_recording(cli, exported, tmp_path):
    result = cli("run", "--engine", exported / "model.int8.onnx", tmp_path)
    assert result.stderr == f"Error: {tmp_path}: no such file\n"
    assert result.exit_code == 1


@pytest.fixture
def answers(cli, exported):
    """The JSON lines of a run in which nothing is wrong, and its notes."""

    def run(*args):
        result = cli("run", "--json", "--engine", exported / "model.int8.onnx", *args)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        return [json.loads(line, parse_constant=pytest.fail) for line in lines], result.stderr

    return run


def test_a_recording_shorter_than_a_chunk_is_padded(answers, wav, rng):
    (answer,), notes = answers(wav("short.wav", rng.uniform(-0.5, 0.5, 100)))
    assert notes == "note: 1 of 1 shorter than one chunk of 320 samples, padded with zeros\n"
    assert answer["duration_s"] == 100 / 16_000


def test_of_eight_channels_the_first_is_answered(answers, wav, demo, rng):
    samples, rate = soundfile.read(clip_of(demo, "yes"))
    others = rng.uniform(-0.5, 0.5, (len(samples), 7))
    eight = wav("eight.wav", np.column_stack([samples, others]), rate)
    (answer,), notes = answers(eight)
    assert notes == "note: 1 of 1 have 8 channels, of which the first is used\n"
    (alone,), nothing = answers(wav("alone.wav", samples, rate))
    assert nothing == ""
    assert answer["scores"] == alone["scores"]


def test_another_sample_rate_is_resampled(answers, wav, demo):
    clips = [clip_of(demo, label) for label in ("yes", "stop")]
    others = []
    for clip in clips:
        samples, rate = soundfile.read(clip)
        others.append(wav(f"{clip.parent.name}.wav", soxr.resample(samples, rate, 44_100), 44_100))
    expected, nothing = answers(*clips)
    found, notes = answers(*others, clips[0])
    assert nothing == ""
    assert notes == "note: 2 of 3 resampled from 44100 to 16000 Hz\n"
    assert [a["label"] for a in found[:2]] == [a["label"] for a in expected]


def test_json_lines_have_these_fields(answers, exported, wav, demo, rng):
    clips = [clip_of(demo, "yes"), wav("stereo.wav", rng.uniform(-0.5, 0.5, (16_000, 2)))]
    found, _ = answers(*clips)
    assert [answer["path"] for answer in found] == [str(clip) for clip in clips]
    assert all(list(answer) == JSON_FIELDS for answer in found)
    checked, _ = answers("--reference", exported / "model.fp32.onnx", *clips)
    assert all(list(answer) == JSON_FIELDS + CHECK_FIELDS for answer in checked)


def test_json_lines_stay_json_beside_a_bad_recording(cli, exported, demo, tmp_path):
    bad, good = tmp_path / "none.wav", clip_of(demo, "yes")
    result = cli("run", "--json", "--engine", exported / "model.int8.onnx", bad, good)
    assert result.exit_code == 1
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [str(good)]


# Engines.


def make_nothing(path):
    pass


def make_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def make_other_onnx(path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def make_impostor(path):
    make_other_onnx(path)
    model = onnx.load(path)
    helper.set_model_props(model, {METADATA_KEY: TINY_SPEC.to_json()})
    onnx.save(model, path)


def make_other_torchscript(path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


INPUTS = ["audio", *(state.name for state in TINY_SPEC.state)]
BAD_ENGINES = {
    "none.onnx": (make_nothing, "no such file"),
    "none.ts": (make_nothing, "no such file"),
    "noise.bin": (
        make_noise,
        r"expected a \.onnx or \.ts file; 'cnngru-edge export' writes both",
    ),
    "noise.onnx": (make_noise, r"ONNX Runtime does not open it \(.+\)"),
    "noise.ts": (make_noise, r"torch does not open it \(.+\)"),
    "other.onnx": (make_other_onnx, re.escape(NO_SPEC)),
    "other.ts": (make_other_torchscript, re.escape(NO_SPEC)),
    "impostor.onnx": (
        make_impostor,
        re.escape(f"inputs are ['x'], its spec asks for {INPUTS}"),
    ),
}


@pytest.mark.parametrize("name", BAD_ENGINES)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_file_that_is_no_engine_is_refused(refused, demo, tmp_path, command, name):
    make, message = BAD_ENGINES[name]
    engine = tmp_path / name
    make(engine)
    args = ["--engine", engine, clip_of(demo, "yes")] if command == "run" else [engine]
    assert re.fullmatch(f"{re.escape(str(engine))}: {message}", refused(command, *args))


def test_a_reference_of_another_model_is_refused(refused, exported, tiny_onnx, demo):
    engine = exported / "model.int8.onnx"
    args = ["run", "--engine", engine, "--reference", tiny_onnx, clip_of(demo, "yes")]
    assert refused(*args) == (
        f"{tiny_onnx}: of another model than {engine}; give its own float one"
    )


def test_an_answer_that_is_no_number_is_refused(refused, exported, demo, tmp_path):
    engine = with_head_times(
        np.float32(np.nan), exported / "model.fp32.onnx", tmp_path / "nan.onnx"
    )
    clip = clip_of(demo, "yes")
    assert refused("run", "--json", "--engine", engine, clip) == (
        f"{clip}: the model answers NaN; its file is damaged, export it again"
    )


# Checkpoints, and what `export` writes.


def make_checkpoint_without_spec(model, path):
    save_file(model.state_dict(), path)


def make_checkpoint_of_other_shape(model, path):
    weights = model.state_dict() | {"head.weight": torch.zeros(3, 3)}
    save_file(weights, path, metadata={METADATA_KEY: model.spec.to_json()})


def make_checkpoint_of_half_a_spec(model, path):
    save_file(model.state_dict(), path, metadata={METADATA_KEY: model.spec.to_json()[:40]})


def make_pickle(model, path):
    torch.save(model.state_dict(), path)


def make_cut_checkpoint(model, path):
    save_checkpoint(model, path)
    half_of(path)


def make_no_checkpoint(model, path):
    pass


BAD_CHECKPOINTS = {
    "none": (make_no_checkpoint, "no such checkpoint"),
    "no spec": (
        make_checkpoint_without_spec,
        re.escape(
            f"no model spec in the metadata (key '{METADATA_KEY}'); 'cnngru-edge train' and "
            "cnngru_edge.models.checkpoint.save_checkpoint write it"
        ),
    ),
    "half a spec": (make_checkpoint_of_half_a_spec, r"model spec: not JSON \(.+\)"),
    "shape": (
        make_checkpoint_of_other_shape,
        re.escape("tensor 'head.weight' is (3, 3), its spec asks for (4, 5)"),
    ),
    "pickle": (
        make_pickle,
        "a pickle, which can run code when loaded; save the weights with "
        r"cnngru_edge\.models\.checkpoint\.save_checkpoint",
    ),
    "cut": (make_cut_checkpoint, r"not a safetensors checkpoint \(.+\)"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused(refused, old, tiny, tmp_path, name):
    make, message = BAD_CHECKPOINTS[name]
    path = tmp_path / "bad.safetensors"
    make(tiny, path)
    found = refused("export", path, "--out", old)
    assert re.fullmatch(f"{re.escape(str(path))}: {message}", found)


@pytest.mark.parametrize("out", ["old", "new", "new/and/deep"])
def test_too_few_recordings_export_nothing(
    refused, tiny_checkpoint, old, manifest, demo, tmp_path, out
):
    clips = [(clip.path, clip.set, clip.label) for clip in demo.of("calib")[:3]]
    clips += [(clip.path, clip.set, clip.label) for clip in demo.of("eval")[:3]]
    data = manifest(("path", "set", "label"), *clips)
    assert refused("export", tiny_checkpoint, "--out", tmp_path / out, "--data", data) == (
        "3 recordings can be used, calibration needs at least 100; give more, or pass "
        "--min-clips to accept fewer"
    )


def test_an_int8_model_that_answers_worse_is_not_written(
    refused, kws12_checkpoint, exported, tmp_path
):
    out = tmp_path / "older"
    shutil.copytree(exported, out)
    assert re.fullmatch(
        r"model\.int8\.onnx: \d+\.\d\d points less accurate than the float model on 240 clips, "
        r"allowed are 0\.5; nothing was written; calibrate with more or other audio, or another "
        "--method; --max-drop accepts more",
        refused(
            "export", kws12_checkpoint, "--out", out, "--method", "percentile", "--percentile", 50
        ),
    )


def test_a_label_that_the_model_lacks_is_refused(refused, old, demo, tmp_path):
    path = tmp_path / "three.safetensors"
    save_checkpoint(CnnGru(replace(TINY_SPEC, labels=("silence", "yes", "no"))), path)
    clip = next(clip for clip in demo.clips if clip.label not in ("silence", "yes", "no"))
    assert refused("export", path, "--out", old) == (
        f"{clip.path}: label {clip.label!r} is not in the model, which has silence, yes, no; "
        "rename or remove the folder"
    )


def test_data_that_is_not_there_is_refused(refused, tiny_checkpoint, old, tmp_path):
    data = tmp_path / "none"
    assert refused("export", tiny_checkpoint, "--out", old, "--data", data) == (
        f"{data}: no such folder or manifest"
    )


@pytest.mark.parametrize(("below", "reason"), [("", "File exists"), ("new/out", "Not a directory")])
def test_a_file_in_the_way_of_the_output_is_named(
    refused, tiny_checkpoint, tmp_path, below, reason
):
    file = tmp_path / "file"
    file.write_text("in the way")
    out = file / below
    assert refused("export", tiny_checkpoint, "--out", out) == f"{out}: {reason}"


def test_a_folder_in_the_place_of_the_output_is_named(refused, exported, old):
    args = [exported / "model.fp32.onnx", "--ranges", exported / "ranges.json", "--out", old]
    assert refused("quantize", *args) == f"{old}: Is a directory"


@pytest.mark.parametrize("command", ["export", "calibrate", "quantize"])
def test_a_full_disk_leaves_the_old_files(tiny_checkpoint, exported, old, tmp_path, command):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    graph, ranges = exported / "model.fp32.onnx", exported / "ranges.json"
    args, full = {
        "export": ([tiny_checkpoint, "--out", old], rf"{old}/model\.ts"),
        "calibrate": ([graph, "--out", old / "ranges.json"], rf"{temporary}/.+/observed\.onnx"),
        "quantize": (
            [graph, "--ranges", ranges, "--out", old / "model.int8.onnx"],
            rf"{old}/model\.int8\.onnx",
        ),
    }[command]
    before = contents(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"{limit}; {START}", command, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"Error: {full}: File too large\n", done.stderr)
    assert contents(tmp_path) == before


# Interruptions.


@pytest.fixture
def endless(demo, manifest, tmp_path):
    """Start a command, in a session of its own, on more recordings than anyone waits for."""
    clips = [(clip.path, "calib", clip.label) for clip in demo.of("calib")]
    data = manifest(("path", "set", "label"), *clips * 300, (clips[0][0], "eval", "yes"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started = []

    def start(*args):
        process = subprocess.Popen(
            [sys.executable, "-c", START, *args, "--data", data],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary), "FORCE_COLOR": "1"},  # bars that move
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def reports_progress(process):
    seen = b""
    while b"calibrate" not in seen:
        seen += (piece := os.read(process.stderr.fileno(), 1000))
        assert piece, seen


def starts_workers(process):
    while len(workers_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.001)


def has_workers_that_import(process):
    starts_workers(process)
    while not all("numpy" in (w / "maps").read_text() for w in workers_of(process)):
        assert process.poll() is None
        time.sleep(0.001)


def workers_of(process):
    children = [
        Path("/proc", child)
        for listed in Path(f"/proc/{process.pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]
    return [child for child in children if b"spawn_main" in (child / "cmdline").read_bytes()]


def is_running(process):
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


STOPS = pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGINT, 1, "Aborted!\n"), (signal.SIGTERM, 143, "")]
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")


def assert_stopped(process, code, last):
    stdout, stderr = (text.decode() for text in process.communicate(timeout=30))
    assert (process.returncode, stdout) == (code, "")
    assert stderr.endswith(last)
    assert "Traceback" not in stderr


@STOPS
def test_an_export_that_is_stopped_leaves_the_older_one(
    endless, kws12_checkpoint, exported, tmp_path, number, code, last
):
    out = tmp_path / "older"
    shutil.copytree(exported, out)
    before = contents(tmp_path)
    process = endless("export", kws12_checkpoint, "--out", out)
    reports_progress(process)
    assert contents(tmp_path) != before  # it is writing
    process.send_signal(number)
    assert_stopped(process, code, last)
    assert contents(tmp_path) == before


@needs_proc
@STOPS
@pytest.mark.parametrize("moment", [starts_workers, has_workers_that_import, reports_progress])
def test_a_stop_of_all_processes_is_answered_once(
    endless, exported, old, tmp_path, number, code, last, moment
):
    before = contents(tmp_path)
    graph, out = exported / "model.fp32.onnx", old / "ranges.json"
    process = endless("calibrate", graph, "--out", out, "--workers", "2")
    moment(process)
    os.killpg(process.pid, number)  # as Ctrl-C and `timeout` do
    assert_stopped(process, code, last)
    assert contents(tmp_path) == before


@needs_proc
def test_workers_end_with_their_parent(endless, exported, old):
    graph, out = exported / "model.fp32.onnx", old / "ranges.json"
    process = endless("calibrate", graph, "--out", out, "--workers", "2")
    reports_progress(process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)  # until the last one that writes to it has ended
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert out.read_text() == "the old ranges.json"


# Calibration and quantization.


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
@pytest.mark.parametrize("kind", ["none", "noise", "other", "torchscript", "int8"])
def test_only_a_float_graph_is_calibrated_and_quantized(
    refused, exported, old, tmp_path, command, kind
):
    graph = {
        "torchscript": exported / "model.ts",
        "int8": exported / "model.int8.onnx",
    }.get(kind, tmp_path / f"{kind}.onnx")
    {"noise": make_noise, "other": make_other_onnx}.get(kind, make_nothing)(graph)
    if command == "calibrate":
        found = refused("calibrate", graph, "--out", old / "ranges.json")
        expected = {
            "none": "no such file",
            "noise": r"ONNX Runtime does not open it \(.+\)",
            "other": re.escape(NO_SPEC),
            "torchscript": r"expected a float \.onnx graph, got fp32 \.ts; "
            "'cnngru-edge trace' writes one",
            "int8": r"expected a float \.onnx graph, got int8 \.onnx; "
            "'cnngru-edge trace' writes one",
        }
    else:
        ranges = exported / "ranges.json"
        found = refused("quantize", graph, "--ranges", ranges, "--out", old / "model.int8.onnx")
        expected = {
            "none": "no such file",
            "noise": "not an ONNX file",
            "other": re.escape(NO_SPEC.replace("export", "trace")),
            "torchscript": "not an ONNX file",
            "int8": "already quantized; give the float graph",
        }
    assert re.fullmatch(f"{re.escape(str(graph))}: {expected[kind]}", found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; 'cnngru-edge calibrate' writes it"),
        (b"", "not a ranges file of 'cnngru-edge calibrate'"),
        (b"\xff\xfe", "not a ranges file of 'cnngru-edge calibrate'"),
        (b"[1, 2]", "not a ranges file of 'cnngru-edge calibrate'"),
        (b'{"format": 1, "tensors": {}}', "not a ranges file of 'cnngru-edge calibrate'"),
        (b'{"format": 2}', "another version's format; calibrate again"),
    ],
)
def test_a_file_that_holds_no_ranges_is_refused(refused, exported, old, tmp_path, text, message):
    ranges = tmp_path / "wrong.json"
    if text is not None:
        ranges.write_bytes(text)
    args = [exported / "model.fp32.onnx", "--ranges", ranges, "--out", old / "model.int8.onnx"]
    assert refused("quantize", *args) == f"{ranges}: {message}"


def test_ranges_of_another_graph_are_refused(refused, exported, tiny_onnx, old):
    ranges, out = exported / "ranges.json", old / "model.int8.onnx"
    other, this = (
        hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in (exported / "model.fp32.onnx", tiny_onnx)
    )
    assert refused("quantize", tiny_onnx, "--ranges", ranges, "--out", out) == (
        f"{ranges}: ranges of another graph (sha256 {other}, this one is {this}); run "
        "'cnngru-edge calibrate' on this graph"
    )


def test_a_bad_recording_is_left_out_of_the_ranges(cli, tiny_onnx, loose, tmp_path):
    data, out = loose(119), tmp_path / "ranges.json"
    bad = data / "noise.wav"
    make_noise(bad)
    result = cli("calibrate", tiny_onnx, "--data", data, "--out", out)
    ranges = json.loads(out.read_text())
    assert ranges["clips"] == 119
    assert result.stdout == f"{out}: {len(ranges['tensors'])} tensors, 119 clips, entropy\n"
    assert re.fullmatch(f"Error: {bad}: {UNREADABLE}\n", result.stderr)
    assert result.exit_code == 1


def test_how_few_recordings_may_calibrate(cli, refused, tiny_onnx, loose, tmp_path):
    args = ["calibrate", tiny_onnx, "--data", loose(3), "--out", tmp_path / "ranges.json"]
    hint = "give more, or pass --min-clips to accept fewer"
    assert refused(*args) == f"3 recordings can be used, calibration needs at least 100; {hint}"
    bad = tmp_path / "loose" / "empty.wav"
    bad.touch()
    assert refused(*args, "--min-clips", 4) == (
        f"3 recordings can be used (1 left out: {bad}: the file is empty), calibration needs at "
        f"least 4; {hint}"
    )
    bad.unlink()
    result = cli(*args, "--min-clips", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads((tmp_path / "ranges.json").read_text())["clips"] == 3


# Comparison.


def test_models_of_other_labels_are_not_compared(refused, exported, tiny_onnx, kws12):
    reference = exported / "model.fp32.onnx"
    assert refused("compare", reference, tiny_onnx) == (
        f"{tiny_onnx}: labels are silence, unknown, yes, no; those of {reference} are "
        f"{', '.join(kws12.spec.labels)}"
    )


def test_a_worse_candidate_is_told_by_the_exit_code(cli, exported, tmp_path):
    reference = exported / "model.fp32.onnx"
    worse = with_head_times(np.float32(0), reference, tmp_path / "worse.onnx")
    result = cli("compare", "--json", reference, worse)
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (1, "")
    assert (found["verdict"], found["passed"], found["clips"]) == ("worse", False, 240)
    assert found["candidate_accuracy"] == pytest.approx(1 / 12)  # one label for all
    accepted = cli("compare", "--json", "--max-drop", 100, reference, worse)
    assert (accepted.exit_code, json.loads(accepted.stdout)["verdict"]) == (0, "equal")


def test_an_equal_candidate_passes(cli, exported):
    graph = exported / "model.fp32.onnx"
    result = cli("compare", "--json", graph, exported / "model.ts")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (found["verdict"], found["passed"], found["delta"]) == ("equal", True, 0)
    assert found["flips"] == []


def test_a_set_without_recordings_is_not_compared(refused, exported):
    graph = exported / "model.fp32.onnx"
    assert refused("compare", graph, graph, "--set", "train") == (
        "no recordings to compare on: none of the set can be read"
    )


# Corpora.

HEAD = ("path", "set", "label")
BAD_MANIFESTS = {
    "empty": ([], "no column label, path, set"),
    "column": ([("path", "set"), ("a.wav", "eval")], "no column label"),
    "set": (
        [HEAD, ("a.wav", "holdout", "yes")],
        "line 2 has set 'holdout', expected train, calib or eval",
    ),
    "short row": ([HEAD, ("a.wav", "calib", "yes"), ("b.wav", "calib")], "line 3 has no label"),
    "tasks": (
        [(*HEAD, "task"), ("a.wav", "eval", "yes", "wake"), ("b.wav", "eval", "no", "words")],
        "several tasks, choose one: wake, words",
    ),
    "long field": (
        [HEAD, ("a" * 200_000, "eval", "yes")],
        "not a CSV file in UTF-8 (field larger than field limit (131072))",
    ),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_used_is_refused(refused, tiny_checkpoint, old, manifest, name):
    rows, message = BAD_MANIFESTS[name]
    data = manifest(*rows)
    assert refused("export", tiny_checkpoint, "--out", old, "--data", data) == (
        f"{data / 'manifest.csv'}: {message}"
    )


def test_a_recording_is_no_manifest(refused, tiny_checkpoint, old, wav, rng):
    data = wav("a.wav", rng.uniform(-0.5, 0.5, 4000))
    found = refused("export", tiny_checkpoint, "--out", old, "--data", data)
    assert re.fullmatch(rf"{re.escape(str(data))}: not a CSV file in UTF-8 \(.+\)", found)


def test_a_task_must_be_one_of_the_manifest(refused, tiny_checkpoint, old, manifest):
    data = manifest((*HEAD, "task"), ("a.wav", "eval", "yes", "wake"))
    args = ["export", tiny_checkpoint, "--out", old, "--data", data, "--task", "words"]
    assert refused(*args) == f"{data / 'manifest.csv'}: no task 'words', it has wake"


def test_a_speaker_is_in_one_set(refused, tiny_checkpoint, old, manifest):
    rows = [("a.wav", "calib", "yes", "ann"), ("b.wav", "eval", "yes", "ann")]
    data = manifest((*HEAD, "speaker"), *rows)
    assert refused("export", tiny_checkpoint, "--out", old, "--data", data) == (
        f"{data}: 1 speakers are in more than one set, as 'ann' in calib and eval; split by speaker"
    )


def test_a_manifest_from_excel_is_read(refused, tiny_checkpoint, old, manifest):
    data = manifest(HEAD, ("a.wav", "calib", "yes"))
    path = data / "manifest.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert refused("export", tiny_checkpoint, "--out", old, "--data", data) == (
        f"{data}: no clips in the set 'eval' to compare on"
    )
