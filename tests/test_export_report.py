"""The report's page: what it says, that nothing breaks it, and how a real browser shows it."""

import base64
import io
import json
import math
import re
import shutil
import wave
from copy import deepcopy
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from cnngru_edge.calibration.corpus.read import DEMO
from cnngru_edge.export.report import plots, svg
from cnngru_edge.export.report.page import REPORT_HTML, REPORT_JSON, render_report, write_report
from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.inputs.audio import Recording, read_audio

LABELS = ["silence", "unknown", "yes", "no"]
CLIPS = sorted(path.relative_to(DEMO).as_posix() for path in DEMO.glob("yes/*.flac"))
ARTEFACT = {"sha256": "ab" * 32, "backend": "onnxruntime 1.32.0", "device": "cpu"}
HTML_WITHOUT_END = {"meta", "link", "br"}


def hear_demo(path, condition):
    return read_audio(DEMO / path, 16000)


def hear_tone(path, condition):
    tone = 0.5 * np.sin(np.arange(12 * 16000) / 10)
    return Recording(tone.astype(np.float32), 16000, 16000, 1)


def condition(name="clean", verdict="equal", delta=-0.08, interval=(-0.5, 0.33)):
    return {
        "condition": name,
        "snr_db": None if name == "clean" else float(name.split()[0]),
        "clips": 1183,
        "reference_accuracy": 0.962,
        "candidate_accuracy": 0.962 + delta / 100,
        "delta": delta,
        "delta_ci": list(interval),
        "confidence": 0.95,
        "mcnemar_p": 1.0,
        "kappa": 0.994,
        "agreement": 0.9949,
        "verdict": verdict,
        "clips_needed": None,
    }


def group(name, clips=90, delta=0.0, flips=0):
    return {
        "group": name,
        "clips": clips,
        "reference_accuracy": 0.95,
        "candidate_accuracy": 0.95 + delta / 100,
        "delta": delta,
        "delta_ci95": [delta - 3.0, delta + 3.0],
        "flips": flips,
    }


def flip(path=CLIPS[0], true="yes", reference="yes", candidate="no", condition="clean"):
    return {
        "path": path,
        "condition": condition,
        "true": true,
        "reference": reference,
        "candidate": candidate,
        "reference_margin": 0.31,
        "candidate_margin": 0.05,
    }


def compared(*conditions, **changes):
    conditions = conditions or (condition(),)
    first = conditions[0]
    verdicts = {c["verdict"] for c in conditions}
    gravest = ("worse", "not enough data", "better", "equal")
    reference = [[90, 0, 0, 0], [1, 88, 1, 0], [0, 1, 89, 0], [0, 0, 0, 0]]
    candidate = [[90, 0, 0, 0], [1, 89, 0, 0], [0, 1, 88, 1], [0, 0, 0, 0]]
    return {
        "verdict": next(v for v in gravest if v in verdicts),
        "passed": True,
        **{k: first[k] for k in ("clips", "reference_accuracy", "candidate_accuracy", "delta")},
        **{k: first[k] for k in ("mcnemar_p", "kappa", "agreement", "clips_needed")},
        "delta_ci95": first["delta_ci"],
        "margin": 0.5,
        "sample_rate": 16_000,
        "reference": {"path": "model.fp32.onnx", "precision": "fp32", **ARTEFACT},
        "candidate": {"path": "model.int8.onnx", "precision": "int8", **ARTEFACT},
        "labels": LABELS,
        "conditions": list(conditions),
        "by_class": [group(label) for label in LABELS],
        "by_speaker": [group("ann", 12, -8.3, 1), group("bob", 9)],
        "confusion": {"reference": reference, "candidate": candidate},
        "flips": [
            flip(CLIPS[1], "yes", "no", "yes"),
            flip(CLIPS[2], "yes", "no", "unknown", "10 dB"),
            flip(),
        ],
    } | changes


def stream_row(model, state, chunk_ms):
    return {
        "model": model,
        "chunk_ms": chunk_ms,
        "offset_ms": 7.3125,
        "state": state,
        "right": 46,
        "accuracy": 0.958,
        "agreement": 1.0,
        "max_abs_error": 0.63,
        "max_abs_clip_error": 0.0,
    }


