"""What `run` and `inspect` are given and cannot use: recordings, engines."""

import json
import re
import warnings

import numpy as np
import onnx
import pytest
import soundfile
import soxr
import torch
from conftest import (
    NO_SPEC,
    TINY_SPEC,
    UNREADABLE,
    half_of,
    make_noise,
    make_nothing,
    make_other_onnx,
    with_head_times,
)
from onnx import helper

from cnngru_edge.models.spec.stream import METADATA_KEY

JSON_FIELDS = ["path", "label", "score", "scores", "duration_s", "latency_ms"]
JSON_FIELDS += ["backend", "device", "precision"]
CHECK_FIELDS = ["reference_label", "agrees", "max_abs_error"]


def clip_of(demo, label):
    return next(clip.path for clip in demo.of("eval") if clip.label == label)


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


def make_impostor(path):
    make_other_onnx(path)
    model = onnx.load(path)
    helper.set_model_props(model, {METADATA_KEY: TINY_SPEC.to_json()})
    onnx.save(model, path)


def make_other_torchscript(path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # as newer torch says
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


INPUTS = ["audio", *(state.name for state in TINY_SPEC.state)]
BAD_ENGINES = {
    "none.onnx": (make_nothing, "no such file"),
    "none.ts": (make_nothing, "no such file"),
    "none.pt2": (make_nothing, "no such file"),
    "none.engine": (make_nothing, "no such file"),
    "noise.bin": (
        make_noise,
        r"expected a \.onnx, \.engine or \.ts file; 'cnngru-edge export' writes them",
    ),
    "noise.onnx": (make_noise, r"ONNX Runtime does not open it \(.+\)"),
    "noise.ts": (make_noise, r"torch does not open it \(.+\)"),
    "noise.pt2": (make_noise, r"torch\.export\.load may run code that a file holds, .+ beside it"),
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


@pytest.mark.parametrize("mode", [[], ["--stream"]])
def test_a_shadow_of_another_model_is_refused(refused, exported, tiny_onnx, demo, mode):
    shadow = ["--reference", tiny_onnx, "--shadow", "0.05"]
    engine, clip = exported / "model.int8.onnx", clip_of(demo, "yes")
    assert refused("run", "--engine", engine, *shadow, *mode, clip) == (
        f"{tiny_onnx}: of another model than the one that it is to check; give its own float one"
    )


def test_a_folder_of_flips_that_cannot_be_made_is_refused(refused, exported, demo, tmp_path):
    (tmp_path / "flips").touch()
    engine, reference = exported / "model.int8.onnx", exported / "model.fp32.onnx"
    shadow = ["--reference", reference, "--shadow", "0.05", "--save-flips", tmp_path / "flips"]
    assert refused("run", "--engine", engine, *shadow, clip_of(demo, "yes")) == (
        f"{tmp_path / 'flips'}: File exists"
    )


WRONG_OPTIONS = {
    "no reference": (["--shadow", "0.1"], "--shadow needs a --reference"),
    "no shadow": (["--min-agreement", "0.98"], "--min-agreement needs --shadow"),
    "no shadow of it": (["--reference", "a.onnx", "--min-sqnr", "9"], "--min-sqnr needs --shadow"),
    "nothing to keep": (["--save-flips", "flips"], "--save-flips needs --shadow"),
    "share of nothing": (["--shadow", "0"], "0.0 is not in the range 0<x<=1."),
    "foreground": (
        ["--stream", "--reference", "a.onnx"],
        "--stream takes one FILE, and --reference only with --shadow",
    ),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_that_do_not_fit_are_a_usage_error(cli, name):
    options, message = WRONG_OPTIONS[name]
    result = cli("run", "--engine", "b.onnx", *options, "a.wav")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].endswith(message)


def test_an_answer_that_is_no_number_is_refused(refused, exported, demo, tmp_path):
    engine = with_head_times(
        np.float32(np.nan), exported / "model.fp32.onnx", tmp_path / "nan.onnx"
    )
    clip = clip_of(demo, "yes")
    assert refused("run", "--json", "--engine", engine, clip) == (
        f"{clip}: the model answers NaN; its file is damaged, export it again"
    )
