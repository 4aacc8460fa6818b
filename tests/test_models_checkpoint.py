import torch

from cnngru_edge.models.checkpoint import load_checkpoint, save_checkpoint


def test_a_checkpoint_alone_gives_the_model_back(tiny, tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint)
    assert loaded.spec == tiny.spec
    audio = torch.randn(1, 10 * tiny.spec.chunk_length)
    expected, _ = tiny(audio, tiny.initial_state())
    found, _ = loaded(audio, loaded.initial_state())
    assert torch.equal(found, expected)


def test_the_same_model_gives_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tiny, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
