"""Words out of audio that some other library delivers to a callback.

python examples/callback.py build/kws12/model.int8.chunk.onnx clip.wav
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import soundfile

from cnngru_edge.runtime.live import Event, StreamSession


class Listener:
    """Give `heard` to whatever delivers audio; `on_word` is called for each word."""

    def __init__(self, engine: Path, sample_rate: int, on_word: Callable[[Event], None]) -> None:
        self._stream = StreamSession(engine, sample_rate)
        self._on_word = on_word

    def heard(self, samples) -> None:
        """The callback: samples (S,) in floats, any number of them."""
        for event in self._stream.push(samples):
            self._on_word(event)

    def close(self) -> None:
        """Hear out what is left."""
        for event in self._stream.flush():
            self._on_word(event)
        self._stream.close()


def main() -> None:
    """Play a file into the callback, as a sound card would."""
    parser = argparse.ArgumentParser(description="Print the words of a file.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("audio", type=Path)
    given = parser.parse_args()
    with soundfile.SoundFile(given.audio) as file:
        listener = Listener(
            given.engine, file.samplerate, lambda e: print(f"{e.time:.2f} s {e.label}")
        )
        for block in file.blocks(1024, dtype="float32", always_2d=True):
            listener.heard(block[:, 0])
    listener.close()


if __name__ == "__main__":
    main()
