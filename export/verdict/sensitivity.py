"""Where INT8 hurts: each layer alone and each restored, by gate, by frame, and each tensor's range.

What is measured is an INT8 graph as it is: its own weights, biases and scales are put, layer by
layer, into the float graph, which is then quantized there, in its clip form, and run by the runtime
that runs them all.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import with_tensors_as_outputs
from cnngru_edge.calibration.ranges.histogram import Histogram
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import Affine, Floats
from cnngru_edge.export.lower.cells import HIDDEN
from cnngru_edge.export.quantize.run import layers_of, lower, quantize_lowered
from cnngru_edge.export.quantize.stored import Stored, range_of_affine, read_stored, steps_of
from cnngru_edge.export.verdict.logit_error import FloatAnswers, LogitError, saved, sqnr
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import ExportError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.agreement import sqnr_text
from cnngru_edge.runtime.decode.ctc import frame_s
from cnngru_edge.runtime.inputs.audio import Samples
from cnngru_edge.runtime.session import PRECISION_KEY, SOURCE_KEY
from cnngru_edge.runtime.stream import clip_feed

_BARS = 64  # of a histogram that is shown
_EXPLAINED_DB = 1.0  # by which sums in another order and another form of the graph may differ
_RECURRENT = re.compile(
    r"(?P<layer>.+)\.weight_(?P<matrix>ih|hh)_l\d+(_reverse)?(\.(?P<gate>\w+))?"
)
_MATRICES = {"ih": "input", "hh": "recurrent"}
ALL = "all"

Progress = Callable[[int, int], None]
"""Told how many more measurements are done, of how many."""


@dataclass(frozen=True)
class LayerError:
    """What a layer costs: SQNR in dB at the logits, None where nothing differs; clips flipped."""

    layer: str
    weights: int
    alone_sqnr_db: float | None  # only this layer in INT8
    alone_flips: int
    restored_sqnr_db: float | None  # all of them but this layer
    restored_flips: int

    @property
    def summary(self) -> str:
        """In words."""
        alone, restored = (sqnr_text(x) for x in (self.alone_sqnr_db, self.restored_sqnr_db))
        return f"{alone} alone in INT8, {restored} if it is restored"


@dataclass(frozen=True)
class GateError:
    """The same for the columns of one gate in one matrix of a GRU or LSTM, alone in INT8."""

    layer: str
    matrix: str  # input or recurrent
    gate: str  # z, r or n of a GRU; i, o, f or c of an LSTM
    sqnr_db: float | None
    flips: int


@dataclass(frozen=True)
class Curve:
    """SQNR in dB at the logits, frame by frame from a clip's beginning."""

    name: str
    sqnr_db: tuple[float | None, ...]


@dataclass(frozen=True)
class Bars:
    """A histogram to be shown."""

    low: float
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TensorUse:
    """What a quantized tensor takes on, against what it is quantized between."""

    tensor: str
    read_by: str  # layer
    low: float
    high: float
    minimum: float
    maximum: float
    clipped: float  # share of the values outside low to high
    effective_bits: float
    histogram: Bars


@dataclass(frozen=True)
class Sensitivity:
    """All that was measured; layers and gates with the worst first."""

    clips: int
    sqnr_db: float | None  # of the INT8 graph as it is
    rebuilt_sqnr_db: float | None  # of all its layers put into the float graph
    flips: int
    layers: tuple[LayerError, ...]
    gates: tuple[GateError, ...]
    frame_ms: float
    curves: tuple[Curve, ...]
    tensors: tuple[TensorUse, ...]

    @property
    def is_explained(self) -> bool:
        """Whether the layers together are as wrong as the graph; else something else in it is."""
        if self.sqnr_db is None or self.rebuilt_sqnr_db is None:
            return self.sqnr_db == self.rebuilt_sqnr_db
        return abs(self.sqnr_db - self.rebuilt_sqnr_db) < _EXPLAINED_DB

    def to_json(self) -> dict[str, Any]:
        """For `sensitivity --json` and the report."""
        raw = asdict(self)
        frames = {"frame_ms": raw.pop("frame_ms"), "curves": raw.pop("curves")}
        return raw | {"frames": frames}


