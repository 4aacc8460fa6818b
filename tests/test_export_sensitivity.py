import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cnngru_edge.calibration.ranges.choose import Ranges
from cnngru_edge.calibration.ranges.histogram import Histogram
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.graph import qdq as integer
from cnngru_edge.export.graph.qdq import Affine
from cnngru_edge.export.quantize.plan import Plan, Step
from cnngru_edge.export.quantize.run import layers_in, layers_of, lower, quantize_onnx
from cnngru_edge.export.quantize.stored import range_of_affine, read_stored, steps_of
from cnngru_edge.export.verdict.logit_error import FloatAnswers, saved, sqnr
from cnngru_edge.export.verdict.search import fewest_in_float, search_plan
from cnngru_edge.export.verdict.sensitivity import _only, effective_bits, sensitivity
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import CorpusError, ExportError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.stream import clip_logits

FLOAT, INT8 = "model.fp32.onnx", "model.int8.onnx"
RECURRENT = "grus.0.weight_hh_l0"
LAYERS = [
    "convs.0.conv",
    "convs.1.conv",
    "convs.2.conv",
    "convs.3.conv",
    "grus.0.weight_ih_l0",
    RECURRENT,
    "head",
]
FORMS = [INT8, "model.int8.tensorrt.clip.onnx", "model.int8.tensorrt-fp16.clip.onnx"]


@pytest.fixture(scope="module")
def samples(demo):
    return [read_audio(clip.path, 16_000).samples for clip in demo.of("eval")[::15]]


@pytest.fixture(scope="module")
def measured(exported, samples):
    return sensitivity(exported / FLOAT, exported / INT8, samples)


