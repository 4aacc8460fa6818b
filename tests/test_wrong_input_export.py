"""What `export` is given and cannot use, and what stops it: the older files stay as they were."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_SPEC, Outcome, contents, half_of
from safetensors.torch import save_file

from cnngru_edge.models.nets.checkpoint import save_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import METADATA_KEY

START = "from cnngru_edge.export.cli import main; main()"

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
            "cnngru_edge.models.nets.checkpoint.save_checkpoint write it; a module of your own "
            "takes --model and --spec"
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
        r"cnngru_edge\.models\.nets\.checkpoint\.save_checkpoint, or give the module that they are "
        "of with --model and --spec",
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
    points, db = r"-\d+\.\d\d", r"-?\d+\.\d dB"
    assert re.fullmatch(
        rf"model\.int8\.onnx: worse than the float model by {points} \({points} to {points}\) "
        r"points \(95 %\) on 240 clips, and 0\.5 may be lost; [\w.]+ hurts most "
        rf"\({db} alone in INT8, {db} if it is restored\); nothing was written; calibrate with "
        "more or other audio, or another --method; --max-drop keeps layers in float",
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
    assert re.fullmatch(f"Error: {full}: File too large\n", Outcome(1, "", done.stderr).stderr)
    assert contents(tmp_path) == before


# Interruptions.


@pytest.fixture
def endless(demo, manifest, tmp_path):
    """Start a command, in a session of its own, on more recordings than anyone waits for."""
    clips = [(clip.path, "calib", clip.label) for clip in demo.of("calib")]
    header, evaluated = ("path", "set", "label"), (clips[0][0], "eval", "yes")
    data = manifest(header, *clips * 300, evaluated)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started = []

    def start(*args, fewer=None):
        if fewer:
            manifest(header, *clips * fewer, evaluated)
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
    # The audit hears them too, and there calibration is what is stopped.
    process = endless("export", kws12_checkpoint, "--force", "--out", out, fewer=20)
    before = contents(tmp_path)
    reports_progress(process)
    assert contents(tmp_path) != before  # it is writing
    process.send_signal(number)
    assert_stopped(process, code, last)
    assert contents(tmp_path) == before


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_leaves_no_worker_behind(endless, exported, old, tmp_path, number):
    before = contents(tmp_path)
    graph, out = exported / "model.fp32.onnx", old / "ranges.json"
    process = endless("calibrate", graph, "--out", out, "--workers", "2")
    reports_progress(process)
    workers = workers_of(process)
    process.send_signal(number)
    time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode
    assert not any(is_running(worker) for worker in workers)
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
