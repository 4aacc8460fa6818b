"""Recordings as float32 mono at the model's rate: WAV, FLAC, Ogg and whatever libsndfile reads."""

import re
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cnngru_edge.models.errors import AudioError

# soundfile and soxr are loaded where they are used: phrases, images and `doctor` do without them.

Samples = npt.NDArray[np.float32]

# A header written before the length was known (a pipe, a killed recorder) claims about 2 or 4 GiB.
_UNKNOWN_LENGTH = 0x7FFF_0000
_NO_LENGTH = 2**63 - 1  # libsndfile's sign for a FLAC of that kind, which it does not read
_PIPE_BYTES = 1 << 16  # at most, of a pipe at a time
_LOUDEST = 100.0  # 40 dB over full scale: no recording, but integers in a float file


@dataclass(frozen=True)
class Recording:
    """One channel of a file, and what was done to get it."""

    samples: Samples  # (S,), full scale 1
    sample_rate: int
    source_rate: int
    source_channels: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate


def read_audio(path: Path, sample_rate: int) -> Recording:
    """Read the first channel of a file, resampled to `sample_rate` (Hz).

    Raises:
        AudioError: the file is missing, empty, no audio, cut short, has no samples, or has NaN,
            infinite or far too large ones.
    """
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty")
    import soundfile

    try:
        with soundfile.SoundFile(path) as f:
            source_rate, channels, announced, log = f.samplerate, f.channels, f.frames, f.extra_info
            if announced == _NO_LENGTH:
                raise AudioError(
                    f"{path}: written to a pipe, its length is unknown; convert it again"
                )
            frames = f.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise AudioError(
            f"{path}: not readable as audio ({e.error_string.rstrip('. ')}); WAV, FLAC and Ogg are"
        ) from e
    _check_complete(path, log, announced, len(frames))
    samples = frames[:, 0]
    if not len(samples):
        raise AudioError(f"{path}: no samples in the file")
    _check_samples(path, samples)
    if source_rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, source_rate, sample_rate)
    if not len(samples):
        raise AudioError(f"{path}: too short, {len(frames)} samples at {source_rate} Hz")
    return Recording(np.ascontiguousarray(samples), sample_rate, source_rate, channels)


def write_wav(file: Path | BinaryIO, samples: Samples, sample_rate: int) -> None:
    """Write `samples` (S,), full scale 1, as a WAV of 16 bits; louder ones are clipped."""
    import soundfile

    soundfile.write(file, np.clip(samples, -1, 1), sample_rate, "PCM_16", format="WAV")


def pad_to_multiple(samples: Samples, length: int) -> Samples:
    """`samples` (S,) with zeros after it up to the next multiple of `length`."""
    return np.pad(samples, (0, -len(samples) % length))


def file_blocks(path: Path) -> tuple[int, Iterator[Samples]]:
    """Sample rate of a file of any length, and its first channel in blocks of a second.

    Raises:
        AudioError: as `read_audio`; what is only seen in the audio, when it gets there.
    """
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as e:
        raise AudioError(
            f"{path}: not readable as audio ({e.error_string.rstrip('. ')}); WAV, FLAC and Ogg are"
        ) from e

    def blocks() -> Iterator[Samples]:
        read = 0
        with file:
            while len(frames := file.read(file.samplerate, dtype="float32", always_2d=True)):
                _check_samples(path, frames[:, 0], read)
                read += len(frames)
                yield frames[:, 0]
            if file.frames != _NO_LENGTH:
                _check_complete(path, file.extra_info, file.frames, read)

    return file.samplerate, blocks()


def pipe_blocks(pipe: Any, sample_rate: int) -> tuple[int, Iterator[Samples]]:
    """Sample rate of what a pipe brings, and its first channel in blocks as they come.

    A WAV of 16 bits, recognised by its header, or else raw 16-bit little-endian mono samples at
    `sample_rate`, as `arecord -t raw -f S16_LE -r 16000` writes them.

    Args:
        pipe: buffered and binary, as `sys.stdin.buffer`.
        sample_rate: in Hz, of raw samples.

    Raises:
        AudioError: a WAV of another kind.
    """
    channels, left = 1, _UNKNOWN_LENGTH
    if pipe.peek(4)[:4] == b"RIFF":
        try:
            header = wave.open(pipe)  # noqa: SIM115 - the pipe is not ours to close
        except (EOFError, wave.Error) as e:
            raise AudioError(f"-: a WAV that cannot be read ({e}); 16 bits PCM is") from e
        if header.getsampwidth() != 2:
            raise AudioError(f"-: a WAV of {8 * header.getsampwidth()} bits, expected 16")
        sample_rate, channels = header.getframerate(), header.getnchannels()
        left = 2 * channels * header.getnframes() or left  # what is behind it is no audio
    is_endless = left >= _UNKNOWN_LENGTH

    def blocks() -> Iterator[Samples]:
        rest, more = b"", left
        # As much as there is: a read of a fixed size would wait for it.
        while data := pipe.read1(_PIPE_BYTES if is_endless else min(_PIPE_BYTES, more)):
            more -= len(data)
            data = rest + data
            whole = len(data) // (2 * channels) * (2 * channels)
            rest = data[whole:]
            if whole:
                frames = np.frombuffer(data[:whole], "<i2").reshape(-1, channels)
                samples: Samples = frames[:, 0].astype(np.float32)
                yield samples / np.float32(2**15)

    return sample_rate, blocks()


def _check_samples(path: Path, samples: Samples, offset: int = 0) -> None:
    if not np.isfinite(samples).all():
        first = int(np.argmin(np.isfinite(samples)))
        raise AudioError(
            f"{path}: sample {offset + first} is {samples[first]}; record or convert it again"
        )
    if (peak := float(np.abs(samples).max())) > _LOUDEST:
        raise AudioError(f"{path}: samples up to {peak:g}, expected full scale 1; scale it down")


def _check_complete(path: Path, log: str, announced: int, read: int) -> None:
    # libsndfile reads what is there of a WAV, AIFF or AU cut short and says so in its log only.
    short = re.search(r"(?:data|SSND|Data Size) +: (\d+) \(should be (\d+)\)", log)
    if short and int(short[1]) < _UNKNOWN_LENGTH and int(short[2]) < int(short[1]):
        raise AudioError(
            f"{path}: truncated, {int(short[2])} of {int(short[1])} bytes of audio; copy it again"
        )
    if read < announced:
        raise AudioError(f"{path}: truncated, {read} of {announced} samples; copy it again")
