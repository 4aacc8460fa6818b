"""Every script of benchmarks/ runs, on a few clips, and so does the one that made the demo clips.

Each is run as a file, with its arguments on the command line; most within this process.
"""

import csv
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import needs_torchaudio  # noqa: F401
import numpy as np
import pytest
import soundfile

from cnngru_edge.calibration.corpus.read import DEMO, DEMO_DIGITS, DEMO_PHRASES
from cnngru_edge.models.errors import BackendMissing
from cnngru_edge.models.nets.checkpoint import PRETRAINED

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = sorted(BENCHMARKS.glob("*.py"))
SCRIPTS = [path.name for path in PAGES if "__main__" in path.read_text(encoding="utf-8")]
FLOAT, INT8, CHUNK = "model.fp32.onnx", "model.int8.onnx", "model.int8.chunk.onnx"
COLUMNS = ("path", "set", "task", "label", "word", "speaker")


@pytest.fixture
def started(monkeypatch, capsys):
    """The exit code, stdout and stderr of a script."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def start(name, *arguments, folder=BENCHMARKS):
        path = str(folder / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        return code, *capsys.readouterr()

    yield start
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def run(started):
    """What a script prints that does well."""

    def run(name, *arguments):
        code, out, err = started(name, *arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def few(tmp_path_factory, demo):
    """A corpus of a few words, with a noise, and with other words as speech without any of them."""
    folder = tmp_path_factory.mktemp("few")
    rows = [COLUMNS]
    for set_name, count in (("calib", 8), ("eval", 24)):
        clips = demo.of(set_name)
        rows += [row_of(clip, "sc12") for clip in clips[:: -(-len(clips) // count)]]
    of_eval = demo.of("eval")
    rows += [row_of(clip, "intent") for clip in of_eval if clip.label == "unknown"][:3]
    rows.append(row_of(next(c for c in of_eval if c.label == "silence"), "noise"))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    return folder


def row_of(clip, task):
    return clip.path, clip.set, task, clip.label, clip.text, clip.speaker


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """The float graph of the CTC model that comes with the package."""
    from cnngru_edge.export.trace.model import export_onnx
    from cnngru_edge.models.nets.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("ctc") / FLOAT
    export_onnx(load_checkpoint(PRETRAINED / "ctc.safetensors").for_export(), path)
    return path


def rows_of(text):
    """The rows of the tables in Markdown, without rules, by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows if set("".join(row)) - set("-: ")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_how_it_is_called(run, name):
    assert re.match(rf"usage: {name} ", run(name, "--help"), re.IGNORECASE)


def test_every_script_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f'run("{name}",' not in source] == []


def test_every_module_belongs_to_a_script():
    sources = [path.read_text(encoding="utf-8") for path in PAGES]
    modules = [path.stem for path in PAGES if path.name not in SCRIPTS]
    assert [name for name in modules if not any(f"from {name} import" in s for s in sources)] == []


def test_accuracy(run, exported, few):
    data = ("--data", few, "--task", "sc12")
    rows = rows_of(run("accuracy.py", *data, exported / FLOAT, exported / INT8))
    assert min(map(float, rows["alone, clean"])) > 70
    assert {"after three other words", "after 3 s of noise", "in noise at 0 dB"} <= rows.keys()
    assert all(len(rows[label]) == 3 for label in ("yes", "no", "unknown"))


def test_calibration_memory(exported, few):
    """In a process of its own: a process inherits the peak of the one that started it."""
    command = [sys.executable, BENCHMARKS / "calibration_memory.py", exported / FLOAT]
    command += ["--data", few, "--task", "sc12", "--clips", "8", "--clips", "40"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = [float(peak) for peak in re.findall(r"^\d+ clips: (\d+) MiB, \d+ s$", found, re.M)]
    assert len(peaks) == 2
    assert min(peaks) > 30
    growth = float(re.search(r"^growth: (-?[\d.]+) MiB$", found, re.M)[1])
    assert growth == pytest.approx(peaks[1] - peaks[0], abs=1.1)
    assert growth < 30


def test_calibration_memory_of_one_calibration(run, exported, few):
    data = ("--data", few, "--task", "sc12")
    assert float(run("calibration_memory.py", exported / FLOAT, *data, "--clips", 8)) > 30


def test_connected_words(run, few, tmp_path):
    out = tmp_path / "connected"
    found = run("connected_words.py", "--data", few, "--task", "sc12", "--out", out)
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert found == f"{len(rows)} strings in {out}\n"
    assert {row["set"] for row in rows} == {"calib", "eval"}
    assert max(len(row["text"].split()) for row in rows) > 1
    assert all(soundfile.info(out / row["path"]).samplerate == 16_000 for row in rows)


def test_damage(run, exported, few):
    rows = rows_of(run("damage.py", exported, "--data", few, "--task", "sc12"))
    header, whole, spoiled, *others = rows.values()
    assert len(others) == 3
    assert (header[3], header[4]) == ("SQNR", "hurts most")
    assert float(whole[3].removesuffix(" dB")) > float(spoiled[3].removesuffix(" dB")) + 20
    assert spoiled[4] == "`grus.0.weight_hh_l0`"


def test_endpoints(run, ctc, few):
    found = run("endpoints.py", "--engine", ctc, "--data", few, "--task", "sc12")
    rows = {float(k): row for k, row in rows_of(found).items() if k != "silence, s"}
    assert list(rows) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2]
    cut = [float(row[0].removesuffix(" %")) for row in rows.values()]
    assert cut == sorted(cut, reverse=True)
    delays = [float(row[3].split(" / ")[0]) for row in rows.values()]
    assert delays[-1] > delays[0] + 0.3


