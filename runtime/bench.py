"""How fast an artefact is here, by trtexec's definitions, as clip and as stream.

From NVIDIA/TensorRT samples/common/sampleReporting.cpp: GPU compute is the time of the kernels of a
step between two events, enqueue the host's time to launch it, H2D and D2H the copies; latency is
H2D + GPU compute + D2H. Beside them the host's time: from samples in a numpy array to logits in
one, which is what a caller waits for, and the only time that a CPU session has.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread

import numpy as np
from rich.console import Console
from rich.table import Table

from cnngru_edge.models.errors import EdgeError, SessionError
from cnngru_edge.models.spec.whole import WholeSpec, sample_rate_of, streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.cuda import Cuda
from cnngru_edge.runtime.backends.trt.engine_file import ENGINE_SUFFIX
from cnngru_edge.runtime.backends.trt.session import TrtSession, TrtStreams
from cnngru_edge.runtime.inputs.read import example_input
from cnngru_edge.runtime.machine import jetson
from cnngru_edge.runtime.session import Array, Session
from cnngru_edge.runtime.stream import Stream, fixed_length

PERCENTILES = (90, 95, 99)
_MIN_STEPS = 10
_WATCH_PERIOD_S = 0.1
_ROWS = {
    "host": "host_ms",
    "latency": "latency_ms",
    "H2D": "h2d_ms",
    "GPU compute": "compute_ms",
    "D2H": "d2h_ms",
    "enqueue": "enqueue_ms",
}
_COLD_START = """
import sys
from pathlib import Path
import numpy as np
from cnngru_edge.models.spec.whole import WholeSpec
from cnngru_edge.runtime.inputs.read import example_input
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.stream import Stream, clip_logits, fixed_length
with open_session(Path(sys.argv[1])) as session:
    spec = session.spec
    if isinstance(spec, WholeSpec):
        clip_logits(session, example_input(spec))
    else:
        length = fixed_length(session) or spec.chunk_length
        Stream(session).push(np.zeros((1, length), np.float32))
