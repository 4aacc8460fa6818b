"""The mel filterbank and the DCT of MFCCs, in numpy, equal to torchaudio's in single precision."""

import math

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.spec.stream import FeatureSpec

Matrix = npt.NDArray[np.float32]


def mel_edges(spec: FeatureSpec) -> Matrix:
    """Edges of the triangular filters in Hz, (n_mels + 2,): filter i is of edges i to i + 2.

    They lie evenly on the HTK mel scale, 2595 log10(1 + f / 700). Single precision, rounded where
    torchaudio rounds: next to a loud bin, an edge's last bit can be seen.
    """
    first, last = (2595 * math.log10(1 + f / 700) for f in (spec.f_min, spec.f_max))
    exponents = _linspace(first, last, spec.n_mels + 2) / np.float32(2595)
    powers = np.power(10.0, exponents.astype(np.float64)).astype(np.float32)
    return np.float32(700) * (powers - np.float32(1))


def mel_filterbank(spec: FeatureSpec) -> Matrix:
    """Power spectrum to mel power, (n_fft / 2 + 1, n_mels).

    Equals `torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, f_min, f_max, n_mels,
    sample_rate)` to within 5e-5, and of the default features to the last bits.
    """
    edges = mel_edges(spec)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    frequency = _linspace(0, spec.sample_rate // 2, spec.n_fft // 2 + 1)[:, None]
    rising = (frequency - low) / (centre - low)
    falling = (high - frequency) / (high - centre)
    return np.maximum(np.float32(0), np.minimum(rising, falling))


def dct_matrix(n_mels: int, n_mfcc: int) -> Matrix:
    """Orthonormal DCT-II of mel bins, (n_mels, n_mfcc), to multiply by from the right.

    Equals `torchaudio.functional.create_dct(n_mfcc, n_mels, norm="ortho")`, whose angles are of
    single precision: decibels of a hundred make their last bits seen.
    """
    n = np.arange(n_mels, dtype=np.float32)[:, None] + np.float32(0.5)
    angles = np.float32(math.pi / n_mels) * n * np.arange(n_mfcc, dtype=np.float32)
    dct = np.cos(angles.astype(np.float64)).astype(np.float32)
    dct[:, 0] *= np.float32(1 / math.sqrt(2))
    return dct * np.float32(math.sqrt(2 / n_mels))


def _linspace(start: float, end: float, count: int) -> Matrix:
    """`torch.linspace`: from both ends to the middle by a step in single precision."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    from_start, from_end = first + step * i, last - step * (count - 1 - i)
    return np.where(i < count // 2, from_start, from_end).astype(np.float32)
