"""What an engine and its manifest can be instead: one line says so, and no library sees it."""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.cli import main
from cnngru_edge.export.targets.trt.build import BuildConfig
from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt import library as trt_library
from cnngru_edge.runtime.backends.trt import session as trt_session
from cnngru_edge.runtime.backends.trt.engine_file import (
    Header,
    manifest_path,
    read_engine,
    read_header,
    read_manifest,
)

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")

ENGINE = "model.int8.chunk.rtx.engine"
NO_MANIFEST = "not the manifest of an engine; build it again"


class Reached(Exception):
    """A library was about to see an engine."""


@pytest.fixture
def guarded(monkeypatch):
    """A GPU that an engine would be opened on, and libraries that must not be touched."""

    def touched(*args, **kwargs):
        raise Reached

    gpu = SimpleNamespace(name="a GPU", capability="8.9", driver="13.0", integrated=False)
    monkeypatch.setattr(trt_session, "Cuda", lambda: SimpleNamespace(gpu=gpu))
    monkeypatch.setattr(trt_library, "load", touched)
    monkeypatch.setattr(trt_library, "logger", touched)


@pytest.fixture
def engine(exported, tmp_path, guarded):
    """A copy of a real engine, with its manifest."""
    path = tmp_path / ENGINE
    for source in (exported / ENGINE, manifest_path(exported / ENGINE)):
        shutil.copy(source, tmp_path / source.name)
    return path


@pytest.fixture
def commands(demo):
    """What the commands that open an engine end with, whatever they print."""

    def run(path):
        for command in (
            ["run", "--engine", path, demo.clips[0].path],
            ["inspect", path],
            ["inspect", "--json", path],
        ):
            yield CliRunner().invoke(main, list(map(str, command)))

    return run


@pytest.fixture
def refused(commands):
    """The one line that the library and every command end with."""

    def run(path):
        with pytest.raises(SessionError) as error:
            open_session(path)
        message = str(error.value)
        for result in commands(path):
            assert isinstance(result.exception, SystemExit), result.exception
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr == f"Error: {message}\n"
        assert message.splitlines() == [message]
        assert message.startswith(str(path))
        return message.removeprefix(str(path))

    return run


def flip(path, offset, bits=0xFF):
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(data)


# As it is.


def test_a_header_says_what_built_the_engine(exported):
    data = (exported / ENGINE).read_bytes()
    header = read_header(data, exported / ENGINE)
    assert header == Header("tensorrt_rtx", len(data), rtx.__version__)
    assert read_manifest(exported / ENGINE).builder.version == header.version


def test_an_engine_as_it_was_written_reaches_its_library(engine):
    """Or the tests below, of those that must not, would prove nothing."""
    with pytest.raises(Reached):
        open_session(engine)


def test_a_manifest_gives_back_what_was_written(engine):
    manifest = read_manifest(engine)
    text = manifest_path(engine).read_text()
    assert f"{manifest.to_json()}\n" == text
    assert read_engine(engine) == (engine.read_bytes(), manifest)


# Another engine.

CUT = {
    0: r": empty; copy or build it again",
    1: r": not a TensorRT engine; it begins with b'v'",
    3: r": not a TensorRT engine; it begins with b'vtr'",
    4: r": cut short at 4 bytes; copy or build it again",
    27: r": cut short at 27 bytes; copy or build it again",
    28: r": cut short, 28 of {size} bytes; copy or build it again",
    "half": r": cut short, {half} of {size} bytes; copy or build it again",
    -1: r": cut short, {but_one} of {size} bytes; copy or build it again",
}


