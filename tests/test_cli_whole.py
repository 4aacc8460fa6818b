"""Models that take their input whole, by the command line: phrases, images, modules not ours."""

import csv
import importlib
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import with_head_times

from cnngru_edge.calibration.corpus.read import DEMO, DEMO_DIGITS, DEMO_PHRASES, read_corpus
from cnngru_edge.export.artefacts import FLOAT, INT8, PROGRAM
from cnngru_edge.export.cli import main
from cnngru_edge.export.trace.program import has_programs
from cnngru_edge.models.nets.checkpoint import PRETRAINED
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.check.golden import GOLDEN, read_golden
from cnngru_edge.runtime.inputs.read import read_image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODULE = ("--model", "keyword_crnn:KeywordCrnn", "--spec", EXAMPLES / "keyword_crnn.toml")
WEIGHTS = EXAMPLES / "keyword_crnn.pt"
WRITTEN = {
    "model.ts",
    FLOAT,
    INT8,
    "model.int8.tensorrt.clip.onnx",
    "model.int8.tensorrt-fp16.clip.onnx",
    "ranges.json",
    "plan.json",
    "coverage.json",
    "comparison.json",
    GOLDEN,
    "report.html",
    "report.json",
}
if has_programs():
    WRITTEN.add(PROGRAM)
ENGINE = "model.int8.clip.rtx.engine"
if trt_library.is_installed("tensorrt_rtx"):
    WRITTEN |= {ENGINE, f"{ENGINE}.json"}
FIELDS = {"path", "score", "duration_s", "latency_ms", "backend", "device", "precision"}
CHECKED = {"agrees", "max_abs_error"}


class Export:
    """A folder that an export wrote, and what it said."""

    def __init__(self, out, result):
        assert result.exit_code == 0, result.stderr
        self.out, self.stdout = out, result.stdout
        self.int8, self.float = out / INT8, out / FLOAT
        self.report = json.loads((out / "report.json").read_text())


def export(out, *args):
    args = ["export", *map(str, args), "--out", str(out)]
    return Export(out, CliRunner().invoke(main, args))


@pytest.fixture(scope="session")
def intent(tmp_path_factory):
    return export(tmp_path_factory.mktemp("intent"), PRETRAINED / "intent.safetensors")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return export(tmp_path_factory.mktemp("digits"), PRETRAINED / "digits.safetensors")


@pytest.fixture(scope="session")
def some_clips(tmp_path_factory):
    """A tenth of the demo."""
    folder = tmp_path_factory.mktemp("some")
    corpus = read_corpus(DEMO)
    with (folder / "manifest.csv").open("w", newline="") as f:
        write = csv.writer(f)
        write.writerow(("path", "set", "label", "speaker"))
        for clip in (*corpus.of("calib")[::7], *corpus.of("eval")[::7]):
            write.writerow((clip.path, clip.set, clip.label, clip.speaker))
    return folder


@pytest.fixture
def beside_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="session")
def keyword(tmp_path_factory, some_clips):
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLES))
        options = ("--data", some_clips, "--min-clips", 20, "--force")
        out = tmp_path_factory.mktemp("keyword")
        return export(out, *MODULE, "--checkpoint", WEIGHTS, *options)


