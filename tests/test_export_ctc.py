"""The whole chain on a CTC model, and what each of its parts knows of texts."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY_SPEC, with_head_times

from cnngru_edge.calibration.audit.run import audit
from cnngru_edge.calibration.corpus.read import read_corpus
from cnngru_edge.export.artefacts import FLOAT, INT8
from cnngru_edge.export.verdict.search import percent_right
from cnngru_edge.models.nets.checkpoint import save_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import BLANK
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.check.golden import GOLDEN, read_golden, selftest, write_golden
from cnngru_edge.runtime.check.shadow import Shadow, ShadowConfig
from cnngru_edge.runtime.decode.answer import clip_answer, clip_lead
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.recognize import recognize
from cnngru_edge.runtime.stream import clip_logits

RATE = 16_000


@pytest.fixture
def texts(demo, tmp_path):
    """Demo clips as a corpus whose rows have a text and no label; some are silence."""
    folder = tmp_path / "texts"
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="") as f:
        write = csv.writer(f)
        write.writerow(("path", "set", "text", "speaker"))
        for set_name, count in (("calib", 24), ("eval", 16)):
            clips = demo.of(set_name)
            for i, clip in enumerate(clips[:: len(clips) // count][:count]):
                text = "" if clip.label == "silence" else "a b" if i % 2 else "c"
                write.writerow((clip.path, set_name, text, clip.speaker))
    return folder


@pytest.mark.parametrize("before", ["", " "], ids=["characters", "words"])
def test_a_ctc_model_goes_through_the_whole_chain(cli, tiny_ctc, texts, tmp_path, before):
    checkpoint, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    if before:
        labels = (BLANK, *(f" {word}" for word in "abcd"))
        weights, tiny_ctc = tiny_ctc.state_dict(), CnnGru(replace(tiny_ctc.spec, labels=labels))
        tiny_ctc.load_state_dict(weights)
    tiny_ctc.head.bias.data[0] += 3  # few characters, so that INT8 leaves some texts as they are
    save_checkpoint(tiny_ctc, checkpoint)
    chain = ("export", checkpoint, "--data", texts, "--min-clips", 20, "--out", out)
    done = cli(*chain, "--max-drop", 300)  # of weights by chance much is lost
    assert done.exit_code == 0, done.stderr
    assert "WER of reference " in done.stdout
    report = json.loads((out / "report.json").read_text())
    comparison = report["comparison"]
    assert comparison["error_rates"]
    assert (comparison["by_class"], comparison["confusion"]) == ([], {})
    assert [one["condition"] for one in comparison["error_rates"]["conditions"]] == ["clean"]
    for name, receipt in report["coverage"].items():
        assert receipt["weights_int8"] == 1, name
    assert report["streaming"][INT8]["passed"]
    assert len(report["sensitivity"]["layers"]) == 7
    page = (out / "report.html").read_text()
    assert "Word errors" in page
    assert "WER by speaker" in page
    assert ">Accuracy" not in page  # no heading, no table
    # On a device.
    assert any(clip.label for clip in read_golden(out / GOLDEN).clips)
    for name in (INT8, "model.int8.chunk.onnx", FLOAT):
        tested = cli("selftest", "--engine", out / name)
        assert tested.exit_code == 0, tested.stderr + tested.stdout
    shown = cli("inspect", out / INT8)
    assert f"labels: a blank and {'a, b, c, d' if before else repr(' abc')}\n" in shown.stdout
    assert cli("bench", out / INT8, "--duration", 0.05).exit_code == 0
    hurt = cli("sensitivity", out / FLOAT, out / INT8, "--data", texts, "--clips", 4)
    assert hurt.exit_code == 0, hurt.stderr


def test_only_a_keyword_model_is_tuned(refused, tiny_ctc, texts, tmp_path):
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny_ctc, checkpoint)
    args = ("--engine", "a.onnx", "--data", texts, "--out", tmp_path / "out.safetensors")
    assert refused("tune", checkpoint, *args) == (
        f"{checkpoint}: a ctc model, whose texts end after 1 s of silence; only the events of a "
        "keyword model are tuned"
    )


def test_a_search_counts_words(tiny_ctc):
    said, true = ("a b", "a", "b"), ("a b", "a c", "")
    assert percent_right(tiny_ctc.spec, said, true) == 100 - 100 * 2 / 4  # one out, one in
    assert percent_right(TINY_SPEC, ("yes", "no"), ("yes", "yes")) == 50


# Golden clips.


@pytest.fixture
def golden(tiny_ctc_onnx, demo, tmp_path):
    path = tmp_path / GOLDEN
    write_golden(path, tiny_ctc_onnx, [tiny_ctc_onnx], [clip.path for clip in demo.of("eval")])
    return path


def test_golden_clips_are_of_many_texts_and_the_sure_ones(golden, tiny_ctc_onnx, demo):
    clips = read_golden(golden).clips
    assert len(clips) == len({clip.label for clip in clips}) == 16
    with open_session(tiny_ctc_onnx) as session:
        leads = [clip_lead(session.spec, clip.logits) for clip in clips]
        heard = [read_audio(clip.path, RATE).samples for clip in demo.of("eval")[::3]]
        of_all = [clip_lead(session.spec, clip_logits(session, samples)) for samples in heard]
    assert leads == sorted(leads, reverse=True)
    assert max(leads) == pytest.approx(max(of_all))


def test_a_device_that_writes_other_texts_is_found(golden, tiny_ctc_onnx, tmp_path):
    other = with_head_times(-1, tiny_ctc_onnx, tmp_path / "other.onnx")
    found = selftest(other, golden)
    assert not found.passed
    expected = {clip.name: clip.label for clip in read_golden(golden).clips}
    assert len(found.failures) > 8
    assert all(one.expected == expected[one.clip] != one.found for one in found.failures)
    assert selftest(tiny_ctc_onnx, golden).passed


def test_a_lead_is_what_it_takes_to_write_another_text(tiny_ctc):
    spec = tiny_ctc.spec
    # Of a, blank, a a: only the second frame keeps the two apart.
    powers = np.array([[1, 1, 96, 1, 1], [60, 1, 37, 1, 1], [4, 2, 90, 2, 2], [40, 1, 57, 1, 1]])
    logits = np.log(powers / 100)
    assert clip_answer(spec, logits) == "aa"
    assert clip_lead(spec, logits) == pytest.approx(0.60 - 0.37)
    assert clip_lead(spec, logits[[1, 0]]) == pytest.approx(0.96 - 0.01)  # a blank, or a, before a


# The shadow.


def test_a_shadow_counts_frames_and_keeps_what_is_written_differently(
    tiny_ctc_onnx, demo, tmp_path
):
    other = with_head_times(0.99, tiny_ctc_onnx, tmp_path / "other.onnx")
    clips = [clip.path for clip in demo.of("eval")[:40:10]]
    texts, shares = [], []
    with open_session(tiny_ctc_onnx) as exact, open_session(other) as session:
        for path in clips:
            logits = [clip_logits(s, read_audio(path, RATE).samples) for s in (exact, session)]
            texts.append([clip_answer(exact.spec, x) for x in logits])
            shares.append(np.mean(np.equal(*(x.argmax(1) for x in logits))))
        flips = [pair for pair in texts if pair[0] != pair[1]]
        assert flips
        config = ShadowConfig(tiny_ctc_onnx, 1.0, min_sqnr_db=-100, flips=tmp_path / "flips")
        with Shadow(session.spec, config) as shadow:
            for path in clips:
                recognize(session, path, shadow=shadow)
    summary = shadow.summary
    assert (summary.checked, summary.missed, summary.flips) == (len(clips), 0, len(flips))
    assert summary.agreement == pytest.approx(np.mean(shares))
    assert 0.5 < summary.agreement < 1
    named = {path.stem.partition("_float-")[2] for path in config.flips.glob("*.wav")}
    first, second = (text.replace(" ", "-")[-80:] for text in flips[0])
    assert f"{first}_here-{second}" in named


# The audit.


def test_texts_are_what_is_said(texts):
    found = audit(read_corpus(texts), least=10)
    (line,) = (finding.text for finding in found.findings if finding.check == "texts")
    said = [clip.text for clip in read_corpus(texts).clips if clip.text]
    assert line == f"{len(said)} of up to 2 words, of 3 different ones"
    assert not any(finding.check == "labels" for finding in found.findings)
    assert not found.refused


def test_the_same_audio_with_two_texts_is_an_error(demo, manifest):
    clip, other = demo.of("calib")[:2]
    rows = [(clip.path, "calib", "go"), (clip.path, "calib", "no"), (other.path, "calib", "no")]
    found = audit(read_corpus(manifest(("path", "set", "text"), *rows)), least=1)
    (error,) = (finding for finding in found.findings if finding.severity == "error")
    assert error.text.startswith("1 times the same audio with two texts, as ")
    assert error.advice == "keep the text that is right"
