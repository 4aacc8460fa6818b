"""A microphone by a stand-in for sounddevice: no sound card is needed, and none is proven."""

import json
import sys
import time
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cnngru_edge.export.cli import main
from cnngru_edge.models.errors import AudioError, BackendMissing
from cnngru_edge.runtime import live
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.inputs.microphone import BUFFER_S, RingBuffer, devices, microphone

RATE = 16_000


class PortAudioError(Exception):
    pass


class Card:
    """sounddevice with one device, which records `samples` as fast as it can and is unplugged."""

    PortAudioError = PortAudioError

    def __init__(self, samples, rates=(RATE, 48_000)):
        self.samples, self.rates = samples, rates
        self.opened = None

    def check_input_settings(self, device, *, channels, samplerate):
        if device not in {None, 0, "USB"}:
            raise ValueError(f"No input device matching {device!r}")
        if samplerate not in self.rates:
            raise PortAudioError("Invalid sample rate")

    def query_devices(self, device=None, kind=None):
        if kind is None:
            return "> 0 USB microphone, ALSA (1 in, 0 out)"
        return {"default_samplerate": float(self.rates[-1])}

    def InputStream(self, **settings):
        self.opened = SimpleNamespace(**settings)
        return self

    def __enter__(self):
        Thread(target=self.record).start()
        return self

    def __exit__(self, *error):
        pass

    def record(self):
        size, block = self.opened.blocksize, np.empty((self.opened.blocksize, 1), np.float32)
        for start in range(0, len(self.samples) - size + 1, size):
            block[:, 0] = self.samples[start : start + size]
            self.opened.callback(block, size, None, None)  # the same memory each time
            time.sleep(0.0005)
        self.opened.finished_callback()


@pytest.fixture
def card(monkeypatch):
    def plug(samples, **options):
        made = Card(samples, **options)
        monkeypatch.setitem(sys.modules, "sounddevice", made)
        return made

    return plug


def test_a_buffer_gives_what_came_and_ends():
    buffer = RingBuffer(100)
    for value in range(3):
        buffer.put(np.full(10, value, np.float32))
    blocks = buffer.blocks()
    np.testing.assert_array_equal(next(blocks), np.repeat(np.float32([0, 1, 2]), 10))
    buffer.put(np.ones(5, np.float32))
    buffer.close()
    assert len(next(blocks)) == 5
    assert list(blocks) == []
    assert buffer.dropped == 0


def test_a_full_buffer_drops_the_oldest_and_counts():
    buffer = RingBuffer(25)
    for value in range(5):
        buffer.put(np.full(10, value, np.float32))
    buffer.close()
    assert list(np.concatenate(list(buffer.blocks()))) == [3] * 10 + [4] * 10
    assert buffer.dropped == 30


def test_a_listener_waits_for_what_comes():
    buffer = RingBuffer(100)
    Thread(
        target=lambda: (time.sleep(0.05), buffer.put(np.ones(3, np.float32)), buffer.close())
    ).start()
    assert [len(block) for block in buffer.blocks()] == [3]


def test_a_microphone_records_at_the_rate_that_is_asked(card, rng):
    samples = rng.standard_normal(RATE).astype(np.float32)
    made = card(samples)
    with microphone("USB", RATE) as (rate, buffer, blocks):
        heard = np.concatenate(list(blocks))
    assert (rate, buffer.dropped, made.opened.device) == (RATE, 0, "USB")
    np.testing.assert_array_equal(heard, samples)


def test_one_that_cannot_records_at_its_own_rate(card):
    made = card(np.zeros(48_000, np.float32), rates=(48_000,))
    with microphone(None, RATE) as (rate, _, blocks):
        assert rate == made.opened.samplerate == 48_000
        list(blocks)


def test_a_device_that_is_not_there_is_named(card):
    card(np.zeros(1))
    with (
        pytest.raises(AudioError, match=r"microphone: No input device matching 'x'; .*--list-dev"),
        microphone("x", RATE),
    ):
        pass


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(BackendMissing, match=r"cnngru-edge\[mic\]'.*libportaudio2"):
        devices()


def test_the_devices_are_listed_without_an_engine(card):
    card(np.zeros(1))
    result = CliRunner().invoke(main, ["run", "--list-devices"])
    assert (result.exit_code, result.stdout) == (0, "> 0 USB microphone, ALSA (1 in, 0 out)\n")


def run(exported, *arguments):
    engine = str(exported / "model.int8.chunk.onnx")
    return CliRunner().invoke(main, ["run", "--engine", engine, "--stream", "mic", *arguments])


def test_words_of_a_microphone_until_it_is_unplugged(exported, demo, card):
    clip = next(c for c in demo.of("eval") if c.label == "yes")
    samples = np.concatenate([np.zeros(RATE), read_audio(clip.path, RATE).samples, np.zeros(RATE)])
    card(samples.astype(np.float32))
    result = run(exported, "--json")
    assert result.exit_code == 0, result.output
    (event,) = map(json.loads, result.stdout.splitlines())
    assert event["label"] == "yes"
    assert 1.2 < event["time"] < 2.3
    assert "1 words" in result.stderr
    assert "dropped" not in result.stderr


def test_one_that_is_too_slow_says_so_once_and_drops(exported, card, monkeypatch):
    card(np.zeros(12 * RATE, np.float32))
    push = live.StreamSession.push

    def slow(self, samples):
        found = push(self, samples)
        self.compute_s += 2 * len(samples) / RATE
        time.sleep(0.15)
        return found

    monkeypatch.setattr(live.StreamSession, "push", slow)
    result = run(exported)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: slower than real time by a factor of 2.") == 1
    assert " s dropped, 0 words" in result.stderr
    heard, dropped = (
        float(part.split()[0]) for part in result.stderr.splitlines()[-1].split(", ")[:2]
    )
    assert heard + dropped == pytest.approx(12, abs=0.1)
    assert dropped > 12 - BUFFER_S * 6


def test_times_are_right_after_a_loss(exported, demo):
    clip = next(c for c in demo.of("eval") if c.label == "yes")
    samples = np.concatenate([np.zeros(RATE), read_audio(clip.path, RATE).samples, np.zeros(RATE)])
    samples = samples.astype(np.float32)
    with live.StreamSession(exported / "model.int8.chunk.onnx") as stream:
        (expected,) = stream.push(samples)
        stream.reset()
        stream.lose(3.0)
        (found,) = stream.push(samples)
    assert found.time == pytest.approx(expected.time + 3)
