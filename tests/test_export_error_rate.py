import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import with_head_times
from rich.console import Console

from cnngru_edge.calibration.corpus.read import Clip, read_corpus
from cnngru_edge.export.chain.evidence import evidence
from cnngru_edge.export.report.page import write_report
from cnngru_edge.export.report.tables import print_comparison
from cnngru_edge.export.verdict.answers import (
    Answer,
    Answered,
    Artefact,
    Conditions,
    Results,
    answer_clips,
    truth_of,
)
from cnngru_edge.export.verdict.compare import compare_results, comparison_fields
from cnngru_edge.export.verdict.doubt import doubt_about
from cnngru_edge.export.verdict.error_rate import (
    Edit,
    Errors,
    align,
    bootstrap_interval,
    clips_needed,
    compare_rates,
    rate_verdict,
)
from cnngru_edge.export.verdict.flips import save_flips
from cnngru_edge.export.verdict.logit_error import FloatAnswers
from cnngru_edge.export.verdict.streaming import StreamingConfig, compare_streaming
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import BackendMissing, CorpusError, SessionError
from cnngru_edge.models.spec.stream import ALPHABET, CTC
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import Recording, read_audio
from cnngru_edge.runtime.recognize import recognize

RATE = 16_000


def results(*rows, name="a.onnx", conditions=("clean",)):
    """Of clips, each as (true, said in each condition...)."""
    clips = tuple(
        Answered(
            f"{i}.flac", f"hash {i}", true, f"speaker {i % 2}", tuple(Answer(t, 0.5) for t in said)
        )
        for i, (true, *said) in enumerate(rows)
    )
    artefact = Artefact(name, "sha256", "fp32", "onnxruntime", "cpu")
    return Results(artefact, ALPHABET, RATE, conditions, Conditions().sha256, clips, CTC)


def test_a_text_is_aligned_with_the_truth():
    (found,) = align(["go left and stop now"], ["so left stop now please"])
    assert found.edits == (
        Edit("substitution", "go", "so"),
        Edit("deletion", "and", ""),
        Edit("insertion", "", "please"),
    )
    assert [str(edit) for edit in found.edits] == ["go>so", "-and", "+please"]
    assert found.words == Errors(5, 1, 1, 1)
    assert found.words.rate == 0.6
    assert found.characters == Errors(20, 1, 4, 7)


def test_silence_is_a_text_too():
    nothing, invented, missed = align(["", "", "go left"], ["", "go", ""])
    assert nothing.words == Errors(0, 0, 0, 0)
    assert nothing.words.rate == 0
    assert invented.words == Errors(0, 0, 0, 1)
    assert missed.words == Errors(2, 0, 2, 0)
    assert (missed.words.rate, missed.characters.rate) == (1, 1)


def test_rates_are_over_all_words_not_over_clips():
    true = ["a b c d", "e"]
    found = compare_rates(align(true, ["a b c d", "e"]), align(true, ["a b c x", "y z"]))
    assert (found.reference_wer, found.candidate_wer) == (0, 0.6)
    assert found.delta == pytest.approx(60)
    assert found.candidate_words == Errors(5, 2, 0, 1)
    assert found.candidate_cer == pytest.approx(4 / 8)
    assert found.delta_ci[0] < found.delta < found.delta_ci[1]


def test_the_interval_holds_the_true_difference_as_often_as_it_says(rng):
    """Of clips of 1 to 6 words, in 5 % of which the candidate has one more wrong, in 3 % less."""
    inside = 0
    for _ in range(200):
        lengths = rng.integers(1, 7, 300)
        errors = rng.choice([1, -1, 0], 300, p=[0.05, 0.03, 0.92])
        low, high = bootstrap_interval(errors, lengths)
        inside += low <= 0.02 / 3.5 <= high
    assert 0.91 <= inside / 200 <= 0.99


@pytest.mark.parametrize("clips", [1, 5, 40, 1000])
def test_clips_that_do_not_differ_leave_what_they_leave(clips):
    """About the rule of three: 3 of N clips could yet differ."""
    low, high = bootstrap_interval(np.zeros(clips, int), np.full(clips, 2))
    assert 1.5 / (2 * (clips + 2)) < high < 4.5 / (2 * (clips + 2))
    assert low == pytest.approx(-high, abs=1.1 / (2 * (clips + 2)))