@pytest.fixture(params=["intent", "digits", "keyword"])
def exported_whole(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def recording():
    return next(clip.path for clip in read_corpus(DEMO).of("eval") if clip.label == "yes")


@pytest.fixture(scope="session")
def line():
    """An image, and what stands in it."""
    clip = read_corpus(DEMO_DIGITS).of("eval")[0]
    return clip.path, clip.text


# Export.


def test_an_export_writes_its_files_and_none_of_a_stream(exported_whole):
    assert {path.name for path in exported_whole.out.iterdir()} == WRITTEN


def test_all_of_it_is_in_int8_in_every_form(exported_whole):
    forms = {
        name: found["weights_int8"] for name, found in exported_whole.report["coverage"].items()
    }
    assert forms.pop(INT8) == 1
    assert set(forms.values()) <= {1}  # of TensorRT, where TensorRT-RTX is installed


def test_an_export_says_why_there_is_no_stream(exported_whole):
    assert "note: no stream: " in exported_whole.stdout
    assert "bidirectional" in exported_whole.stdout
    assert "streaming" not in exported_whole.report
    assert "streaming.json" not in exported_whole.stdout


def test_int8_answers_about_as_well(exported_whole):
    comparison = exported_whole.report["comparison"]
    assert comparison["verdict"] in {"equal", "not enough data", "better"}
    assert comparison["agreement"] > 0.9


def test_the_report_is_whole(exported_whole):
    page = (exported_whole.out / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "None" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)
    assert ">Streaming" not in page
    assert exported_whole.report["sensitivity"]["layers"]
    assert {file["name"] for file in exported_whole.report["files"]} >= {FLOAT, INT8}


@pytest.fixture
def some_phrases(tmp_path):
    """A part of the demo."""
    lines = (DEMO_PHRASES / "manifest.csv").read_text().splitlines(keepends=True)
    head, *rows = lines
    (tmp_path / "phrases.csv").write_text(head + "".join(rows[::16]))
    return tmp_path / "phrases.csv"


def test_a_second_export_takes_what_was_a_streams_away(tmp_path, some_phrases):
    out = tmp_path / "out"
    out.mkdir()
    left = ["model.int8.chunk.onnx", "streaming.json", "model.int8.chunk.engine"]
    for name in left:
        (out / name).write_text("the old one")
    (out / "mine.txt").write_text("mine")
    export(out, PRETRAINED / "intent.safetensors", "--data", some_phrases, "--min-clips", 20)
    assert {path.name for path in out.iterdir()} == {*WRITTEN, "mine.txt"}


def test_the_stages_one_by_one_make_the_same(cli, intent, tmp_path):
    traced = cli("trace", PRETRAINED / "intent.safetensors", "--out", tmp_path / "a")
    assert traced.exit_code == 0, traced.stderr
    ranges, out = tmp_path / "ranges.json", tmp_path / "int8.onnx"
    calibrated = cli("calibrate", tmp_path / "a" / FLOAT, "--out", ranges)
    assert (calibrated.exit_code, calibrated.stderr) == (0, "")
    quantized = cli("quantize", tmp_path / "a" / FLOAT, "--ranges", ranges, "--out", out)
    assert quantized.stdout.startswith(f"{out}: 100.0% of the weights in INT8")
    for found, expected in ((tmp_path / "a" / FLOAT, intent.float), (out, intent.int8)):
        assert found.read_bytes() == expected.read_bytes()


def test_labels_in_another_order_are_doubted(tmp_path, some_clips, keyword):
    text = (EXAMPLES / "keyword_crnn.toml").read_text()
    labels = re.search(r"^labels = (\[.*?\])$", text, flags=re.M | re.S)
    turned = json.dumps(json.loads(labels[1])[::-1])
    (tmp_path / "spec.toml").write_text(text.replace(labels[1], turned))
    args = ("--model", "keyword_crnn:KeywordCrnn", "--spec", tmp_path / "spec.toml")
    options = ("--data", some_clips, "--min-clips", 20, "--force")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLES))
        found = export(tmp_path / "out", *args, "--checkpoint", WEIGHTS, *options)
    assert re.search(
        r"note: the float model is right on \d+\.\d% here, and always to answer '\w+' would be on "
        r"\d+\.\d%; are the labels of the spec in the order that it was trained with, and ",
        found.stdout,
    )
    assert "note: the float model is right on" not in keyword.stdout


WITH_A_DETERMINANT = """
import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(40, 32, batch_first=True)
        self.head = nn.Linear(32, 12)

    def forward(self, x):
        scale = 1 + 0.1 * torch.tanh(torch.linalg.det(x[:, :2, :2]))
        return self.head(self.gru(x)[0][:, -1]) * scale[:, None]
"""