def test_event_delay(run, exported, few):
    engine = ("--engine", exported / INT8)
    found = run("event_delay.py", *engine, "--data", few, "--task", "sc12")
    match = re.match(r"(\d+) words found: p5 (-?\d+) ms, median (-?\d+) ms, p95 (\d+) ms", found)
    count, p5, p50, p95 = map(int, match.groups())
    assert count >= 10
    assert -300 < p5 <= p50 <= p95 < 1000


@pytest.fixture
def no_gpu():
    from cnngru_edge.runtime.backends.trt.cuda import Cuda

    try:
        Cuda()
    except BackendMissing as e:
        return str(e)
    pytest.skip("a GPU is here, and nothing is missing")


def test_gpu_prepares_graphs(run, tmp_path):
    found = run("gpu.py", "prepare", tmp_path, "--models", "kws12")
    assert found == f"{tmp_path / 'kws12'}: 8 graphs\n"
    names = {path.name for path in (tmp_path / "kws12").glob("*.onnx")}
    assert {"native.clip.onnx", "cell.step.onnx", "int8.tensorrt-fp16.step.onnx"} <= names
    from cnngru_edge.export.chain.inspection import inspect

    assert inspect(tmp_path / "kws12/int8.tensorrt.clip.onnx")["target"] == "tensorrt"


def test_gpu_says_what_is_missing(started, no_gpu, tmp_path):
    assert started("gpu.py", "measure", tmp_path) == (1, "", f"gpu.py: {no_gpu}\n")


def test_gru_error(run, few, tmp_path):
    file, text = tmp_path / "errors.json", tmp_path / "errors.md"
    options = ("--models", "kws12", "--seconds", 6, "--json", file, "--markdown", text)
    found = run("gru_error.py", "--data", few, "--task", "sc12", *options)
    assert text.read_text(encoding="utf-8") == found
    (report,) = json.loads(file.read_text(encoding="utf-8"))
    assert {row["tensor"] for row in report["tensors"]} == {"logits", "Wx", "z", "r", "n", "h"}
    assert all(20 < row["sqnr_db"] < 70 for row in report["tensors"])
    assert report["agreement"] > 0.9
    assert f"Same label in {report['agreement']:.2%} of 6 s." in found


def test_gru_forms(run):
    found = run("gru_forms.py", "--rounds", 1)
    rows = re.findall(r"(\d+ to \d+, \d+) +│(.+)│$", found, re.M)
    assert len(rows) == 8
    assert all(int(us) > 0 for _, cells in rows for us in cells.split("│"))


def test_large_ctc(run):
    found = run("large_ctc.py", "--rounds", 1, "--steps", 20)
    assert "5.4 million weights, 100.0% of them in INT8" in found
    rows = rows_of(found)
    assert int(rows["INT8"][2].replace(",", "")) < 0.3 * int(rows["float"][2].replace(",", ""))
    ratio = re.search(r"^float / INT8: ([\d.]+) in the median", found, re.M)[1]
    quotient = float(rows["float"][0]) / float(rows["INT8"][0])
    assert float(ratio) == pytest.approx(quotient, rel=0.02)
    assert 20 < float(re.search(r"INT8 logits ([\d.]+) dB", found)[1]) < 50


def test_latency(run, exported):
    engines = ("--engine", exported / CHUNK, "--reference", exported / FLOAT)
    found = run("latency.py", *engines, "--chunks", 1000, "--starts", 1)
    assert found.startswith("1,000 chunks of 20 ms")
    steps, starts = found.split("cold start")
    for name in ("INT8", "float"):
        p50, p99, p999, longest, *_ = map(float, rows_of(steps)[name])
        assert 0 < p50 <= p99 <= p999 <= longest
        seconds, mib = map(float, rows_of(f"|{starts}")[name])
        assert 0 < seconds < 60
        assert mib > 30


