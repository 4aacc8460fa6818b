import io
import json
import os
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
import soxr
from click.testing import CliRunner

from cnngru_edge.export.cli import main
from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import file_blocks, pipe_blocks, read_audio
from cnngru_edge.runtime.live import StreamSession
from cnngru_edge.runtime.stream import clip_logits

RATE = 16_000
START = [sys.executable, "-c", "from cnngru_edge.export.cli import main; main()"]


LABELS = ("yes", "left", "on", "go", "no", "down")


@pytest.fixture(scope="module")
def speech(demo, exported):
    """Clips of commands that the model is sure of, with pauses; the labels, and where each ends."""
    rng, parts, ends, best = np.random.default_rng(0), [], [], {}
    with open_session(exported / "model.fp32.onnx") as session:
        for clip in demo.of("eval"):
            samples = read_audio(clip.path, RATE).samples
            scores = clip_scores(session.spec, clip_logits(session, samples))
            score = scores[session.spec.labels.index(clip.label)]
            if score > best.get(clip.label, (0, None))[0]:
                best[clip.label] = score, samples
    for label in LABELS:
        parts += [np.zeros(rng.integers(8_000, 16_000), np.float32), best[label][1]]
        ends.append(sum(map(len, parts)) / RATE)
    return np.concatenate([*parts, np.zeros(RATE, np.float32)]), list(LABELS), ends


@pytest.fixture
def session(exported):
    with open_session(exported / "model.int8.chunk.onnx") as session:
        yield session


def events_of(session, samples, step, rate=None):
    with StreamSession(session, rate) as stream:
        found = [
            e for i in range(0, len(samples), step) for e in stream.push(samples[i : i + step])
        ]
        return found + stream.flush()


def what(events):
    return [(event.label, round(event.time, 6), round(event.score, 6)) for event in events]


def test_words_are_found_where_they_end(session, speech):
    samples, said, ends = speech
    found = events_of(session, samples, 320)
    assert [event.label for event in found] == said
    for event, end in zip(found, ends, strict=True):
        assert end - 1.0 < event.time < end + 0.3  # a clip has silence behind its word
        assert event.score >= 0.9
        assert event.latency_ms > 0


@pytest.mark.parametrize("step", [100, 319, 4_000, 10**6])
def test_however_the_audio_comes_the_events_are_the_same(session, speech, step):
    samples, _, _ = speech
    assert what(events_of(session, samples, step)) == what(events_of(session, samples, 320))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_rate_is_resampled_as_a_stream(session, speech, rate):
    samples, said, _ = speech
    other = soxr.resample(samples, RATE, rate)
    assert what(events_of(session, other, 997, rate)) == what(
        events_of(session, other, 5_000, rate)
    )
    if rate > RATE:
        assert [event.label for event in events_of(session, other, 997, rate)] == said


def test_a_word_at_the_very_end_is_found_by_the_flush(session, demo):
    clip = next(c for c in demo.of("eval") if c.label == "yes")
    samples = np.concatenate([np.zeros(RATE, np.float32), read_audio(clip.path, RATE).samples])
    energy = np.convolve(samples**2, np.ones(320), "same")
    word_end = int(np.flatnonzero(energy > energy.max() / 300)[-1])
    assert [e.label for e in events_of(session, samples[: word_end + 1600], 320)] == ["yes"]


def test_streams_of_one_session_do_not_disturb_each_other(session, speech):
    samples, _, _ = speech
    expected = what(events_of(session, samples, 1600))
    with StreamSession(session) as one, StreamSession(session) as other:
        found = []
        for i in range(0, len(samples), 1600):
            found += one.push(samples[i : i + 1600])
            other.push(-samples[::-1][i : i + 1600])
        assert what(found + one.flush()) == expected


def test_a_reset_begins_another_stream(session, speech):
    samples, _, _ = speech
    with StreamSession(session) as stream:
        first = stream.push(samples) + stream.flush()
        stream.reset()
        assert what(stream.push(samples) + stream.flush()) == what(first)
        assert stream.pushed_s == pytest.approx(len(samples) / RATE)


def test_samples_that_are_none_are_refused(session):
    with StreamSession(session) as stream:
        stream.push(np.zeros(1600, np.float32))
        with pytest.raises(AudioError, match=r"a sample after 0\.10 s is NaN or infinite"):
            stream.push(np.array([0, np.nan], np.float32))
        with pytest.raises(AudioError, match=r"expected samples of shape \(S,\), got \(1, 2\)"):
            stream.push(np.zeros((1, 2), np.float32))


# Where the audio comes from.


def pcm(samples):
    return (np.clip(samples, -1, 1) * (2**15 - 1)).astype("<i2").tobytes()