def test_a_module_that_tensorrt_does_not_take_still_runs_on_a_cpu(
    tmp_path, some_clips, monkeypatch
):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scaled.py").write_text(WITH_A_DETERMINANT)
    text = (EXAMPLES / "keyword_crnn.toml").read_text()
    text = text.replace("N1TM", "NTM").replace("n_classes = 12", "")
    (tmp_path / "spec.toml").write_text(text)
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(importlib.import_module("scaled").Scaled().state_dict(), weights)
    args = ("--model", "scaled:Scaled", "--checkpoint", weights, "--spec", tmp_path / "spec.toml")
    out = tmp_path / "out"
    found = export(out, *args, "--data", some_clips, "--min-clips", 20, "--force")
    why = r"TensorRT-RTX 1\.\S+ does not parse it: Det /\S+: unsupported node, false"
    for form in ("tensorrt", "tensorrt-fp16"):
        assert re.search(
            rf"note: not proven: model\.int8\.{form}\.clip\.onnx: {why}\n", found.stdout
        )
    assert re.search(rf"note: no {ENGINE}: model\.int8\.\S+\.clip\.onnx: {why}\n", found.stdout)
    assert {path.name for path in out.iterdir()} == WRITTEN - {ENGINE, f"{ENGINE}.json"}
    assert found.report["coverage"][INT8]["weights_int8"] == 1


def test_frames_are_for_streams(refused, intent, tmp_path):
    args = ("--ranges", intent.out / "ranges.json", "--out", tmp_path / "a.onnx", "--frames", 2)
    assert "this model cannot be a stream: " in refused("quantize", intent.float, *args)


# Run.


def lines_of(result):
    assert (result.exit_code, result.stderr) == (0, "")
    return [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]


def test_phrases_and_tokens_are_answered(cli, intent):
    phrase, other = "Turn on the light, please!", "what time is it"
    found = lines_of(
        cli("run", "--engine", intent.int8, "--json", "--text", phrase, "--text", other)
    )
    assert [answer["label"] for answer in found] == ["light_on", "ask_time"]
    assert [answer["path"] for answer in found] == [phrase, other]
    for answer in found:
        assert set(answer) == FIELDS | {"label", "scores"}
        assert answer["duration_s"] is None
        assert (
            answer["score"] == answer["scores"][answer["label"]] == max(answer["scores"].values())
        )
        assert sum(answer["scores"].values()) == pytest.approx(1)
    vocabulary = json.loads(cli("inspect", intent.int8, "--json").stdout)["spec"]["input"]
    words = ["turn", "on", "the", "light", "please"]
    ids = " ".join(str(vocabulary["vocabulary"].index(word)) for word in words)
    for tokens in (ids, ids.replace(" ", ",")):
        (same,) = lines_of(cli("run", "--engine", intent.int8, "--json", "--tokens", tokens))
        assert same["scores"] == found[0]["scores"]
        assert same["path"] == ids


def test_an_image_is_read(cli, digits, line):
    path, text = line
    (found,) = lines_of(cli("run", "--engine", digits.int8, "--json", path))
    assert set(found) == FIELDS | {"text", "words"}
    assert (found["text"], found["words"], found["duration_s"]) == (text, [], None)


def test_a_recording_is_answered_by_a_module_that_is_not_ours(cli, keyword, recording):
    (found,) = lines_of(cli("run", "--engine", keyword.int8, "--json", recording))
    assert found["label"] == "yes"
    assert found["duration_s"] > 0.3


@pytest.mark.parametrize("suffix", ["onnx", "ts"])
def test_a_reference_checks_the_answers(cli, intent, digits, line, suffix):
    name = FLOAT if suffix == "onnx" else "model.ts"
    run = ("run", "--json", "--engine", intent.int8, "--reference", intent.out / name)
    (found,) = lines_of(cli(*run, "--text", "turn the lamp off"))
    assert set(found) == FIELDS | CHECKED | {"label", "scores", "reference_label"}
    assert found["agrees"]
    assert 0 < found["max_abs_error"] < 1
    run = ("run", "--json", "--engine", digits.int8, "--reference", digits.out / name)
    (found,) = lines_of(cli(*run, line[0]))
    assert set(found) == FIELDS | CHECKED | {"text", "words", "reference_text"}
    assert found["agrees"]
    assert found["reference_text"] == line[1]


