import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.trace import model as onnx_export
from cnngru_edge.export.trace.model import export_onnx
from cnngru_edge.models.errors import ExportError
from cnngru_edge.models.spec.stream import METADATA_KEY, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import PRECISION_KEY
from cnngru_edge.runtime.stream import Stream, clip_logits


@pytest.fixture(scope="module")
def proto(exported):
    return onnx.load(exported / "model.fp32.onnx")


def test_it_is_of_the_version_that_every_target_reads(proto):
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
    assert proto.ir_version <= 8


def test_the_spec_travels_inside(proto, kws12):
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert ModelSpec.from_json(metadata[METADATA_KEY]) == kws12.spec
    assert metadata[PRECISION_KEY] == "fp32"


def test_batch_and_samples_are_free_and_every_state_has_a_name(exported, kws12):
    with open_session(exported / "model.fp32.onnx") as session:
        assert [(i.name, i.shape) for i in session.inputs] == [
            ("audio", ("N", "S")),
            *((s.name, ("N", *s.shape)) for s in kws12.spec.state),
        ]
        assert [(o.name, o.shape) for o in session.outputs] == [
            ("logits", ("N", "T", 12)),
            *((s.next_name, ("N", *s.shape)) for s in kws12.spec.state),
        ]


def test_weights_are_named_after_their_modules(proto):
    names = {i.name for i in proto.graph.initializer}
    assert {"convs.0.conv.weight", "grus.0.W", "grus.0.R", "grus.0.B", "head.weight"} <= names


def test_the_front_ends_matrices_are_not_stored(proto, exported, kws12):
    weights = sum(4 * p.numel() for p in kws12.for_export().parameters())
    # Names, nodes and what the matrices are computed from; they would take 0.5 MB.
    assert (exported / "model.fp32.onnx").stat().st_size < weights + 30_000


def test_the_front_end_computes_its_matrices(proto, kws12):
    names = [
        node.input[1]
        for node in proto.graph.node
        if node.op_type == "MatMul" and node.name.startswith(FRONTEND_NODES)
    ]
    typed = onnx.shape_inference.infer_shapes(proto)
    computed = onnx.utils.Extractor(typed).extract_model([], names)
    session = onnxruntime.InferenceSession(
        computed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = (kws12.log_mel.cosine, kws12.log_mel.sine, kws12.log_mel.mel)
    for found, matrix in zip(session.run(names, {}), expected, strict=True):
        np.testing.assert_allclose(found, matrix.numpy(), rtol=0, atol=2e-6)


def test_onnx_runtime_folds_the_matrices_when_it_loads(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        exported / "model.fp32.onnx", options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert not {"Cos", "Sin", "Round"} & {node.op_type for node in nodes}
    assert not [node.name for node in nodes if node.name.startswith(f"{FRONTEND_NODES}constants/")]


def test_no_reshape_reads_its_target_off_a_shape(proto):
    stored = {i.name for i in proto.graph.initializer}
    targets = [node.input[1] for node in proto.graph.node if node.op_type == "Reshape"]
    assert len(targets) == 2  # the front-end's hops, and what the GRU reads
    assert set(targets) <= stored


RESHAPE = """
<ir_version: 8, opset_import: ["" : 17]>
reshape (float[A,B,3,2] x, float[A,B] other) => (float[K,L,M] y)
<int64 i0 = {0}, int64 i1 = {1}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
 int64[1] rest = {-1}, int64[1] last = {6}> {
  shape = Shape(x)
  d0 = Gather(shape, i0)
  d1 = Gather(shape, i1)
  a = Unsqueeze(d0, zero)
  b = Unsqueeze(d1, zero)
  both = Slice(shape, zero, two)
  second = Slice(shape, one, two)
  target = Concat<axis = 0>(TARGET)
  y = Reshape(x, target)
}
"""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a, b, rest", [0, 0, -1]),
        ("both, last", [0, 0, 6]),
        ("a, rest, two", [0, -1, 2]),
        ("a, second, rest", [0, 0, -1]),
    ],
)
def test_a_reshape_copies_the_dimensions_that_it_keeps(target, expected):
    graph = ir.from_proto(parser.parse_model(RESHAPE.replace("TARGET", target)))
    onnx_export.copy_leading_dimensions(graph)
    (node,) = graph.graph
    assert node.inputs[1].const_value.numpy().tolist() == expected


@pytest.mark.parametrize(
    ("old", "target"),
    [("Shape(x)", "b, a, rest"), ("Shape(x)", "rest, a"), ("Shape(other)", "a, b, rest")],
    ids=["swapped", "moved", "of-another"],
)
def test_a_reshape_to_other_dimensions_is_refused(old, target):
    text = RESHAPE.replace("TARGET", target).replace("Shape(x)", old)
    with pytest.raises(ExportError, match="a Reshape to something else than its input's dimens"):
        onnx_export.copy_leading_dimensions(ir.from_proto(parser.parse_model(text)))


# The last bit of a float can round to the next of 255 steps, which the layers after it pass on.
TOLERANCE = {"model.fp32.onnx": 1e-5, "model.int8.onnx": 0.05}


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.int8.onnx"])
@pytest.mark.parametrize("frames", [1, 3], ids="{} frames".format)
def test_chunks_give_what_the_whole_clip_gives(exported, demo, name, frames):
    with open_session(exported / name) as session:
        step = frames * session.spec.chunk_length
        for clip in demo.clips[::100]:
            samples = read_audio(clip.path, 16_000).samples
            stream = Stream(session)
            parts = [stream.push(samples[None, i : i + step]) for i in range(0, 15_360, step)]
            found = np.concatenate(parts, axis=1)[0]
            whole = clip_logits(session, samples)[: len(found)]  # and the flush after it
            np.testing.assert_allclose(found, whole, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.int8.onnx"])
def test_streams_side_by_side_do_not_touch_each_other(exported, demo, name):
    clips = [read_audio(clip.path, 16_000).samples for clip in demo.clips[::150]]
    with open_session(exported / name) as session:
        together = Stream(session, batch=len(clips)).push(np.stack(clips))
        for row, clip in zip(together, clips, strict=True):
            alone = clip_logits(session, clip)[: len(row)]
            np.testing.assert_allclose(row, alone, rtol=0, atol=TOLERANCE[name])


def test_the_same_model_gives_the_same_file(tiny, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        export_onnx(tiny.for_export(), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_several_layers_keep_their_names(tiny, tmp_path):
    export_onnx(tiny.for_export(), tmp_path / "tiny.onnx")
    graph = onnx_graph.load(tmp_path / "tiny.onnx")
    grus = [node for node in graph.graph if node.op_type == "GRU"]
    assert [onnx_graph.module_of(node) for node in grus] == ["grus.0", "grus.1"]
    assert [node.inputs[1].name for node in grus] == ["grus.0.W", "grus.1.W"]