def score(misses):
    return {
        "words": 100,
        "misses": misses,
        "hours": 0.4,
        "false_accepts_per_hour": 2.5,
        "false_accepts_interval": [0.1, 13.9],
        "false_rejects": misses / 100,
        "false_rejects_interval": [0.01, 0.09],
    }


def whole_report(**changes):
    """A report with every section."""
    models, states, chunks = ("reference", "candidate"), ("fresh", "carried"), (None, 20)
    rows = [stream_row(m, s, c) for m in models for s in states for c in chunks]
    events = {"reference": score(5), "candidate": score(6)}
    events |= {"reference_only": [CLIPS[0]], "candidate_only": []}
    layers = [
        {"name": "convs.0.conv", "precision": "fp32", "weights": 800, "bytes": 3200, "macs": 8000},
        {"name": "head", "precision": "int8", "weights": 1536, "bytes": 1536, "macs": 76800},
    ]
    sensitive = {
        "clips": 96,
        "flips": 1,
        "sqnr_db": 31.2,
        "layers": [
            {
                "layer": layer["name"],
                "weights": layer["weights"],
                "alone_sqnr_db": alone,
                "alone_flips": 0,
                "restored_sqnr_db": 38.0,
                "restored_flips": 0,
            }
            for layer, alone in zip(layers, (33.1, None), strict=True)
        ],
        "gates": [
            {"layer": "grus.0", "matrix": matrix, "gate": gate, "sqnr_db": 40.0, "flips": 0}
            for matrix in ("input", "recurrent")
            for gate in "zrn"
        ],
        "frames": {
            "frame_ms": 20.0,
            "curves": [
                {"name": "all", "sqnr_db": [33.0, 32.0, None, 31.0, 30.5]},
                {"name": "grus.0 alone", "sqnr_db": [40.0, 39.0, 38.0, 37.0]},
            ],
        },
        "tensors": [
            {
                "tensor": f"/convs.{i}/Relu_output_0",
                "read_by": "convs.1.conv",
                "low": 0.0,
                "high": 4.1,
                "minimum": 0.0,
                "maximum": 6.3,
                "clipped": 0.0001,
                "effective_bits": 6.3,
                "histogram": {
                    "low": 0.0,
                    "width": 0.1,
                    "counts": [5000 // (j + 1) for j in range(63)],
                },
            }
            for i in range(4)
        ],
    }
    finding = {
        "check": "duplicates",
        "severity": "warning",
        "text": "2 clips hold the same audio",
        "advice": "Remove one.",
        "clips": CLIPS[:2],
    }
    return {
        "format": 1,
        "title": "kws12",
        "created": "2026-11-25T14:30:00+00:00",
        "command": "cnngru-edge export kws12.safetensors",
        "versions": {"cnngru-edge": "0.1.0", "python": "3.11.7"},
        "files": [
            {"name": "model.int8.tensorrt-fp16.chunk.onnx", "bytes": 292000, "sha256": "cd" * 32}
        ],
        "comparison": compared(),
        "streaming": {
            "model.int8.onnx": {
                "verdict": "equal",
                "passed": True,
                "clips": 48,
                "failures": [],
                "context_loss": {"reference": 0.0, "candidate": 0.0},
                "rows": rows,
                "events": events,
            }
        },
        "coverage": {
            "model.int8.onnx": {
                "source": "profile",
                "weights_int8": 0.6575,
                "macs_int8": 0.9057,
                "weights_hidden": 0.0,
                "layers": layers,
            }
        },
        "sensitivity": sensitive,
        "search": {
            "max_drop": 0.3,
            "kept_in_float": ["convs.0.conv"],
            "steps": [{"kept_in_float": [], "drop": 0.42, "flips": 9, "sqnr_db": 31.2}],
        },
        "audit": {"clips": 359, "seconds": 359.0, "refused": False, "findings": [finding]},
        "latency": [
            {
                "artefact": name,
                "what": "20 ms step",
                "device": "cpu",
                "steps": 4000,
                "median": 0.4,
                "p90": 0.5,
                "p99": 0.7,
                "quantiles_ms": [scale * 1.03**i for i in range(101)],
            }
            for name, scale in (("model.fp32.onnx", 0.3), ("model.int8.onnx", 0.1))
        ],
    } | changes


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, and its text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.texts = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in HTML_WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def render(report, hear=hear_demo):
    """The page, well-formed, with plots whose every number is one."""
    html = render_report(report, hear)
    for drawing in re.findall(r"<svg.*?</svg>", html, re.S):
        ElementTree.fromstring(drawing)
        assert not re.search(r'="[^"]*\b(nan|inf|None)\b[^"]*"', drawing)
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    links = [a["href"] for a in page.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    return page


@pytest.mark.parametrize(
    ("comparison", "sentence"),
    [
        (
            compared(),
            "INT8 answers as well as float: -0.08 points, between -0.50 and +0.33 (95%), of 1,183 "
            "clips.",
        ),
        (
            compared(condition(verdict="better", delta=1.2, interval=(0.6, 1.8))),
            "INT8 answers better than float: +1.20 points, between +0.60 and +1.80 (95%), of 1,183 "
            "clips.",
        ),
        (
            compared(condition(), condition("10 dB", "worse", -2.1, (-3.2, -1.1))),
            "INT8 answers worse than float in noise (10 dB): -2.10 points, between -3.20 and -1.10 "
            "(95%), of 1,183 clips. More than the margin of 0.5 points is lost. Calibrate with",
        ),
        (
            compared(condition(verdict="not enough data", interval=(-0.9, 0.7)), clips_needed=5200),
            "INT8 may answer as well as float or worse, there are too few clips to tell: -0.08 "
            "points, between -0.90 and +0.70 (95%), of 1,183 clips. Compare on more labelled "
            "clips: about 5,200 would settle whether no more than 0.5 points are lost.",
        ),
        (
            compared(condition(verdict="not enough data", delta=-0.5)),
            "so near to the margin of 0.5 points that ten million clips would not settle it",
        ),
    ],
    ids=["equal", "better", "worse in noise", "more clips", "at the margin"],
)
def test_the_verdict_is_one_sentence_and_what_to_do(comparison, sentence):
    assert svg.minus(sentence) in render(whole_report(comparison=comparison)).text


def test_two_models_of_one_precision_are_reference_and_candidate():
    same = {"path": "other.onnx", "precision": "fp32", **ARTEFACT}
    page = render(whole_report(comparison=compared(candidate=same)))
    assert "The candidate answers as well as the reference: " in page.text


def test_what_failed_elsewhere_stands_at_the_top():
    report = whole_report()
    (found,) = report["streaming"].values()
    found |= {"passed": False, "verdict": "worse", "failures": ["candidate stream: 3 points"]}
    report["audit"]["refused"] = True
    report["audit"]["findings"][0]["severity"] = "error"
    top = render(report).text.split("Cohen")[0]
    assert "✕ Not right as a stream: model.int8.onnx" in top
    assert "✕ Audio for calibration: 1 error" in top
    assert "• 65.8% of the weights compute in INT8, measured on 1 file" in top


def test_a_report_that_no_command_made_says_how_it_was_made():
    page = render_report(whole_report(command=""), hear_demo)
    assert "How it was made" in page
    assert "<pre>" not in page


def test_a_section_without_data_is_left_out():
    everything = render(whole_report())
    order = (
        "accuracy confusion flips coverage sensitivity ranges latency files streaming audit search "
        "made"
    )
    assert " ".join(attributes["id"] for attributes in everything.all("section")) == order
    kept = ("format", "title", "created", "command", "versions")
    bare = {key: whole_report()[key] for key in kept}
    for report in (bare, bare | {"comparison": None, "coverage": None, "files": []}):
        page = render(report)
        assert [attributes["id"] for attributes in page.all("section")] == ["made"]
        assert not page.all("svg")


def test_foreign_text_stays_text():
    evil = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>&amp;'

    def with_evil(value):
        """The same with this for every text, but for the words that are ours."""
        if isinstance(value, dict):
            ours = {"verdict", "model", "state", "severity"}
            return {key: one if key in ours else with_evil(one) for key, one in value.items()}
        if isinstance(value, list):
            return [with_evil(one) for one in value]
        return evil if isinstance(value, str) else value

    report = with_evil(whole_report())
    for key in ("versions", "coverage", "streaming"):
        report[key] = {evil: next(iter(report[key].values()))}

    def hear(path, condition):
        raise AudioError(f"{path}: no such file")

    page = render(report, hear)
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count(evil) > 60
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_what_is_lost_comes_first_and_can_be_heard():
    page = render(whole_report())
    flips = page.text[page.text.index("3 answers of float and INT8 differ") :]
    assert flips.startswith(
        "3 answers of float and INT8 differ: 1 lost, 1 wrong both times, 1 won."
    )
    order = [flips.index(f"Said yes , {what}") for what in ("lost", "wrong both times", "won")]
    assert order == sorted(order)
    audios = page.all("audio")
    assert len(audios) == 3
    assert all(audio["preload"] == "none" for audio in audios)
    with wave.open(io.BytesIO(base64.b64decode(audios[0]["src"].split(",")[1]))) as f:
        assert (f.getnchannels(), f.getsampwidth(), f.getframerate()) == (1, 2, 16000)
        written = np.frombuffer(f.readframes(f.getnframes()), "<i2") / 32767
    np.testing.assert_allclose(written, hear_demo(CLIPS[0], "clean").samples, atol=2e-5)


def test_of_many_flips_some_can_be_heard_and_all_are_listed():
    heard = []

    def hear(path, condition):
        heard.append((path, condition))
        return hear_tone(path, condition)

    flips = [flip(f"{i}.flac", condition="10 dB") for i in range(25)]
    page = render(whole_report(comparison=compared(flips=flips)), hear)
    assert heard == [(f"{i}.flac", "10 dB") for i in range(20)]
    audios = page.all("audio")
    assert len(audios) == 20
    assert (
        "The first 20 can be heard, up to 10 seconds of each; the others are in the table."
        in page.text
    )
    assert "24.flac" in page.text
    with wave.open(io.BytesIO(base64.b64decode(audios[0]["src"].split(",")[1]))) as f:
        assert f.getnframes() == 10 * 16000


def test_a_clip_that_cannot_be_read_any_more_is_said_in_its_place():
    comparison = compared(flips=[flip(), flip("gone/away.flac")])
    page = render(whole_report(comparison=comparison))
    assert len(page.all("audio")) == 1
    assert f"Cannot be heard: {DEMO / 'gone/away.flac'}: no such file" in page.text


def test_the_same_report_gives_the_same_bytes():
    report = whole_report()
    before = deepcopy(report)
    assert render_report(report, hear_demo) == render_report(report, hear_demo)
    assert report == before


def test_page_and_numbers_are_written(tmp_path):
    report = whole_report(title="caf\udce9")  # a name in Latin-1, as Python has it
    report["sensitivity"]["sqnr_db"] = math.inf
    report["sensitivity"]["layers"][0]["alone_sqnr_db"] = math.nan
    write_report(tmp_path / "out", report, hear_demo)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [REPORT_HTML, REPORT_JSON]
    assert "<h1><bdi>caf\\udce9</bdi></h1>" in (tmp_path / "out" / REPORT_HTML).read_text("utf-8")
    numbers = json.loads((tmp_path / "out" / REPORT_JSON).read_bytes())
    assert numbers["sensitivity"]["sqnr_db"] is None
    assert numbers["sensitivity"]["layers"][0]["alone_sqnr_db"] is None
    assert numbers["comparison"] == report["comparison"]


def degenerate(name):
    report = whole_report()
    c, s = report["comparison"], report["sensitivity"]
    if name == "no flips":
        c |= {"flips": [], "by_speaker": [], "by_class": []}
    elif name == "one class and one clip":
        c |= {"labels": ["yes"], "by_class": [group("yes", 1)], "clips": 1, "kappa": math.nan}
        c["confusion"] = {"reference": [[1]], "candidate": [[1]]}
    elif name == "no errors at all":
        s |= {"sqnr_db": math.inf, "gates": [], "flips": 0}
        for layer in s["layers"]:
            layer |= {"alone_sqnr_db": None, "restored_sqnr_db": math.nan}
        for curve in s["frames"]["curves"]:
            curve["sqnr_db"] = [None] * 5
    elif name == "nothing counted":
        s["tensors"][0]["histogram"]["counts"] = [0] * 63
        s["tensors"][1] |= {"low": 0.0, "high": 0.0, "effective_bits": math.nan}
        s["tensors"][1]["histogram"] = {"low": 0.0, "width": 0.0, "counts": [7]}
        s["tensors"][2]["histogram"]["counts"] = []
        c["confusion"] = {which: [[0] * 4] * 4 for which in ("reference", "candidate")}
    elif name == "no steps":
        for row in report["latency"]:
            row |= {"steps": 0, "median": math.nan, "p90": None, "p99": None, "quantiles_ms": []}
        report["latency"][0]["quantiles_ms"] = [0.0] * 101
        report["coverage"]["model.int8.onnx"] |= {"layers": [], "weights_hidden": 1.0}
        report["files"][0]["bytes"] = 0
        s |= {"layers": [], "frames": {"frame_ms": 20.0, "curves": []}, "tensors": []}
    elif name == "269 speakers and 60 labels":
        c["by_speaker"] = [group(f"speaker {i}", 4, -(i % 50)) for i in range(269)]
        c["labels"] = [f"label {i} of sixty" for i in range(60)]
        c["by_class"] = [group(label) for label in c["labels"]]
        matrix = [[90 if i == j else (i * j) % 7 == 1 for j in range(60)] for i in range(60)]
        matrix = [[int(count) for count in row] for row in matrix]
        changed = [[*row[1:], 12345] for row in matrix]
        c["confusion"] = {"reference": matrix, "candidate": changed}
    elif name == "long names":
        c["labels"] = ["silence", "W" * 300, "日本語" * 40, "نعم" * 40]
        c["by_class"] = [group(label) for label in c["labels"]]
        c["flips"] = [flip(f"{'folder/' * 60}{'x' * 200}.flac"), flip("日本" * 90)]
        s["layers"][0]["layer"] = "decoder.blocks." * 12
        s["tensors"][0]["tensor"] = "/" + "MatMul_output_0" * 20
        report |= {"title": "t" * 200, "command": "x" * 500}
        report["files"][0]["name"] = "model" * 40
        report["latency"][0]["artefact"] = "engine" * 40
    return report


DEGENERATE = (
    "no flips",
    "one class and one clip",
    "no errors at all",
    "nothing counted",
    "no steps",
    "269 speakers and 60 labels",
    "long names",
)


@pytest.mark.parametrize("name", DEGENERATE)
def test_odd_data_is_shown_too(name):
    said = {
        "no flips": "Both give the same answer to every clip.",
        "one class and one clip": "of 1 clip right",
        "no errors at all": "no error",
        "nothing counted": "no values",
        "no steps": "model.int8.onnx 20 ms step cpu 0 \N{EN DASH} \N{EN DASH}",
        "269 speakers and 60 labels": "The same by speaker, the 10 of 269 who lose most.",
        "long names": "t" * 200,
    }
    assert said[name] in render(degenerate(name)).text


def test_all_speakers_are_in_the_table_and_the_worst_in_the_plot():
    report = degenerate("269 speakers and 60 labels")
    html = render_report(report, hear_demo)
    speakers = report["comparison"]["by_speaker"]
    plot = plots.groups_plot("Accuracy by speaker", speakers, 0.5, ("float", "INT8"), 10)
    assert plot in html
    assert plot.count("<circle") == 10
    shown = set(re.findall(r"<title>(speaker \d+)</title>", plot))
    deltas = {g["group"]: g["delta"] for g in speakers}
    assert max(deltas[name] for name in shown) == sorted(deltas.values())[9]
    assert all(f"<bdi>{name}</bdi>" in html for name in deltas)


def number_of(name, tag):
    return float(re.search(rf'\b{name}="(.*?)"', tag)[1])


def test_an_interval_lies_where_its_numbers_are():
    rows = [plots.Interval("a", -1.0, -2.0, 0.0), plots.Interval("b", 1.0, 0.0, 2.0)]
    plot = plots.interval_plot("t", rows, 0.5, ("float", "INT8"))
    a, b = (number_of("cx", tag) for tag in re.findall("<circle.*?>", plot))
    zero = number_of("x1", re.search('<line[^>]*class="zero"', plot)[0])
    assert zero == pytest.approx((a + b) / 2, abs=0.01)
    band = re.search('<rect[^>]*class="band"', plot)[0]
    assert number_of("width", band) == pytest.approx((b - a) / 2, abs=0.02)
    lost, kept = re.findall('<circle class="(.*?)"', plot)
    assert (lost, kept) == ("dot lost", "dot")


def test_bars_are_as_long_as_their_numbers():
    bars = [
        plots.Bar("a", 10.0, "10"),
        plots.Bar("b", -5.0, "-5"),
        plots.Bar("c", None, "no error"),
    ]
    plot = plots.bar_plot("t", bars, "dB")
    a, b = re.findall('<rect[^>]*class="bar s0"', plot)
    assert number_of("width", a) == pytest.approx(2 * number_of("width", b), abs=0.02)
    assert number_of("x", a) == pytest.approx(number_of("x", b) + number_of("width", b), abs=0.02)
    assert "no error</text>" in plot


def test_a_gap_interrupts_a_line():
    curve = plots.Curve("a", [(0, 1.0), (1, 2.0), (2, None), (3, 4.0), (4, 3.0)])
    plot = plots.line_plot("t", [curve], "x", "y")
    (path,) = re.findall(r'<path class="curve l0" d="(.*?)"', plot)
    assert re.sub(r"[\d. ]+", "", path) == "MLML"


def test_changes_are_signed_and_shaded_by_what_they_mean():
    plot = plots.confusion_plot("t", ["a", "b"], [[-2, 2], [-1, 1]], changes=True)
    shades = re.findall(r'class="(better|worse)".*?class="cell"[^>]*>(.*?)<', plot)
    signed = [("worse", "-2"), ("worse", "+2"), ("better", "-1"), ("better", "+1")]
    assert shades == [(shade, svg.minus(text)) for shade, text in signed]


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ([0.0, 10.0], False, [0, 2, 4, 6, 8, 10]),
        ([-0.5, 0.31], False, [-0.4, -0.2, 0, 0.2]),
        ([], False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([7.0], False, [4, 6, 8, 10]),
        ([1e6, 1e6 + 1], False, [1e6, 1e6 + 0.2, 1e6 + 0.4, 1e6 + 0.6, 1e6 + 0.8, 1e6 + 1]),
        ([0.1, 20.0], True, [0.1, 0.3, 1, 3, 10]),
        ([1e-9, 1e9], True, [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
    ],
    ids=["plain", "signed", "none", "one", "narrow", "log", "wide log"],
)
def test_an_axis_has_round_ticks(values, is_log, ticks):
    axis = svg.Axis.over(values, 50, 330, is_log=is_log)
    assert axis.ticks == pytest.approx(ticks)
    places = [axis(tick) for tick in axis.ticks]
    assert places == sorted(places)
    assert places[0] >= 50
    assert places[-1] <= 330


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_enough_contrast(scheme):
    html = render_report(whole_report(), hear_demo)
    block = re.findall(r":root {(.*?)}", html, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", block))
    for name in ("text", "quiet", "good", "bad", "open", "c0", "c1", "c2", "c3", "c4", "c5"):
        for back in ("page", "box"):
            dark, light = sorted(luminance(colours[which]) for which in (name, back))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, back)
    for name in ("c0", "c1"):  # the strongest shades of a matrix, under its numbers
        pairs = [[int(colours[c][i : i + 2], 16) for i in (1, 3, 5)] for c in (name, "page")]
        shade = "#" + "".join(f"{(a + b) // 2:02x}" for a, b in zip(*pairs, strict=True))
        dark, light = sorted((luminance(shade), luminance(colours["text"])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


# The same page in a real browser.

PHONE, DESK = 360, 1100
MEASURE = """
const sides = r => [r.left, r.top, r.right, r.bottom], box = e => sides(e.getBoundingClientRect());
const hidden = e => e.closest("details:not([open])");
return [...document.querySelectorAll("svg")].filter(e => !hidden(e)).map(e => ({
    title: e.querySelector("title").textContent, box: box(e), scale: e.getScreenCTM().a,
    marks: e.querySelectorAll("path, line, rect, circle").length,
    texts: [...e.querySelectorAll("text")].map(t => [t.lastChild.textContent, ...box(t)]),
}));
"""
WIDER_THAN_THE_PAGE = """
const out = e => e.getBoundingClientRect().right > innerWidth + 1;
const scrolls = e => e.closest(".scroll, figure:has(.wide)");
return [...document.querySelectorAll("body *")].filter(e => out(e) && !scrolls(e))
    .map(e => e.outerHTML.slice(0, 200));
"""
PLAY = """
const [done] = arguments, audio = document.querySelector("audio");
audio.ontimeupdate = () => { if (audio.currentTime > 0) done(audio.duration); };
audio.play().catch(e => done(String(e)));
"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and its driver are not installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root in a container needs
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def show(browser, folder, report, *, width=DESK, scheme="light"):
    write_report(folder, report, hear_demo)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((folder / REPORT_HTML).as_uri())


def assert_drawn(drawing):
    """Something is there, all text lies within the drawing, and no text on another."""
    left, top, right, bottom = drawing["box"]
    room, scale = 1.5, drawing["scale"]
    assert right - left > 200
    assert bottom - top > 50
    assert drawing["marks"]
    assert drawing["texts"]
    for text, *place in drawing["texts"]:
        inside = (place[0] - left, place[1] - top, right - place[2], bottom - place[3])
        assert min(inside) > -room * scale, (drawing["title"], text, inside)
    for i, (a, *one) in enumerate(drawing["texts"]):
        for b, *other in drawing["texts"][:i]:
            across = min(one[2], other[2]) - max(one[0], other[0])
            down = min(one[3], other[3]) - max(one[1], other[1])
            assert min(across, down) < 3 * scale, (drawing["title"], a, b)


def test_a_browser_shows_the_page_and_asks_nobody_for_more(browser, tmp_path):
    browser.get_log("performance")
    show(browser, tmp_path, whole_report())
    drawings = browser.execute_script(MEASURE)
    assert len(drawings) == 15
    for drawing in drawings:
        assert_drawn(drawing)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {browser.current_url}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["269 speakers and 60 labels", "long names", "nothing counted"])
def test_a_browser_shows_odd_data(browser, tmp_path, name):
    show(browser, tmp_path, degenerate(name))
    for drawing in browser.execute_script(MEASURE):
        assert_drawn(drawing)


def test_light_and_dark_are_what_the_reader_asked_for(browser, tmp_path):
    def colours(scheme):
        show(browser, tmp_path, whole_report(), scheme=scheme)
        return browser.execute_script(
            "const of = e => getComputedStyle(e);"
            "return [of(document.body).backgroundColor, of(document.body).color,"
            " of(document.querySelector('svg text')).fill]"
        )

    assert colours("light") == ["rgb(255, 255, 255)", "rgb(27, 32, 38)", "rgb(89, 99, 110)"]
    assert colours("dark") == ["rgb(20, 23, 27)", "rgb(231, 234, 238)", "rgb(163, 173, 184)"]


@pytest.mark.parametrize("name", ["", "269 speakers and 60 labels", "long names"])
def test_a_telephone_scrolls_down_only(browser, tmp_path, name):
    show(browser, tmp_path, degenerate(name), width=PHONE)
    browser.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE
    assert browser.execute_script(WIDER_THAN_THE_PAGE) == []


def test_a_changed_answer_is_heard(browser, tmp_path):
    show(browser, tmp_path, whole_report())
    duration = browser.execute_async_script(PLAY)
    assert duration == pytest.approx(hear_demo(CLIPS[0], "clean").duration_s, abs=0.01)


def test_details_open_by_keyboard(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    show(browser, tmp_path, whole_report())
    summary = browser.find_element("css selector", "#accuracy summary")
    is_open = "return document.querySelector('#accuracy details').open"
    assert not browser.execute_script(is_open)
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script(is_open)
    assert browser.find_element("css selector", "#accuracy details table").is_displayed()