def test_the_same_clips_have_the_same_interval(rng):
    errors, lengths = rng.integers(-1, 2, 50), rng.integers(1, 5, 50)
    assert bootstrap_interval(errors, lengths) == bootstrap_interval(errors, lengths)
    narrow, wide = (bootstrap_interval(errors, lengths, c) for c in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.4, 0.4), "equal"),
        ((0.1, 0.4), "equal"),
        ((0.6, 0.9), "worse"),
        ((0.1, 0.6), "not enough data"),
        ((-0.6, -0.1), "better"),
        ((-0.1, 0.6), "not enough data"),
        ((-0.6, 0.1), "not enough data"),
    ],
)
def test_more_errors_are_worse(interval, verdict):
    assert rate_verdict(interval, 0.5) == verdict


def repeated(share_worse, share_better, clips):
    worse, better = round(share_worse * clips), round(share_better * clips)
    true = ["a b c"] * clips
    reference = ["a b x"] * better + ["a b c"] * (clips - better)
    candidate = ["a b c"] * (clips - worse) + ["a b x"] * worse
    return compare_rates(align(true, reference), align(true, candidate))


@pytest.mark.parametrize(("worse", "better"), [(0.02, 0.02), (0.04, 0.01)])
def test_as_many_clips_as_are_needed_are_enough(worse, better):
    few = repeated(worse, better, 200)
    assert rate_verdict(few.delta_ci, 0.5) == "not enough data"
    needed = clips_needed(few, 0.5)
    assert rate_verdict(repeated(worse, better, int(1.2 * needed)).delta_ci, 0.5) != (
        "not enough data"
    )
    assert rate_verdict(repeated(worse, better, int(0.6 * needed)).delta_ci, 0.5) == (
        "not enough data"
    )
    assert clips_needed(repeated(worse, better, int(1.2 * needed)), 0.5) is None


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(BackendMissing, match="jiwer is not installed: pip install jiwer; or keep"):
        align(["a"], ["a"])


# Two models.


