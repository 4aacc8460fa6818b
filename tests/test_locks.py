"""The locks hold all that pyproject.toml asks for, on every Python and machine they are for."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from versions import requirements  # isort: skip  # beside this file

LOCKS = Path(__file__).parents[1] / "locks"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
MACHINES = ["x86_64", "aarch64"]


def pins(*names, python="3.11", machine="x86_64"):
    """Versions by package, of what is for this Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
    }
    found = {}
    for name in names:
        text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
        for line in re.findall(r"^\w.*", text, re.M):
            pin = Requirement(line.rstrip(" \\"))
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in found, f"{pin.name} twice"
                found[pin.name] = str(pin.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_asked_for_is_locked_within_its_range(python, machine):
    package, tools = requirements()
    locked = {
        **pins("torch", "dev", python=python, machine=machine),
        **pins("build", python=python, machine=machine),
    }
    for text in (*package, *tools):
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"python_version": python}):
            assert asked.specifier.contains(locked[asked.name]), asked
    assert locked["torch"] == locked["torchaudio"]


@pytest.mark.parametrize("python", PYTHONS)
def test_what_a_host_gets_is_a_part_of_what_a_developer_gets(python):
    host, developer = pins("export", python=python), pins("dev", python=python)
    assert host.items() < developer.items()
    assert {"onnx", "onnxruntime", "scipy"} < host.keys()
    assert not {"pytest", "ruff", "torch"} & host.keys()


def test_torchs_cuda_wheels_stand_apart():
    """TORCH_INDEX takes the place of torch.txt, so nothing else may need what is in there."""
    apart = pins("torch")
    assert {"torch", "torchaudio", "triton"} < apart.keys()
    others = apart.keys() - {"torch", "torchaudio", "triton", "cuda-toolkit"}
    assert all(name.startswith("nvidia-") for name in others)
    assert not apart.keys() & pins("dev").keys()


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_version_has_its_hashes(path):
    blocks = re.split(r"^(?=\w)", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert blocks
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)
    assert "http" not in path.read_text(encoding="utf-8")
