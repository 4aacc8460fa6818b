import numpy as np
import pytest
import torch
import torchaudio

from cnngru_edge.models.frontend import LogMel
from cnngru_edge.models.spec import FeatureSpec
from cnngru_edge.runtime.audio import read_audio


@pytest.mark.parametrize(
    "spec", [FeatureSpec(), FeatureSpec(n_fft=400, win_length=400, n_mels=64)], ids=["512", "400"]
)
def test_features_equal_torchaudio(demo, spec):
    # In double precision: torchaudio's own single precision is further from it than ours.
    reference = torchaudio.transforms.MelSpectrogram(
        spec.sample_rate,
        n_fft=spec.n_fft,
        win_length=spec.win_length,
        hop_length=spec.hop_length,
        f_min=spec.f_min,
        f_max=spec.f_max,
        n_mels=spec.n_mels,
        center=False,
    ).double()
    log_mel = LogMel(spec)
    for clip in demo.clips[::10]:
        audio = torch.from_numpy(read_audio(clip.path, spec.sample_rate).samples)[None]
        audio = audio[:, : audio.shape[1] // spec.hop_length * spec.hop_length]
        past = torch.randn(1, spec.tail_length) * 0.01
        features, tail = log_mel(audio, past)
        whole = torch.cat([past, audio], dim=1)
        expected = torch.log(reference(whole.double()) + spec.log_offset).transpose(1, 2)
        assert features.shape == expected.shape
        assert (features - expected).abs().max() < 1e-4
        assert torch.equal(tail, whole[:, -spec.tail_length :])


def test_the_dft_kernel_is_the_windowed_dft():
    spec = FeatureSpec(n_fft=64, win_length=48, hop_length=16, n_mels=4)
    kernel = LogMel(spec).dft_kernel()[:, 0].numpy()
    window = np.zeros(64)
    window[8:56] = np.hanning(49)[:-1]
    rows = np.fft.rfft(np.eye(64) * window, axis=1).T
    np.testing.assert_allclose(kernel[:33], rows.real, atol=1e-6)
    np.testing.assert_allclose(np.abs(kernel[33:]), np.abs(rows.imag), atol=1e-6)