def sensitivity(
    reference: Path,
    candidate: Path,
    clips: Sequence[Samples],
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Measure what each layer of an INT8 graph costs.

    Args:
        reference: the float ONNX file that `candidate` was made from.
        candidate: an INT8 ONNX file, for any target.
        clips: samples (S,) at the model's rate.
        progress: see Progress.

    Raises:
        ExportError: not an INT8 graph and the float graph that it was made from.
        CorpusError: no clips.
    """
    stored = read_stored(candidate)
    _check_source(reference, candidate)
    exact = FloatAnswers(reference, clips)
    layers, gates = list(stored.weights), _gates(reference, stored)
    recurrent: dict[str, list[str]] = {}
    for name in layers:
        if parts := _RECURRENT.fullmatch(name):
            recurrent.setdefault(parts["layer"], []).append(name)
    total = 3 + 2 * len(layers) + len(gates) + len(recurrent)

    def measured(error: LogitError) -> LogitError:
        progress(1, total)
        return error

    def only(names: Collection[str], by_gate: bool = False) -> LogitError:
        with saved(_only(reference, stored, names, by_gate)) as path:
            return measured(exact.error(path))

    whole = measured(exact.error(candidate))
    rebuilt = only(layers)
    alone = {name: only([name]) for name in layers}
    restored = {name: only([other for other in layers if other != name]) for name in layers}
    by_gate = {name: only([name], by_gate=True) for name in gates}
    curves = [Curve(ALL, whole.curve[: exact.frames])]
    for layer, matrices in recurrent.items():
        curves.append(Curve(f"{layer} alone", only(matrices).curve[: exact.frames]))
    tensors = tensor_uses(reference, stored, clips)
    progress(1, total)
    found = [
        LayerError(
            name,
            stored.weights[name].size,
            alone[name].sqnr_db,
            alone[name].flips,
            restored[name].sqnr_db,
            restored[name].flips,
        )
        for name in layers
    ]
    return Sensitivity(
        clips=len(clips),
        sqnr_db=whole.sqnr_db,
        rebuilt_sqnr_db=rebuilt.sqnr_db,
        flips=whole.flips,
        layers=tuple(sorted(found, key=lambda layer: _rank(layer.alone_sqnr_db))),
        gates=tuple(
            sorted(
                (_gate_error(name, by_gate[name]) for name in gates),
                key=lambda gate: _rank(gate.sqnr_db),
            )
        ),
        frame_ms=1000 * frame_s(exact.spec),
        curves=tuple(curves),
        tensors=tensors,
    )


def tensor_uses(reference: Path, stored: Stored, clips: Sequence[Samples]) -> tuple[TensorUse, ...]:
    """What the tensors that quantized layers read take on in float, on these clips."""
    model = onnx_graph.load(reference)
    lower(model)
    read: dict[str, tuple[str, Affine]] = {}
    for node in integer.weighted_nodes(model):
        data = node.inputs[0]
        assert data is not None
        if integer.layer_of(node) not in stored.weights:
            continue
        affine = stored.affine_of(data)
        if affine is not None and data.name and not data.is_graph_output():
            read.setdefault(data.name, (integer.layer_of(node), affine))
    histograms: dict[str, Histogram] = {name: Histogram() for name in read}
    with tempfile.TemporaryDirectory() as folder:
        observed = Path(folder) / "observed.onnx"
        ir.save(with_tensors_as_outputs(ir.load(reference)), observed)
        with open_session(observed) as session:
            for samples in clips:
                outputs = session.run(clip_feed(session.spec, samples))
                for name, histogram in histograms.items():
                    if name in outputs:
                        histogram.observe(outputs[name])
    return tuple(
        _use(name, layer, affine, histograms[name])
        for name, (layer, affine) in read.items()
        if histograms[name].total
    )


def effective_bits(histogram: Histogram, affine: Affine) -> float:
    """Bits of a converter that would be as exact on these values: (SQNR - 1.76 dB) / 6.02 dB.

    The effective number of bits of IEEE Std 1241, clipping included.
    """
    values, counts = histogram.centres, histogram.counts
    scale = float(affine.scale)
    low, high = steps_of(affine)
    errors = values - scale * np.clip(np.rint(values / scale), low, high)
    ratio = sqnr(float(counts @ values**2), float(counts @ errors**2))
    return 8.0 if ratio is None else (ratio - 1.76) / 6.02


def _use(name: str, layer: str, affine: Affine, histogram: Histogram) -> TensorUse:
    kept = range_of_affine(affine)
    counts, centres = histogram.counts, histogram.centres
    outside = (centres < kept.low) | (centres > kept.high)
    shown = np.histogram(
        centres, bins=_BARS, range=(histogram.minimum, histogram.maximum), weights=counts
    )
    return TensorUse(
        tensor=name,
        read_by=layer,
        low=kept.low,
        high=kept.high,
        minimum=histogram.minimum,
        maximum=histogram.maximum,
        clipped=float(counts[outside].sum() / histogram.total),
        effective_bits=effective_bits(histogram, affine),
        histogram=Bars(
            float(shown[1][0]), float(shown[1][1] - shown[1][0]), tuple(shown[0].tolist())
        ),
    )


def _check_source(reference: Path, candidate: Path) -> None:
    first, second = (onnx_graph.load(path).metadata_props for path in (reference, candidate))
    if first.get(PRECISION_KEY) != "fp32":
        raise ExportError(f"{reference}: not a float graph; give the one 'cnngru-edge trace' wrote")
    if second.get(SOURCE_KEY) != file_sha256(reference):
        raise ExportError(
            f"{candidate}: not made from {reference}; give the float graph that it was made from"
        )


def _gates(reference: Path, stored: Stored) -> dict[str, Floats]:
    """The weights of each gate of what recurs in INT8, by name, as the graph by gate names them."""
    model = onnx_graph.load(reference)
    lower(model, by_gate=True)
    gates: dict[str, list[str]] = {}  # of each matrix, in the order of its columns
    for name in layers_of(model):
        parts = _RECURRENT.fullmatch(name)
        if parts is not None and parts["gate"] is not None:
            gates.setdefault(name.removesuffix(f".{parts['gate']}"), []).append(parts["gate"])
    found: dict[str, Floats] = {}
    for base, all_gates in gates.items():
        # A GRU whose reset comes before R has two products.
        wholes = {base: all_gates, f"{base}.zr": all_gates[:2], f"{base}.n": all_gates[2:]}
        for whole, columns in wholes.items():
            if whole in stored.weights:
                split = np.split(stored.weights[whole], len(columns), axis=1)
                found |= {f"{base}.{gate}": part for gate, part in zip(columns, split, strict=True)}
    return found


def _only(reference: Path, stored: Stored, names: Collection[str], by_gate: bool) -> ir.Model:
    """The float graph with just these layers as the INT8 graph has them."""
    weights = _gates(reference, stored) if by_gate else stored.weights
    model = onnx_graph.load(reference)
    lower(model, stored.target, by_gate=by_gate)
    for node in integer.weighted_nodes(model):
        if (name := integer.layer_of(node)) in names:
            weight = integer.weight_of(node)
            assert weight is not None
            weight.const_value = ir.tensor(np.ascontiguousarray(weights[name]))
            bias = _bias(node)
            if bias is not None and bias.name in stored.biases:
                bias.const_value = ir.tensor(stored.biases[bias.name])
    tensors = {
        value.name: range_of_affine(affine)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        for value in (*node.inputs, *node.outputs)
        if value is not None
        and value.name
        and HIDDEN not in value.meta
        and (affine := stored.affine_of(value)) is not None
    }
    kept = set(layers_of(model)) - set(names)
    quantize_lowered(model, tensors, stored.target, kept)
    return model


def _bias(node: ir.Node) -> ir.Value | None:
    """The bias of a convolution, or the one that an Add brings to a product."""
    if node.op_type == "Conv":
        return node.inputs[2] if len(node.inputs) > 2 else None
    adds = (use.node for use in node.outputs[0].uses() if use.node.op_type == "Add")
    return next((v for add in adds for v in add.inputs if v and v.is_initializer()), None)


def _gate_error(name: str, error: LogitError) -> GateError:
    parts = _RECURRENT.fullmatch(name)
    assert parts is not None
    return GateError(
        parts["layer"], _MATRICES[parts["matrix"]], parts["gate"], error.sqnr_db, error.flips
    )


def _rank(sqnr_db: float | None) -> float:
    return math.inf if sqnr_db is None else sqnr_db


def sensitivity_json(found: Sensitivity) -> str:
    """As the one object that `sensitivity --json` prints."""
    return json.dumps(found.to_json(), indent=1)
