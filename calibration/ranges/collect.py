"""Run the float graph over recordings, the state carried, and count what its tensors take on."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import onnx_ir as ir

from cnngru_edge.calibration.ranges.choose import CalibrateConfig, Range, Ranges, Subset, range_of
from cnngru_edge.calibration.ranges.histogram import Histogram
from cnngru_edge.calibration.ranges.workers import in_order
from cnngru_edge.models.atomic import write_file
from cnngru_edge.models.errors import CalibrationError, InputError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import sample_rate_of
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import pad_to_multiple
from cnngru_edge.runtime.inputs.read import Source, fitted, read_input, source_sha256
from cnngru_edge.runtime.session import Session, initial_state

CLIPS_PER_STREAM = 8
"""Clips in a row before the state starts afresh: streams, so that workers can share a corpus."""

WEIGHTED = frozenset({"Conv", "GRU", "LSTM", "MatMul"})
"""Operators whose second input is a weight, if it is a constant; their first is the data."""

FRONTEND_NODES = "/log_mel/"
"""Prefix of the names of the front-end's nodes, which stay float whatever the precision."""
FRONTEND_CONSTANTS = f"{FRONTEND_NODES}constants/"
"""Prefix of those among them that compute the same whatever the audio."""

HALVINGS = 3
"""The smallest subset whose ranges are kept as well is of every 2**HALVINGS-th clip."""


