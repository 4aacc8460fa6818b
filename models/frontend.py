"""The log-mel front-end in torch, as a part of the model: device and training cannot disagree."""

import math

import torch
from torch import Tensor, nn

from cnngru_edge.models.spec import FeatureSpec


class LogMel(nn.Module):
    """Waveform to log-mel features, one chunk at a time.

    Equals `log(torchaudio.transforms.MelSpectrogram(center=False)(audio) + log_offset)` of the
    audio with `tail_length` samples of the past in front of it.

    The windowed DFT is one strided convolution. Its kernel, larger than a small model, is not
    stored: cos and sin of 2 pi k n / n_fft take only n_fft different values, so the graph holds
    that one period and looks the kernel up, which a runtime folds when it loads the graph.
    """

    window: Tensor
    cosine: Tensor
    mel: Tensor

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        # torchaudio is needed to build a model, not to read a spec.
        from torchaudio.functional import melscale_fbanks

        self.spec = spec
        n_fft, bins = spec.n_fft, spec.n_fft // 2 + 1
        left = (n_fft - spec.win_length) // 2  # torch.stft centres a short window in the frame
        window = torch.zeros(n_fft)
        window[left : left + spec.win_length] = torch.hann_window(spec.win_length)
        cosine = torch.cos(2 * math.pi * torch.arange(n_fft, dtype=torch.float64) / n_fft).float()
        mel = melscale_fbanks(bins, spec.f_min, spec.f_max, spec.n_mels, spec.sample_rate)  # (K, M)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("mel", mel.T.contiguous(), persistent=False)

    def dft_kernel(self) -> Tensor:
        """Windowed DFT basis as a Conv1d weight, (2 K, 1, n_fft): real parts, then imaginary."""
        n_fft = self.spec.n_fft
        bins = torch.arange(n_fft // 2 + 1)
        phase = bins[:, None] * torch.arange(n_fft)[None, :] % n_fft
        quarter_turn = 3 * n_fft // 4  # cos(x - pi/2) = sin(x)
        phase = torch.cat([phase, (phase + quarter_turn) % n_fft])
        return (self.cosine[phase] * self.window)[:, None, :]

    def forward(self, audio: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a chunk and the tail for the next one.

        Args:
            audio: (N, S), full scale 1, S a multiple of hop_length.
            tail: (N, tail_length), the samples before the chunk.

        Returns:
            features (N, S / hop_length, M), natural log of mel power; tail (N, tail_length).
        """
        audio = torch.cat([tail, audio], dim=1)
        spectrum = nn.functional.conv1d(
            audio[:, None, :], self.dft_kernel(), stride=self.spec.hop_length
        )  # (N, 2 K, T)
        bins = self.spec.n_fft // 2 + 1
        power = spectrum[:, :bins].square() + spectrum[:, bins:].square()
        mel = torch.matmul(self.mel, power)  # (N, M, T)
        features = torch.log(mel + self.spec.log_offset).transpose(1, 2)
        return features, audio[:, -self.spec.tail_length :]