def test_answers_are_lines_for_people(cli, intent, digits, line):
    found = cli("run", "--engine", intent.int8, "--text", "turn on the light")
    assert re.fullmatch(r"turn on the light +light_on +[\d.]+% +[\d.]+ ms\n", found.stdout)
    found = cli("run", "--engine", digits.int8, line[0])
    assert found.stdout.endswith(f"{line[1]}\n")


def test_a_bad_phrase_among_others_is_named(cli, intent):
    result = cli("run", "--engine", intent.int8, "--text", "?!", "--text", "turn on the light")
    assert (result.exit_code, result.stderr) == (1, "Error: '?!': no word in it\n")
    assert result.stdout.startswith("turn on the light")


# Wrong use: one line, exit code 1.

NO_STREAM = r"this model cannot be a stream: .*bidirectional.*"


@pytest.fixture
def files(tmp_path, recording):
    """What is no line of text."""
    from PIL import Image

    (tmp_path / "text.png").write_text("this is no image\n")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (60, 20)).save(tmp_path / "low.png")
    shutil.copy(recording, tmp_path / "speech.png")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (
            "intent",
            ["--tokens", "3 99999"],
            r"token 99999 is out of range: this model knows 0 to \d+",
        ),
        ("intent", ["--tokens", "-1"], r"token -1 is out of range: this model knows 0 to \d+"),
        ("intent", ["--tokens", " "], "no token given"),
        ("intent", ["--text", "... ?!"], r"'\.\.\. \?!': no word in it"),
        ("intent", ["--text", ""], "'': no word in it"),
        ("intent", ["RECORDING"], ".+: this model reads phrases, not files; give --text"),
        ("digits", ["--text", "12"], "'12': this model reads an image, not a phrase"),
        ("digits", ["--tokens", "1 2"], "'1 2': this model reads an image, not a phrase"),
        ("digits", ["RECORDING"], ".+: not an image that can be read"),
        ("digits", ["text.png"], r".+text\.png: not an image that can be read"),
        ("digits", ["empty.png"], r".+empty\.png: not an image that can be read"),
        ("digits", ["speech.png"], r".+speech\.png: not an image that can be read"),
        ("digits", ["missing.png"], r".+missing\.png: no such file"),
        (
            "digits",
            ["low.png"],
            r".+low\.png: 20 pixels high, this model reads lines 32 pixels high; crop .+",
        ),
        ("keyword", ["--text", "yes"], "'yes': this model reads a recording, not a phrase"),
        ("keyword", ["--tokens", "1"], "'1': this model reads a recording, not a phrase"),
        ("keyword", ["LINE"], r".+: not readable as audio .+"),
        ("keyword", ["--stream", "RECORDING"], NO_STREAM),
        ("intent", ["--stream", "RECORDING"], NO_STREAM),
        ("digits", ["--stream", "-"], NO_STREAM),
    ],
)
def test_what_a_model_does_not_read_is_one_line(
    refused, request, files, recording, line, model, args, message
):
    found = request.getfixturevalue(model)
    known = {"RECORDING": recording, "LINE": line[0]}
    args = [known.get(arg, files / arg if arg.endswith(".png") else arg) for arg in args]
    assert re.fullmatch(message, refused("run", "--engine", found.int8, *args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a FILE, --text or --tokens"),
        (["--tokens", "3 b"], "--tokens takes whole numbers, got '3 b'"),
        (["--tokens", "0.5"], "--tokens takes whole numbers, got '0.5'"),
        (["--text", "a", "--stream"], "--stream takes one FILE, and .+"),
        (["--text", "turn", "--beam", "4"], "--beam, --words and --lm are for models that .+"),
        (["--text", "turn", "--shadow", "0.5"], "--shadow needs a --reference"),
    ],
)
def test_wrong_use_of_run_is_exit_code_2(cli, intent, args, message):
    result = cli("run", "--engine", intent.int8, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"Error: {message}", result.stderr.splitlines()[-1])


