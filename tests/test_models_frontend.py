import needs_torchaudio  # noqa: F401
import pytest
import torch
import torchaudio

from cnngru_edge.models.nets.log_mel import LogMel
from cnngru_edge.models.spec.stream import FeatureSpec
from cnngru_edge.runtime.inputs.audio import read_audio


@pytest.mark.parametrize(
    "spec",
    [
        FeatureSpec(),
        FeatureSpec(n_fft=400, win_length=400, n_mels=64),
        FeatureSpec(win_length=401),
        FeatureSpec(win_length=320),
        FeatureSpec(win_length=160, hop_length=160),
        FeatureSpec(win_length=512, hop_length=128),
    ],
    ids="{0.n_fft} {0.win_length} {0.hop_length}".format,
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


def test_the_last_bin_is_half_the_rate():
    spec = FeatureSpec(
        sample_rate=8000, n_fft=412, win_length=400, hop_length=80, f_min=0.0, f_max=4000.0
    )
    features, _ = LogMel(spec)(torch.randn(1, 800), torch.zeros(1, spec.tail_length))
    assert features.shape == (1, 10, spec.n_mels)