def test_methods(run, exported, few):
    lines = run("methods.py", exported / FLOAT, "--data", few, "--task", "sc12").splitlines()
    found = dict(line.removesuffix(" dB").split(": ") for line in lines)
    assert found.keys() == {"minmax", "percentile", "entropy", "mse"}
    assert all(15 < float(sqnr_db) < 60 for sqnr_db in found.values())


def test_peers(started, monkeypatch, few, tmp_path):
    """Without OpenVINO, whether or not it is installed: its rows are left out."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "nncf", None)
    file, text = tmp_path / "rows.json", tmp_path / "tables.md"
    written = ("--json", file, "--markdown", text)
    options = ("--models", "kws12", "--rounds", 1)
    code, out, err = started("peers.py", "--data", few, "--task", "sc12", *options, *written)
    assert code == 0, err
    assert len(re.findall(r"^openvino-.+: skipped, ", err, re.M)) == 3
    assert text.read_text(encoding="utf-8") == out
    rows = {(row["form"], row["backend"]): row for row in json.loads(file.read_text())}
    assert {form for form, _ in rows} == {"step", "clip"}
    backends = {backend for _, backend in rows}
    assert len(rows) == 2 * len(backends) == 14
    assert {backend.split("-")[0] for backend in backends} == {"cnngru", "onnxruntime", "torch"} | {
        "torchscript"
    }
    assert all(row["latency_us"] > 0 for row in rows.values())
    ours, exact = rows["step", "cnngru-int8"], rows["step", "onnxruntime-fp32"]
    assert (ours["weights_int8"], exact["weights_int8"]) == (1, 0)
    assert ours["file_bytes"] < 0.4 * exact["file_bytes"]
    # Torch, its TorchScript and its ONNX are one model, whatever runs it.
    for backend in ("torch-fp32", "torchscript"):
        assert rows["step", backend]["accuracy"] == exact["accuracy"] > 0.7


@pytest.mark.filterwarnings("default")  # of what others do within
def test_peers_with_openvino(run, few, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install --group peers")
    pytest.importorskip("nncf", reason="nncf is not installed: pip install --group peers")
    file = tmp_path / "rows.json"
    names = ("openvino-fp32", "openvino-nncf-int8", "openvino-nncf-int8 (front-end excluded)")
    chosen = [option for name in names for option in ("--peers", name)]
    options = ("--models", "kws12", "--rounds", 1, "--json", file)
    run("peers.py", "--data", few, "--task", "sc12", *chosen, *options)
    rows = [row for row in json.loads(file.read_text()) if row["form"] == "step"]
    assert [row["backend"] for row in rows] == list(names)
    assert rows[0]["accuracy"] > 0.7
    assert rows[0]["weights_int8"] == 0 < rows[1]["weights_int8"] < 0.5


def test_soak(run, exported):
    engines = ("--engine", exported / INT8, "--reference", exported / FLOAT)
    rows = rows_of(run("soak.py", *engines, "--hours", 0.05))
    hours, pieces = re.fullmatch(r"([\d.]+) h in ([\d,]+) pieces", rows["audio"][0]).groups()
    assert float(hours) == 0.05
    assert int(pieces) > 100
    assert float(rows["logits of the last 120 s, run again"][0].split()[0]) < 1e-3
    assert re.fullmatch(r"[\d.]+ MiB", rows["memory"][0])  # the warm-up is longer than this
    assert 0.001 < float(rows["RMS error of h, last 120 s"][0]) < 0.1


def test_streaming(run, exported, few, tmp_path):
    engines = ("--engine", exported / FLOAT, "--engine", exported / INT8)
    decision = ("--decision", PRETRAINED / "kws12.safetensors")
    run("streaming.py", "--data", few, *engines, *decision, "--out", tmp_path)
    text = (tmp_path / "streaming.md").read_text(encoding="utf-8")
    rows = rows_of(text)
    assert {"0.5", "0.98", FLOAT, INT8} <= rows.keys()
    alone, cut, within = map(float, rows[INT8])
    assert alone > 70
    assert min(cut, within) > 40
    curve = ElementTree.parse(tmp_path / "det.svg").getroot()
    assert len(curve.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def cut_manifest(source, target, count):
    """Write so many rows of a demo's evaluation set, evenly chosen, with absolute paths."""
    with (source / "manifest.csv").open(newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["set"] == "eval"]
    rows = rows[:: len(rows) // count][:count]
    for row in rows:
        if "path" in row:
            row["path"] = source / row["path"]
    with (target / "manifest.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


@pytest.mark.parametrize(("demo_of", "name"), [(DEMO_PHRASES, "intent"), (DEMO_DIGITS, "digits")])
def test_whole_accuracy(run, tmp_path, demo_of, name):
    data = cut_manifest(demo_of, tmp_path, 24)
    found = run("whole_accuracy.py", "--data", data, PRETRAINED / f"{name}.safetensors")
    share = float(re.search(r"^all +([\d.]+)% of 24 ", found, re.M)[1])
    assert 50 < share <= 100
    assert re.search(r"^[\d,]+ parameters$", found, re.M)
    assert ("character errors" in found) == (name == "digits")


def test_word_errors(run, ctc, few):
    rows = rows_of(run("word_errors.py", "--data", few, "--task", "sc12", ctc))
    conditions = {"single words", "strings", "after 10 s of noise", "in noise at 0 dB"}
    assert conditions <= rows.keys()
    for name in conditions:
        strings, words, rates = rows[name]
        assert int(words) >= int(strings) > 0
        assert all(0 <= float(rate) <= 150 for rate in rates.split(" / "))
    assert float(rows["strings"][2].split(" / ")[0]) < 60


def test_zoo_with_one_row(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = rows_of(run("zoo.py", "--models", "large_ctc"))
    assert list(rows) == ["model", "large_ctc"]
    assert rows["large_ctc"][:4] == ["ctc", "5,420,477", "a text; not trained", "-"]
    assert (tmp_path / "build/zoo/large_ctc" / CHUNK).is_file()


def test_zoo_writes_no_part_of_a_table(started, tmp_path):
    readme = tmp_path / "README.md"
    code, _, err = started("zoo.py", "--models", "kws12", "--readme", readme)
    assert code == 2
    assert "leave --models out" in err


@pytest.mark.slow
def test_the_whole_zoo(run, monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(
        "before\n<!-- zoo: written by make zoo -->\n<!-- /zoo -->\n", encoding="utf-8"
    )
    found = run("zoo.py", "--readme", "README.md")
    names = {path.stem for path in PRETRAINED.glob("*.safetensors")}
    assert rows_of(found).keys() == names | {"model", "keyword_crnn", "large_ctc"}
    assert found in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_calibration_memory_as_it_is(exported):
    """Thousands of clips."""
    command = [sys.executable, BENCHMARKS / "calibration_memory.py", exported / FLOAT]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith("100 clips: ")
    assert float(re.search(r"^growth: (-?[\d.]+) MiB$", found, re.M)[1]) < 20


# The script that made the demo clips


@pytest.fixture(scope="module")
def make_clips():
    spec = importlib.util.spec_from_file_location("make_clips", DEMO / "make_clips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_clips_says_how_it_is_called(started):
    code, out, _ = started("make_clips.py", "--help", folder=DEMO)
    assert code == 0
    assert out.startswith("usage: make_clips.py ")


def test_the_demo_has_the_clips_that_are_planned(make_clips):
    with (DEMO / "manifest.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == make_clips.COLUMNS
    for group in make_clips.VOICES:
        listed = [
            (row["label"], row["word"], row["speaker"]) for row in rows if row["set"] == group
        ]
        assert listed == [
            (label, word, voice.replace(":", "-") or f"noise-{group}")
            for label, word, voice in make_clips.plan(group)
        ]


def test_silences_are_made_again(make_clips):
    """The only clips without a synthesizer."""
    for number, colour in enumerate(make_clips.NOISES):
        name = f"silence/noise-eval_{number}.flac"
        rng = np.random.default_rng([make_clips.SEED, make_clips.zlib.crc32(name.encode())])
        made = make_clips.noise(colour, rng.uniform(-68, -38), rng)
        shipped, _ = soundfile.read(DEMO / name, dtype="int16")
        assert np.abs(np.rint(made * 32768) - shipped).max() <= 1


def test_make_clips_says_which_package_is_missing(started, make_clips, tmp_path):
    if (package := make_clips.missing()) is None:
        pytest.skip("all synthesizers are installed")
    code, out, err = started("make_clips.py", "--out", tmp_path, folder=DEMO)
    assert (code, out) == (1, "")
    assert err == f"make_clips: a synthesizer is missing: apt-get install {package}\n"


@pytest.mark.slow
def test_the_demo_is_made_again(started, make_clips, tmp_path):
    if (package := make_clips.missing()) is not None:
        pytest.skip(f"needs the Debian package {package}")
    code, out, err = started("make_clips.py", "--out", tmp_path, folder=DEMO)
    assert code == 0, err
    with (DEMO / "manifest.csv").open(newline="", encoding="utf-8") as f:
        paths = [row["path"] for row in csv.DictReader(f)]
    assert out == f"{len(paths)} clips in {tmp_path}\n"
    assert all((tmp_path / path).is_file() for path in paths)