def wav_bytes(samples, channels=1, width=2, rate=RATE):
    file = io.BytesIO()
    with wave.open(file, "wb") as w:
        w.setnchannels(channels)
        w.setsampwidth(width)
        w.setframerate(rate)
        w.writeframes(pcm(np.repeat(samples, channels)) if width == 2 else bytes(len(samples)))
    return file.getvalue()


def from_pipe(data, rate=RATE):
    found, blocks = pipe_blocks(io.BufferedReader(io.BytesIO(data)), rate)
    return found, np.concatenate([np.zeros(0, np.float32), *blocks])


def test_a_pipe_is_raw_or_a_wav(rng):
    samples = rng.uniform(-0.9, 0.9, 100_001).astype(np.float32)
    for data, rate in ((pcm(samples), RATE), (wav_bytes(samples, rate=8_000), 8_000)):
        found, read = from_pipe(data)
        assert found == rate
        np.testing.assert_allclose(read, samples, rtol=0, atol=1e-4)


def test_of_a_pipe_with_channels_the_first_is_used(rng):
    samples = rng.uniform(-0.9, 0.9, 5_001).astype(np.float32)
    np.testing.assert_allclose(
        from_pipe(wav_bytes(samples, channels=2))[1], samples, rtol=0, atol=1e-4
    )


def test_what_is_behind_the_audio_of_a_wav_is_none(rng):
    samples = rng.uniform(-0.9, 0.9, 5_000).astype(np.float32)
    assert len(from_pipe(wav_bytes(samples) + b"LIST\x04\0\0\0abcd")[1]) == 5_000


def test_a_wav_of_a_length_that_nobody_knew_is_read_to_its_end(rng):
    """As arecord writes it, which does not know when it will be stopped."""
    data = bytearray(wav_bytes(rng.uniform(-0.9, 0.9, 5_000)))
    data[40:44] = (0x7FFF_FFFE).to_bytes(4, "little")
    assert len(from_pipe(bytes(data))[1]) == 5_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav_bytes(np.zeros(100), width=1), "a WAV of 8 bits, expected 16"),
        (b"RIFF", "a WAV that cannot be read"),
        (b"RIFF\0\0\0\0AVI LIST", "a WAV that cannot be read"),
    ],
)
def test_a_wav_of_another_kind_is_refused(data, message):
    with pytest.raises(AudioError, match=message):
        from_pipe(data)


def test_a_file_comes_in_blocks(wav, rng):
    samples = rng.uniform(-0.5, 0.5, 40_000).astype(np.float32)
    rate, blocks = file_blocks(wav("a.wav", samples, 8_000, subtype="FLOAT"))
    found = list(blocks)
    assert rate == 8_000
    assert [len(block) for block in found] == [8_000] * 5
    np.testing.assert_array_equal(np.concatenate(found), samples)


def test_a_sample_that_is_none_is_named_where_it_is(wav):
    samples = np.zeros(20_000, np.float32)
    samples[17_000] = np.inf
    _, blocks = file_blocks(wav("a.wav", samples, 8_000, subtype="FLOAT"))
    with pytest.raises(AudioError, match="sample 17000 is inf"):
        list(blocks)


# The command.


def command(exported, *arguments):
    engine = str(exported / "model.int8.chunk.onnx")
    return ["run", "--engine", engine, "--stream", *map(str, arguments)]


def test_the_command_prints_each_word(exported, speech, wav):
    samples, said, _ = speech
    path = wav("long.wav", samples)
    shown = CliRunner().invoke(main, command(exported, path))
    assert shown.exit_code == 0, shown.output
    assert [line.split()[2] for line in shown.stdout.splitlines()] == said
    assert f"of audio, {len(said)} words, real-time factor 0." in shown.stderr
    lines = CliRunner().invoke(main, command(exported, path, "--json")).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["label"] for event in events] == said
    assert all(e.keys() == {"time", "label", "score", "latency_ms"} for e in events)


def test_a_pipe_is_answered_while_it_goes_on_and_ends_cleanly(exported, speech):
    samples, said, ends = speech
    process = subprocess.Popen(
        [*START, *command(exported, "-", "--json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(pcm(samples[: round(ends[0] * RATE) + 3_200]))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["label"] == said[0]  # and it waits for more
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert errors.decode().splitlines()[0] == "stopped"
    assert "1 words" in errors.decode()


def test_an_empty_pipe_has_no_words(exported):
    done = subprocess.run(
        [*START, *command(exported, "-")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert done.stderr == "0.0 s of audio, 0 words, real-time factor 0.0000\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.wav"], 1, "none.wav: no such file"),
        (["a.wav", "b.wav"], 2, "--stream takes one FILE, and --reference only with --shadow"),
        ([os.devnull], 1, "no such file"),
        (["a.wav", "--device", "1"], 2, "--device is for --stream mic"),
    ],
)
def test_wrong_input_is_one_line(exported, arguments, code, message):
    result = CliRunner().invoke(main, command(exported, *arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
