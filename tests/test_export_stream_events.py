import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import with_head_times

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.verdict.long_streams import (
    LongStream,
    Score,
    Word,
    find_words,
    poisson_interval,
    stream_logits,
    word_streams,
)
from cnngru_edge.export.verdict.stream_events import Events
from cnngru_edge.export.verdict.streaming import (
    StreamingConfig,
    compare_sessions,
    compare_streaming,
    streaming_json,
)
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.events import Detection, Detector
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import TensorInfo
from cnngru_edge.runtime.stream import Stream, flushed

RATE = 16_000
ONCE = StreamingConfig(chunks_ms=(20,), offsets_ms=(0,))
FLOAT, INT8 = "model.fp32.onnx", "model.int8.onnx"
SPEC = ModelSpec(("silence", "unknown", "yes", "no"))


@pytest.fixture
def few(demo):
    return demo.of("eval")[::8]


@pytest.fixture
def deaf(exported, tmp_path):
    """The float model with a head that answers the same whatever it hears."""
    return with_head_times(0, exported / FLOAT, tmp_path / "deaf.onnx")


def events(reference, candidate, clips, **options):
    comparison, _ = compare_streaming(reference, candidate, clips, ONCE, **options)
    return comparison.events


# The statistics


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(0, 0, 3.6889), (1, 0.0253, 5.5716), (5, 1.6235, 11.6683), (100, 81.3640, 121.6268)],
)
def test_the_interval_of_a_count_is_the_exact_one(count, low, high):
    assert poisson_interval(count) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_a_large_count_is_nearly_a_normal_one():
    assert poisson_interval(10_000) == pytest.approx((9805, 10198), abs=2)


def test_a_score_has_intervals():
    score = Score(words=200, misses=40, false_accepts=5, seconds=1800)
    assert score.false_accepts_interval == pytest.approx((3.2470, 23.3366), abs=1e-3)
    assert score.false_rejects_interval == pytest.approx((0.1505, 0.2609), abs=1e-4)


def test_events_in_words():
    reference = Score(words=200, misses=40, false_accepts=5, seconds=1800)
    candidate = Score(words=200, misses=41, false_accepts=0, seconds=1800)
    assert str(Events(reference, candidate, ("a", "b"), ("c",))) == (
        "200 words in 0.50 h of streams: reference 10.0 false accepts/h (3.2-23.3), 20.0% false "
        "rejects (15.0-26.1); candidate 0.0 false accepts/h (0.0-7.4), 20.5% false rejects "
        "(15.5-26.6) (95 %); found by one only: 2 by the reference, 1 by the candidate"
    )


# Which words are found


def test_each_word_has_a_detection_of_its_own_or_none():
    said = [("yes", 2.0), ("no", 4.0), ("yes", 4.5), ("unknown", 6.0), ("yes", 8.0)]
    words = tuple(Word(label, end_s, i, (0, 0)) for i, (label, end_s) in enumerate(said))
    stream = LongStream(np.zeros(10 * RATE, np.float32), words)
    heard = [(2.1, "yes"), (4.1, "yes"), (4.2, "yes"), (6.0, "no"), (8.9, "yes")]
    found = find_words([Detection(time, label, 1.0) for time, label in heard], stream, SPEC)
    assert {word.clip: is_found for word, is_found in found} == {
        0: True,
        1: False,
        2: True,
        4: False,
    }


def directly(path, stream):
    """Detections of a stream, heard chunk by chunk."""
    with open_session(path) as session, Stream(session) as one:
        audio = flushed(session.spec, stream.audio).reshape(-1, 1, session.spec.chunk_length)
        detector = Detector(session.spec)
        return [found for chunk in audio for found in detector.push(one.push(chunk)[0])]


def test_the_events_are_those_of_a_direct_computation(exported, few):
    rng = np.random.default_rng(0)  # as in the comparison: the order, then the streams
    clips = [few[i] for i in rng.permutation(len(few))]
    samples = [read_audio(clip.path, RATE).samples for clip in clips]
    labels = [clip.label for clip in clips]
    streams = word_streams(samples, labels, [], sample_rate=RATE, seconds=0, rng=rng)
    found = events(exported / FLOAT, exported / INT8, few)
    alone = {FLOAT: set(), INT8: set()}
    for name, measured in ((FLOAT, found.reference), (INT8, found.candidate)):
        words = detections = 0
        for stream in streams:
            heard = directly(exported / name, stream)
            detections += len(heard)
            for word in stream.words:
                if word.label not in {"silence", "unknown"}:
                    words += 1
                    near = [d for d in heard if -0.5 <= d.time - word.end_s <= 0.8]
                    if any(d.label == word.label for d in near):
                        alone[name].add(str(clips[word.clip].path))
        hits = len(alone[name])
        assert measured.words == words == 25
        assert measured.misses == words - hits
        assert measured.false_accepts == detections - hits
        assert measured.seconds == sum(len(stream.audio) for stream in streams) / RATE
        assert 15 < hits < 25
    assert set(found.reference_only) == alone[FLOAT] - alone[INT8]
    assert set(found.candidate_only) == alone[INT8] - alone[FLOAT]


