import numpy as np
import onnx
import onnxruntime
import pytest

from cnngru_edge.export import onnx_graph
from cnngru_edge.export.onnx_graph import export_onnx
from cnngru_edge.models.spec import METADATA_KEY, ModelSpec
from cnngru_edge.runtime.audio import read_audio
from cnngru_edge.runtime.session import PRECISION_KEY, open_session
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


def test_the_dft_kernel_is_not_stored(proto, exported, kws12):
    weights = sum(4 * p.numel() for p in kws12.for_export().parameters())
    # Mel matrix (41 KB), window, one period of the cosine, names: not the 1 MB of the kernel.
    assert (exported / "model.fp32.onnx").stat().st_size < weights + 80_000


def test_onnx_runtime_folds_the_kernel_when_it_loads(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        exported / "model.fp32.onnx", options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert not {"Range", "Mod"} & {node.op_type for node in nodes}


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
