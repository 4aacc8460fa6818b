import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import with_head_times

from cnngru_edge.calibration.corpus.read import Clip, Corpus, match_labels
from cnngru_edge.export.verdict.streaming import (
    FLOAT_TOLERANCE,
    INT8_TOLERANCE,
    StreamingConfig,
    compare_sessions,
    compare_streaming,
)
from cnngru_edge.models.errors import CorpusError, ExportError, SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.stream import Stream, flushed

SHORT = StreamingConfig(chunks_ms=(20, 80), offsets_ms=(5,), events=False)
FLOAT, INT8, CHUNK = "model.fp32.onnx", "model.int8.onnx", "model.int8.chunk.onnx"


@pytest.fixture
def few(demo):
    return demo.of("eval")[::20]


class Session:
    """One whose streams are not as they should be."""

    def __init__(self, session, spoil):
        self._session, self._spoil = session, spoil

    def __getattr__(self, name):
        return getattr(self._session, name)

    def streams(self, batch):
        return self._spoil(self._session.streams(batch))


class Spoiled:
    def __init__(self, streams):
        self._streams = streams

    def __getattr__(self, name):
        return getattr(self._streams, name)


class Forgetful(Spoiled):
    """Loses the state between two pushes."""

    def advance(self, audio):
        self._streams.reset()
        return self._streams.advance(audio)


class NeverReset(Spoiled):
    def reset(self, rows=None):
        pass


def off_by(error, length):
    """Streams whose logits are another's if they are pushed so many samples at a time."""

    class OffBy(Spoiled):
        def advance(self, audio):
            return self._streams.advance(audio) + error * (audio.shape[1] == length)

    return OffBy


class LostInContext(Spoiled):
    """Answers the opposite from the 56th frame after a reset on: to no clip that comes first."""

    def reset(self, rows=None):
        self._streams.reset(rows)
        self._frames = 0

    def advance(self, audio):
        logits = self._streams.advance(audio).copy()
        logits[:, max(55 - self._frames, 0) :] *= -1
        self._frames += logits.shape[1]
        return logits


def compared(exported, clips, *, reference=None, candidate=None, config=SHORT):
    with open_session(exported / FLOAT) as a, open_session(exported / INT8) as b:
        a = Session(a, reference) if reference else a
        b = Session(b, candidate) if candidate else b
        return compare_sessions(a, b, clips, config)[0]


def directly(session, spec, clips, state):
    """Logits of each clip after 5 ms of silence, one chunk at a time."""
    samples = [read_audio(clip.path, spec.features.sample_rate).samples for clip in clips]
    found = []
    for i, own in enumerate(samples):
        clip = flushed(spec, np.concatenate([np.zeros(80, np.float32), own]))
        with Stream(session) as stream:
            if state == "carried":
                stream.push(flushed(spec, samples[i - 1])[None])
            starts = range(0, len(clip), spec.chunk_length)
            chunks = [clip[None, s : s + spec.chunk_length] for s in starts]
            found.append(np.concatenate([stream.push(chunk)[0] for chunk in chunks]))
    return found