def test_texts_are_right_if_all_of_them_is_and_the_verdict_is_by_words():
    reference = results(("go left", "go left"), ("stop", "stop"), ("no", "on"))
    candidate = results(("go left", "go right"), ("stop", "stop"), ("no", "no"), name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    assert (found.clean.reference_accuracy, found.clean.candidate_accuracy) == (2 / 3, 2 / 3)
    assert found.clean.agreement == 1 / 3
    assert [(f.true, f.reference, f.candidate) for f in found.flips] == [
        ("go left", "go left", "go right"),
        ("no", "on", "no"),
    ]
    (rates,) = found.error_rates.conditions
    assert (rates.rates.reference_wer, rates.rates.candidate_wer) == (0.25, 0.25)
    assert [(f.path, f.reference, f.candidate) for f in found.error_rates.flips] == [
        ("0.flac", (), (Edit("substitution", "left", "right"),)),
        ("2.flac", (Edit("substitution", "no", "on"),), ()),
    ]
    assert [(s.speaker, s.rates.clips) for s in found.error_rates.by_speaker] == [
        ("speaker 0", 2),
        ("speaker 1", 1),
    ]
    assert (found.by_class, found.confusion) == ((), {})
    assert found.verdict == rates.verdict == found.clean.verdict == "not enough data"
    assert found.clips_needed == rates.clips_needed > 3
    assert "WER of reference 25.00%, candidate 25.00%, +0.00 (" in found.summary
    assert "points of WER (95 %), agreement 33.33%: not enough data for a" in found.summary


def test_results_in_words_are_read_again(tmp_path):
    words = replace(results(("go left", "left go")), labels=("<blank>", " go", " left"))
    words.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == words
    replace(words, labels=("<blank>", " go")).save(tmp_path / "other.json")
    with pytest.raises(SessionError, match="not a results file"):
        Results.load(tmp_path / "other.json")


def test_a_model_that_writes_no_word_right_is_doubted():
    wrong = results(("go left", "stop now"), ("up", "down"))
    doubt = doubt_about(compare_results(wrong, wrong, margin=1))
    assert doubt.startswith(
        "the float model has a WER of 100% here, and to write nothing 100%; are"
    )
    some = results(("go left", "go now"), ("up", "down"))
    assert doubt_about(compare_results(some, some, margin=1)) is None


def test_more_wrong_words_are_worse_though_as_many_texts_are_right():
    """A text with one wrong word is as wrong as one without a right one."""
    true = "one two three four"
    reference = results(*[(true, "one two three five")] * 200, *[(true, true)] * 200)
    candidate = results(*[(true, "five")] * 200, *[(true, true)] * 200, name="b.onnx")
    found = compare_results(reference, candidate, margin=5)
    assert found.clean.delta == 0
    assert found.verdict == "worse"
    assert not found.passed
    assert compare_results(candidate, reference, margin=5).verdict == "better"
    assert compare_results(reference, reference, margin=5).verdict == "equal"
    assert found.change.startswith("+37.50 (+")


def test_the_gravest_condition_decides():
    heard = ("clean", "0 dB")
    reference = results(*[("go", "go", "go")] * 800, conditions=heard)
    candidate = results(*[("go", "go", "")] * 800, conditions=heard, name="b.onnx")
    found = compare_results(reference, candidate, margin=1)
    assert [c.verdict for c in found.error_rates.conditions] == ["equal", "worse"]
    assert {c.rates.confidence for c in found.error_rates.conditions} == {0.975}
    assert found.verdict == "worse"
    assert {f.condition for f in found.error_rates.flips} == {"0 dB"}


def test_json_and_table_and_report_have_the_rates(tmp_path):
    reference = results(("go left", "go left"), ("stop", "stop"))
    candidate = results(("go left", "go"), ("stop", "stop"), name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    fields = json.loads(json.dumps(comparison_fields(found)))
    clean = fields["error_rates"]["conditions"][0]
    assert clean["rates"]["candidate_wer"] == pytest.approx(1 / 3)
    assert clean["rates"]["candidate_words"] == {
        "length": 3,
        "substitutions": 0,
        "deletions": 1,
        "insertions": 0,
    }
    edits = fields["error_rates"]["flips"][0]["candidate"]
    assert edits == [{"kind": "deletion", "true": "left", "said": ""}]
    with (tmp_path / "shown").open("w") as f:
        print_comparison(found, Console(file=f, width=200))
    shown = (tmp_path / "shown").read_text()
    assert "candidate: 0 of 3 words replaced, 1 left out, 0 put in" in shown
    assert "points of WER lost by speaker: speaker 0 +50.0 (2 words)" in shown
    assert "│ -left " in shown
    silence = Recording(np.zeros(160, np.float32), RATE, RATE, 1)
    report = evidence("ctc", "compare", {"comparison": comparison_fields(found)})
    write_report(tmp_path, report, lambda path, condition: silence)
    page = (tmp_path / "report.html").read_text()
    assert "33.33%" in page
    assert "points of WER, between" in page
    assert "Confusion" not in page
    assert "WER, all clips" in page
    assert "WER by speaker" in page
    assert 'class="dot lost"' in page  # more errors than the margin allows
    assert "1 answer of float and" in page or "1 answer of the reference and" in page
    assert "with more errors" in page
    assert "<bdi>all right</bdi>" in page
    assert "<bdi>-left</bdi>" in page


def test_fewer_errors_are_no_loss_in_the_plots(tmp_path):
    reference = results(("go left", "go"), ("stop", "stop"))
    candidate = results(("go left", "go left"), ("stop", "stop"), name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    report = evidence("ctc", "compare", {"comparison": comparison_fields(found)})
    silence = Recording(np.zeros(160, np.float32), RATE, RATE, 1)
    write_report(tmp_path, report, lambda path, condition: silence)
    page = (tmp_path / "report.html").read_text()
    assert 'class="dot lost"' not in page
    assert "with fewer errors" in page


def test_the_names_of_saved_texts_are_short(wav, rng, tmp_path):
    path = wav("corpus/a.wav", rng.normal(0, 0.1, 800))
    text = "one two three four five " * 20
    said = results((text, text))
    said = replace(said, clips=(replace(said.clips[0], path="a.wav", sha256=file_sha256(path)),))
    other = replace(said.clips[0], answers=(Answer(text[4:], 0.5),))
    comparison = compare_results(said, replace(said, clips=(other,)), margin=1)
    save_flips(comparison, path.parent, tmp_path / "flips")
    (name,) = (file.name for file in (tmp_path / "flips").iterdir())
    assert name.startswith("001_clean_one-two-three-four")
    assert len(name) < 120


# Artefacts.


@pytest.fixture
def spoken(tiny_ctc_onnx, wav, manifest, rng):
    """A corpus whose texts are what the model writes, but for one of them."""
    rows = [("path", "set", "text", "speaker")]
    with open_session(tiny_ctc_onnx) as session:
        for i in range(4):
            loud = np.repeat(rng.uniform(0, 1, 20) ** 4, RATE // 20)
            path = wav(f"data/{i}.wav", 0.3 * loud * rng.standard_normal(RATE), subtype="FLOAT")
            rows.append((path.name, "eval", recognize(session, path).text, f"s{i}"))
    rows[-1] = (*rows[-1][:2], "a b", "s3")
    return manifest(*rows)


def test_results_carry_texts(tiny_ctc_onnx, spoken, tmp_path):
    corpus = read_corpus(spoken)
    with open_session(tiny_ctc_onnx) as session:
        truth = truth_of(corpus.clips, session.spec)
        said = [recognize(session, clip.path) for clip in corpus.clips]
    found, errors = answer_clips(tiny_ctc_onnx, corpus.root, corpus.clips, Conditions())
    assert (found.writes_text, errors) == (True, [])
    assert [clip.true for clip in found.clips] == list(truth.values())
    assert [clip.answers[0].label for clip in found.clips] == [one.text for one in said]
    assert [clip.answers[0].margin for clip in found.clips] == [
        pytest.approx(one.score, abs=1e-6) for one in said
    ]
    found.save(tmp_path / "answers.json")
    assert Results.load(tmp_path / "answers.json") == found
    text = (tmp_path / "answers.json").read_text()
    (tmp_path / "answers.json").write_text(text.replace('"true": "a b"', '"true": "a d"'))
    with pytest.raises(SessionError, match="not a results file"):
        Results.load(tmp_path / "answers.json")


def test_a_text_that_the_model_cannot_write_is_refused(tiny_ctc_onnx, tmp_path):
    clip = Clip(tmp_path / "a.wav", "", "eval", "", "abd")
    with open_session(tiny_ctc_onnx) as session, pytest.raises(CorpusError, match="text 'abd' has"):
        truth_of([clip], session.spec)


def test_the_command_judges_texts(cli, tiny_ctc_onnx, spoken, tmp_path):
    other = with_head_times(0.3, tiny_ctc_onnx, tmp_path / "other.onnx")
    same = cli("compare", tiny_ctc_onnx, tiny_ctc_onnx, "--data", spoken, "--margin", 90, "--json")
    assert same.exit_code == 0, same.stderr
    fields = json.loads(same.stdout)
    assert fields["reference_accuracy"] == fields["candidate_accuracy"] == 0.75
    assert fields["error_rates"]["conditions"][0]["rates"]["delta"] == 0
    done = cli("compare", tiny_ctc_onnx, other, "--data", spoken)
    assert done.exit_code in (1, 3)
    assert "points of WER (95 %)" in done.stdout


def test_streams_are_compared_by_text(tiny_ctc_onnx, spoken, tmp_path):
    clips = read_corpus(spoken).clips
    other = with_head_times(0.3, tiny_ctc_onnx, tmp_path / "other.onnx")
    config = StreamingConfig(chunks_ms=(20,), offsets_ms=(0,))
    found, _ = compare_streaming(tiny_ctc_onnx, tiny_ctc_onnx, clips, config)
    assert found.events is None
    fresh = [row for row in found.rows if row.state == "fresh"]
    assert {(row.accuracy, row.agreement) for row in fresh} == {(0.75, 1)}
    assert found.verdict == "equal"
    found, _ = compare_streaming(tiny_ctc_onnx, other, clips, config)
    assert {row.agreement < 1 for row in found.rows if row.model == "candidate"} == {True}


def test_flips_of_layers_are_texts(tiny_ctc_onnx, spoken, tmp_path):
    clips = [read_audio(clip.path, RATE).samples for clip in read_corpus(spoken).clips]
    exact = FloatAnswers(tiny_ctc_onnx, clips)
    with open_session(tiny_ctc_onnx) as session:
        texts = [recognize(session, clip.path).text for clip in read_corpus(spoken).clips]
    assert list(exact.labels) == texts
    assert exact.error(tiny_ctc_onnx).flips == 0
    assert exact.error(with_head_times(0.3, tiny_ctc_onnx, tmp_path / "b.onnx")).flips == 4
