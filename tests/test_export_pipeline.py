import json
import shutil

import numpy as np
import pytest
import soundfile

from cnngru_edge.calibration.corpus.read import read_corpus
from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.export.artefacts import FLOAT, INT8
from cnngru_edge.export.chain import pipeline
from cnngru_edge.export.quantize.plan import Plan
from cnngru_edge.models.errors import CorpusError


@pytest.fixture
def corpus(demo, tmp_path):
    """A copy of a part of the demo, to spoil."""
    rows = ["path,set,label,speaker"]
    for clip in (*demo.of("calib")[::2], *demo.of("eval")[::6]):
        inside = clip.path.relative_to(demo.root)
        target = tmp_path / "corpus" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip.path, target)
        rows.append(f"{inside},{clip.set},{clip.label},{clip.speaker}")
    (tmp_path / "corpus" / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "corpus"


def test_the_report_holds_what_the_stages_found(exported):
    report = json.loads((exported / "report.json").read_text())
    assert report["title"] == "kws12"
    for name in ("comparison", "coverage", "streaming"):
        assert report[name] == json.loads((exported / f"{name}.json").read_text())
    assert report["search"] is None
    assert report["audit"]["clips"] == 444
    assert any(f["check"] == "scales" for f in report["audit"]["findings"])
    assert len(report["sensitivity"]["layers"]) == 7
    assert {row["artefact"] for row in report["latency"]} == {
        FLOAT,
        INT8,
        "model.int8.chunk.onnx",
    }
    assert all(len(row["quantiles_ms"]) == 101 for row in report["latency"])
    files = {file["name"]: file for file in report["files"]}
    assert files[INT8]["bytes"] == (exported / INT8).stat().st_size
    assert {"cnngru-edge", "python", "onnxruntime", "platform", "cpu"} <= report["versions"].keys()
    page = (exported / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "kws12" in page


def test_everything_in_int8_is_the_plan_unless_asked(exported):
    plan = Plan.load(exported / "plan.json")
    assert plan.kept_in_float == frozenset()
    assert "grus.0.weight_hh_l0" in plan.layers


def with_noise_for_speech(corpus):
    rng = np.random.default_rng(0)
    for clip in read_corpus(corpus).of("calib"):
        soundfile.write(clip.path, rng.normal(0, 0.1, 16_000).clip(-1, 1), 16_000)


def test_noise_in_place_of_speech_is_refused(kws12_checkpoint, corpus, tmp_path):
    with_noise_for_speech(corpus)
    with pytest.raises(CorpusError, match=r"corpus: noise: .*most of the calibration is without"):
        pipeline.export(
            kws12_checkpoint,
            read_corpus(corpus),
            tmp_path / "out",
            CalibrateConfig(min_clips=50),
        )
    assert not (tmp_path / "out").exists()


def test_the_same_audio_in_calibration_and_evaluation_is_refused(kws12_checkpoint, corpus, refused):
    clips = read_corpus(corpus)
    shutil.copyfile(clips.of("calib")[0].path, clips.of("eval")[0].path)
    args = ("export", kws12_checkpoint, "--data", corpus, "--out", corpus.parent / "out")
    said = refused(*args, "--min-clips", 50)
    assert said.startswith(f"{corpus}: duplicates: 1 times the same audio in calibration and eval")
    assert said.endswith("'cnngru-edge audit' names the clips, --force goes on all the same")


def test_forced_within_a_budget_and_by_a_plan(kws12_checkpoint, corpus, cli, tmp_path):
    """Noise calibrates, one range is wrong, and the search finds what to keep in float."""
    with_noise_for_speech(corpus)
    out = tmp_path / "searched"
    args = ("export", kws12_checkpoint, "--data", corpus, "--min-clips", 50)
    searched = cli(*args, "--force", "--max-drop", 40, "--out", out)
    assert searched.exit_code == 0, searched.stderr
    plan = Plan.load(out / "plan.json")
    assert plan.log[0].kept_in_float == ()
    assert json.loads((out / "report.json").read_text())["search"]["max_drop"] == 40
    assert "error: noise: " in searched.stdout  # forced, and said all the same
    # By hand, and with what it says.
    Plan(plan.layers, frozenset({"convs.0.conv"})).save(tmp_path / "mine.json")
    again = tmp_path / "planned"
    planned = cli(
        *args, "--force", "--plan", tmp_path / "mine.json", "--out", again, "--min-coverage", 1
    )
    assert planned.exit_code == 0, planned.stderr
    assert Plan.load(again / "plan.json").kept_in_float == {"convs.0.conv"}
    assert "kept in float: convs.0.conv" in planned.stdout
    receipts = json.loads((again / "coverage.json").read_text())
    for name, receipt in receipts.items():
        found = {layer["name"]: layer["precision"] for layer in receipt["layers"]}
        assert found.pop("convs.0.conv") != "int8", name
        assert set(found.values()) == {"int8"}, name


def test_a_plan_and_a_budget_are_one_too_many(cli, kws12_checkpoint, tmp_path):
    args = ("export", kws12_checkpoint, "--out", tmp_path / "out", "--plan", tmp_path / "p.json")
    done = cli(*args, "--max-drop", 1)
    assert done.exit_code == 2
    assert "--plan says what is kept in float, --max-drop searches it; give one" in done.stderr


def test_a_phrase_in_both_sets_is_refused(tmp_path):
    from cnngru_edge.models.nets.checkpoint import PRETRAINED

    rows = [f"turn the light on in room {i},light_on,calib" for i in range(120)]
    rows += [f"play song {i},play_music,eval" for i in range(4)]
    rows.append("turn the light on in room 7,light_on,eval")
    (tmp_path / "manifest.csv").write_text("\n".join(["text,label,set", *rows]))
    corpus = read_corpus(tmp_path)
    with pytest.raises(CorpusError, match="1 of 5 in the set 'eval' are in the calibration too"):
        pipeline.export(
            PRETRAINED / "intent.safetensors", corpus, tmp_path / "out", CalibrateConfig()
        )
    assert not (tmp_path / "out").exists()