def test_the_numbers_are_those_of_a_direct_computation(exported, few):
    order = np.random.default_rng(0).permutation(len(few))
    clips = [few[i] for i in order]  # each is heard after the one before it, the first after all
    comparison, errors = compare_streaming(exported / FLOAT, exported / CHUNK, few, SHORT)
    assert errors == []
    assert comparison.clips == len(few)
    assert len(comparison.rows) == (3 + 2) * 1 * 2  # ways to cut of both, offsets, states
    with open_session(exported / FLOAT) as a, open_session(exported / CHUNK) as b:
        spec = a.spec
        truth = match_labels(few, spec.labels)
        for state in ("fresh", "carried"):
            expected = directly(a, spec, clips, state)
            for model, logits in (
                ("reference", expected),
                ("candidate", directly(b, spec, clips, state)),
            ):
                said = [spec.labels[clip_scores(spec, one).argmax()] for one in logits]
                first = [spec.labels[clip_scores(spec, one).argmax()] for one in expected]
                error = max(np.abs(x - y).max() for x, y in zip(logits, expected, strict=True))
                rows = [r for r in comparison.rows if (r.model, r.state) == (model, state)]
                chunks_ms = {"reference": [None, 20, 80], "candidate": [None, 20]}
                assert [r.chunk_ms for r in rows] == chunks_ms[model]
                for row in rows:
                    assert row.offset_ms == 5
                    assert row.right == sum(
                        s == truth[c.path] for s, c in zip(said, clips, strict=True)
                    )
                    assert row.accuracy == row.right / len(few)
                    assert row.agreement == np.mean(
                        [x == y for x, y in zip(said, first, strict=True)]
                    )
                    assert row.max_abs_error == pytest.approx(error, abs=1e-5)
                    assert row.max_abs_clip_error <= 1e-5
    assert 0.1 < error < 1  # of the candidate: INT8 is not float


def test_the_states_and_the_offsets_are_different_hearings(exported, few):
    config = replace(SHORT, chunks_ms=(20,), offsets_ms=(0, 5))
    rows = [r for r in compared(exported, few, config=config).rows if r.model == "candidate"]
    assert len({r.max_abs_error for r in rows if r.chunk_ms is None}) == 4
    assert len({(r.offset_ms, r.state) for r in rows}) == 4


def test_a_stream_equals_its_clip(exported, few):
    comparison = compared(exported, few)
    assert (comparison.verdict, comparison.passed) == ("equal", True)
    assert comparison.differences == comparison.losses == ()
    assert (comparison.reference_tolerance, comparison.candidate_tolerance) == (
        FLOAT_TOLERANCE,
        INT8_TOLERANCE,
    )


@pytest.mark.parametrize("model", ["reference", "candidate"])
@pytest.mark.parametrize("spoil", [Forgetful, NeverReset])
def test_a_session_that_loses_or_keeps_its_state_is_called_out(exported, few, model, spoil):
    comparison = compared(exported, few, **{model: spoil})
    assert (comparison.verdict, comparison.passed) == ("different", False)
    assert comparison.differences
    assert all(line.startswith(f"{model} stream of ") for line in comparison.differences)


@pytest.mark.parametrize(
    ("model", "error", "is_allowed"),
    [
        ("reference", 0.5 * FLOAT_TOLERANCE, True),
        ("reference", 2 * FLOAT_TOLERANCE, False),
        ("candidate", 0.8 * INT8_TOLERANCE, True),
        ("candidate", 1.2 * INT8_TOLERANCE, False),
    ],
)
def test_logits_that_depend_on_the_cut_are_called_out(exported, few, model, error, is_allowed):
    comparison = compared(exported, few, **{model: off_by(np.float32(error), 1280)})
    assert comparison.passed == is_allowed
    if not is_allowed:
        tolerance = getattr(comparison, f"{model}_tolerance")
        assert comparison.differences == tuple(
            f"{model} stream of 80 ms chunks, offset 5 ms, {state} state: logits differ from "
            f"those of the clip by up to {error:.2g}, allowed are {tolerance:g}"
            for state in ("fresh", "carried")
        )


def test_what_only_the_candidate_loses_by_context_fails(exported, few):
    comparison = compared(exported, few, candidate=LostInContext)
    assert comparison.differences == ()  # clip and stream lose the same
    assert (comparison.verdict, comparison.passed) == ("worse", False)
    lost = [line for line in comparison.losses if "points lost after another clip" in line]
    assert len(lost) == 3
    assert "candidate clip, offset 5 ms, carried state: " in lost[0]
    assert all("carried state" in line for line in comparison.losses)
    assert comparison.context_loss["candidate"] > 50


