"""What `calibrate`, `quantize` and `compare` are given and cannot use."""

import hashlib
import json
import re

import numpy as np
import pytest
from conftest import (
    NO_SPEC,
    UNREADABLE,
    make_noise,
    make_nothing,
    make_other_onnx,
    with_head_times,
)

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
        (b'{"format": 3, "tensors": {}}', "not a ranges file of 'cnngru-edge calibrate'"),
        (
            b'{"format": 3, "tensors": {}, "clip_samples": [1, 2]}',
            "not a ranges file of 'cnngru-edge calibrate'",
        ),
        (b'{"format": 1}', "another version's format; calibrate again"),
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
    accepted = cli("compare", "--json", "--margin", 100, reference, worse)
    assert (accepted.exit_code, json.loads(accepted.stdout)["verdict"]) == (0, "equal")


def test_an_equal_candidate_passes(cli, exported):
    graph = exported / "model.fp32.onnx"
    result = cli("compare", "--json", "--margin", 2, graph, exported / "model.ts")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (found["verdict"], found["passed"], found["delta"]) == ("equal", True, 0)
    assert found["flips"] == []


def test_a_set_without_recordings_is_not_compared(refused, exported):
    graph = exported / "model.fp32.onnx"
    assert refused("compare", graph, graph, "--set", "train") == (
        "no recordings to compare on: none of the set can be read"
    )
