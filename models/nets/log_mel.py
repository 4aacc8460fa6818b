"""The log-mel front-end in torch, as a part of the model: device and training cannot disagree."""

import math

import torch
from torch import Tensor, nn

from cnngru_edge.models.nets.mel import mel_filterbank
from cnngru_edge.models.spec.stream import FeatureSpec


class LogMel(nn.Module):
    """Waveform to log-mel features, one chunk at a time.

    Equals `log(torchaudio.transforms.MelSpectrogram(center=False)(audio) + log_offset)` of the
    audio with `tail_length` samples of the past in front of it.

    The DFT is taken about the middle of the window, where a frame's even part gives the real and
    its odd part the imaginary half of the spectrum: two products with half as many samples, the
    window in their matrices. A fast Fourier transform in single precision would need fewer
    operations, and is 1e-3 off in a quiet band beside a loud one, where its rounding errors are
    averaged over 16 terms instead of 240.
    """

    cosine: Tensor
    sine: Tensor
    mel: Tensor

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = spec
        mel = torch.from_numpy(mel_filterbank(spec))
        first, last = heard_bins(spec)
        offsets, weights = half_window(spec)
        angle = offsets[:, None] * torch.arange(first, last + 1) * (2 * math.pi / spec.n_fft)
        cosine, sine = weights[:, None] * angle.cos(), weights[:, None] * angle.sin()
        self.register_buffer("cosine", cosine.float(), persistent=False)  # (win_length / 2, K)
        self.register_buffer("sine", sine.float(), persistent=False)
        self.register_buffer("mel", mel[first : last + 1], persistent=False)  # (K, M)

    def forward(self, audio: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a chunk and the tail for the next one.

        Args:
            audio: (N, S), full scale 1, S a multiple of hop_length.
            tail: (N, tail_length), the samples before the chunk.

        Returns:
            features (N, S / hop_length, M), natural log of mel power; tail (N, tail_length).
        """
        audio = torch.cat([tail, audio], dim=1)
        mel = self.power(audio)
        return torch.log(mel + self.spec.log_offset), audio[:, -self.spec.tail_length :]

    def power(self, audio: Tensor) -> Tensor:
        """Mel power (N, T, M) of the frames in audio (N, tail_length + T hop_length)."""
        frames = self._frames(audio)
        after = frames[:, :, (self.spec.win_length + 1) // 2 :]
        # A periodic Hann window is symmetric but for the zero that it begins with.
        before = frames[:, :, 1 : self.spec.win_length // 2 + 1].flip(2)
        real = torch.matmul(after + before, self.cosine)
        imaginary = torch.matmul(after - before, self.sine)
        return torch.matmul(real * real + imaginary * imaginary, self.mel)

    def _frames(self, audio: Tensor) -> Tensor:
        """What the window sees of each frame, (N, T, win_length): hops side by side."""
        n_fft, win_length, hop_length = self.spec.n_fft, self.spec.win_length, self.spec.hop_length
        start = (n_fft - win_length) // 2  # torch.stft centres a short window in the frame
        hops = math.ceil(win_length / hop_length)
        surplus = n_fft - start - hops * hop_length
        if surplus > 0:
            audio = audio[:, start:-surplus]
        else:
            filler = audio[:, :-surplus]  # for whole hops; cut off again below
            audio = torch.cat([audio[:, start:], filler], dim=1)
        blocks = audio.reshape(audio.shape[0], -1, hop_length)
        parts = [blocks[:, i : i - hops + 1] for i in range(hops - 1)] + [blocks[:, hops - 1 :]]
        frames = torch.cat(parts, dim=2)
        return frames if hops * hop_length == win_length else frames[:, :, :win_length]


def heard_bins(spec: FeatureSpec) -> tuple[int, int]:
    """The first and the last bin of the DFT between f_min and f_max: the mel filters' own."""
    width = spec.sample_rate / spec.n_fft
    last = min(math.ceil(spec.f_max / width), spec.n_fft // 2)
    return math.floor(spec.f_min / width), last


def half_window(spec: FeatureSpec) -> tuple[Tensor, Tensor]:
    """Samples from the window's middle on: offsets from it, and the Hann window's values there.

    A sample in the middle itself is its own counterpart, and counts half.
    """
    start = (spec.win_length + 1) // 2
    offsets = torch.arange(start, spec.win_length, dtype=torch.float64) - spec.win_length / 2
    weights = torch.hann_window(spec.win_length, dtype=torch.float64)[start:]
    weights[offsets == 0] /= 2
    return offsets, weights