def test_what_both_lose_by_context_is_reported_and_no_failure(exported, few):
    comparison = compared(exported, few, reference=LostInContext, candidate=LostInContext)
    assert comparison.passed
    assert comparison.context_loss["reference"] == comparison.context_loss["candidate"] > 50


@pytest.mark.parametrize(("frames", "chunk_ms"), [(2, 40), (3, 60)])
def test_a_session_of_one_length_takes_its_own_chunks(exported, few, tmp_path, frames, chunk_ms):
    from cnngru_edge.export.quantize.run import quantize_onnx

    path = tmp_path / "chunk.onnx"
    quantize_onnx(exported / FLOAT, exported / "ranges.json", path, "cpu", frames)
    config = replace(SHORT, chunks_ms=(20, 40, 80))
    comparison, _ = compare_streaming(exported / FLOAT, path, few[:4], config)
    rows = [r for r in comparison.rows if (r.model, r.state) == ("candidate", "fresh")]
    assert [r.chunk_ms for r in rows] == [None, chunk_ms]
    assert comparison.passed


def test_a_model_that_answers_nan_is_named(exported, few):
    with pytest.raises(SessionError, match=r"^the candidate answers NaN; its file is damaged"):
        compared(exported, few[:2], candidate=off_by(np.float32("nan"), 320))


def test_recordings_that_cannot_be_read_are_left_out(exported, few, tmp_path):
    missing = Clip(tmp_path / "none.wav", "yes", "eval", "")
    paths = (exported / FLOAT, exported / INT8)
    comparison, errors = compare_streaming(*paths, [*few[:3], missing], SHORT)
    assert comparison.clips == 3
    assert [str(e) for e in errors] == [f"{missing.path}: no such file"]
    with pytest.raises(CorpusError, match="none of the set can be read"):
        compare_streaming(*paths, [missing], SHORT)
    with pytest.raises(CorpusError, match="none of the set can be read"):
        compare_streaming(*paths, [], SHORT)


# The command


@pytest.fixture
def folder(few, tmp_path):
    for clip in few[::3]:
        (tmp_path / "clips" / clip.label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / clip.label / clip.path.name).symlink_to(clip.path)
    return tmp_path / "clips"


def test_the_command_prints_a_table_or_json(cli, exported, folder):
    args = ("compare", "--streaming", "--data", folder, "--set", "all")
    result = cli(*args, "--json", exported / FLOAT, exported / INT8)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["verdict"], found["passed"], found["failures"]) == ("equal", True, [])
    assert found["clips"] == 4
    assert set(found["context_loss"]) == {"reference", "candidate"}
    assert len(found["rows"]) == 2 * 5 * 4 * 2
    assert {row["chunk_ms"] for row in found["rows"]} == {None, 20, 40, 80, 160}
    assert {row["offset_ms"] for row in found["rows"]} == {0, 5, 10, 15}
    assert found["events"]["candidate"]["words"] == found["events"]["reference"]["words"] == 4
    table = cli(*args, exported / FLOAT, exported / CHUNK)
    assert table.exit_code == 0
    assert "│ reference │ 160 ms │ carried │ " in table.stdout
    assert "│ candidate │ 20 ms  │ carried │ " in table.stdout
    assert "\n4 words in 0.00 h of streams: reference 0.0 false accepts/h (0.0-" in table.stdout
    assert table.stdout.endswith(": equal\n")


def test_the_command_fails_for_a_worse_model(cli, exported, folder, tmp_path):
    worse = with_head_times(-1, exported / FLOAT, tmp_path / "worse.onnx")
    args = ("compare", "--streaming", "--data", folder, "--set", "all")
    result = cli(*args, "--json", exported / FLOAT, worse)
    found = json.loads(result.stdout)
    assert (result.exit_code, found["verdict"], found["passed"]) == (1, "worse", False)
    assert "candidate clip, offset 0 ms, fresh state: " in found["failures"][0]
    table = cli(*args, exported / FLOAT, worse)
    assert table.exit_code == 1
    assert "and 36 more; --json lists them all" in table.stdout
    assert cli(*args, "--margin", 100, exported / FLOAT, worse).exit_code == 0


