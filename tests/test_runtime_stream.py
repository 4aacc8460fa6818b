import numpy as np
import pytest

from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.session import initial_state
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


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.int8.onnx", "model.int8.chunk.onnx"])
def test_a_stream_gives_what_runs_with_the_states_by_hand_give(exported, rng, name):
    """Whose memory is bound once: lengths may change, and rows begin anew, all the same."""
    with open_session(exported / name) as session, Stream(session) as stream:
        fixed = session.max_samples is not None
        state = initial_state(session.spec, 1)
        for chunks in [1] * 5 if fixed else [1, 3, 3, 1, 2, 2]:
            audio = rng.standard_normal((1, 320 * chunks)).astype(np.float32) / 10
            expected = session.run({"audio": audio, **state})
            state = {s.name: expected[s.next_name] for s in session.spec.state}
            found = stream.push(audio)
            np.testing.assert_array_equal(found, expected["logits"])
            for key, value in stream.state.items():
                np.testing.assert_array_equal(value, state[key])
        again = found.copy()
        stream.push(audio)
        np.testing.assert_array_equal(found, again)  # what was given is not written over
        stream.reset()
        assert not any(value.any() for value in stream.state.values())


def test_one_row_of_many_begins_anew(exported, rng):
    audio = rng.standard_normal((3, 640)).astype(np.float32) / 10
    with open_session(exported / "model.int8.onnx") as session, Stream(session, 3) as stream:
        first = stream.push(audio)
        stream.reset([1])
        again = stream.push(audio)
        with pytest.raises(SessionError, match="ONNX Runtime does not run this step"):
            stream.push(audio[:2])
    np.testing.assert_array_equal(again[1], first[1])
    assert np.abs(again[0] - first[0]).max() > 0
