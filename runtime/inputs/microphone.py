"""A microphone as blocks of samples, through sounddevice (PortAudio)."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

import numpy as np

from cnngru_edge.models.errors import AudioError, BackendMissing
from cnngru_edge.runtime.inputs.audio import Samples

BUFFER_S = 2.0
"""Of audio that waits at most. What comes when it is full displaces the oldest."""

_BLOCK_S = 0.02


class RingBuffer:
    """Blocks between a thread that records and one that listens; bounded.

    A recorder cannot wait, so when the listener is late the oldest audio is dropped, and counted:
    an answer to what was said two seconds ago is worth less than one to what is said now.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._waiting = capacity, 0
        self._blocks: deque[Samples] = deque()
        self._changed = Condition()
        self._is_closed = False
        self.dropped = 0  # samples, so far

    def put(self, samples: Samples) -> None:
        """Add a block (S,), from any thread; never waits."""
        with self._changed:
            self._blocks.append(samples)
            self._waiting += len(samples)
            while self._waiting > self._capacity and len(self._blocks) > 1:
                lost = len(self._blocks.popleft())
                self._waiting -= lost
                self.dropped += lost
            self._changed.notify()

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def blocks(self) -> Iterator[Samples]:
        """All that waits, each time as one block, until it is closed and empty."""
        while True:
            with self._changed:
                while not self._blocks and not self._is_closed:
                    self._changed.wait(0.1)  # so that a signal is heard
                if not self._blocks:
                    return
                found = np.concatenate(self._blocks)
                self._blocks.clear()
                self._waiting = 0
            yield found


def devices() -> str:
    """The devices that record and play, by number, as PortAudio lists them."""
    return str(_sounddevice().query_devices())


@contextmanager
def microphone(
    device: str | int | None, sample_rate: int
) -> Iterator[tuple[int, RingBuffer, Iterator[Samples]]]:
    """Record from a device: its sample rate, the buffer, and the blocks that come out of it.

    Args:
        device: number or part of the name; None for the system's default.
        sample_rate: that is wanted, in Hz; a device that cannot records at its own.

    Raises:
        BackendMissing: sounddevice or PortAudio is not installed.
        AudioError: no such device, or it does not record.
    """
    sounddevice = _sounddevice()
    try:
        rate = sample_rate
        try:
            sounddevice.check_input_settings(device, channels=1, samplerate=rate)
        except sounddevice.PortAudioError:
            rate = int(sounddevice.query_devices(device, "input")["default_samplerate"])
        buffer = RingBuffer(round(BUFFER_S * rate))

        def record(samples: Any, frames: int, moment: Any, status: Any) -> None:
            buffer.put(samples[:, 0].copy())  # PortAudio uses its own again

        stream = sounddevice.InputStream(
            device=device,
            samplerate=rate,
            channels=1,
            dtype="float32",
            blocksize=round(_BLOCK_S * rate),
            callback=record,
            finished_callback=buffer.close,  # also when it is unplugged
        )
    except (sounddevice.PortAudioError, ValueError) as e:
        raise AudioError(
            f"microphone: {e}; 'cnngru-edge run --list-devices' shows what there is"
        ) from e
    with stream:
        yield rate, buffer, buffer.blocks()


def _sounddevice() -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as e:  # OSError: without PortAudio's library
        raise BackendMissing(
            f"sounddevice cannot be imported ({e}): pip install 'cnngru-edge[mic]', and on Linux "
            "sudo apt install libportaudio2"
        ) from e
    return sounddevice
