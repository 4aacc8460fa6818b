import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from conftest import contents, with_head_times

from cnngru_edge.export.cli import main
from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.check import shadow as monitor
from cnngru_edge.runtime.check.shadow import Shadow, ShadowConfig
from cnngru_edge.runtime.decode.agreement import FALSE_ALARMS, proves_more, sqnr_db
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.live import StreamSession
from cnngru_edge.runtime.recognize import recognize
from cnngru_edge.runtime.stream import Stream

RATE, CHUNK = 16_000, 320
START = [sys.executable, "-c", "from cnngru_edge.export.cli import main; main()"]
NEVER_DB = -1000.0  # an SQNR that nothing falls below
WARNING = r"warning: {}: SQNR of -?\d\.\d dB to model\.fp32\.onnx, expected 6 dB or more\n"


@pytest.fixture(scope="module")
def paths(demo):
    """Recordings of every label."""
    clips = demo.of("eval")
    return [clip.path for clip in clips[:: len(clips) // 24]]


@pytest.fixture(scope="module")
def speech(paths):
    """24 s of whole seconds."""
    samples = [read_audio(path, RATE).samples for path in paths]
    return np.concatenate([np.resize(s, RATE) for s in samples])[: 24 * RATE]


@pytest.fixture(scope="module")
def negated(exported, tmp_path_factory):
    """An INT8 model whose logits have the wrong sign: no label is right."""
    path = tmp_path_factory.mktemp("negated") / "negated.onnx"
    return with_head_times(-1, exported / "model.int8.onnx", path)


@pytest.fixture
def session(exported):
    with open_session(exported / "model.int8.onnx") as session:
        yield session


@pytest.fixture
def wrong(negated):
    with open_session(negated) as session:
        yield session


@pytest.fixture
def config(exported):
    """All is checked, by the float model."""

    def make(share=1.0, **limits):
        return ShadowConfig(exported / "model.fp32.onnx", share, **limits)

    return make


def stem_of(path):
    """What the file that is kept of a clip begins with."""
    return re.sub(r"[^\w.-]+", "-", str(path))[-80:]


def hear(session, samples, config, step=CHUNK, warn=lambda line: None):
    """Push samples through a stream; its shadow's summary."""
    shadow = Shadow(session.spec, config, warn)
    with shadow, StreamSession(session, shadow=shadow) as stream:
        for start in range(0, len(samples), step):
            stream.push(samples[start : start + step])
    return shadow.summary


# What is found.


def test_an_intact_model_passes(session, config, paths, speech, tmp_path):
    flips = tmp_path / "flips"
    with Shadow(session.spec, config(flips=flips)) as shadow:
        for path in paths[:4]:
            recognize(session, path, shadow=shadow)
    for summary in (shadow.summary, hear(session, speech[: 4 * RATE], config())):
        assert (summary.checked, summary.missed) == (4, 0)
        assert summary.passed
        assert summary.agreement > 0.95
        assert 25 < summary.sqnr_db < 60
        assert 15 < summary.lowest_sqnr_db <= summary.sqnr_db
        assert re.fullmatch(
            r"shadow: 4 checked, 0 missed because it was busy; agreement \d+\.\d%, "
            r"SQNR \d+\.\d dB, lowest \d+\.\d dB",
            summary.text,
        )


def test_the_float_model_agrees_with_itself(exported, config, paths, speech):
    with open_session(exported / "model.fp32.onnx") as session:
        with Shadow(session.spec, config()) as shadow:
            recognize(session, paths[0], shadow=shadow)
        summary = hear(session, speech[: 2 * RATE], config())
    assert (shadow.summary.agreement, shadow.summary.sqnr_db) == (1.0, np.inf)
    assert summary.agreement == 1.0
    assert summary.lowest_sqnr_db > 90  # chunk by chunk, and a second at once


@pytest.mark.parametrize("form", ["model.int8.chunk.onnx", "model.ts"])
def test_any_form_is_checked_and_checks(exported, session, speech, form):
    with open_session(exported / form) as other:
        expected = hear(other, speech[: 3 * RATE], ShadowConfig(exported / "model.int8.onnx", 1.0))
    found = hear(session, speech[: 3 * RATE], ShadowConfig(exported / form, 1.0))
    assert expected.checked == found.checked == 3
    assert found.passed
    assert expected.agreement == found.agreement


def test_a_wrong_label_is_told_at_once_and_kept(wrong, config, paths, tmp_path):
    lines, told = [], threading.Event()

    def warn(line):
        lines.append(line)
        told.set()

    with Shadow(wrong.spec, config(flips=tmp_path), warn) as shadow:
        found = recognize(wrong, paths[0], shadow=shadow)
        assert told.wait(30)  # long before the end
        recognize(wrong, paths[1], shadow=shadow)
    first, second = lines  # no more, however many clips are wrong
    assert re.fullmatch(WARNING.format(re.escape(str(paths[0]))), f"warning: {first}\n")
    assert second == (
        f"{paths[1]}: 0.0% agreement with model.fp32.onnx over the latest 2 checked, expected "
        "98.0% or more"
    )
    assert shadow.summary.alarms == (first, second)
    assert not shadow.summary.passed
    assert shadow.summary.text.endswith("; 2 files kept; failed")
    kept = next(path for path in tmp_path.iterdir() if path.name.startswith(stem_of(paths[0])))
    assert re.search(rf"_float-\w+_here-{found.label}\.wav$", kept.name)
    samples, rate = soundfile.read(kept, dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(samples, soundfile.read(paths[0], dtype="int16")[0])


def test_a_second_of_a_stream_is_kept_by_its_time(wrong, config, speech, tmp_path):
    warnings = []
    summary = hear(
        wrong, speech, config(0.1, flips=tmp_path), warn=lambda line: warnings.append(line)
    )
    assert (summary.checked, summary.missed) == (3, 0)
    assert re.fullmatch(WARNING.format(r"0\.00 s"), f"warning: {warnings[0]}\n")
    kept = {path.name.split("_")[0]: path for path in tmp_path.iterdir()}
    assert kept.keys() == {"0.00-s", "10.00-s", "20.00-s"}
    samples, _ = soundfile.read(kept["10.00-s"], dtype="float32")
    np.testing.assert_allclose(samples, speech[10 * RATE : 11 * RATE], rtol=0, atol=2**-15)


def test_a_stream_of_no_numbers_is_told(exported, config, speech, tmp_path):
    damaged = with_head_times(
        np.float32(np.nan), exported / "model.fp32.onnx", tmp_path / "nan.onnx"
    )
    with open_session(damaged) as session:
        summary = hear(session, speech[:RATE], config())
    assert summary.lowest_sqnr_db == -np.inf
    assert summary.alarms[0] == (
        "0.00 s: SQNR of -inf dB to model.fp32.onnx, expected 6 dB or more"
    )


def test_one_limit_is_not_the_other(wrong, config, paths):
    with Shadow(wrong.spec, config(min_sqnr_db=NEVER_DB)) as shadow:
        for path in paths[:2]:
            recognize(wrong, path, shadow=shadow)
    (alarm,) = shadow.summary.alarms
    assert "0.0% agreement" in alarm
    with Shadow(wrong.spec, config(min_agreement=0.0)) as shadow:
        for path in paths[:2]:
            recognize(wrong, path, shadow=shadow)
    (alarm,) = shadow.summary.alarms
    assert "SQNR" in alarm


# How much is heard.


def test_every_fourth_clip_is_taken(wrong, config, paths, tmp_path):
    with Shadow(wrong.spec, config(0.25, flips=tmp_path)) as shadow:
        for path in paths[:13]:
            recognize(wrong, path, shadow=shadow)
    assert shadow.summary.checked == 4
    kept = " ".join(path.name for path in tmp_path.iterdir())
    assert [i for i in range(13) if stem_of(paths[i]) in kept] == [0, 4, 8, 12]


@pytest.mark.parametrize(("step", "segments"), [(CHUNK, 6), (1_600, 6), (RATE, 6), (40_000, 3)])
def test_a_quarter_of_a_stream_is_taken_however_it_comes(session, config, speech, step, segments):
    summary = hear(session, speech, config(0.25), step)  # of 24 s; a segment is whole pushes
    assert summary.checked + summary.missed == segments


def test_what_is_left_of_a_stream_is_heard(session, config, speech):
    assert hear(session, speech[: RATE // 2], config()).checked == 1
    assert hear(session, speech[: RATE * 3 // 2], config()).checked == 2
    nothing = hear(session, speech[:0], config())
    assert nothing.text == "shadow: 0 checked, 0 missed because it was busy"
    assert nothing.passed


def test_while_it_is_busy_nothing_is_taken_and_nobody_waits(wrong, config, paths):
    is_busy, is_done = threading.Event(), threading.Event()

    def warn(line):
        is_busy.set()
        assert is_done.wait(60)

    with Shadow(wrong.spec, config(min_agreement=0.0), warn) as shadow:
        recognize(wrong, paths[0], shadow=shadow)
        assert is_busy.wait(30)
        for path in paths[:10]:
            recognize(wrong, path, shadow=shadow)  # would never end if it waited
        assert (shadow.summary.checked, shadow.summary.missed) == (1, 7)
        is_done.set()
    assert (shadow.summary.checked, shadow.summary.missed) == (4, 7)


def test_when_it_is_free_again_it_takes_more(session, config, paths):
    with Shadow(session.spec, config()) as shadow:
        for _ in range(10_000):
            recognize(session, paths[0], shadow=shadow)
            if shadow.summary.checked > 10:
                break
    assert shadow.summary.checked > 10


def test_a_checked_stream_answers_as_any(session, config, speech):
    shadow = Shadow(session.spec, config(0.3))
    with shadow, shadow.stream(session) as checked, Stream(session) as plain:
        for start in range(0, 5 * RATE, CHUNK):
            chunk = speech[None, start : start + CHUNK]
            np.testing.assert_array_equal(checked.push(chunk), plain.push(chunk))
        for name, value in plain.state.items():
            np.testing.assert_array_equal(checked.state[name], value)


def test_what_the_caller_does_to_its_arrays_is_not_heard(session, config, speech):
    expected = hear(session, speech[:RATE], config())
    with Shadow(session.spec, config()) as shadow, shadow.stream(session) as stream:
        buffer = np.empty((1, CHUNK), np.float32)
        for start in range(0, RATE, CHUNK):
            buffer[0] = speech[start : start + CHUNK]
            stream.push(buffer).fill(0)
            buffer.fill(1)
    assert shadow.summary == expected


def test_of_streams_side_by_side_the_wrong_one_is_named(wrong, config, speech, tmp_path):
    both = np.stack([speech[:RATE], speech[RATE : 2 * RATE]])
    with Shadow(wrong.spec, config(flips=tmp_path)) as shadow, shadow.stream(wrong, 2) as stream:
        stream.push(both)
    assert shadow.summary.checked == 2
    names = sorted(path.name.split("_")[0] for path in tmp_path.iterdir())
    assert names == ["0.00-s-of-stream-0", "0.00-s-of-stream-1"]


def test_a_reset_ends_a_segment_and_begins_another_stream(session, config, speech):
    with Shadow(session.spec, config()) as shadow, shadow.stream(session, 2) as stream:
        two = np.stack([speech[: RATE // 2], speech[RATE : RATE * 3 // 2]])
        stream.push(two)
        stream.reset([1])
        stream.push(two)
        stream.reset()
        stream.push(two)
    assert shadow.summary.checked == 6
    assert shadow.summary.passed  # with a state of the wrong row it would not


def test_lost_audio_moves_the_times(wrong, config, speech, tmp_path):
    shadow = Shadow(wrong.spec, config(flips=tmp_path))
    with shadow, StreamSession(wrong, shadow=shadow) as stream:
        stream.push(speech[:RATE])
        stream.lose(2.5)
        stream.push(speech[:RATE])
    names = sorted(path.name.split("_")[0] for path in tmp_path.iterdir())
    assert names == ["0.00-s", "3.50-s"]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are of Linux")
def test_it_gives_way_to_others(wrong, config, paths):
    found = []

    def warn(line):
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    with Shadow(wrong.spec, config(), warn) as shadow:
        recognize(wrong, paths[0], shadow=shadow)
    assert found == [max(before, 10)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


# What is kept.


def test_no_file_is_overwritten_and_no_disk_filled(wrong, config, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "MAX_FLIPS", 3)
    for run in range(3):
        with Shadow(wrong.spec, config(flips=tmp_path)) as shadow:
            for path in paths[run : run + 2] if run else paths[:1] * 2:
                recognize(wrong, path, shadow=shadow)
        if run == 0:
            first = contents(tmp_path)
            assert len(first) == 2
    assert shadow.summary.flips == 0
    kept = contents(tmp_path)
    assert len(kept) == 3
    assert first.items() <= kept.items()


def test_what_cannot_be_kept_is_told_and_the_checks_go_on(wrong, config, paths, tmp_path):
    folder = tmp_path / "flips"
    limits = {"min_agreement": 0.0, "min_sqnr_db": NEVER_DB}
    with Shadow(wrong.spec, config(flips=folder, **limits)) as shadow:
        folder.rmdir()
        folder.touch()
        for path in paths[:3]:
            recognize(wrong, path, shadow=shadow)
    assert shadow.summary.checked == 3
    (alarm,) = shadow.summary.alarms
    assert re.fullmatch(rf"{re.escape(str(paths[0]))}: not checked fully \(.+\)", alarm)


def test_a_reference_of_another_model_is_refused(session, tiny_onnx):
    with pytest.raises(SessionError) as caught, Shadow(session.spec, ShadowConfig(tiny_onnx)):
        pass
    assert str(caught.value) == (
        f"{tiny_onnx}: of another model than the one that it is to check; give its own float one"
    )
    assert not [t for t in threading.enumerate() if t.name == "shadow"]


# When it is proven.


def fewest(checked, allowed):
    """The fewest flips of so many that are proof."""
    tries = range(checked + 1)
    return next((k for k in tries if proves_more([1] * k + [0] * (checked - k), allowed)), None)


def test_one_flip_proves_nothing_and_many_do():
    found = [fewest(n, 0.02) for n in (1, 2, 12, 100, 1000)]
    assert found == [None, 2, 4, 11, 45]
    assert not proves_more([0.2], 0.02)  # of one segment's frames
    assert proves_more([0.2] * 40, 0.02)


def test_limits_at_the_ends():
    assert proves_more([0, 0, 0.01], 0.0)
    assert not proves_more([0, 0], 0.0)
    assert not proves_more([1, 1, 1], 1.0)


def test_a_model_at_the_limit_is_hardly_ever_accused(rng):
    """However often one looks: after each of 200 clips, or segments of which some frames flip."""
    runs = 1000
    for draw in (
        lambda: (rng.random(200) < 0.05).astype(float),
        lambda: (rng.random(200) < 0.2) * rng.random(200) * 0.5,
    ):
        accused = 0
        for _ in range(runs):
            flips = draw().tolist()
            accused += any(flips[n - 1] and proves_more(flips[:n], 0.05) for n in range(1, 200))
        assert accused <= runs * FALSE_ALARMS


def test_decibels():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(1.0, 0.0) == np.inf
    assert sqnr_db(1.0, np.nan) == sqnr_db(np.nan, np.nan) == sqnr_db(0.0, 1.0) == -np.inf


# The command.


def command(engine, exported, *arguments):
    reference = exported / "model.fp32.onnx"
    return [*map(str, ["run", "--engine", engine, "--reference", reference, *arguments])]


def test_the_command_ends_with_a_summary(exported, paths):
    clips = paths[:4]
    args = command(exported / "model.int8.onnx", exported, "--shadow", "1", "--json", *clips)
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 4
    assert "agrees" not in result.stdout  # that is of the foreground
    assert re.fullmatch(r"shadow: \d checked, \d missed because it was busy.+\n", result.stderr)


def test_the_command_fails_with_a_damaged_model(negated, exported, paths, tmp_path):
    flips = tmp_path / "flips"
    args = command(negated, exported, "--shadow", "1", "--save-flips", flips, *paths[:1])
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    warning, summary = result.stderr.splitlines(keepends=True)
    assert re.fullmatch(WARNING.format(re.escape(str(paths[0]))), warning)
    assert summary.startswith("shadow: 1 checked, 0 missed")
    assert summary.endswith("1 files kept; failed\n")
    (kept,) = flips.iterdir()
    assert kept.name.startswith(stem_of(paths[0]))


def test_the_command_fails_with_a_damaged_stream(negated, exported, speech, wav):
    path = wav("long.wav", speech)
    args = command(negated, exported, "--shadow", "0.05", "--stream", path)
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert re.search(f"^{WARNING.format('0.00 s')}", result.stderr, re.M)
    assert re.search(r"^shadow: 2 checked, 0 missed.+; failed\n$", result.stderr, re.M)


def test_the_limits_are_the_users(negated, exported, paths):
    limits = ["--min-agreement", "0", "--min-sqnr", "-20"]
    args = command(negated, exported, "--shadow", "1", *limits, *paths[:2])
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 1)


def test_a_stopped_stream_ends_with_the_summary(exported, speech):
    args = command(exported / "model.int8.chunk.onnx", exported, "--shadow", "1", "--stream", "-")
    process = subprocess.Popen(
        [*START, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write((speech * 32767).astype("<i2").tobytes())
    process.stdin.flush()
    assert process.stdout.readline()  # a word; and it waits for more
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    stopped, audio, shadow = errors.decode().splitlines()
    assert stopped == "stopped"
    assert re.match(r"\d+\.\d s of audio, \d+ words", audio)
    assert re.match(r"shadow: [1-9]\d* checked, \d+ missed", shadow)


def test_stopped_among_clips_it_ends_with_the_summary(exported, paths):
    args = command(exported / "model.int8.onnx", exported, "--shadow", "0.01", *paths * 200)
    process = subprocess.Popen([*START, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    lines = errors.decode().splitlines()
    assert re.match(r"shadow: \d+ checked, \d+ missed", lines[0])
    assert lines[-1] == "Aborted!"
