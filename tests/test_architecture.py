"""Imports point down: each folder stands on a floor, and takes only from the floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "runtime", "calibration", "export")
FLOORS = (  # the ground first; a folder is in its longest name here
    {"models.errors", "models.atomic"},
    {"models.spec", "models.receipt"},
    {"models.nets"},
    {"models.own"},
    {"runtime.session", "runtime.progress"},
    {"runtime.inputs", "runtime.decode", "runtime.backends.trt"},
    {"runtime.backends", "runtime.machine", "runtime.stream"},
    {"runtime.check"},
    {"runtime.recognize", "runtime.live", "runtime.bench"},
    {"runtime.cli"},
    {"calibration.ranges", "calibration.corpus"},
    {"calibration.audit"},
    {"export.graph", "export.training"},
    {"export.normalize", "export.targets"},
    {"export.lower", "export.trace"},
    {"export.quantize"},
    {"export.verdict"},
    {"export.artefacts"},
    {"export.report"},
    {"export.chain"},
    {"export.commands"},
    {"export.cli"},
    {"export.start"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if (path.parent / "__init__.py").is_file() and path.stem != "__init__"
}


def room_of(module):
    """The folder of a module, or the module itself where it has a floor of its own."""
    while module not in FLOOR_OF:
        module, _, rest = module.rpartition(".")
        assert rest, "no floor"
    return module


def imported_by(path):
    """Modules of ours that a module imports, inside of functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnngru_edge."):
            package = node.module.removeprefix("cnngru_edge.")
            for name in (alias.name for alias in node.names):
                yield f"{package}.{name}" if f"{package}.{name}" in MODULES else package


def test_every_module_has_a_floor():
    assert all(room_of(module) for module in MODULES)
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    room = room_of(module)
    others = {other for other in imported_by(MODULES[module]) if room_of(other) != room}
    assert [o for o in others if FLOOR_OF[room_of(o)] >= FLOOR_OF[room]] == []


def test_no_import_is_a_circle():
    below = {module: set(imported_by(path)) & set(MODULES) for module, path in MODULES.items()}
    while leaves := [module for module, others in below.items() if not others]:
        below = {m: others - set(leaves) for m, others in below.items() if m not in leaves}
    assert below == {}


def test_every_folder_with_modules_is_packaged():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {module.rpartition(".")[0] for module in MODULES}
    assert all(f'    "cnngru_edge.{folder}",\n' in text for folder in folders)
