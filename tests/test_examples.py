"""The examples run as their first lines say."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnngru_edge.runtime.inputs.audio import read_audio

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [
    path.name
    for path in sorted(EXAMPLES.glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


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
    if "torchaudio" in (EXAMPLES / name).read_text(encoding="utf-8"):
        import needs_torchaudio  # noqa: F401
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_says_how_it_is_called(name):
    first, *lines = run(name, "--help")
    assert re.match(f"usage: {name} ", first)
    assert any(line.startswith(("Print ", "Train ")) for line in lines)


def test_a_callback(exported, clips):
    (line,) = run("callback.py", exported / "model.int8.chunk.onnx", clips[0])
    assert line.endswith(" s yes")


def test_many_streams(exported, clips):
    lines = run("many_streams.py", exported / "model.int8.chunk.onnx", *clips)
    assert [line.split()[0] for line in lines] == ["yes.wav", "no.wav"]
    assert [line.split()[-1] for line in lines] == ["yes", "no"]


def test_a_module_that_is_not_ours_is_trained(tmp_path, demo):
    """An epoch on the demo, in place of 24 on real recordings."""
    rows = ["path,set,task,label"]
    rows += [f"{c.path},{c.set},demo,{c.label}" for c in (*demo.of("calib"), *demo.of("eval"))]
    rows += [f"{c.path},train,demo,{c.label}" for c in demo.of("eval")]
    rows.append(f"{next(c.path for c in demo.clips if c.label == 'silence')},train,noise,")
    manifest, out = tmp_path / "manifest.csv", tmp_path / "trained.pt"
    manifest.write_text("\n".join(rows))
    lines = run("train_keyword_crnn.py", manifest, "demo", out, "--epochs", "1")
    assert lines[0].startswith("epoch 1: loss ")
    import torch

    trained = torch.load(out, weights_only=True)["state_dict"]
    shipped = torch.load(EXAMPLES / "keyword_crnn.pt", weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in shipped.items()}


def test_every_example_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f'run("{name}",' not in source] == []


def test_every_module_belongs_to_an_example():
    """keyword_crnn.py is what another one trains."""
    sources = [(EXAMPLES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    modules = [path.stem for path in EXAMPLES.glob("*.py") if path.name not in SCRIPTS]
    assert [name for name in modules if not any(f"from {name} import" in s for s in sources)] == []
