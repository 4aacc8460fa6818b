"""Run the float graph over recordings, the state carried, and count what its tensors take on."""

import hashlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import median
from threading import Thread

import onnx_ir as ir

from cnngru_edge.calibration.observers import Histogram
from cnngru_edge.calibration.ranges import CalibrateConfig, Ranges, range_of
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import AudioError, CalibrationError
from cnngru_edge.runtime.audio import pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Session, initial_state, open_session

CLIPS_PER_STREAM = 8
"""Clips in a row before the state starts afresh: streams, so that workers can share a corpus."""

WEIGHTED = frozenset({"Conv", "GRU", "MatMul"})
"""Operators with weights; their first input is the data."""

FRONTEND_NODES = "/log_mel/"
"""Prefix of the names of the front-end's nodes, which stay float whatever the precision."""
FRONTEND_CONSTANTS = f"{FRONTEND_NODES}constants/"
"""Prefix of those among them that compute the same whatever the audio."""

_STOPS = {signal.SIGINT, signal.SIGTERM}


@dataclass
class Statistics:
    """What some recordings did to the tensors; parts add up to the whole."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    clips: int = 0
    lengths: list[int] = field(default_factory=list)  # in samples
    digests: list[str] = field(default_factory=list)
    errors: list[AudioError] = field(default_factory=list)

    def merge(self, other: "Statistics") -> None:
        """Add what another part of the corpus did, which comes after this one."""
        for name, histogram in other.histograms.items():
            self.histograms.setdefault(name, Histogram()).merge(histogram)
        self.clips += other.clips
        self.lengths += other.lengths
        self.digests += other.digests
        self.errors += other.errors


def calibrate(
    graph: Path,
    clips: Sequence[Path],
    config: CalibrateConfig,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[Ranges, list[AudioError]]:
    """Ranges of a float graph's tensors on these recordings, and the recordings left out.

    The result does not depend on the number of workers, and memory not on the number of clips.

    Args:
        graph: a float ONNX file of ours.
        clips: recordings, in the order in which they are heard.
        config: see CalibrateConfig.
        progress: called with the number of clips that are newly done.

    Raises:
        SessionError: the graph cannot be opened.
        CalibrationError: not a float graph, or too few recordings that can be read.
    """
    with open_session(graph) as session:
        rate = session.spec.features.sample_rate
        if graph.suffix != ".onnx" or session.precision != "fp32":
            raise CalibrationError(
                f"{graph}: expected a float .onnx graph, got {session.precision} {graph.suffix}; "
                "'cnngru-edge trace' writes one"
            )
    groups = [clips[i : i + CLIPS_PER_STREAM] for i in range(0, len(clips), CLIPS_PER_STREAM)]
    whole = Statistics()
    with tempfile.TemporaryDirectory() as folder:
        observed = Path(folder) / "observed.onnx"
        proto = ir.to_proto(with_tensors_as_outputs(ir.load(graph)))
        write_file(observed, proto.SerializeToString())
        for part in _in_order(observed, groups, config.workers):
            whole.merge(part)
            progress(part.clips + len(part.errors))
    if whole.clips < config.min_clips:
        why = f" ({len(whole.errors)} left out: {whole.errors[0]})" if whole.errors else ""
        raise CalibrationError(
            f"{whole.clips} recordings can be used{why}, calibration needs at least "
            f"{config.min_clips}; give more, or pass --min-clips to accept fewer"
        )
    ranges = Ranges(
        graph_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        clips_sha256=hashlib.sha256("".join(whole.digests).encode()).hexdigest(),
        clips=whole.clips,
        duration_s=sum(whole.lengths) / rate,
        clip_samples=(min(whole.lengths), round(median(whole.lengths)), max(whole.lengths)),
        method=config.method,
        percentile=config.percentile,
        tensors={
            name: range_of(histogram, config.method, config.percentile)
            for name, histogram in sorted(whole.histograms.items())
        },
    )
    return ranges, whole.errors


def with_tensors_as_outputs(graph: ir.Model) -> ir.Model:
    """Make every tensor that a plan can need the range of an output of the graph as well."""
    for name in observed_tensors(graph):
        value = next(v for node in graph.graph for v in node.outputs if v.name == name)
        value.dtype = ir.DataType.FLOAT
        graph.graph.outputs.append(value)
    return graph


def observed_tensors(graph: ir.Model) -> list[str]:
    """What weighted operators outside the front-end read and, after an activation, write."""
    names: dict[str, None] = {}  # in the order of the graph, each once
    for node in graph.graph:
        if node.op_type not in WEIGHTED or (node.name or "").startswith(FRONTEND_NODES):
            continue
        read, written = node.inputs[0], activated(node.outputs[0])
        for value in (read, written):
            if value is not None and value.name and not value.is_graph_output():
                names[value.name] = None
    return list(names)


def activated(value: ir.Value) -> ir.Value:
    """The tensor after the ReLU that alone reads `value`, or else `value`."""
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Relu" and not value.is_graph_output():
        return users[0].outputs[0]
    return value


def _in_order(graph: Path, groups: Sequence[Sequence[Path]], workers: int) -> Iterator[Statistics]:
    if workers == 1:
        with open_session(graph) as session:
            yield from (_observe(session, group) for group in groups)
        return
    # A spawned worker shares nothing, so ONNX Runtime's threads are not forked.
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _open_in_worker, (graph,))
    # Workers are started from a thread that has the signals blocked: they are born with that, and
    # no stop interrupts it half-way.
    blocked = (signal.SIG_BLOCK, _STOPS)
    try:
        with ThreadPoolExecutor(1, "start", signal.pthread_sigmask, blocked) as starter:
            parts = starter.submit(pool.map, _observe_in_worker, groups).result()
        yield from parts
    finally:
        pool.shutdown(cancel_futures=True)


_worker_session: Session


def _open_in_worker(graph: Path) -> None:
    global _worker_session
    # A stop of the whole group is the parent's to answer: a worker that died of it while it sends
    # its result would leave the parent waiting for the rest.
    os.setsid()
    Thread(target=_end_with_parent, daemon=True).start()
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets one that came before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends its workers with it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    _worker_session = open_session(graph)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _observe_in_worker(clips: Sequence[Path]) -> Statistics:
    return _observe(_worker_session, clips)


def _observe(session: Session, clips: Sequence[Path]) -> Statistics:
    """One stream: the clips in a row, from the initial state."""
    spec = session.spec
    statistics = Statistics()
    states = {state.name: state.next_name for state in spec.state}
    outside = {"logits", *states.values()}
    state = initial_state(spec, 1)
    for path in clips:
        try:
            samples = read_audio(path, spec.features.sample_rate).samples
        except AudioError as e:
            statistics.errors.append(e)
            continue
        audio = pad_to_multiple(samples, spec.chunk_length)[None]
        outputs = session.run({"audio": audio, **state})
        state = {name: outputs[next_name] for name, next_name in states.items()}
        for name in outputs.keys() - outside:
            statistics.histograms.setdefault(name, Histogram()).observe(outputs[name])
        statistics.clips += 1
        statistics.lengths.append(len(samples))
        statistics.digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return statistics