def test_a_reference_of_another_model_is_named(refused, intent, digits):
    found = refused("run", "--engine", intent.int8, "--reference", digits.float, "--text", "turn")
    assert found == f"{digits.float}: of another model than {intent.int8}; give its own float one"


def test_a_shadow_is_for_streams(refused, exported_whole):
    out = exported_whole
    args = ("--reference", out.float, "--shadow", 1, "--text", "turn on the light")
    assert refused("run", "--engine", out.int8, *args) == (
        "--shadow is for models that can be streams; --reference alone checks every answer"
    )


def test_what_is_for_streams_is_refused_with_the_reason(refused, exported_whole):
    out = exported_whole
    assert re.fullmatch(NO_STREAM, refused("compare", out.float, out.int8, "--streaming"))


@pytest.mark.parametrize("name", ["intent", "digits"])
def test_only_a_stream_is_tuned(refused, tmp_path, name):
    checkpoint = PRETRAINED / f"{name}.safetensors"
    args = ("--engine", "a.onnx", "--data", DEMO, "--out", tmp_path / "out.safetensors")
    assert re.fullmatch(
        f"{re.escape(str(checkpoint))}: {NO_STREAM}", refused("tune", checkpoint, *args)
    )


# On the device.


@pytest.mark.parametrize("name", [FLOAT, INT8, "model.ts", "model.int8.tensorrt-fp16.clip.onnx"])
def test_what_was_exported_passes_its_self_test(cli, exported_whole, name):
    result = cli("selftest", "--engine", exported_whole.out / name)
    assert result.exit_code == 0, result.stdout
    assert ": passed: 16 of 16 answers as the float model's, SQNR " in result.stdout


def test_golden_clips_are_what_the_model_is_given(intent, digits, keyword, line):
    phrases = read_golden(intent.out / GOLDEN).clips
    known = {clip.text: clip.label for clip in read_corpus(DEMO_PHRASES).of("eval")}
    assert len({clip.label for clip in phrases}) == 12
    assert [known[clip.name] for clip in phrases] == [clip.label for clip in phrases]
    lines = read_golden(digits.out / GOLDEN)
    image = read_image(DEMO_DIGITS / lines.clips[0].name, lines.spec.input)
    assert (lines.clips[0].given == image.ravel() * 255).all()
    recordings = read_golden(keyword.out / GOLDEN)
    length = recordings.spec.input.samples or 3 * 16_000
    assert all(0 < len(clip.given) <= length for clip in recordings.clips)


@pytest.mark.parametrize("name", ["intent", "digits"])
def test_a_damaged_model_fails_its_self_test(cli, request, tmp_path, name):
    out = request.getfixturevalue(name).out
    engine = with_head_times(-1, out / INT8, tmp_path / "negated.onnx")
    result = cli("selftest", "--engine", engine, "--golden", out / GOLDEN)
    assert result.exit_code == 1
    *failures, last = result.stdout.splitlines()
    assert ": failed: 0 of 16 answers as the float model's" in last
    clips = {clip.name: clip.label for clip in read_golden(out / GOLDEN).clips}
    assert all(
        x.startswith(tuple(f"{n}: expected {a}, got" for n, a in clips.items())) for x in failures
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("intent", 9_999, "token 9999 is out of range: this model knows 0 to .+"),
        ("digits", None, "cannot reshape array of size .+"),
    ],
)
def test_golden_clips_that_no_model_takes_are_refused(
    refused, request, tmp_path, name, value, message
):
    out, path = request.getfixturevalue(name).out, tmp_path / "damaged.npz"
    with np.load(out / GOLDEN) as file:
        arrays = dict(file)
    if value is None:
        arrays["lengths"][:2] += (1, -1)
    else:
        arrays["given"][0] = value
    np.savez(path, **arrays)
    error = refused("selftest", "--engine", out / INT8, "--golden", path)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: not a golden set, or damaged \({message}\); copy it again", error
    )


