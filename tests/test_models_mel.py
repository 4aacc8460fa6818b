"""The filterbank and the DCT are torchaudio's."""

import needs_torchaudio  # noqa: F401
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.functional import create_dct, melscale_fbanks

from cnngru_edge.models.nets.mel import dct_matrix, mel_filterbank
from cnngru_edge.models.spec.stream import FeatureSpec


@st.composite
def specs(draw):
    sample_rate = draw(st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]))
    n_fft = 4 * draw(st.integers(16, 512))
    return FeatureSpec(
        sample_rate,
        n_fft,
        win_length=n_fft,
        hop_length=n_fft // 2,
        n_mels=draw(st.integers(1, 128)),
        f_min=draw(st.floats(0, 300)),
        f_max=draw(st.floats(1_000, sample_rate / 2)),
    )


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
@given(specs())
def test_the_filterbank_is_torchaudios(spec):
    bins = spec.n_fft // 2 + 1
    expected = melscale_fbanks(bins, spec.f_min, spec.f_max, spec.n_mels, spec.sample_rate)
    np.testing.assert_allclose(mel_filterbank(spec), expected.numpy(), rtol=0, atol=5e-5)


def test_the_filterbank_of_our_models_is_torchaudios_to_the_last_bits():
    expected = melscale_fbanks(257, 20.0, 7_600.0, 40, 16_000).numpy()
    np.testing.assert_allclose(mel_filterbank(FeatureSpec()), expected, rtol=0, atol=1e-6)


@given(st.integers(1, 128), st.data())
def test_the_dct_is_torchaudios(n_mels, data):
    n_mfcc = data.draw(st.integers(1, n_mels))
    expected = create_dct(n_mfcc, n_mels, norm="ortho").numpy()
    np.testing.assert_allclose(dct_matrix(n_mels, n_mfcc), expected, rtol=0, atol=1e-6)