def graphs_of(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def with_scale_times(factor, name, source, target, index=...):
    """An INT8 graph in which one initializer of scales is off."""
    model = onnx.load(source)
    found = 0
    for graph in graphs_of(model.graph):
        for stored in graph.initializer:
            if stored.name == name:
                scales = numpy_helper.to_array(stored).copy()
                scales[index] *= factor
                stored.CopyFrom(numpy_helper.from_array(scales, name))
                found += 1
    assert found == 1
    onnx.save(model, target)
    return target


def logits_of(path, samples):
    with open_session(path) as session:
        return [clip_logits(session, clip) for clip in samples]


def test_every_layer_and_gate_is_measured(measured, samples):
    assert measured.clips == len(samples)
    assert sorted(layer.layer for layer in measured.layers) == sorted(LAYERS)
    alone = [layer.alone_sqnr_db for layer in measured.layers]
    assert alone == sorted(alone)
    assert {(g.layer, g.matrix, g.gate) for g in measured.gates} == {
        ("grus.0", matrix, gate) for matrix in ("input", "recurrent") for gate in "zrn"
    }
    whole = measured.sqnr_db
    assert measured.is_explained
    assert 25 < whole < 45
    assert all(layer.alone_sqnr_db > whole for layer in measured.layers)
    assert all(layer.restored_sqnr_db > whole - 1 for layer in measured.layers)
    assert [curve.name for curve in measured.curves] == ["all", "grus.0 alone"]
    assert {len(curve.sqnr_db) for curve in measured.curves} == {53}  # a second and the flush
    assert measured.frame_ms == 20


def test_errors_of_gates_add_up_to_that_of_their_matrix(measured):
    for matrix, layer in (("input", "grus.0.weight_ih_l0"), ("recurrent", RECURRENT)):
        gates = [g.sqnr_db for g in measured.gates if g.matrix == matrix]
        together = -10 * np.log10(sum(10 ** (-db / 10) for db in gates))
        (whole,) = (one.alone_sqnr_db for one in measured.layers if one.layer == layer)
        assert together == pytest.approx(whole, abs=3)


@pytest.mark.parametrize("form", FORMS)
def test_layer_by_layer_the_graph_is_made_again(exported, samples, form):
    stored = read_stored(exported / form)
    assert sorted(stored.weights) == sorted(LAYERS)
    with saved(_only(exported / FLOAT, stored, LAYERS, by_gate=False)) as path:
        for again, logits in zip(
            logits_of(path, samples[:4]), logits_of(exported / form, samples[:4]), strict=True
        ):
            np.testing.assert_allclose(again, logits, atol=2e-3)
    with saved(_only(exported / FLOAT, stored, [], by_gate=True)) as path:
        expected = logits_of(exported / FLOAT, samples[:2])
        for again, logits in zip(logits_of(path, samples[:2]), expected, strict=True):
            tolerance = 1e-4 if form != FORMS[2] else 0.05  # FP16 where it is not in INT8
            np.testing.assert_allclose(again, logits, atol=tolerance)


@pytest.mark.parametrize("index", [..., 300], ids=["all", "one unit"])
def test_a_damaged_layer_is_named(exported, samples, tmp_path, index):
    damaged = with_scale_times(
        4, f"{RECURRENT}_scale", exported / INT8, tmp_path / "damaged.onnx", index
    )
    found = sensitivity(exported / FLOAT, damaged, samples)
    worst = found.layers[0]
    assert worst.layer == RECURRENT
    assert worst.restored_sqnr_db > found.sqnr_db + 3
    assert all(layer.restored_sqnr_db < found.sqnr_db + 3 for layer in found.layers[1:])
    assert (found.gates[0].matrix, found.gates[0].gate) == ("recurrent", "n")  # unit 300 is of n


def test_a_damaged_bias_is_named(exported, samples, tmp_path):
    model = onnx.load(exported / INT8)
    (bias,) = (i for i in model.graph.initializer if i.name == "convs.2.conv.bias_int32")
    bias.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(bias), bias.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    found = sensitivity(exported / FLOAT, tmp_path / "damaged.onnx", samples)
    assert found.sqnr_db < 20
    assert found.layers[0].layer == "convs.2.conv"
    assert found.layers[0].restored_sqnr_db > 30
    assert found.is_explained


def test_what_no_layer_explains_is_said(cli, exported, tmp_path):
    """The gates are the other way round: neither a weight nor a bias nor a scale is wrong."""
    model = onnx.load(exported / INT8)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    (sigmoid,) = (node for node in body.node if node.op_type == "Sigmoid")
    (gates,) = (node for node in body.node if sigmoid.output[0] in node.input)
    gates.output[0], gates.output[1] = gates.output[1], gates.output[0]
    onnx.save(model, tmp_path / "damaged.onnx")
    done = cli("sensitivity", exported / FLOAT, tmp_path / "damaged.onnx", "--clips", 12)
    assert done.exit_code == 0
    assert "of it: something else in the graph is not as in the float graph" in done.stdout


def test_a_range_that_clips_is_named(exported, samples, tmp_path):
    name = "/convs.2/Concat_output_0"  # takes the range of the tensor that it joins to its past
    ranges = Ranges.load(exported / "ranges.json", file_sha256(exported / FLOAT))
    narrow = {
        tensor: replace(kept, high=kept.high / 16) if tensor == "/convs.1/Relu_output_0" else kept
        for tensor, kept in ranges.tensors.items()
    }
    replace(ranges, tensors=narrow).save(tmp_path / "ranges.json")
    quantize_onnx(exported / FLOAT, tmp_path / "ranges.json", tmp_path / "narrow.onnx")
    found = sensitivity(exported / FLOAT, tmp_path / "narrow.onnx", samples)
    (use,) = (use for use in found.tensors if use.tensor == name)
    assert use.read_by == "convs.2.conv"
    assert use.clipped > 0.01
    assert use.effective_bits == min(other.effective_bits for other in found.tensors)
    # It is written by one layer and read by the next.
    assert {layer.layer for layer in found.layers[:2]} == {"convs.1.conv", "convs.2.conv"}


def test_the_use_of_a_range_is_counted(measured):
    for use in measured.tensors:
        assert use.low <= 0 < use.high
        assert use.minimum < use.maximum
        assert 0 <= use.clipped < 0.01
        assert 4 < use.effective_bits < 8
        bars = use.histogram
        assert bars.low == pytest.approx(use.minimum)
        assert bars.low + len(bars.counts) * bars.width == pytest.approx(use.maximum)
    assert [use.read_by for use in measured.tensors] == LAYERS[:5]  # h is known to be in -1 to 1


@pytest.mark.parametrize(
    ("zero_point", "scale", "bits"),
    [
        (np.uint8(128), 1 / 127, 7.7),  # of 8: evenly spread values have no crest
        (np.uint8(128), 4 / 127, 5.7),
        (np.uint8(128), 0.25 / 127, 0.33),  # three of four values clipped: 3.75 dB
    ],
)
def test_effective_bits_of_evenly_spread_values(rng, zero_point, scale, bits):
    histogram = Histogram()
    histogram.observe(rng.uniform(-1, 1, 400_000).astype(np.float32))
    found = effective_bits(histogram, Affine(np.float32(scale), zero_point))
    assert found == pytest.approx(bits, abs=0.15)


def test_an_affine_is_that_of_its_range():
    for affine in (
        Affine(np.float32(0.013), np.uint8(0)),
        Affine(np.float32(0.013), np.uint8(128)),
    ):
        assert integer.unsigned_affine(range_of_affine(affine)) == affine
    affine = Affine(np.float32(0.013), np.int8(0))
    assert integer.symmetric_affine(range_of_affine(affine)) == affine
    assert steps_of(affine) == (-127, 127)


def test_sqnr_of_powers():
    assert sqnr(100, 1) == pytest.approx(20)
    assert sqnr(1, 0) is None
    assert sqnr(0, 1) == -np.inf


def test_json_has_it_all(measured):
    raw = json.loads(json.dumps(measured.to_json()))
    assert raw["frames"]["frame_ms"] == 20
    assert raw["layers"][0]["layer"] == measured.layers[0].layer


def test_what_does_not_fit_together_is_refused(exported, samples, tmp_path):
    with pytest.raises(ExportError, match=r"fp32.onnx: not in INT8; give the graph that"):
        sensitivity(exported / FLOAT, exported / FLOAT, samples)
    with pytest.raises(ExportError, match=r"int8.onnx: not a float graph"):
        sensitivity(exported / INT8, exported / INT8, samples)
    other = onnx.load(exported / FLOAT)
    other.doc_string = "another file"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"not made from .*other.onnx; give the float graph"):
        sensitivity(tmp_path / "other.onnx", exported / INT8, samples)
    with pytest.raises(CorpusError, match="no recordings to measure on"):
        sensitivity(exported / FLOAT, exported / INT8, [])


