"""The examples run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnngru_edge.runtime.audio import read_audio

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def clips(demo, wav):
    """Two files with a word each."""
    paths = []
    for label in ("yes", "no"):
        clip = next(c for c in demo.of("eval") if c.label == label)
        samples = read_audio(clip.path, 16_000).samples
        silence = np.zeros(8_000, np.float32)
        paths.append(wav(f"{label}.wav", np.concatenate([silence, samples, silence])))
    return paths


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_callback(exported, clips):
    (line,) = run("callback.py", exported / "model.int8.chunk.onnx", clips[0])
    assert line.endswith(" s yes")


def test_many_streams(exported, clips):
    lines = run("many_streams.py", exported / "model.int8.chunk.onnx", *clips)
    assert [line.split()[0] for line in lines] == ["yes.wav", "no.wav"]
    assert [line.split()[-1] for line in lines] == ["yes", "no"]


def test_every_example_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))
