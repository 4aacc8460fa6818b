"""The README's commands run as written, and it names every command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cnngru_edge.export.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("cnngru-edge ") and not line.startswith("cnngru-edge train")
]
COMMANDS = [command for command in COMMANDS if not command.endswith("--stream mic")]
ON_A_GPU = [command for command in COMMANDS if "kws12.engine" in command]


def shell(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    return subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def all_commands():
    context = click.Context(main)
    return [(name, main.get_command(context, name)) for name in main.list_commands(context)]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=[n for n, _ in all_commands()])
def test_every_command_has_help_and_stands_in_the_readme(name, command):
    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in options), name
    assert f"| `{name}` |" in README
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0


def test_the_readmes_commands_run(tmp_path, exported, demo):
    for folder in ("calibration", "examples", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/kws12").symlink_to(exported)
    for path in exported.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "long.wav").symlink_to(demo.clips[0].path)
    (tmp_path / "words.txt").write_text("go\nstop\n")
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        done = shell(command, tmp_path)
        if command in ON_A_GPU and done.returncode:
            assert done.stderr.startswith("Error: "), f"{command}\n{done.stderr}"
            assert done.stderr.count("\n") == 1
            continue
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout


@pytest.mark.gpu
def test_the_readmes_commands_for_a_gpu_run(tmp_path, exported, demo):
    for path in exported.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "clip.wav").symlink_to(demo.clips[0].path)
    assert len(ON_A_GPU) == 3
    for command in ON_A_GPU:
        done = shell(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_readmes_python_runs(tmp_path, exported, demo, monkeypatch):
    (tmp_path / "build").mkdir()
    (tmp_path / "build/kws12").symlink_to(exported)
    (tmp_path / "clip.wav").symlink_to(demo.clips[0].path)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, 1, 12)


def test_the_shell_commands_are_those_of_make():
    targets = set(re.findall(r"^make (\w+)", README, re.M))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert all(f"{target}:" in makefile or f"or {target}):" in makefile for target in targets)
