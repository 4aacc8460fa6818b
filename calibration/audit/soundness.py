"""What one recording sounds like, in a few numbers: level, clipping, offset, bandwidth, change."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from cnngru_edge.models.errors import AudioError
from cnngru_edge.models.spec.stream import FeatureSpec
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple, read_audio

QUIET_DBFS = -50.0
"""Level below which 16 bits are too few: the quietest of 2,500 Speech Commands is at -46 dBFS."""
CLIPPED = 0.001
"""Share of samples on a flat top: speech that only touches full scale stays below a tenth of it."""
OFFSET_DB = -20.0
"""DC offset over level: a tenth. It then reaches, through the window, the lowest mel bins."""
NARROW_DB = -60.0
"""Energy above 4.2 kHz over all: of 8 kHz audio nothing is left there but rounding. Of 100 Speech
Commands 99 are above it, and 98 of 100 that went through 8 kHz below."""
STEADY_DB = 1.2
"""Change of the spectrum below which there is no speech in it. White, pink and brown noise, hum and
random integers of 0.3 s to a minute stay below 1.12; of 100 Speech Commands 99 are above 2.4, under
pink noise of 10 dB SNR above 2.2, of 0 dB above 1.1."""
SHORT_S = 0.25
"""Shorter than any word; too short to tell speech from noise."""

_EDGES_HZ = (150, 400, 800, 1400, 2200, 3200, 4200, 7600)  # of the bands whose change is measured
_WINDOW_S = 0.032  # at least; a power of two of samples
_AVERAGED = 4  # windows in a row, half overlapping: noise has settled, and a syllable not passed
_CHANGE_S = 1.0  # in which speech changes, however long the recording
_AUDIBLE_DB = 40.0  # below the loudest part: padding and pauses are not counted
_FLOOR_DB = -30.0  # of a band's share: a thousandth is as good as empty, and may be rounding
_FLAT_PEAK = 0.25  # a flat top at a lower peak may be rounding
_FULL_SCALE = 0.999
_STEP = 2.0**-14  # two steps of 16 bits: the two ends of the scale differ by one
_BLOCK = 4096  # windows at a time: bounded memory for a recording of any length

Powers = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Sound:
    """A recording's first channel, as it is in the file."""

    digest: str  # of the samples, whatever the format of the file
    sample_rate: int
    duration_s: float
    level_dbfs: float  # RMS of the loudest 80 ms, without the DC offset
    offset_db: float  # DC offset over that level
    clipped: float  # share of the samples
    high_db: float  # energy above 4.2 kHz over all; infinite where the rate does not reach so far
    change_db: float  # of the spectrum's shape in a second, see `spectral_change`

    @property
    def is_quiet(self) -> bool:
        """Silence, or speech at a level that leaves it few of its bits."""
        return self.level_dbfs < QUIET_DBFS

    @property
    def is_steady(self) -> bool:
        """Nothing but noise, hum or silence."""
        return self.duration_s >= SHORT_S and self.change_db < STEADY_DB

    @property
    def is_empty(self) -> bool:
        """Every sample is the same."""
        return self.level_dbfs == -math.inf


def listen(path: Path) -> Sound:
    """Measure one recording.

    Raises:
        AudioError: it cannot be read.
    """
    try:
        rate = soundfile.info(path).samplerate
    except soundfile.LibsndfileError:
        rate = FeatureSpec.sample_rate  # read_audio says what is wrong
    samples = read_audio(path, rate).samples
    if rate / 2 < _EDGES_HZ[1]:
        raise AudioError(f"{path}: recorded at {rate} Hz, which holds no speech")
    powers, bands, high = _powers(samples - samples.mean(), rate)
    level = _db(float(_averaged(powers).max()))
    return Sound(
        digest=hashlib.sha256(samples.data).hexdigest(),
        sample_rate=rate,
        duration_s=len(samples) / rate,
        level_dbfs=level,
        offset_db=_ratio_db(_offset(samples) ** 2, 10 ** (level / 10)),
        clipped=_clipped(samples),
        high_db=high,
        change_db=spectral_change(bands, rate),
    )