def test_by_gate_the_float_graph_answers_the_same(exported, samples):
    graph = onnx_graph.load(exported / FLOAT)
    lower(graph, by_gate=True)
    assert {f"grus.0.weight_{m}_l0.{gate}" for m in ("ih", "hh") for gate in "zrn"} < set(
        layers_of(graph)
    )
    with saved(graph) as path:
        error = FloatAnswers(exported / FLOAT, samples[:4]).error(path)
    assert error.sqnr_db is None or error.sqnr_db > 90
    assert error.flips == 0


# Mixed precision.


@pytest.mark.parametrize("target", ["cpu", "tensorrt", "tensorrt-fp16"])
@pytest.mark.parametrize(
    "kept", [["convs.0.conv"], ["convs.1.conv", RECURRENT], LAYERS[:4], LAYERS]
)
@pytest.mark.parametrize("frames", [None, 2])
def test_a_plan_keeps_layers_in_float(exported, tmp_path, target, kept, frames):
    plan = Plan(tuple(LAYERS), frozenset(kept))
    out = tmp_path / "mixed.onnx"
    quantize_onnx(exported / FLOAT, exported / "ranges.json", out, target, frames, plan)
    assert sorted(read_stored(out).weights) == sorted(set(LAYERS) - set(kept))
    with open_session(out) as session:  # and ONNX Runtime takes it
        assert session.spec.labels


def test_the_more_is_in_float_the_closer_it_answers(exported, samples, tmp_path):
    exact = FloatAnswers(exported / FLOAT, samples)
    found = []
    for kept in ([], LAYERS[:1], LAYERS[:4], LAYERS[:6]):
        plan = Plan(tuple(LAYERS), frozenset(kept))
        out = tmp_path / "mixed.onnx"
        quantize_onnx(exported / FLOAT, exported / "ranges.json", out, plan=plan)
        found.append(exact.error(out).sqnr_db)
    assert found == sorted(found)
    assert found[-1] > found[0] + 6


@pytest.fixture
def labelled(exported, samples):
    exact = FloatAnswers(exported / FLOAT, samples)
    return list(zip(samples, exact.labels, strict=True))


@pytest.fixture
def ranges(exported):
    return Ranges.load(exported / "ranges.json", file_sha256(exported / FLOAT))


def test_nothing_is_kept_in_float_for_nothing(exported, ranges, labelled):
    plan = search_plan(exported / FLOAT, ranges, labelled, 5)
    assert plan.layers == tuple(layers_in(exported / FLOAT))
    assert plan.kept_in_float == frozenset()
    assert [step.kept_in_float for step in plan.log] == [()]


