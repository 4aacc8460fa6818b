import numpy as np
import pytest
import soundfile

from cnngru_edge.models.errors import AudioError
from cnngru_edge.runtime.inputs.audio import pad_to_multiple, read_audio


@pytest.fixture
def tone():
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "FLOAT"}, 0),
        ("a.flac", {}, 1e-4),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 0.1),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 0.1),
    ],
    ids=["pcm16", "pcm24", "float", "flac", "vorbis", "opus"],
)
def test_formats(wav, tone, name, options, tolerance):
    recording = read_audio(wav(name, tone, **options), 16_000)
    assert recording.samples.dtype == np.float32
    assert recording.duration_s == 1.0
    middle = slice(2000, 14_000)
    np.testing.assert_allclose(recording.samples[middle], tone[middle], rtol=0, atol=tolerance)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(wav, tone, rate):
    time = np.arange(rate) / rate
    recording = read_audio(wav("a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate), 16_000)
    assert (recording.source_rate, recording.sample_rate) == (rate, 16_000)
    assert len(recording.samples) == pytest.approx(16_000, abs=2)
    np.testing.assert_allclose(recording.samples[2000:14_000], tone[2000:14_000], atol=2e-3)


def test_of_several_channels_the_first_is_taken(wav, tone):
    channels = np.stack([tone, *[np.zeros_like(tone)] * 7], axis=1)
    recording = read_audio(wav("a.wav", channels, subtype="FLOAT"), 16_000)
    assert recording.source_channels == 8
    assert np.array_equal(recording.samples, tone)


def test_a_header_of_unknown_length_is_no_truncation(wav, tone):
    path = wav("pipe.wav", tone)
    data = bytearray(path.read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = (0xFFFF_FFFF).to_bytes(
        4, "little"
    )  # as ffmpeg writes to a pipe
    path.write_bytes(data)
    assert read_audio(path, 16_000).duration_s == 1.0


def test_a_sample_that_is_no_number_is_named(wav, tone):
    tone[1234] = np.nan
    with pytest.raises(AudioError, match="sample 1234 is nan"):
        read_audio(wav("a.wav", tone, subtype="FLOAT"), 16_000)


@pytest.mark.parametrize(("length", "padded"), [(1, 320), (320, 320), (321, 640)])
def test_padding_is_zeros_after_the_end(length, padded):
    samples = pad_to_multiple(np.ones(length, np.float32), 320)
    assert len(samples) == padded
    assert samples.sum() == length


def test_what_libsndfile_reads_is_at_full_scale_one(wav):
    path = wav("a.wav", np.array([1.0, -1.0, 0.5]), subtype="PCM_16")
    assert soundfile.info(path).frames == 3
    np.testing.assert_allclose(read_audio(path, 16_000).samples, [1.0, -1.0, 0.5], atol=1e-4)
