import pytest
import torch
from conftest import TINY_SPEC
from hypothesis import given, settings
from hypothesis import strategies as st

from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.runtime.inputs.audio import pad_to_multiple, read_audio

CHUNKS = 30


def model_with(spec=TINY_SPEC):
    torch.manual_seed(2)
    return CnnGru(spec).eval()


def in_chunks(model, audio, cuts):
    logits, state = [], model.initial_state(len(audio))
    for start, end in zip([0, *cuts], [*cuts, audio.shape[1]], strict=True):
        if end > start:
            part, state = model(audio[:, start:end], state)
            logits.append(part)
    return torch.cat(logits, dim=1), state


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, CHUNKS), max_size=6).map(sorted), batch=st.sampled_from([1, 3]))
def test_any_chunking_gives_the_same_logits_and_state(cuts, batch):
    model = model_with()
    chunk = model.spec.chunk_length
    audio = torch.randn(batch, CHUNKS * chunk, generator=torch.Generator().manual_seed(batch)) * 0.1
    with torch.inference_mode():
        expected, state = model(audio, model.initial_state(batch))
        found, chunked_state = in_chunks(model, audio, [cut * chunk for cut in cuts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for value, other in zip(state, chunked_state, strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 7], ids="{} frames".format)
def test_real_clips_stream_as_they_are_heard_whole(kws12, demo, frames):
    step = frames * kws12.spec.chunk_length
    for clip in demo.clips[::60]:
        samples = pad_to_multiple(read_audio(clip.path, 16_000).samples, kws12.spec.chunk_length)
        audio = torch.from_numpy(samples)[None]
        with torch.inference_mode():
            expected, _ = kws12(audio, kws12.initial_state())
            found, _ = in_chunks(kws12, audio, list(range(step, audio.shape[1], step)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_rows_of_a_batch_do_not_touch_each_other():
    model = model_with()
    audio = torch.randn(3, 10 * model.spec.chunk_length)
    with torch.inference_mode():
        together, _ = model(audio, model.initial_state(3))
        alone, _ = model(audio[1:2], model.initial_state(1))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


def test_nothing_is_heard_before_it_is_said():
    model = model_with()
    chunk = model.spec.chunk_length
    audio = torch.randn(1, 10 * chunk)
    changed = audio.clone()
    changed[:, 6 * chunk :] = 0
    with torch.inference_mode():
        first, _ = model(audio, model.initial_state())
        second, _ = model(changed, model.initial_state())
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.allclose(first[:, 6:], second[:, 6:])


def test_folding_batch_norms_changes_nothing(tiny):
    folded = tiny.for_export()
    assert not any("norm" in name for name in folded.state_dict())
    audio = torch.randn(2, 20 * tiny.spec.chunk_length)
    with torch.inference_mode():
        expected, _ = tiny(audio, tiny.initial_state(2))
        found, _ = folded(audio, folded.initial_state(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_state_is_as_the_spec_says():
    model = model_with()
    _, state = model(torch.zeros(2, model.spec.chunk_length), model.initial_state(2))
    assert [tuple(s.shape) for s in state] == [(2, *s.shape) for s in model.spec.state]


def test_the_pretrained_model_is_small(kws12):
    assert sum(p.numel() for p in kws12.parameters()) <= 300_000