@dataclass
class Observed:
    """What some recordings did to the tensors; parts add up to the whole."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    clips: int = 0

    def merge(self, other: "Observed") -> None:
        """Add what other recordings did."""
        for name, histogram in other.histograms.items():
            self.histograms.setdefault(name, Histogram()).merge(histogram)
        self.clips += other.clips


@dataclass
class Statistics:
    """What some recordings did to the tensors, by the smallest subset that each of them is in."""

    shells: list[Observed] = field(
        default_factory=lambda: [Observed() for _ in range(HALVINGS + 1)]
    )
    lengths: list[int] = field(default_factory=list)  # in samples, tokens or columns
    digests: list[str] = field(default_factory=list)
    errors: list[InputError] = field(default_factory=list)

    def merge(self, other: "Statistics") -> None:
        """Add what another part of the corpus did, which comes after this one."""
        for shell, more in zip(self.shells, other.shells, strict=True):
            shell.merge(more)
        self.lengths += other.lengths
        self.digests += other.digests
        self.errors += other.errors


def calibrate(
    graph: Path,
    clips: Sequence[Source],
    config: CalibrateConfig,
    progress: Callable[[int], None] = lambda clips: None,
) -> tuple[Ranges, list[InputError]]:
    """Ranges of a float graph's tensors on these recordings, and the recordings left out.

    The result does not depend on the number of workers, and memory not on the number of clips.

    Args:
        graph: a float ONNX file of ours.
        clips: recordings, phrases or images, in the order in which they are heard.
        config: see CalibrateConfig.
        progress: called with the number of clips that are newly done.

    Raises:
        SessionError: the graph cannot be opened.
        CalibrationError: not a float graph, or too few recordings that can be read.
    """
    with open_session(graph) as session:
        rate = sample_rate_of(session.spec)
        if graph.suffix != ".onnx" or session.precision != "fp32":
            raise CalibrationError(
                f"{graph}: expected a float .onnx graph, got {session.precision} {graph.suffix}; "
                "'cnngru-edge trace' writes one"
            )
    numbered = list(enumerate(clips))
    groups = [numbered[i : i + CLIPS_PER_STREAM] for i in range(0, len(clips), CLIPS_PER_STREAM)]
    statistics = Statistics()
    with tempfile.TemporaryDirectory() as folder:
        observed = Path(folder) / "observed.onnx"
        proto = ir.to_proto(with_tensors_as_outputs(ir.load(graph)))
        write_file(observed, proto.SerializeToString())
        for part in in_order(_observe, observed, groups, config.workers):
            statistics.merge(part)
            progress(len(part.lengths) + len(part.errors))
    lengths, errors = statistics.lengths, statistics.errors
    if len(lengths) < config.min_clips:
        why = f" ({len(errors)} left out: {errors[0]})" if errors else ""
        raise CalibrationError(
            f"{len(lengths)} recordings can be used{why}, calibration needs at least "
            f"{config.min_clips}; give more, or pass --min-clips to accept fewer"
        )
    *parts, (_, tensors) = _growing(statistics.shells, config)
    ranges = Ranges(
        graph_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        clips_sha256=hashlib.sha256("".join(statistics.digests).encode()).hexdigest(),
        clips=len(lengths),
        duration_s=sum(lengths) / rate if rate else 0.0,
        clip_samples=(min(lengths), round(median(lengths)), max(lengths)),
        method=config.method,
        percentile=config.percentile,
        tensors=tensors,
        convergence=tuple(
            Subset(clips, {name: tensor.amax for name, tensor in part.items()})
            for clips, part in parts
        ),
    )
    return ranges, errors


def smallest_subset(index: int) -> int:
    """How often the clips can be halved until this one is no longer among them, at most HALVINGS.

    A subset takes one of every 2, 4 or 8 clips in a row, and another place in each row of eight:
    so it is no label's alone, however they are sorted, and has clips from everywhere in a stream.
    """
    place = (index + index // CLIPS_PER_STREAM) % 2**HALVINGS
    return HALVINGS if place == 0 else (place & -place).bit_length() - 1


def with_tensors_as_outputs(graph: ir.Model) -> ir.Model:
    """Make every tensor that a plan can need the range of an output of the graph as well."""
    written = (value for node in graph.graph for value in node.outputs)
    values = {value.name: value for value in (*graph.graph.inputs, *written)}
    for name in observed_tensors(graph):
        values[name].dtype = ir.DataType.FLOAT
        graph.graph.outputs.append(values[name])
    return graph


def observed_tensors(graph: ir.Model) -> list[str]:
    """What weighted operators outside the front-end read and, after an activation, write."""
    names: dict[str, None] = {}  # in the order of the graph, each once
    for node in graph.graph:
        if node.op_type not in WEIGHTED or (node.name or "").startswith(FRONTEND_NODES):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue  # a product of two activations
        read, written = node.inputs[0], activated(node.outputs[0])
        for value in (read, written):
            if value is not None and value.name and not value.is_graph_output():
                names[value.name] = None
    return list(names)


def activated(value: ir.Value) -> ir.Value:
    """The tensor after the ReLU that alone reads `value`, or else `value`.

    A Clip between 0 and something, ReLU6, is one too.
    """
    users = [use.node for use in value.uses()]
    if len(users) == 1 and not value.is_graph_output() and _is_relu(users[0]):
        return users[0].outputs[0]
    return value


def _is_relu(node: ir.Node) -> bool:
    if node.op_type == "Clip" and len(node.inputs) > 1:
        low = node.inputs[1]
        return low is not None and low.const_value is not None and low.const_value.numpy() == 0
    return node.op_type == "Relu"


def _growing(
    shells: Sequence[Observed], config: CalibrateConfig
) -> list[tuple[int, dict[str, Range]]]:
    """Clips and ranges of each subset, from the smallest that is not empty to the whole."""
    observed, found = Observed(), []
    for shell in reversed(shells):
        if shell.clips:
            observed.merge(shell)
            ranges = {
                name: range_of(histogram, config.method, config.percentile)
                for name, histogram in sorted(observed.histograms.items())
            }
            found.append((observed.clips, ranges))
    return found


def _observe(session: Session, clips: Sequence[tuple[int, Source]]) -> Statistics:
    """Clips, each with its number in the corpus: one stream, if the model can be one."""
    spec = session.spec
    statistics = Statistics()
    stream_states = spec.state if isinstance(spec, ModelSpec) else ()
    states = {state.name: state.next_name for state in stream_states}
    outside = {"logits", *states.values()}
    state = initial_state(spec, 1) if isinstance(spec, ModelSpec) else {}
    for index, source in clips:
        try:
            given = read_input(spec, source)
        except InputError as e:
            statistics.errors.append(e)
            continue
        if isinstance(spec, ModelSpec):
            feed = {"audio": pad_to_multiple(given, spec.chunk_length)[None], **state}
        else:
            feed = {spec.input.name: fitted(spec, given)[None]}
        outputs = session.run(feed)
        state = {name: outputs[next_name] for name, next_name in states.items()}
        shell = statistics.shells[smallest_subset(index)]
        for name in outputs.keys() - outside:
            shell.histograms.setdefault(name, Histogram()).observe(outputs[name])
        shell.clips += 1
        statistics.lengths.append(given.shape[-1])
        statistics.digests.append(source_sha256(source))
    return statistics
