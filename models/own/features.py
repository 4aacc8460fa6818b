"""Log-mel features and MFCCs of a whole clip, as a part of the graph."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cnngru_edge.models.nets.log_mel import LogMel
from cnngru_edge.models.nets.mel import dct_matrix
from cnngru_edge.models.spec.whole import DECIBELS, WholeFeatures


class ClipFeatures(nn.Module):
    """Waveform (N, S) to features (N, T, M), equal to those of torchaudio's transforms.

    `MelSpectrogram`, then a logarithm or `AmplitudeToDB`, then the DCT of `MFCC` if asked for.
    """

    dct: Tensor

    def __init__(self, spec: WholeFeatures) -> None:
        super().__init__()
        self.spec = spec
        self.log_mel = LogMel(spec)
        dct = torch.from_numpy(dct_matrix(spec.n_mels, spec.n_mfcc or 1))
        self.register_buffer("dct", dct, persistent=False)  # (M, coefficients)

    def forward(self, audio: Tensor) -> Tensor:
        """Features (N, T, M or coefficients); S at least n_fft, or half of it where centred."""
        spec = self.spec
        if spec.center:
            half = spec.n_fft // 2
            audio = pad(audio[:, None], (half, half), mode="reflect")[:, 0]
        frames = (audio.shape[1] - spec.n_fft) // spec.hop_length
        power = self.log_mel.power(audio[:, : spec.n_fft + frames * spec.hop_length])
        if spec.log == DECIBELS:
            features = 10 * torch.log10(torch.clamp(power, min=spec.log_offset))
            if spec.top_db is not None:
                loudest = features.amax((1, 2), keepdim=True)
                features = torch.maximum(features, loudest - spec.top_db)
        else:
            features = torch.log(power + spec.log_offset)
        if spec.n_mfcc is not None:
            features = torch.matmul(features, self.dct)
        return (features - spec.mean) / spec.std