def test_forms_of_different_models_are_not_compared(refused, exported, tiny_onnx):
    line = refused("compare", "--streaming", exported / FLOAT, tiny_onnx)
    assert line.startswith(f"{tiny_onnx}: labels are silence, unknown, yes, no; those of ")


def test_models_with_other_frames_are_not_compared(refused, exported, kws12, tmp_path):
    from cnngru_edge.export.trace.model import export_onnx
    from cnngru_edge.models.nets.cnn_gru import CnnGru

    features = replace(kws12.spec.features, hop_length=80)
    other = tmp_path / "other.onnx"
    export_onnx(CnnGru(replace(kws12.spec, features=features)).for_export(), other)
    assert refused("compare", "--streaming", exported / FLOAT, other) == (
        f"{other}: features or the length of a frame are not those of {exported / FLOAT}; only "
        "forms of one model have the same logits"
    )


# The gate of `export`


def test_export_writes_what_the_streams_did(exported):
    found = json.loads((exported / "streaming.json").read_text())
    assert set(found) == {INT8, CHUNK}
    assert all(comparison["passed"] for comparison in found.values())
    assert {row["offset_ms"] for row in found[INT8]["rows"]} == {7.3125}


def test_export_fails_if_a_stream_answers_otherwise(demo, kws12_checkpoint, tmp_path, monkeypatch):
    from cnngru_edge.calibration.ranges.choose import CalibrateConfig
    from cnngru_edge.export.chain import gates, pipeline

    def quantize(source, ranges, target, *how):
        written = pipeline_quantize(source, ranges, target, *how)
        if target.name == CHUNK:
            with_head_times(-1, target, target)
        return written

    pipeline_quantize = pipeline.quantize_onnx
    forms = {INT8: ("cpu", True), CHUNK: ("cpu", False)}
    monkeypatch.setattr(pipeline, "quantize_onnx", quantize)
    monkeypatch.setattr(pipeline, "INT8_FORMS", forms)
    monkeypatch.setattr(gates, "ENGINES", {})
    corpus = Corpus(demo.root, demo.of("calib")[::4] + demo.of("eval")[::20])
    with pytest.raises(ExportError, match=f"{CHUNK}: as a stream .+ candidate clip, .+% right"):
        pipeline.export(kws12_checkpoint, corpus, tmp_path / "out", CalibrateConfig(min_clips=10))
    assert not (tmp_path / "out").exists()


# The soak, in short


@pytest.fixture(scope="module")
def soak():
    path = Path(__file__).parents[1] / "benchmarks/soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_minutes_leave_nothing_behind(soak, exported, few):
    samples = [read_audio(clip.path, 16_000).samples for clip in few]
    found = soak.soak(exported / INT8, exported / FLOAT, samples, 600, window_s=60, warm_up_s=120)
    assert 600 <= found.audio_s < 602
    assert found.pushes > 1000
    assert found.max_abs_error <= INT8_TOLERANCE
    # A process that other tests have run in grows by a MiB by itself; states kept would be 20.
    assert found.growth_mib < 4
    assert 0.001 < found.first_rms < 0.1
    assert found.last_rms < 1.5 * found.first_rms


def test_a_soak_sees_a_stream_that_forgets(soak, exported, few, monkeypatch):
    samples = [read_audio(clip.path, 16_000).samples for clip in few]
    first = iter([Forgetful])

    def open_spoiled(path):
        spoil = next(first, None)
        return Opened(open_session(path), spoil) if spoil else open_session(path)

    monkeypatch.setattr(soak, "open_session", open_spoiled)
    found = soak.soak(exported / INT8, None, samples, 20, window_s=10, warm_up_s=5)
    assert found.max_abs_error > 1
    assert found.first_rms is found.last_rms is None


class Opened(Session):
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._session.__exit__(*exception)
