"""Several speakers at once in asyncio, through one engine.

    python examples/many_streams.py build/kws12/model.int8.chunk.onnx a.wav b.wav c.wav

A session is for one thread, so one worker thread computes for all streams, and the event loop stays
free for the network.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile

from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.live import Event, StreamSession


async def packets(audio: Path) -> AsyncIterator:
    """Audio as it might come over a network, 20 ms at a time."""
    with soundfile.SoundFile(audio) as file:
        for block in file.blocks(file.samplerate // 50, dtype="float32", always_2d=True):
            yield block[:, 0]
            await asyncio.sleep(0)  # other streams take their turn


async def listen(session, worker: ThreadPoolExecutor, audio: Path) -> list[Event]:
    """The words of one speaker."""
    loop, rate = asyncio.get_running_loop(), soundfile.info(audio).samplerate
    stream = await loop.run_in_executor(worker, StreamSession, session, rate)
    events: list[Event] = []
    async for samples in packets(audio):
        events += await loop.run_in_executor(worker, stream.push, samples)
    events += await loop.run_in_executor(worker, stream.flush)
    await loop.run_in_executor(worker, stream.close)
    return events


async def main(engine: Path, audio: list[Path]) -> None:
    """All files at once."""
    with ThreadPoolExecutor(1) as worker, open_session(engine) as session:
        found = await asyncio.gather(*(listen(session, worker, path) for path in audio))
    for path, events in zip(audio, found, strict=True):
        print(path.name, *(f"{event.time:.2f} s {event.label}" for event in events))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the words of several files.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("audio", type=Path, nargs="+")
    asyncio.run(main(**vars(parser.parse_args())))
