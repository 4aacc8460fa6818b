import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY_SPEC

from cnngru_edge.calibration.corpus.read import DEMO
from cnngru_edge.export.verdict.long_streams import (
    LongStream,
    MixConfig,
    Score,
    Word,
    background_streams,
    detect,
    load,
    matches,
    score,
    speech_end,
    stream_logits,
    word_streams,
)
from cnngru_edge.export.verdict.tune import TuneConfig, choose, crossings, moving_average, tune
from cnngru_edge.models.nets.checkpoint import load_checkpoint
from cnngru_edge.models.spec.stream import METADATA_KEY, DecisionSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.events import Detection, Detector
from cnngru_edge.runtime.decode.label import softmax

RATE = 16_000
SPEC = ModelSpec(("silence", "unknown", "yes", "no"))


def tone(seconds, level=0.5):
    return (level * np.sin(np.arange(round(seconds * RATE)) * 0.3)).astype(np.float32)


def said(*words, seconds=10):
    found = tuple(Word(label, end, 0, (0, 0)) for label, end in words)
    return LongStream(np.zeros(seconds * RATE, np.float32), found)


def heard(*detections):
    return [Detection(time, label, 1.0) for label, time in detections]


def test_speech_ends_with_its_last_loud_frame():
    clip = np.concatenate([tone(0.4), tone(0.2, 0.01), np.zeros(RATE // 5, np.float32)])
    assert speech_end(clip, RATE) == 0.4 * RATE
    assert speech_end(tone(0.31), RATE) == round(0.31 * RATE)  # not past its end
    assert speech_end(np.zeros(RATE, np.float32), RATE) == RATE


@pytest.mark.parametrize(("time", "count"), [(1.49, 0), (1.51, 1), (2.0, 1), (2.79, 1), (2.81, 0)])
def test_a_word_is_found_near_its_end(time, count):
    assert matches([time], [2.0]) == count


def test_a_detection_finds_one_word_and_a_word_has_one_detection():
    assert matches([2.0], [1.8, 2.2]) == 1
    assert matches([1.9, 2.1], [2.0]) == 1
    assert matches([1.9, 2.1, 5.0], [2.0, 2.2, 4.9]) == 3


def test_every_other_detection_is_a_false_accept():
    stream = said(("yes", 2.0), ("no", 4.0), ("unknown", 6.0))
    found = heard(("yes", 2.1), ("yes", 2.5), ("yes", 4.0), ("no", 6.0))
    assert score(found, stream, SPEC) == Score(words=2, misses=1, false_accepts=3, seconds=10)


def test_no_false_accepts_in_some_hours_prove_three_by_the_hours():
    assert Score(seconds=2 * 3600).false_accepts_bound == pytest.approx(3 / 2, rel=2e-3)
    assert Score(false_accepts=4, seconds=3600).false_accepts_per_hour == 4


def test_words_lie_where_a_stream_says(rng):
    clips = [tone(0.5), tone(0.3)]
    config = MixConfig(gain_db=(0, 0), length_s=4)
    streams = word_streams(
        clips, ["yes", "no"], [], sample_rate=RATE, seconds=12, rng=rng, config=config
    )
    assert len(streams) > 1
    assert sum(len(stream.audio) for stream in streams) >= 12 * RATE
    counts = {"yes": 0, "no": 0}
    for stream in streams:
        silent = stream.audio.copy()
        for word in stream.words:
            counts[word.label] += 1
            start, end = word.samples
            assert end - start == len(clips[word.clip])
            assert np.abs(stream.audio[start:end]).max() > 0.4
            assert abs(word.end_s * RATE - end) < 0.02 * RATE
            silent[start:end] = 0
        assert not silent.any()
    assert counts["yes"] == counts["no"] >= 4


def test_words_lie_in_noise_of_the_given_snr(rng):
    noise = rng.standard_normal(RATE).astype(np.float32)
    config = MixConfig(snr_db=(10, 10), gain_db=(0, 0))
    (stream,) = word_streams(
        [tone(1.0, 0.1)], ["yes"], [noise], sample_rate=RATE, seconds=0, rng=rng, config=config
    )
    start, _ = stream.words[0].samples
    power = np.square(stream.audio[RATE // 50 : start - RATE // 50]).mean()
    assert 10 * np.log10(0.1**2 / 2 / power) == pytest.approx(10, abs=0.5)


def test_background_is_a_stream_for_each_recording(rng):
    config = MixConfig(gain_db=(-6, -6))
    (stream,) = background_streams([tone(2)], rng=rng, config=config)
    assert np.allclose(stream.audio, tone(2) * 10 ** (-6 / 20))
    assert stream.words == ()


def test_a_moving_average_and_crossings_are_those_of_the_detector(rng):
    # Random walks between labels; without a refractory time both must give the same detections.
    logits = np.cumsum(rng.standard_normal((3000, 4)), axis=0).astype(np.float32)
    logits -= logits.mean(1, keepdims=True)
    logits = 6 * np.sin(logits / 3)
    for threshold, release, smoothing_s in ((0.8, 0.4, 0.2), (0.6, 0.6, 0.1), (0.9, 0.2, 0.02)):
        decision = DecisionSpec(smoothing_s, threshold, release=release, refractory_s=0)
        spec = replace(SPEC, decision=decision)
        average = moving_average(softmax(logits.astype(np.float64)), round(smoothing_s / 0.02))
        found = []
        for label in spec.words:
            reached = crossings(average, spec.labels.index(label), np.array([threshold]), release)
            found += [(int(f[0]) + 1, label) for f in reached if f[0] >= 0]
        expected = [(round(d.time / 0.02), d.label) for d in Detector(spec).push(logits)]
        assert sorted(found) == sorted(expected)
        assert len(expected) > 5


TABLES = {  # (misses, false accepts) at rising thresholds
    "yes": [(0, 5), (1, 2), (4, 0)],
    "no": [(0, 3), (6, 1), (9, 0)],
}


@pytest.mark.parametrize(
    ("budget", "cost", "chosen"),
    [
        (8, (0, 0), {"yes": 0, "no": 0}),
        (5, (0, 1), {"yes": 1, "no": 0}),
        (3, (0, 4), {"yes": 2, "no": 0}),
        (2, (0, 10), {"yes": 2, "no": 1}),  # as few misses as with 1 and 2, and one less
        (0, (0, 13), {"yes": 2, "no": 2}),
    ],
)
def test_false_accepts_are_spent_where_they_save_most(budget, cost, chosen):
    assert choose(TABLES, budget) == (cost, chosen)


def test_of_equal_thresholds_the_highest_is_taken():
    assert choose({"yes": [(1, 0), (1, 0), (2, 0)]}, 0)[1] == {"yes": 1}


def test_out_of_reach_are_the_fewest_false_accepts():
    assert choose({"yes": [(0, 5), (3, 2), (4, 2)]}, 1) == ((1, 3), {"yes": 1})


def test_tuning_loses_fewer_words_at_no_more_false_accepts(demo, exported):
    engine = exported / "model.int8.onnx"
    with open_session(engine) as session:
        spec = session.spec
    config = TuneConfig(false_accepts_per_hour=60, hours=0.05)
    # A poor decision, so that there is something to gain.
    poor = replace(spec, decision=DecisionSpec(smoothing_s=0.5, threshold=0.97))
    tuned, errors = tune(poor, engine, demo, config=config)
    assert errors == []
    assert tuned.reached
    assert tuned.total.false_accepts <= 60 * tuned.total.hours
    assert tuned.total.words >= 170  # every calibration clip of a word, once at least
    assert tuned.total.hours >= 0.05
    assert tuned.decision.refractory_s == poor.decision.refractory_s

    again, _ = tune(poor, engine, demo, config=config)
    assert again == tuned

    # Other voices gain too.
    scores = {}
    clips = [clip for clip in demo.of("eval") if clip.label not in {"silence", "unknown"}][:60]
    _, samples, _ = load(clips, spec)
    streams = word_streams(
        samples,
        [clip.label for clip in clips],
        [],
        sample_rate=RATE,
        seconds=0,
        rng=np.random.default_rng(3),
    )
    with open_session(engine) as session:
        logits = stream_logits(session, streams)
    for name, decision in (("poor", poor.decision), ("tuned", tuned.decision)):
        decided = replace(spec, decision=decision)
        rows = zip(logits, streams, strict=True)
        scores[name] = sum((score(detect(decided, row), s, decided) for row, s in rows), Score())
    assert scores["tuned"].misses < scores["poor"].misses


def test_the_checkpoint_carries_the_decision_and_the_same_weights(
    cli, kws12_checkpoint, exported, tmp_path
):
    out = tmp_path / "tuned.safetensors"
    done = cli(
        "tune", kws12_checkpoint, "--engine", exported / "model.int8.onnx", "--data", DEMO,
        "--background", DEMO / "unknown", "--hours", "0.02", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    first, second, third, last = done.stdout.splitlines()
    assert re.fullmatch(
        r"[\d.]+ false accepts/h and [\d.]+% false rejects; [\d.]+ h heard, \d+ words to find, "
        r"204 different clips",
        first,
    )
    assert "h of background alone" in second
    assert re.match(r"too short to prove 1/h: 0 in [\d.]+ h can be up to|the target of 1/h", third)
    before, after = load_checkpoint(kws12_checkpoint), load_checkpoint(out)
    assert last == f"{out}: {after.spec.decision.summary}"
    assert after.spec.decision != before.spec.decision
    assert replace(after.spec, decision=before.spec.decision) == before.spec
    weights = before.state_dict()
    assert all((weights[name] == value).all() for name, value in after.state_dict().items())
    assert json.loads(after.spec.to_json())["decision"]["release"] == after.spec.decision.release
    assert METADATA_KEY.encode() in out.read_bytes()


def test_an_artefact_of_another_model_is_refused(refused, tiny_checkpoint, exported, tmp_path):
    engine = exported / "model.int8.onnx"
    message = refused(
        "tune", tiny_checkpoint, "--engine", engine, "--data", DEMO,
        "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert message == (
        f"{engine}: made from another model than the checkpoint, labels, features, convs, "
        "hidden_size, num_layers differ; export the checkpoint"
    )


def test_a_corpus_has_to_have_calibration_clips_of_every_word(
    refused, manifest, wav, kws12_checkpoint, exported, tmp_path
):
    wav("data/yes.wav", tone(1))
    arguments = ("tune", kws12_checkpoint, "--engine", exported / "model.int8.onnx", "--data")
    out = ("--out", tmp_path / "a.safetensors")
    data = manifest(["path", "set", "label"], ["yes.wav", "eval", "yes"])
    assert refused(*arguments, data, *out).startswith(f"{data}: no clips for calibration; ")
    manifest(["path", "set", "label"], ["yes.wav", "calib", "yes"])
    assert refused(*arguments, data, *out) == (
        f"{data}: no calibration clip of no, up, down, left, right, on, off, stop, go"
    )


def test_background_has_to_have_recordings(refused, kws12_checkpoint, exported, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(
        "tune", kws12_checkpoint, "--engine", exported / "model.int8.onnx", "--data",
        DEMO, "--background", empty, "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert message == f"{empty}: no recordings found (WAV, FLAC or Ogg)"


def test_a_tiny_model_that_hears_nothing_says_so(demo, tiny_onnx, tmp_path):
    # Random weights: whatever it answers, what is said about it has to be true.
    spec = TINY_SPEC
    tuned, _ = tune(spec, tiny_onnx, demo, config=TuneConfig(0, hours=0.01))
    assert tuned.total.false_accepts == 0 or "is not reached" in tuned.summary
    assert tuned.total.false_rejects > 0.5
