import math
from functools import partial

import numpy as np
import pytest
import soxr

from cnngru_edge.calibration.audit import soundness
from cnngru_edge.calibration.audit.soundness import (
    CLIPPED,
    NARROW_DB,
    OFFSET_DB,
    STEADY_DB,
    listen,
    spectral_change,
)
from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.inputs.audio import read_audio

RATE = 16_000


def coloured(rng, seconds, rate=RATE, slope=0):
    """Noise whose power falls with frequency**slope: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(int(seconds * rate)))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-slope / 2)
    samples = np.fft.irfft(spectrum)
    return 0.1 * samples / samples.std()


def hum(rng, seconds, rate=RATE):
    t = np.arange(int(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * (50 * k * t + rng.uniform())) / k for k in range(1, 12)]
    return 0.1 * sum(waves)


def integers(rng, seconds, rate=RATE):
    return rng.integers(-(2**15), 2**15, int(seconds * rate)) / 2**15


NOISES = {
    "white": coloured,
    "pink": partial(coloured, slope=1),
    "brown": partial(coloured, slope=2),
    "hum": hum,
    "integers": integers,
}


@pytest.fixture(scope="module")
def speech(demo):
    """A word of each label but silence, loud enough to be worked on: peak 0.9."""
    words = {clip.label: clip for clip in demo.of("calib") if clip.label != "silence"}
    samples = [read_audio(clip.path, RATE).samples for clip in words.values()]
    return [0.9 * s / np.abs(s).max() for s in samples]


@pytest.fixture
def heard(wav):
    def write(samples, rate=RATE, subtype="FLOAT"):
        return listen(wav("a.wav", samples, rate, subtype=subtype))

    return write


def with_noise(rng, samples, snr_db):
    noise = coloured(rng, len(samples) / RATE, slope=1)
    loud = np.sort(samples**2)[-len(samples) // 3 :].mean()
    return samples + noise / noise.std() * math.sqrt(loud / 10 ** (snr_db / 10))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("seconds", [0.3, 1, 20])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_steady(heard, rng, kind, seconds, rate):
    for _ in range(3):
        assert heard(NOISES[kind](rng, seconds, rate), rate, "PCM_16").is_steady


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_steady_when_it_fades(heard, rng, kind):
    assert heard(NOISES[kind](rng, 1) * np.hanning(RATE), subtype="PCM_16").is_steady


@pytest.mark.parametrize("gain", [1, 1e-2, 2**-15])
def test_speech_is_not_steady_at_any_level(heard, speech, gain):
    changes = [heard(gain * samples).change_db for samples in speech]
    assert min(changes) > 2 * STEADY_DB


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_speech_is_not_steady_at_any_rate(heard, speech, rate):
    found = [heard(soxr.resample(samples, RATE, rate), rate) for samples in speech]
    assert not any(sound.is_steady for sound in found)
    assert {sound.sample_rate for sound in found} == {rate}


def test_speech_in_noise_is_not_steady(heard, speech, rng):
    assert not any(heard(with_noise(rng, samples, 5)).is_steady for samples in speech)


def test_a_word_in_a_long_recording_is_found(heard, speech, rng):
    around = 1e-3 * rng.standard_normal(20 * RATE)
    for samples in speech:
        assert heard(np.concatenate([around, samples, around])).change_db > 2 * STEADY_DB


def test_what_is_too_short_is_not_called_noise(heard, rng):
    assert not heard(coloured(rng, 0.2)).is_steady
    assert heard([0.5]).duration_s == 1 / RATE


def test_a_share_that_swings_changes_by_its_deviation():
    bands = np.ones((200, 2))
    bands[:, 0] = np.repeat([10, 1, 10, 1, 10], 40)
    swing = np.std(np.repeat([10 * np.log10(10 / 11), 10 * np.log10(1 / 2)], 40))
    other = np.std(np.repeat([10 * np.log10(1 / 11), 10 * np.log10(1 / 2)], 40))
    found = spectral_change(bands, RATE)
    assert found == pytest.approx(np.sqrt((swing**2 + other**2) / 2), rel=0.25)
    assert spectral_change(1e-12 * bands, RATE) == pytest.approx(found)
    assert spectral_change(np.zeros((5, 2)), RATE) == 0


def test_a_long_recording_is_heard_in_blocks(heard, speech, monkeypatch):
    whole = heard(np.concatenate(speech))
    monkeypatch.setattr(soundness, "_BLOCK", 7)
    assert vars(heard(np.concatenate(speech))) == pytest.approx(vars(whole))


def test_the_level_is_that_of_the_loudest_part(heard):
    t = np.arange(RATE) / RATE
    tone = np.where(t > 0.5, 1.0, 0.01) * np.sin(2 * np.pi * 1000 * t)
    assert heard(0.5 * tone).level_dbfs == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1)
    assert heard(np.zeros(RATE)).is_empty
    assert heard(np.zeros(RATE)).is_steady


def test_a_flat_top_is_clipped(heard, speech):
    for samples in speech:
        assert heard(samples).clipped == 0
        clipped = np.clip(10 * samples, -1, 1)
        assert heard(clipped, subtype="PCM_16").clipped > 5 * CLIPPED
        assert heard(0.5 * clipped, subtype="PCM_16").clipped > 5 * CLIPPED


def test_clipped_audio_stays_clipped_after_a_codec(heard, speech):
    overshot = np.clip(10 * speech[0], -1, 1) * (1 + 0.05 * np.sin(np.arange(len(speech[0]))) ** 2)
    assert heard(overshot).clipped > 5 * CLIPPED


def test_an_offset_is_told_from_rumble(heard, speech):
    t = np.arange(len(speech[0])) / RATE
    assert heard(0.5 * speech[0]).offset_db < OFFSET_DB
    assert heard(0.5 * speech[0] + 0.1).offset_db > OFFSET_DB
    assert heard(0.5 * speech[0] - 0.1).offset_db > OFFSET_DB
    assert heard(0.5 * speech[0] + 0.2 * np.sin(2 * np.pi * t)).offset_db < OFFSET_DB


def test_audio_from_a_telephone_has_nothing_above(heard, speech):
    for samples in speech:
        assert heard(samples, subtype="PCM_16").high_db > NARROW_DB
        telephone = soxr.resample(soxr.resample(samples, RATE, 8_000), 8_000, RATE)
        assert heard(telephone / np.abs(telephone).max(), subtype="PCM_16").high_db < NARROW_DB
    assert heard(speech[0], 8_000).high_db == math.inf


def test_the_digest_is_of_the_samples(wav, speech):
    samples = np.round(speech[0] * 2**15) / 2**15
    paths = [wav("a.wav", samples), wav("b.flac", samples), wav("c.wav", 0.999 * samples)]
    first, copy, other = (listen(path).digest for path in paths)
    assert first == copy != other


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match=r"a\.wav: the file is empty"):
        listen(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=r"b\.wav: no such file"):
        listen(tmp_path / "b.wav")


def test_a_rate_that_holds_no_speech_is_refused(wav, rng):
    path = wav("slow.wav", rng.normal(0, 0.1, 100), 100)
    with pytest.raises(AudioError, match=r"slow.wav: recorded at 100 Hz, which holds no speech"):
        listen(path)
