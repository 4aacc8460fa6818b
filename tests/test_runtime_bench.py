import json

import pytest
from click.testing import CliRunner

from cnngru_edge.export.cli import main
from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime import bench as module
from cnngru_edge.runtime.bench import Times, bench, percentile
from cnngru_edge.runtime.machine import jetson


@pytest.mark.parametrize(
    ("count", "p", "expected"),
    # trtexec's: sorted[max(n - 1 - int((1 - p / 100) * n), 0)]
    [
        (150, 99, 148),
        (100, 90, 89),
        (10, 99, 9),
        (10, 90, 8),
        (1, 99, 0),
        (3, 0, 0),
        (210, 95, 199),
    ],
)
def test_percentiles_are_trtexecs(count, p, expected):
    assert percentile(range(count), p) == expected


def test_times_summarize_whatever_the_order():
    times = Times.of([3.0, 1.0, 2.0, 10.0])
    assert (times.minimum, times.median, times.mean, times.maximum) == (1.0, 2.5, 4.0, 10.0)
    assert times.p99 == 10.0


def test_a_graph_of_any_length_is_measured_as_stream_and_as_clip(exported):
    found = bench(exported / "model.int8.onnx", seconds=0.5, duration_s=0.05, warm_up_s=0)
    step, clip = found.timings
    assert (step.what, step.audio_ms, clip.what, clip.audio_ms) == ("step", 20, "clip", 500)
    for timing in found.timings:
        host = timing.host_ms
        assert timing.steps >= 10
        assert 0 < host.minimum <= host.median <= host.p90 <= host.p95 <= host.p99 <= host.maximum
        assert timing.real_time_factor == pytest.approx(host.mean / timing.audio_ms)
        assert timing.steps_per_s <= 1000 / host.minimum
        assert timing.compute_ms is None
    assert clip.host_ms.median > step.host_ms.median
    assert 0 < found.open_s < found.cold_start_s
    assert found.resident_mib > 20
    assert found.device_mib is None


def test_a_graph_of_one_length_is_measured_as_stream(exported):
    found = bench(exported / "model.int8.chunk.onnx", duration_s=0, warm_up_s=0)
    assert [timing.what for timing in found.timings] == ["step"]
    assert found.timings[0].steps == 10


def test_a_batch_that_it_does_not_take_is_an_error(exported):
    with pytest.raises(SessionError, match="for 1 at a time, not for 8 streams"):
        bench(exported / "model.int8.chunk.onnx", batch=8)


def test_a_batch_is_measured_as_one(exported):
    found = bench(exported / "model.int8.onnx", batch=3, duration_s=0, warm_up_s=0)
    assert found.batch == 3


def test_power_is_the_mean_over_the_measurement(exported, monkeypatch):
    seen = iter([0.0] + [1000.0, 3000.0] * 10_000)  # the first only asks whether there is any
    monkeypatch.setattr(jetson, "power_mw", lambda: {"VDD_IN": next(seen)})
    monkeypatch.setattr(jetson, "power_mode", lambda: "MAXN (0)")
    monkeypatch.setattr(module, "_WATCH_PERIOD_S", 0.001)
    found = bench(exported / "model.int8.chunk.onnx", duration_s=0.2)
    assert found.power_mode == "MAXN (0)"
    assert found.power_mw["VDD_IN"] == pytest.approx(2000, rel=0.05)


def test_the_command_line(exported):
    command = ["bench", str(exported / "model.int8.onnx"), "--duration", "0.05", "--warm-up", "0"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "real-time factor" in shown.stdout
    assert "H2D" not in shown.stdout  # of a GPU only
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert found["backend"].startswith("onnxruntime ")
    assert {timing["what"] for timing in found["timings"]} == {"step", "clip"}


def test_an_engine_without_a_gpu_is_one_line(exported):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this machine")
    from cnngru_edge.models.errors import BackendMissing
    from cnngru_edge.runtime.backends.trt.cuda import Cuda

    try:
        Cuda()
    except BackendMissing:
        pass
    else:
        pytest.skip("there is a GPU here")
    result = CliRunner().invoke(main, ["bench", str(exported / "model.int8.chunk.rtx.engine")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")


def test_an_engine_has_the_times_of_its_gpu_too(exported, tmp_path, monkeypatch):
    """On a simulated GPU: what is measured around what, and that a graph is."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    import simulated_gpu

    from cnngru_edge.export.chain.engine import write_engine
    from cnngru_edge.export.targets.trt.build import BuildConfig

    cuda, _ = simulated_gpu.install(monkeypatch)
    monkeypatch.setattr(module, "_cold_start_s", lambda path: 1.0)  # of a process without it
    graph = exported / "model.int8.tensorrt-fp16.clip.onnx"
    write_engine(graph, tmp_path / "a.engine", BuildConfig(batch=2))
    found = bench(tmp_path / "a.engine", batch=2, seconds=0.1, duration_s=0, warm_up_s=0)
    assert [timing.what for timing in found.timings] == ["step", "clip"]
    for timing in found.timings:
        assert timing.cuda_graph
        parts = (timing.h2d_ms, timing.compute_ms, timing.d2h_ms)
        assert timing.latency_ms.mean == pytest.approx(sum(part.mean for part in parts))
        assert timing.enqueue_ms.minimum > 0
    assert found.device_mib is not None
    assert cuda.leaks() == []
    with pytest.raises(SessionError, match="samples at a time, not 160000: give fewer --seconds"):
        bench(tmp_path / "a.engine", seconds=10, duration_s=0)
