"""Run the tests with the oldest or the newest versions of everything, and say which broke.

    python tests/versions.py oldest
    python tests/versions.py newest

The oldest are of the lowest series in pyproject.toml, of >=2.5 the newest 2.5, of the package and
its extra export. The newest are those that the
registry has for this Python, whatever pyproject.toml says. The environment is .venv-oldest or
.venv-newest. Where tests fail, each direct dependency is put back to its locked version alone, and
the tests that failed run again: what mends them is what broke. Tools of the tests are not put
back. Exit 0: all tests passed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))


def requirements() -> tuple[list[str], list[str]]:
    """What pyproject.toml asks for: by the package with its extra export, and by the tests."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["export"]], [*groups["build"], *groups["test"]]


def locked() -> dict[str, str]:
    """The versions in locks/ that are for this Python."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "locks").glob("*.txt"))
    found = [Requirement(line.rstrip(" \\")) for line in re.findall(r"^\w.*", text, re.M)]
    fitting = [r for r in found if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in fitting}


def set_up(which: str, venv: Path) -> str:
    """Make the environment; its Python."""
    python = str(venv / "bin" / "python")
    subprocess.run([UV, "venv", "--quiet", "--clear", "-p", sys.executable, venv], check=True)
    package, tools = requirements()
    named = [Requirement(text) for text in (*package, "torchaudio", *tools)]
    named = [r for r in named if r.marker is None or r.marker.evaluate()]
    if which == "newest":
        install(python, *(r.name for r in named))
    else:  # without torchaudio, which goes with one torch alone
        lowest = [re.sub(r">=([\d.]+)[^;]*", r"==\1.*", text) for text in package]
        install(python, *lowest, *tools)
    install(python, "--no-deps", "--editable", ".")
    return python


def install(python: str, *arguments: str) -> None:
    """`pip install` into the environment."""
    subprocess.run(
        [UV, "pip", "install", "--quiet", "-p", python, *arguments], cwd=ROOT, check=True
    )


def versions(python: str) -> dict[str, str]:
    """What is installed there."""
    listing = subprocess.check_output([UV, "pip", "list", "-p", python, "--format", "json"])
    return {package["name"]: package["version"] for package in json.loads(listing)}


def failures(python: str, *options: str) -> list[str]:
    """The tests that fail, and the files whose tests do not load."""
    cache = Path(python).parents[1] / "tests"
    # Cleared, for pytest keeps a file that did not load once as failed when it loads again.
    shared = [
        "-q",
        "--cache-clear",
        "--numprocesses",
        "2",
        "--dist",
        "loadfile",
        "-o",
        f"cache_dir={cache}",
    ]
    done = subprocess.run([python, "-m", "pytest", *shared, *options], cwd=ROOT, check=False)
    noted = cache / "v" / "cache" / "lastfailed"
    failed = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    if done.returncode and not failed:
        raise SystemExit(f"pytest did not run the tests (exit {done.returncode})")
    return sorted(failed)


@click.command()
@click.argument("which", type=click.Choice(["oldest", "newest"]))
def main(which: str) -> None:
    """Run the tests with the oldest or the newest versions, and say which broke."""
    python, lock = set_up(which, ROOT / f".venv-{which}"), locked()
    tried = versions(python)
    failed = failures(python)
    direct = sorted({Requirement(text).name for text in requirements()[0]})
    table = Table("package", "locked", which, "mends, put back to the locked version")
    for name in direct:
        if name not in tried or tried[name] == lock.get(name, tried[name]):
            continue
        mended = "-"
        if failed:
            beside = ["torchaudio"] if name == "torch" and "torchaudio" in tried else []
            install(python, *(f"{n}=={lock[n]}" for n in (name, *beside)))
            mended = str(len(failed) - len({*failed} & {*failures(python, *failed)}))
            install(python, *(f"{n}=={v}" for n, v in tried.items() if n != "cnngru-edge"))
        table.add_row(name, lock[name], tried[name], mended)
    console = Console()
    console.print(table)
    console.print(f"{len(failed)} tests fail with the {which} versions")
    for name in failed:
        console.print(f"  {name}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