@pytest.mark.parametrize("bad", [["convs.0.conv"], ["convs.0.conv", "grus.0.weight_ih_l0"]])
def test_the_search_finds_the_layers_to_blame(exported, ranges, labelled, bad):
    # What a layer reads is clipped to next to nothing.
    read = {
        "convs.0.conv": "/convs.0/Concat_output_0",
        "grus.0.weight_ih_l0": "/convs.3/Relu_output_0",
    }
    spoiled = dict(ranges.tensors)
    for layer in bad:
        kept = spoiled[read[layer]]
        spoiled[read[layer]] = replace(kept, low=kept.low / 64, high=kept.high / 64)
    done = []
    plan = search_plan(
        exported / FLOAT,
        replace(ranges, tensors=spoiled),
        labelled,
        2,
        lambda n, total: done.append((n, total)),
    )
    assert plan.log[0].drop > 20
    # The last convolution writes what the GRU's input product reads: one of them is float or both.
    expected = {"convs.0.conv"} if len(bad) == 1 else {"convs.0.conv", "convs.3.conv", bad[1]}
    assert plan.kept_in_float <= expected
    assert "convs.0.conv" in plan.kept_in_float
    (chosen,) = {step for step in plan.log if set(step.kept_in_float) == plan.kept_in_float}
    assert chosen.drop <= 2
    for step in plan.log:  # and nothing smaller that was tried is enough
        assert step.drop > 2 or len(step.kept_in_float) >= len(plan.kept_in_float)
    assert sum(n for n, _ in done) == done[0][1]


def test_what_turns_out_not_to_be_needed_goes_back_to_int8():
    """`c` helps most at first, and is of no use once the two to blame are in float."""
    drops = {"": 9.0, "c": 5.0, "ac": 3.0, "abc": 0.0, "ab": 0.5}
    log = []

    def tried(kept):
        log.append("".join(sorted(kept)))
        return Step(tuple(kept), drops.get(log[-1], 8.0), 0, 20.0)

    assert sorted(fewest_in_float("abcd", tried, 1).kept_in_float) == ["a", "b"]
    assert log[-3:] == ["ab", "b", "a"]
    assert len(log) == 1 + 4 + 3 + 2 + 3


def test_a_budget_that_nothing_holds_leaves_all_in_float(exported, ranges, labelled):
    samples = [samples for samples, _ in labelled]
    wrong = [(s, "yes" if label != "yes" else "no") for s, label in labelled]
    plan = search_plan(exported / FLOAT, ranges, wrong[:2], -1)  # more right than float: impossible
    assert plan.kept_in_float == frozenset(LAYERS)
    assert len(samples) > 2


# The commands.


def test_the_command_names_the_worst_layer(cli, exported, tmp_path):
    damaged = with_scale_times(4, f"{RECURRENT}_scale", exported / INT8, tmp_path / "damaged.onnx")
    judged = cli("compare", exported / FLOAT, damaged)
    assert judged.exit_code == 1
    assert judged.stdout.splitlines()[0].endswith(": worse")
    done = cli("sensitivity", exported / FLOAT, damaged, "--clips", 24, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["clips"], found["layers"][0]["layer"]) == (24, RECURRENT)
    shown = cli("sensitivity", exported / FLOAT, damaged, "--clips", 24)
    assert shown.stdout.startswith("24 clips: all in INT8 ")
    assert RECURRENT in shown.stdout.splitlines()[4]


def test_quantize_follows_a_plan(cli, exported, tmp_path):
    Plan(tuple(LAYERS), frozenset({"convs.0.conv"})).save(tmp_path / "plan.json")
    out = tmp_path / "mixed.onnx"
    files = exported / FLOAT, "--ranges", exported / "ranges.json", "--out", out
    done = cli("quantize", *files, "--plan", tmp_path / "plan.json")
    assert done.exit_code == 0
    assert "99.7% of the weights in INT8" in done.stdout
    inspected = json.loads(cli("inspect", out, "--json").stdout)
    precision = {layer["name"]: layer["precision"] for layer in inspected["coverage"]["layers"]}
    assert {name for name, found in precision.items() if found != "int8"} == {"convs.0.conv"}
    assert precision["convs.0.conv"] == "fp32"


def test_a_plan_of_another_model_is_one_line(refused, exported, tmp_path):
    Plan(("other",)).save(tmp_path / "plan.json")
    files = exported / FLOAT, "--ranges", exported / "ranges.json", "--out", tmp_path / "a.onnx"
    said = refused("quantize", *files, "--plan", tmp_path / "plan.json")
    assert said.startswith("the plan is of another model: convs.0.conv, convs.1.conv, ")
