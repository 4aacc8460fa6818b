import json

import numpy as np
import pytest

from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.backends.onnx import OrtStreams
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.recognize import recognize
from cnngru_edge.runtime.stream import Stream


@pytest.fixture
def session(exported):
    with open_session(exported / "model.int8.onnx") as session:
        yield session


def test_real_commands_are_heard(session, demo):
    clips = demo.of("eval")
    right = sum(recognize(session, clip.path).label == clip.label for clip in clips)
    assert right / len(clips) > 0.85


def test_a_recognition_says_what_ran_where(session, demo):
    fields = json.loads(recognize(session, demo.clips[0].path).to_json())
    assert fields["precision"] == "int8"
    assert fields["backend"].startswith("onnxruntime ")
    assert "CPUExecutionProvider" in fields["device"]
    assert fields["duration_s"] == 1.0
    assert fields["latency_ms"] > 0
    assert list(fields["scores"]) == list(session.spec.labels)
    assert sum(fields["scores"].values()) == pytest.approx(1.0)
    assert fields["score"] == max(fields["scores"].values()) == fields["scores"][fields["label"]]
    assert "agrees" not in fields


def test_a_reference_checks_the_answer(session, exported, demo):
    with open_session(exported / "model.fp32.onnx") as reference:
        found = recognize(session, demo.clips[0].path, reference)
    fields = json.loads(found.to_json())
    assert fields["agrees"] is True
    assert fields["reference_label"] == fields["label"]
    assert 0 < fields["max_abs_error"] < 1


class Negated(OrtStreams):
    def advance(self, audio):
        return -super().advance(audio)


def test_a_reference_that_says_otherwise_is_told(session, demo, monkeypatch, exported):
    with open_session(exported / "model.fp32.onnx") as reference:
        monkeypatch.setattr(
            reference, "streams", lambda batch: Negated(reference, reference._session, batch)
        )
        found = recognize(session, demo.clips[0].path, reference)
    assert not found.check.agrees
    assert f"reference: {found.check.reference_label}" in found.to_line(10)


def test_a_word_in_a_long_recording_is_heard(session, demo, wav):
    clip = next(c for c in demo.of("eval") if c.label == "stop")
    from cnngru_edge.runtime.inputs.audio import read_audio

    word = read_audio(clip.path, 16_000).samples
    noise = np.random.default_rng(0).standard_normal(4 * 16_000).astype(np.float32) * 1e-3
    noise[16_000 : 16_000 + len(word)] += word
    assert recognize(session, wav("long.wav", noise)).label == "stop"


def test_what_was_done_to_a_recording_is_noted(session, wav):
    short = wav("short.wav", np.zeros((100, 2)), 8_000)
    assert recognize(session, short).notes == (
        "resampled from 8000 to 16000 Hz",
        "have 2 channels, of which the first is used",
        "shorter than one chunk of 320 samples, padded with zeros",
    )


def test_a_recording_that_cannot_be_read_is_refused(session, tmp_path):
    with pytest.raises(AudioError, match="no such file"):
        recognize(session, tmp_path / "none.wav")


def test_a_stream_starts_from_zeros(session):
    stream = Stream(session, batch=2)
    assert all(not value.any() for value in stream.state.values())
    assert {value.shape[0] for value in stream.state.values()} == {2}
    stream.push(np.full((2, 320), 0.1, np.float32))
    assert all(value.any() for value in stream.state.values())
