"""The features of a whole clip are those of torchaudio's transforms."""

import dataclasses

import needs_torchaudio  # noqa: F401
import pytest
import torch
import torchaudio.transforms as T
from conftest import exported_to_onnx

from cnngru_edge.models.own.features import ClipFeatures
from cnngru_edge.models.spec.whole import DECIBELS, WholeFeatures
from cnngru_edge.runtime.inputs.audio import read_audio

RATE = 16_000
SIZES = [(400, 400, 160), (512, 400, 160), (512, 480, 160), (1024, 640, 320)]
# n_fft, win_length, hop_length


@pytest.fixture
def clips(demo):
    """Noise that comes and goes, speech in a quiet room, and almost nothing."""
    speech = torch.from_numpy(read_audio(demo.of("eval")[0].path, RATE).samples)
    seconds = torch.arange(RATE + 37) / RATE
    speech = torch.nn.functional.pad(speech, (0, len(seconds)))[: len(seconds)]
    noise = torch.randn(len(seconds)) * (1.1 + torch.sin(7 * seconds))
    return torch.stack([0.2 * noise, speech + 1e-3 * noise, 1e-3 * noise.flip(0)])


def spec_of(n_fft, win_length, hop_length, **options):
    return WholeFeatures(
        n_fft=n_fft, win_length=win_length, hop_length=hop_length, n_mels=40, **options
    )


def mel_arguments(spec):
    return {
        "n_fft": spec.n_fft,
        "win_length": spec.win_length,
        "hop_length": spec.hop_length,
        "f_min": spec.f_min,
        "f_max": spec.f_max,
        "n_mels": spec.n_mels,
        "center": spec.center,
    }


def power_of(spec, clips):
    return T.MelSpectrogram(RATE, **mel_arguments(spec))(clips)  # (N, M, T)


def same(found, expected):
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "not centred"])
def test_log_mel_is_torchaudios(clips, size, center):
    spec = spec_of(*size, center=center, log_offset=1e-6)
    expected = torch.log(power_of(spec, clips) + 1e-6)
    assert expected.std() > 1
    same(ClipFeatures(spec)(clips), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("top_db", [None, 80.0, 20.0])
def test_decibels_are_torchaudios_clip_by_clip(clips, size, center, top_db):
    spec = spec_of(*size, center=center, log=DECIBELS, log_offset=1e-10, top_db=top_db)
    to_decibels = T.AmplitudeToDB(top_db=top_db)
    # Of a batch (N, M, T) torchaudio takes the loudest of all clips; of one alone, its own.
    expected = torch.cat([to_decibels(power_of(spec, clip[None])) for clip in clips])
    same(ClipFeatures(spec)(clips), expected)
    if top_db == 20:
        low, high = expected.amin((1, 2)), expected.amax((1, 2))
        torch.testing.assert_close(high - low, torch.full((3,), 20.0))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("n_mfcc", [13, 40])
def test_mfccs_are_torchaudios(clips, size, center, n_mfcc):
    spec = spec_of(*size, center=center, log=DECIBELS, log_offset=1e-10, top_db=80.0, n_mfcc=n_mfcc)
    transform = T.MFCC(RATE, n_mfcc, melkwargs=mel_arguments(spec))
    same(ClipFeatures(spec)(clips), torch.cat([transform(clip[None]) for clip in clips]))


@pytest.mark.parametrize("center", [True, False])
def test_mfccs_of_natural_logarithms_are_torchaudios(clips, center):
    spec = spec_of(512, 400, 160, center=center, log_offset=1e-6, n_mfcc=20)
    transform = T.MFCC(RATE, 20, melkwargs=mel_arguments(spec), log_mels=True)
    same(ClipFeatures(spec)(clips), transform(clips))  # torchaudio's offset is 1e-6


def test_the_mean_is_taken_off_and_the_rest_divided(clips):
    spec = spec_of(512, 400, 160)
    plain = ClipFeatures(spec)(clips)
    scaled = ClipFeatures(dataclasses.replace(spec, mean=-4.0, std=3.0))(clips)
    torch.testing.assert_close(scaled, (plain + 4) / 3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("samples", [513, 672, 16_000, 16_001, 16_159])
def test_there_are_as_many_frames_as_torchaudio_has(center, samples):
    spec = spec_of(512, 400, 160, center=center)
    audio = torch.randn(2, samples)
    same(ClipFeatures(spec)(audio), torch.log(power_of(spec, audio) + spec.log_offset))


@pytest.mark.parametrize("center", [True, False])
def test_the_graph_computes_the_same_of_any_length(clips, center):
    spec = spec_of(512, 400, 160, center=center, log=DECIBELS, log_offset=1e-10, top_db=60.0)
    module = ClipFeatures(spec).eval()
    session = exported_to_onnx(module, clips[:1, :16_000], {0: "N", 1: "S"})
    for samples in (8_000, 16_037):
        audio = clips[:, :samples]
        (found,) = session.run(None, {"x": audio.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(audio), rtol=0, atol=1e-3)