@pytest.mark.parametrize("length", CUT)
def test_an_engine_that_is_cut_short_is_refused(refused, engine, length):
    data = engine.read_bytes()
    size = len(data)
    engine.write_bytes(data[: size // 2 if length == "half" else length])
    expected = CUT[length].format(size=size, half=size // 2, but_one=size - 1)
    assert refused(engine) == expected


FIELDS = {
    "magic": (range(4), ": not a TensorRT engine; it begins with "),
    "serialization version": (range(4, 8), ": not the engine that "),
    "entries": (range(8, 16), ": not the engine that "),
    "version": (range(24, 28), ": not the engine that "),
    "table of entries": (range(28, 112), ": not the engine that "),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_in_the_header_is_found(refused, engine, field):
    offsets, expected = FIELDS[field]
    for offset in offsets:
        flip(engine, offset, 1)
        assert refused(engine).startswith(expected), offset
        flip(engine, offset, 1)


@pytest.mark.parametrize("offset", range(16, 24))
def test_a_flipped_bit_in_the_size_is_found(refused, engine, offset):
    size = engine.stat().st_size
    for bit in range(8):
        flip(engine, offset, 1 << bit)
        claimed = int.from_bytes(engine.read_bytes()[16:24], "little", signed=True)
        if claimed > size:
            expected = f": cut short, {size} of {claimed} bytes; copy or build it again"
            assert refused(engine) == expected
        else:
            assert refused(engine).startswith(": not the engine that ")
        flip(engine, offset, 1 << bit)


def test_a_flipped_bit_is_found_wherever_it_is(refused, engine):
    size = engine.stat().st_size
    for offset in (*range(112, size, size // 40), size // 2, *range(size - 8, size)):
        flip(engine, offset, 1 << offset % 8)
        assert refused(engine) == (
            f": not the engine that {ENGINE}.json was written for (sha256 differs; {size} bytes, "
            f"by TensorRT-RTX {rtx.__version__}); copy both files again, or build the engine again"
        )
        flip(engine, offset, 1 << offset % 8)


def test_an_engine_with_more_behind_it_is_refused(refused, engine):
    engine.write_bytes(engine.read_bytes() + b"\0")
    assert refused(engine).startswith(f": not the engine that {ENGINE}.json was written for")


def test_a_magic_of_another_library_does_not_open_it_there(refused, engine):
    flip(engine, 0, ord("v") ^ ord("f"))
    assert refused(engine).startswith(f": not the engine that {ENGINE}.json was written for")


def test_a_manifest_for_another_library_does_not_open_it_there(refused, engine):
    rewrite(engine, ("builder", "library"), "tensorrt")
    assert refused(engine) == (
        ": an engine of TensorRT-RTX, and its manifest says TensorRT " + rtx.__version__
    )


OTHERS = {
    "text": (lambda exported: b"this is no engine\n" * 9, r"it begins with b'this'"),
    "zeros": (lambda exported: bytes(1000), r"it begins with b'\x00\x00\x00\x00'"),
    "noise": (lambda exported: np.random.default_rng(0).bytes(5000), "it begins with b"),
    "onnx": (lambda exported: (exported / "model.int8.onnx").read_bytes(), "it begins with b'"),
    "torchscript": (lambda exported: (exported / "model.ts").read_bytes(), r"it begins with b'PK"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_no_engine(refused, engine, exported, kind):
    make, begins = OTHERS[kind]
    engine.write_bytes(make(exported))
    found = refused(engine)
    assert found.startswith(": not a TensorRT engine")
    assert begins in found
    manifest_path(engine).unlink()
    assert refused(engine).startswith(".json: no such file; an engine is opened only with")


def test_an_engine_that_is_not_there_is_named(refused, tmp_path):
    assert refused(tmp_path / "none.engine") == ": no such file"


def test_a_manifest_alone_is_no_engine(refused, engine):
    engine.unlink()
    assert refused(engine) == ": no such file"


def test_a_folder_is_no_engine(commands, tmp_path, guarded):
    folder = tmp_path / "a.engine"
    folder.mkdir()
    with pytest.raises(SessionError, match="no such file"):
        open_session(folder)
    for result in commands(folder):
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"Error: {folder}: no such file\n"


# Another manifest.


def test_an_engine_without_its_manifest_is_refused(refused, engine):
    manifest_path(engine).unlink()
    assert refused(engine) == (
        ".json: no such file; an engine is opened only with the manifest that 'cnngru-edge build' "
        "wrote beside it"
    )


def test_a_folder_is_no_manifest(commands, engine):
    manifest_path(engine).unlink()
    manifest_path(engine).mkdir()
    for result in commands(engine):
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"Error: {manifest_path(engine)}: Is a directory\n"


def test_an_engine_and_a_manifest_of_two_builds_are_refused(refused, exported, tmp_path):
    graph = exported / "model.int8.tensorrt-fp16.chunk.onnx"
    paths = [tmp_path / "a.rtx.engine", tmp_path / "b.rtx.engine"]
    for path, capability in zip(paths, ("8.6", "8.9"), strict=True):
        write_engine(graph, path, BuildConfig("tensorrt_rtx", capabilities=(capability,)))
    first, second = map(manifest_path, paths)
    aside = first.rename(tmp_path / "aside")
    second.rename(first)
    aside.rename(second)
    for path in paths:
        assert refused(path).startswith(f": not the engine that {path.name}.json was written for")


TEXTS = {
    "empty": b"",
    "cut": b'{"sha256": "',
    "nothing": b"null",
    "number": b"1",
    "text": b'"x"',
    "list": b"[]",
    "object": b"{}",
    "some": b'{"spec": {}, "coverage": []}',
    "two": b"{}{}",
    "latin-1": b'{"sha256": "\xe4"}',
    "utf-16": '{"sha256": ""}'.encode("utf-16"),
    "zeros": bytes(100),
    "long number": b'{"sha256": ' + b"9" * 5000 + b"}",
    "onnx": b"\x08\x08\x12\x07pytorch",
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_manifest_is_refused(refused, engine, name):
    manifest_path(engine).write_bytes(TEXTS[name])
    assert refused(engine).startswith(".json: not the manifest of an engine")


def rewrite(engine, where, value):
    """Put a value, or nothing (...), somewhere into a manifest."""
    path = manifest_path(engine)
    raw = json.loads(path.read_text())
    *folders, last = where
    inner = raw
    for key in folders:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(raw))


def places(value, where=()):
    """Every place in what JSON gives, of lists the first item."""
    if where:
        yield where
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*where, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*where, 0))


@pytest.mark.parametrize("value", [..., None, "x"], ids=repr)
@pytest.mark.parametrize(
    "field", ["builder", "spec", "coverage", "metadata", "inputs", "outputs", "max_batch"]
)
def test_a_manifest_with_a_field_of_another_kind_is_refused(refused, engine, field, value):
    rewrite(engine, (field,), value)
    assert refused(engine) == f".json: {NO_MANIFEST}"


def test_a_manifest_of_a_library_that_is_not_known_is_refused(refused, engine):
    for name in ("os", "subprocess", "", "TensorRT", "tensorrt.plugin"):
        rewrite(engine, ("builder", "library"), name)
        assert refused(engine) == f".json: {NO_MANIFEST}"


def test_a_field_that_no_manifest_has_is_refused(refused, engine):
    for where in (("more",), ("builder", "more"), ("spec", "more"), ("inputs", 0, "more")):
        text = manifest_path(engine).read_text()
        rewrite(engine, where, 1)
        assert refused(engine) == f".json: {NO_MANIFEST}"
        manifest_path(engine).write_text(text)


JUNK = [..., None, True, 0, -1, 1.5, 10**30, float("inf"), float("nan")]
JUNK += ["x", "", "two\nlines", "\ud800", "\x1b[2J", [], [1], ["x"], [[]], {}, {"x": 1}]


def test_junk_in_a_manifest_is_one_line_or_shown(commands, engine):
    good = json.loads(manifest_path(engine).read_text())
    crashed = []
    for number, where in enumerate(places(good)):
        for value in JUNK[number % 4 :: 4]:  # each place a few, and each value in many
            manifest_path(engine).write_text(json.dumps(good))
            rewrite(engine, where, copy.deepcopy(value))
            for result in commands(engine):
                lines = result.stderr.splitlines()
                said = result.exit_code == 1 and len(lines) == 1 and lines[0].startswith("Error: ")
                if isinstance(result.exception, Reached) or result.exit_code == 0 or said:
                    continue
                crashed.append((where, value, repr(result.exception), lines))
    assert not crashed, crashed


def test_a_manifest_too_deep_to_read_is_refused(refused, engine):
    manifest_path(engine).write_text("[" * 100_000)
    assert refused(engine).startswith(".json: not the manifest of an engine")


# What the library itself makes of a damaged engine, in a process that it may take with it.

OPEN = """
import json, sys
import tensorrt_rtx
from pathlib import Path
from cnngru_edge.runtime.backends.trt import library as trt_library

log = trt_library.logger(tensorrt_rtx)
runtime = tensorrt_rtx.Runtime(log)
for path in map(Path, sys.argv[1:]):
    log.start()
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    print(json.dumps([path.name, engine is not None, trt_library.explain(log.lines)]), flush=True)
"""


def test_the_library_alone_checks_the_frame_of_an_engine(exported, tmp_path):
    """Its magic, its size and its last bytes, and says so; nothing in between has a check."""
    data = (exported / ENGINE).read_bytes()
    last = data[:-1] + bytes([data[-1] ^ 1])
    damaged = {
        "magic": (b"VTRT" + data[4:], "magicTag == kEXPECTED_MAGIC_TAG failed"),
        "tensorrt": (b"ftrt" + data[4:], "(the engine is of another version; build it again here)"),
        "text": (b"this is no engine\n" * 9, "magicTag == kEXPECTED_MAGIC_TAG failed"),
        "empty": (b"", "Cannot deserialize with an empty memory buffer"),
        "header": (data[:28], "bufferSize >= minBufferSize failed"),
        "half": (data[: len(data) // 2], "plan.header.size == blobSize failed"),
        "short": (data[:-1], "plan.header.size == blobSize failed"),
        "long": (data + b"\0", "plan.header.size == blobSize failed"),
        "last": (last, "kEND_OF_PLAN_MARKER failed"),
    }
    paths = []
    for name, (content, _) in damaged.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(damaged)
    for name, is_open, said in found:
        assert not is_open
        assert damaged[name][1] in said