# Compare, bench, inspect, sensitivity, audit.


def test_artefacts_are_compared_on_the_demo_of_their_kind(cli, exported_whole):
    out = exported_whole
    result = cli("compare", out.float, out.int8, "--json")
    assert result.exit_code in {0, 3}, result.stderr
    found = json.loads(result.stdout)
    assert found["verdict"] in {"equal", "not enough data", "better"}
    assert found["clips"] >= 100


def test_noise_is_not_for_a_model_that_reads_phrases(refused, intent):
    message = f"{intent.float}: this model takes no recordings, so there is no noise in it"
    for args in (("--noise", DEMO), ("--noise", DEMO, "--snr", 10)):
        assert refused("compare", intent.float, intent.int8, *args) == message


def test_data_of_another_kind_is_refused(refused, intent, digits, keyword):
    wrong = ((intent, DEMO), (keyword, DEMO_PHRASES))
    for out, data in wrong:
        refused("compare", out.float, out.int8, "--data", data)
    found = refused("compare", digits.float, digits.int8, "--data", DEMO_PHRASES)
    assert "the characters of this model are '0123456789'" in found


def test_models_of_other_labels_are_not_compared(refused, intent, digits):
    assert "labels are <blank>, 0, 1" in refused("compare", intent.float, digits.int8)


def test_answers_are_kept_and_compared_later(cli, intent, tmp_path):
    kept = tmp_path / "answers.json"
    assert cli("compare", intent.float, "--save-results", kept).exit_code == 0
    result = cli("compare", kept, intent.int8, "--json")
    assert result.exit_code in {0, 3}, result.stderr
    assert json.loads(result.stdout)["clips"] == 480


@pytest.mark.parametrize(
    ("name", "what"), [("intent", "tokens of 8"), ("digits", "image of 128"), ("keyword", "clip")]
)
def test_speed_is_measured_on_a_usual_input(cli, request, name, what):
    out = request.getfixturevalue(name)
    result = cli("bench", out.int8, "--duration", 0.05, "--warm-up", 0)
    assert (result.exit_code, result.stderr) == (0, "")
    assert what in result.stdout
    found = json.loads(cli("bench", out.int8, "--duration", 0.05, "--json").stdout)
    assert found["batch"] == 1


def test_inspect_shows_what_a_model_takes(cli, exported_whole):
    out = exported_whole
    result = cli("inspect", out.int8)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(cli("inspect", out.int8, "--json").stdout)
    assert found["coverage"]["weights_int8"] == 1
    kind = found["spec"]["input"]["kind"]
    assert [tensor["name"] for tensor in found["inputs"]] == [kind]
    assert [tensor["name"] for tensor in found["outputs"]] == ["logits"]
    assert ("of audio" in result.stdout) is (kind == "audio")
    for name in (FLOAT, "model.ts"):
        assert cli("inspect", out.out / name, "--json").exit_code == 0


def test_sensitivity_names_the_layers(cli, intent):
    result = cli("sensitivity", intent.float, intent.int8, "--json", "--clips", 4)
    assert (result.exit_code, result.stderr) == (0, "")
    found = {layer["layer"] for layer in json.loads(result.stdout)["layers"]}
    assert found == {layer["layer"] for layer in intent.report["sensitivity"]["layers"]}


def test_what_is_audited_are_recordings(refused, intent):
    found = refused("audit", DEMO, "--graph", intent.float)
    assert found == f"{intent.float}: this model takes no recordings, which are what is audited"