"""


@dataclass(frozen=True)
class Times:
    """Of many steps, in milliseconds."""

    minimum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Times":
        """Summarize."""
        ordered = sorted(values)
        p90, p95, p99 = (percentile(ordered, p) for p in PERCENTILES)
        mean, median = float(np.mean(ordered)), float(np.median(ordered))
        return cls(ordered[0], mean, median, p90, p95, p99, ordered[-1])


@dataclass(frozen=True)
class Timing:
    """One kind of step: a chunk of a stream, or a clip, phrase or image."""

    what: str
    audio_ms: float | None  # in one row
    steps: int
    steps_per_s: float
    real_time_factor: float | None  # mean host time to audio time: below 1 is faster than real time
    cuda_graph: bool
    host_ms: Times
    host_quantiles_ms: tuple[float, ...]  # the 0th to 100th percentile
    latency_ms: Times | None = None  # these five of a GPU only
    h2d_ms: Times | None = None
    compute_ms: Times | None = None
    d2h_ms: Times | None = None
    enqueue_ms: Times | None = None


@dataclass
class Bench:
    """All that was measured, and in what state the machine was."""

    artefact: str
    backend: str
    device: str
    precision: str
    batch: int
    open_s: float
    cold_start_s: float  # a new process, from its start to the first logits
    resident_mib: float  # at most, of this process
    device_mib: float | None  # of a GPU with memory of its own
    timings: list[Timing] = field(default_factory=list)
    power_mode: str | None = None
    clocks_mhz: dict[str, float] = field(default_factory=dict)  # mean while measuring
    power_mw: dict[str, float] = field(default_factory=dict)  # the same, by rail

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))


def print_bench(found: Bench, console: Console) -> None:
    """A table: a row for each time that was measured, a column for each kind of step."""
    console.print(
        f"{found.artefact}: {found.backend}, {found.device}, {found.precision}, batch {found.batch}"
    )
    table = Table("milliseconds", *(t.what for t in found.timings), highlight=False)
    for label, key in _ROWS.items():
        times = [getattr(t, key) for t in found.timings]
        if any(times):
            for row in ("median", "p90", "p95", "p99"):
                cells = (f"{getattr(t, row):.3f}" if t else "" for t in times)
                table.add_row(f"{label} {row}", *cells)
    for label, text in (
        ("audio in a row", "{0.audio_ms:.0f}"),
        ("steps a second", "{0.steps_per_s:,.0f}"),
        ("real-time factor", "{0.real_time_factor:.5f}"),
        ("CUDA graph", "{0.cuda_graph}"),
    ):
        if found.timings[0].audio_ms is None and ("audio" in label or "real-time" in label):
            continue
        table.add_row(label, *(text.format(t) for t in found.timings))
    console.print(table)
    memory = f"resident {found.resident_mib:.0f} MiB"
    if found.device_mib is not None:
        memory += f", on the GPU {found.device_mib:.0f} MiB"
    console.print(f"open {found.open_s:.2f} s, cold start {found.cold_start_s:.2f} s, {memory}")
    if found.power_mode:
        console.print(f"power mode {found.power_mode}")
    for clock, mhz in found.clocks_mhz.items():
        console.print(f"{clock} {mhz:,.0f} MHz")
    for rail, power in found.power_mw.items():
        console.print(f"{rail} {power:,.0f} mW")


def percentile(ordered: Sequence[float], p: float) -> float:
    """The value that p percent do not exceed, by trtexec's formula (findPercentile) in its floats.

    Args:
        ordered: ascending, at least one.
        p: 0 to 100.
    """
    count = len(ordered)
    exclude = int((np.float32(1) - np.float32(p) / np.float32(100)) * np.float32(count))
    return ordered[max(count - 1 - exclude, 0)]


def bench(
    path: Path,
    *,
    batch: int = 1,
    seconds: float = 1.0,
    duration_s: float = 3.0,
    warm_up_s: float = 0.2,
    threads: int = 1,
    cuda_graph: bool = True,
) -> Bench:
    """Measure an artefact.

    Args:
        path: what `open_session` opens.
        batch: rows, each a stream of its own.
        seconds: of the clip, for an artefact that takes any length.
        duration_s: to measure for, each kind of step; at least 10 steps.
        warm_up_s: before that.
        threads: CPU threads.
        cuda_graph: launch a captured graph, on a GPU.

    Raises:
        EdgeError: it does not open or run here.
    """
    if not path.is_file():
        raise SessionError(f"{path}: no such file")
    free = Cuda().free_bytes() if path.suffix == ENGINE_SUFFIX else 0
    start = time.perf_counter()
    with open_session(path, threads=threads, cuda_graph=cuda_graph) as session:
        opened = time.perf_counter() - start
        spec = session.spec
        with _watched() as load:
            if isinstance(spec, WholeSpec):
                timings = [measure_whole(session, batch, seconds, duration_s, warm_up_s)]
            else:
                lengths = {"step": fixed_length(session) or spec.chunk_length}
                if fixed_length(session) is None:
                    chunks = max(round(seconds * spec.features.sample_rate / spec.chunk_length), 1)
                    lengths["clip"] = chunks * spec.chunk_length
                timings = [
                    measure_steps(session, what, batch, length, duration_s, warm_up_s)
                    for what, length in lengths.items()
                ]
        return Bench(
            artefact=str(path),
            backend=session.backend,
            device=session.device,
            precision=session.precision,
            batch=batch,
            open_s=opened,
            cold_start_s=_cold_start_s(path),
            resident_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            device_mib=(free - session.cuda.free_bytes()) / 2**20
            if isinstance(session, TrtSession) and not session.cuda.gpu.integrated
            else None,
            timings=timings,
            power_mode=jetson.power_mode(),
            clocks_mhz=load.clocks_mhz,
            power_mw=load.power_mw,
        )


def measure_whole(
    session: Session, batch: int, seconds: float, duration_s: float, warm_up_s: float
) -> Timing:
    """Give a model that takes its input whole `batch` examples at a time; see `bench`."""
    spec = session.spec
    assert isinstance(spec, WholeSpec)
    given = example_input(spec, seconds)
    feed = {spec.input.name: np.repeat(given[None], batch, 0)}

    def step() -> None:
        session.run(feed)

    _repeat(step, warm_up_s)
    start = time.perf_counter()
    host = _repeat(step, duration_s)
    rate = sample_rate_of(spec)
    audio_ms = 1000 * given.shape[-1] / rate if rate else None
    return Timing(
        what="clip" if rate else f"{spec.input.name} of {given.shape[-1]}",
        audio_ms=audio_ms,
        steps=len(host),
        steps_per_s=len(host) / (time.perf_counter() - start),
        real_time_factor=float(np.mean(host)) / audio_ms if audio_ms else None,
        cuda_graph=False,
        host_ms=Times.of(host),
        host_quantiles_ms=tuple(np.percentile(host, range(101)).tolist()),
    )


def measure_steps(
    session: Session, what: str, batch: int, length: int, duration_s: float, warm_up_s: float
) -> Timing:
    """Push so many samples at a time through `batch` streams of a session; see `bench`."""
    spec = streamable(session.spec)
    if session.max_samples is not None and length > session.max_samples:
        raise SessionError(
            f"this engine takes {session.max_samples} samples at a time, not {length}: give fewer "
            "--seconds, or build with more --max-seconds"
        )
    audio = np.random.default_rng(0).standard_normal((batch, length), np.float32)
    with Stream(session, batch) as stream:

        def step() -> None:
            stream.push(audio)

        _repeat(step, warm_up_s)
        start = time.perf_counter()
        host = _repeat(step, duration_s)
        steps_per_s = len(host) / (time.perf_counter() - start)
    on_device: dict[str, Times] = {}
    has_graph = False
    if isinstance(session, TrtSession):
        streams = session.streams(batch)
        on_device = _device_times(session, streams, audio, duration_s)
        has_graph = streams.has_graph
        streams.close()
    audio_ms = 1000 * length / spec.features.sample_rate
    return Timing(
        what=what,
        audio_ms=audio_ms,
        steps=len(host),
        steps_per_s=steps_per_s,
        real_time_factor=float(np.mean(host)) / audio_ms,
        cuda_graph=has_graph,
        host_ms=Times.of(host),
        host_quantiles_ms=tuple(np.percentile(host, range(101)).tolist()),
        **on_device,
    )


def _repeat(step: Callable[[], None], duration_s: float) -> list[float]:
    """Milliseconds of each step, for so long."""
    times: list[float] = []
    end = time.perf_counter() + duration_s
    while len(times) < _MIN_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _device_times(
    session: TrtSession, streams: TrtStreams, audio: Array, duration_s: float
) -> dict[str, Times]:
    cuda, stream = session.cuda, session.stream
    marks = [cuda.event() for _ in range(4)]
    parts: dict[str, list[float]] = {
        name: [] for name in ("latency_ms", "h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")
    }

    def step() -> None:
        streams.write_audio(audio)
        cuda.record(marks[0], stream)
        streams.upload()
        cuda.record(marks[1], stream)
        start = time.perf_counter()
        streams.compute()
        parts["enqueue_ms"].append(1000 * (time.perf_counter() - start))
        cuda.record(marks[2], stream)
        streams.download()
        cuda.record(marks[3], stream)
        cuda.synchronize(stream)
        for name, first, last in (
            ("h2d_ms", 0, 1),
            ("compute_ms", 1, 2),
            ("d2h_ms", 2, 3),
            ("latency_ms", 0, 3),
        ):
            parts[name].append(cuda.elapsed_ms(marks[first], marks[last]))

    for _ in range(4):  # the warm-up, and the capture of a graph in either direction
        streams.advance(audio)
    _repeat(step, duration_s)
    for mark in marks:
        cuda.destroy_event(mark)
    return {name: Times.of(values) for name, values in parts.items()}


@dataclass
class _Load:
    """What a machine draws and how fast it runs, in the mean; empty where nothing tells."""

    power_mw: dict[str, float] = field(default_factory=dict)
    clocks_mhz: dict[str, float] = field(default_factory=dict)


@contextmanager
def _watched() -> Iterator[_Load]:
    """The load while the block runs, filled in at its end."""
    load, power, clocks = _Load(), [jetson.power_mw()], list[dict[str, float]]()
    stop = Event()

    def watch() -> None:
        while not stop.wait(_WATCH_PERIOD_S):
            power.append(jetson.power_mw())
            clocks.append(jetson.clocks_mhz())

    thread = Thread(target=watch, daemon=True)
    is_watched = bool(power.pop()) or jetson.release() is not None
    if is_watched:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        if is_watched:
            thread.join()
        load.power_mw, load.clocks_mhz = _mean(power), _mean(clocks)


def _mean(seen: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in seen for name in values)
    return {name: float(np.mean([v[name] for v in seen if name in v])) for name in names}


def _cold_start_s(path: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _COLD_START, path], capture_output=True, check=False
    )
    if done.returncode:
        said = (done.stderr.decode().splitlines() or ["it does not say why"])[-1]
        raise EdgeError(f"{path}: does not start in a new process: {said.partition(': ')[2]}")
    return time.perf_counter() - start
