import numpy as np
import pytest

from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.audio import read_audio
from cnngru_edge.runtime.session import open_session
from cnngru_edge.runtime.stream import Stream, clip_logits


def test_a_session_of_one_length_answers_as_one_of_any(exported, demo):
    with (
        open_session(exported / "model.int8.onnx") as whole,
        open_session(exported / "model.int8.chunk.onnx") as chunk,
    ):
        for clip in demo.clips[::100]:
            samples = read_audio(clip.path, 16_000).samples
            np.testing.assert_allclose(
                clip_logits(chunk, samples), clip_logits(whole, samples), rtol=0, atol=0.05
            )


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8.chunk.onnx"])
@pytest.mark.parametrize("length", [0, 100, 330])
def test_audio_that_is_no_multiple_of_a_chunk_is_refused(exported, name, length):
    with (
        open_session(exported / name) as session,
        pytest.raises(SessionError, match=f"320 samples at a time, and {length} are no multiple"),
    ):
        Stream(session).push(np.zeros((1, length), np.float32))


def test_a_session_for_one_stream_says_so(exported):
    with (
        open_session(exported / "model.int8.chunk.onnx") as session,
        pytest.raises(SessionError, match="is for 1 at a time, not for 8 streams"),
    ):
        Stream(session, batch=8)