def test_the_same_clips_make_the_same_events(exported, few):
    paths = (exported / FLOAT, exported / INT8)
    assert events(*paths, few) == events(*paths, few)


def test_words_that_one_model_alone_finds_are_named(exported, few, deaf):
    comparison, _ = compare_streaming(exported / FLOAT, deaf, few, ONCE)
    found = comparison.events
    assert (found.candidate.misses, found.candidate.false_accepts) == (found.candidate.words, 0)
    assert found.candidate_only == ()
    assert len(found.reference_only) == found.reference.words - found.reference.misses > 15
    assert set(found.reference_only) < {str(clip.path) for clip in few if clip.label != "unknown"}
    turned = events(deaf, exported / FLOAT, few)
    assert (turned.reference_only, turned.candidate_only) == ((), found.reference_only)


def test_events_that_only_the_candidate_misses_are_a_loss(exported, few, deaf):
    comparison, _ = compare_streaming(exported / FLOAT, deaf, few, ONCE)
    missed = comparison.events.reference.false_rejects
    assert comparison.losses[-1] == (
        f"candidate events: 100.00% of 25 words missed, by the reference {missed:.2%}; allowed are "
        "0.5 points more"
    )
    only_events = replace(comparison, rows=())
    assert (only_events.verdict, only_events.passed) == ("worse", False)
    assert replace(only_events, max_drop=100).passed


def test_events_that_both_miss_are_no_loss(few, deaf):
    comparison, _ = compare_streaming(deaf, deaf, few, ONCE)
    assert comparison.events.candidate.false_rejects == 1
    assert (comparison.losses, comparison.passed) == ((), True)


def test_noises_lie_under_the_words(exported, few, wav, rng, tmp_path):
    hiss = wav("hiss.wav", 0.1 * rng.standard_normal(5 * RATE))
    noises = [Clip(path, "silence", "eval", "") for path in (hiss, tmp_path / "none.wav")]
    paths = (exported / FLOAT, exported / INT8)
    comparison, errors = compare_streaming(*paths, few, ONCE, noises=noises)
    assert [str(e) for e in errors] == [f"{tmp_path / 'none.wav'}: no such file"]
    assert comparison.events.reference.misses > events(*paths, few).reference.misses


def test_clips_without_words_have_no_events(exported, demo):
    clips = [clip for clip in demo.of("eval") if clip.label in {"unknown", "silence"}][::10]
    comparison, _ = compare_streaming(exported / FLOAT, exported / INT8, clips, ONCE)
    assert comparison.clips == len(clips) == 4
    assert comparison.events is None
    assert json.loads(streaming_json(comparison))["events"] is None


def test_events_can_be_left_out(exported, few):
    short = replace(ONCE, events=False)
    missing = Clip(exported / "none.wav", "silence", "eval", "")
    comparison, errors = compare_streaming(
        exported / FLOAT, exported / INT8, few[:4], short, noises=[missing]
    )
    assert (comparison.events, errors) == (None, [])


class OfThree:
    """A session for three streams at a time."""

    def __init__(self, session):
        self._session = session
        audio, *states = session.inputs
        self.inputs = (TensorInfo(audio.name, audio.dtype, (3, audio.shape[1])), *states)
        self.max_batch = 3

    def __getattr__(self, name):
        return getattr(self._session, name)


def test_a_session_of_several_streams_hears_the_same(exported, few, rng):
    audio = rng.standard_normal(RATE).astype(np.float32) / 10
    with open_session(exported / FLOAT) as session:
        (alone,) = stream_logits(session, [LongStream(audio)])
        (together,) = stream_logits(OfThree(session), [LongStream(audio)])
        assert together.shape == alone.shape == (53, 12)
        assert np.allclose(together, alone, atol=1e-4)
        comparison, _ = compare_sessions(session, OfThree(session), few, ONCE)
    assert comparison.events.reference == comparison.events.candidate


def test_each_stream_is_heard_from_its_beginning(exported, rng):
    long = LongStream(rng.standard_normal(RATE).astype(np.float32) / 10)
    with open_session(exported / FLOAT) as session:
        first, second = stream_logits(session, [long, long])
    assert (first == second).all()


def test_json_has_what_follows_from_the_events(exported, few):
    comparison, _ = compare_streaming(exported / FLOAT, exported / INT8, few, ONCE)
    found = json.loads(streaming_json(comparison))["events"]
    score = comparison.events.reference
    assert found["reference"] == {
        "words": 25,
        "misses": score.misses,
        "false_accepts": score.false_accepts,
        "seconds": score.seconds,
        "hours": score.hours,
        "false_accepts_per_hour": score.false_accepts_per_hour,
        "false_accepts_interval": list(score.false_accepts_interval),
        "false_rejects": score.false_rejects,
        "false_rejects_interval": list(score.false_rejects_interval),
    }
    assert set(found) == {"reference", "candidate", "reference_only", "candidate_only"}