def spectral_change(bands: Powers, sample_rate: int) -> float:
    """By how many dB the shape of the spectrum changes in a second, at most.

    The standard deviation, in time, of each band's share of the power, RMS over the bands. Speech
    goes from vowel to consonant to pause several times a second; noise and hum keep their shape,
    also where they are faded or padded, since a share does not know the level.

    Args:
        bands: (T, bands) power in windows that overlap by half.
        sample_rate: in Hz, of what the windows were cut from.
    """
    bands = _averaged(bands)
    power = bands.sum(1)
    if not power.max():
        return 0.0
    audible = power >= power.max() * 10 ** (-_AUDIBLE_DB / 10)
    share = bands[audible] / power[audible, None]
    shape = 10 * np.log10(np.maximum(share, 10 ** (_FLOOR_DB / 10)))
    shape -= shape.mean(0)
    length = min(len(shape), round(2 * _CHANGE_S * sample_rate / _window_length(sample_rate)))
    mean, square = (_moving_average(x, length) for x in (shape, shape**2))
    return float(np.sqrt(np.maximum(square - mean**2, 0).mean(1).max()))


def _powers(samples: Samples, sample_rate: int) -> tuple[Powers, Powers, float]:
    """Power of overlapping windows (T,), and by band (T, bands); the high band over all, in dB."""
    length = _window_length(sample_rate)
    window = np.hanning(length).astype(np.float32)
    edges = [round(hz * length / sample_rate) for hz in _EDGES_HZ if hz <= sample_rate / 2]
    inside = slice(edges[0], edges[-1])
    # 6 dB an octave, so that in a band of pink or brown noise all frequencies count.
    raised = (np.arange(length // 2 + 1, dtype=np.float32) / length)[inside] ** 2
    starts = np.array(edges[:-1]) - edges[0]
    if len(samples) < length:
        samples = pad_to_multiple(samples, length)
    frames = np.lib.stride_tricks.sliding_window_view(samples, length)[:: length // 2]
    powers, bands, total = [], [], np.zeros(edges[-1] - edges[0])
    for start in range(0, len(frames), _BLOCK):
        block = frames[start : start + _BLOCK]
        powers.append(np.einsum("tn,tn->t", block, block) / length)
        transform = np.fft.rfft(block * window)[:, inside]
        spectrum = transform.real**2 + transform.imag**2
        bands.append(np.add.reduceat(spectrum * raised, starts, axis=1))
        total += spectrum.sum(0)
    reaches = len(edges) == len(_EDGES_HZ)
    high = _ratio_db(total[starts[-1] :].sum(), total.sum()) if reaches else math.inf
    return np.concatenate(powers), np.concatenate(bands), high


def _window_length(sample_rate: int) -> int:
    return 1 << math.ceil(math.log2(_WINDOW_S * sample_rate))


def _averaged(powers: Powers) -> Powers:
    return _moving_average(powers, min(len(powers), _AVERAGED))


def _moving_average(values: Powers, length: int) -> Powers:
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    sums[length:] -= sums[:-length].copy()
    averages: Powers = np.maximum(sums[length - 1 :], 0) / length
    return averages


def _clipped(samples: Samples) -> float:
    """Share of the samples that lie, with both their neighbours, on a flat top."""
    magnitudes = np.abs(samples)
    peak = float(magnitudes.max())
    if peak < _FLAT_PEAK:
        return 0.0
    top = magnitudes >= min(peak - _STEP, _FULL_SCALE)
    return float((top[:-2] & top[1:-1] & top[2:]).sum() / len(samples))


def _offset(samples: Samples) -> float:
    """The DC offset: what all parts of a recording have in common; rumble changes its sign."""
    means = np.array([part.mean() for part in np.array_split(samples, min(4, len(samples)))])
    return 0.0 if means.min() < 0 < means.max() else float(np.abs(means).min())


def _db(power: float) -> float:
    return 10 * math.log10(power) if power > 0 else -math.inf


def _ratio_db(part: float, whole: float) -> float:
    return _db(part) - _db(whole) if part > 0 else -math.inf