# A model of one's own: wrong use.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--spec", "SPEC"], "--spec and --checkpoint are for --model, --spec for --onnx too"),
        (["--checkpoint", "WEIGHTS"], "--spec and --checkpoint are for --model, .+"),
        (["--model", "a:B", "--checkpoint", "WEIGHTS"], "--model and --onnx need a --spec: .+"),
        (["--onnx", "a.onnx"], "--model and --onnx need a --spec: .+"),
        (["--model", "a:B", "--spec", "SPEC"], "--model needs its weights: --checkpoint"),
        (["WEIGHTS", "--model", "a:B", "--spec", "SPEC", "--checkpoint", "WEIGHTS"], "two .+"),
        (["--onnx", "a.onnx", "--model", "a:B", "--spec", "SPEC"], "--onnx is all of a model; .+"),
        (["WEIGHTS", "--onnx", "a.onnx", "--spec", "SPEC"], "--onnx is all of a model; .+"),
    ],
)
@pytest.mark.parametrize("command", ["export", "trace"])
def test_options_that_do_not_go_together_are_usage(cli, tmp_path, command, args, message):
    known = {"SPEC": EXAMPLES / "keyword_crnn.toml", "WEIGHTS": WEIGHTS}
    result = cli(command, *(known.get(arg, arg) for arg in args), "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"Error: {message}", result.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_missing_tensors_is_one_line(refused, beside_examples, tmp_path):
    state = torch.load(WEIGHTS, weights_only=True)["state_dict"]
    del state["gru.weight_ih_l0"]
    torch.save(state, tmp_path / "a.pt")
    found = refused("export", *MODULE, "--checkpoint", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert found.startswith(
        f"{tmp_path / 'a.pt'}: 1 tensors of keyword_crnn:KeywordCrnn are missing, as "
        "'gru.weight_ih_l0'; it has "
    )


def spec_file(path, layout):
    labels, _, _ = (EXAMPLES / "keyword_crnn.toml").read_text().partition("answers")
    path.write_text(
        f'{labels}\n[input]\nkind = "audio"\nlayout = "{layout}"\n[input.features]\nn_mels = 40\n'
    )
    return path


@pytest.fixture
def theirs(tmp_path):
    """The options of a module with random weights."""
    import own_models

    def options(name, layout):
        module = getattr(own_models, name)()
        torch.save(module.state_dict(), tmp_path / "model.pt")
        spec = spec_file(tmp_path / "model.toml", layout)
        return (
            "--model",
            f"own_models:{name}",
            "--checkpoint",
            tmp_path / "model.pt",
            "--spec",
            spec,
        )

    return options


@pytest.mark.parametrize("command", ["export", "trace"])
def test_a_module_that_cannot_be_traced_is_one_line(cli, theirs, old, some_clips, command):
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    more = ("--min-clips", 20, "--force") if command == "export" else ()
    args = theirs("NotTraceable", "NTM")
    result = cli(command, *args, "--data", some_clips, "--out", old, *more)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    (error,) = lines
    assert re.fullmatch(r"Error: model\.ts: .+ on its input, which cannot be traced", error)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_loop_over_frames_is_told_to_have_a_length(cli, theirs, some_clips, tmp_path):
    args = theirs("CellGru", "NMT")
    result = cli("trace", *args, "--data", some_clips, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.endswith("one length: give that under [input] of the spec\n")
    assert result.stderr.count("\n") == 1


def test_a_mistake_in_a_module_is_a_warning(cli, tmp_path, some_clips, theirs):
    args = theirs("BatchAsTime", "N1MT")
    spec = tmp_path / "model.toml"
    spec.write_text(spec.read_text().replace("layout", "samples = 16000\nlayout"))
    result = cli("trace", *args, "--data", some_clips, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = re.sub(f"note: no {PROGRAM}: it needs torch .+\n", "", result.stderr)
    assert re.fullmatch("warning: gru reads the batch as time: .+\n", found)


def test_a_file_of_another_exporter_has_no_torchscript(cli, some_clips, tmp_path):
    import own_models

    source = tmp_path / "theirs.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            own_models.ConvLstm().eval(),
            torch.zeros(1, 40, 101),
            source,
            dynamo=False,
            input_names=["mfcc"],
            dynamic_axes={"mfcc": {0: "n", 2: "t"}},
        )
    args = ("--onnx", source, "--spec", spec_file(tmp_path / "a.toml", "NMT"), "--data", some_clips)
    result = cli("trace", *args, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FLOAT]
