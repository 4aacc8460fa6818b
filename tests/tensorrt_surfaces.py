"""The Python names of several TensorRT versions, read from their bindings without a GPU.

The bindings are wheels of about 1 MB; the libraries that they call weigh gigabytes. A wheel is
imported in a child process against stand-ins for these libraries: enough to look at every class,
not to make an object. `python tests/tensorrt_surfaces.py` writes the snapshot again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("tensorrt_surfaces.json")

# What pip installs the bindings from. 8.6 is JetPack 6.0, 10.3 JetPack 6.1 and 6.2, 10.13
# JetPack 7.0, 10.16 JetPack 7.2; 11 can be installed on JetPack 7.2.
WHEELS = {
    "8.6.1": "tensorrt_bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3.9": "tensorrt-cu13-bindings==10.13.3.9",
    "10.16.1.11": "tensorrt-cu13-bindings==10.16.1.11",
    "11.0.0.114": "tensorrt-cu13-bindings==11.0.0.114",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
RTX = "rtx-1.7.1.116"  # installed whole in the development environment
VERSIONS = (*WHEELS, RTX)

# What an adapter that builds and runs engines may touch.
CLASSES = [
    "Builder",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IErrorRecorder",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
]
ENUMS = [
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineCapability",
    "EngineInvalidityDiagnostics",
    "EngineStat",
    "EngineValidity",
    "ErrorCode",
    "ErrorCodeTRT",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "ILogger.Severity",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "PreviewFeature",
    "ProfilingVerbosity",
    "RuntimePlatform",
    "SerializationFlag",
    "TacticSource",
    "TempfileControlFlag",
    "TensorFormat",
    "TensorIOMode",
    "TensorLocation",
    "TilingOptimizationLevel",
]

# Runs in the child. Modules are left out: which there are depends on what else is installed.
_READ = """
import importlib, json, operator, sys, types

module = importlib.import_module(sys.argv[1])

def public(thing):
    return [name for name in dir(thing) if not name.startswith("_")]

def find(names):
    for name in names:
        try:
            yield name, operator.attrgetter(name)(module)
        except AttributeError:  # not in this version
            pass

classes, enums = json.load(sys.stdin)
print(json.dumps({
    "version": module.__version__,
    "names": [n for n in public(module) if not isinstance(getattr(module, n), types.ModuleType)],
    "classes": {name: public(found) for name, found in find(classes)},
    "enums": {
        name: {member: int(value) for member, value in found.__members__.items()}
        for name, found in find(enums)
    },
}))
"""


class Unavailable(Exception):
    """What reading the bindings needs is not there: a network, a wheel, a compiler."""


def load_surfaces():
    """The snapshot: version -> {"names": [...], "classes": {...}, "enums": {...}}."""
    return json.loads(SNAPSHOT.read_text())


def has(surface, path):
    """Whether a version has `name`, `Class.member` or `Enum.MEMBER`; KeyError if not recorded."""
    owner, _, member = path.rpartition(".")
    if not owner:
        return member in surface["names"]
    if owner not in CLASSES and owner not in ENUMS:
        raise KeyError(f"{owner}: not in the snapshot, add it to CLASSES or ENUMS")
    kind = "classes" if owner in CLASSES else "enums"
    return member in surface[kind].get(owner, ())


def download(requirement, folder):
    """Download the wheel of a requirement with pip; its path."""
    options = ["--no-deps", "-q", "--only-binary=:all:", "--retries=1", "--timeout=10"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise Unavailable(f"pip cannot download {requirement}: {reason}")
    name = re.sub(r"[-_.]+", "_", requirement.partition("==")[0])
    return next(Path(folder).glob(f"{name}-{requirement.partition('==')[2]}-*.whl"))


def unpack(wheel, folder):
    """Unpack TensorRT's bindings with stand-ins; the environment in which they import.

    There `import tensorrt` works as on a device; its Builder and Runtime raise the TypeError that
    they raise without a driver.
    """
    folder = Path(folder).resolve()
    package = folder / "tensorrt_bindings"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "tensorrt.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    _write_stand_ins(package / "tensorrt.so", package)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(package),
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def read_surface(module, environment=None):
    """Import a module in a child process; its version, public names, classes and enums."""
    done = subprocess.run(
        [sys.executable, "-c", _READ, module],
        input=json.dumps([CLASSES, ENUMS]),
        env=environment,
        cwd="/",  # the child looks for modules where it runs, too: not in this file's folder
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"import {module}: exit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def read_wheel(version, folder):
    """Download, unpack and read the bindings of a version in WHEELS."""
    wheel = download(WHEELS[version], folder)
    return read_surface("tensorrt_bindings", unpack(wheel, Path(folder) / version))


def _write_stand_ins(extension, folder):
    """Write each NVIDIA library that an extension names, with functions that return 0."""
    for tool in ("gcc", "readelf"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed, it makes stand-ins for the libraries")
    libraries = re.findall(r"\(NEEDED\).*\[(libnv.+)\]", _run("readelf", "-dW", extension))
    symbols = _run("readelf", "--dyn-syms", "-W", extension)
    # Undefined functions without a version (@GLIBC_2.17) that are not Python's are TensorRT's.
    functions = re.findall(r" FUNC +GLOBAL +DEFAULT +UND +(?!_?Py)(\w+)$", symbols, re.MULTILINE)
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    for name in libraries:
        options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}"]
        _run("gcc", *options, "-o", folder / name, source)


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_snapshot(surfaces, path):
    """Write JSON with one line for each class and enum, so that a diff shows what changed."""
    versions = []
    for version, surface in surfaces.items():
        sections = [f'"names": {json.dumps(surface["names"])}']
        for kind in ("classes", "enums"):
            lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in surface[kind].items())
            sections.append(f'"{kind}": {{\n  ' + ",\n  ".join(lines) + "\n }")
        versions.append(f'"{version}": {{\n ' + ",\n ".join(sections) + "\n}")
    Path(path).write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main(path=SNAPSHOT):
    with tempfile.TemporaryDirectory() as folder:
        surfaces = {version: read_wheel(version, folder) for version in WHEELS}
    surfaces[RTX] = read_surface("tensorrt_rtx")
    for version, surface in surfaces.items():
        found = surface.pop("version")
        if not version.endswith(found):
            raise SystemExit(f"expected {version}, found {found}")
    write_snapshot(surfaces, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
