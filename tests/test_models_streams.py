import numpy as np
import pytest

from cnngru_edge.export.training.streams import (
    StreamBuilder,
    StreamConfig,
    collate,
    excerpt,
    fade,
    snr_gain,
)

UNDISTURBED = StreamConfig(
    segments=3,
    silence_share=0.0,
    noise_probability=0.0,
    gain_db=(0.0, 0.0),
    speed=(1.0, 1.0),
    gap_s=(0.1, 0.1),
    read_delay_s=0.02,
)


def builder(config, counts=(40, 40), noises=()):
    # A clip of label t is a plateau at 0.1 (t + 1), so that what lies where can be read off.
    targets = np.repeat(np.arange(len(counts)), counts)
    clips = [np.full(1600, 0.1 * (t + 1), np.float32) for t in targets]
    return StreamBuilder(
        clips,
        targets.tolist(),
        list(noises),
        silence=len(counts),
        sample_rate=16_000,
        chunk_length=320,
        config=config,
    )


def test_a_target_is_of_the_word_that_ends_in_its_frame(rng):
    for batch in builder(UNDISTURBED).epoch(4, rng):
        assert batch.audio.shape[1] % 320 == 0
        for audio, frames, targets in zip(batch.audio, batch.frames, batch.targets, strict=True):
            for frame, target in zip(frames, targets, strict=True):
                heard = audio[: (frame + 1) * 320]
                last_word = heard[np.flatnonzero(heard > 0.09)][-800]
                assert last_word == pytest.approx(0.1 * (target + 1), rel=0.02)


def test_an_epoch_hears_every_clip_about_once(rng):
    made = builder(UNDISTURBED, counts=(60, 60))
    words = sum(batch.targets.size for batch in made.epoch(4, rng))
    assert words == made.batches_per_epoch(4) * 12 == 120


def test_a_rare_label_is_heard_more_often():
    made = builder(UNDISTURBED, counts=(64, 64, 16))
    assert np.bincount(np.array(made.targets)[made.order]).tolist() == [64, 64, 32]


def test_the_same_seed_gives_the_same_streams():
    made = builder(StreamConfig(), noises=[np.linspace(-1, 1, 9000, dtype=np.float32)])
    first, second = (next(made.epoch(4, np.random.default_rng(7))) for _ in range(2))
    assert np.array_equal(first.audio, second.audio)
    assert np.array_equal(first.targets, second.targets)
    other = next(made.epoch(4, np.random.default_rng(8)))
    assert not np.array_equal(first.targets, other.targets)


def test_streams_are_never_louder_than_full_scale(rng):
    loud = StreamConfig(gain_db=(20.0, 30.0))
    for batch in builder(loud).epoch(8, rng):
        assert np.abs(batch.audio).max() <= 1.0


def test_silences_have_their_share(rng):
    config = StreamConfig(silence_share=0.3)
    targets = np.concatenate(
        [b.targets.ravel() for b in builder(config, counts=(300, 300)).epoch(10, rng)]
    )
    assert np.mean(targets == 2) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_is_mixed_at_its_snr(rng, snr_db):
    speech = rng.standard_normal(8000).astype(np.float32)
    noise = 0.01 * rng.standard_normal(8000).astype(np.float32)
    mixed = noise * snr_gain(speech, noise, snr_db)
    assert 10 * np.log10(np.mean(speech**2) / np.mean(mixed**2)) == pytest.approx(snr_db, abs=1e-3)


def test_digital_silence_is_no_noise():
    assert snr_gain(np.ones(4, np.float32), np.zeros(4, np.float32), 10.0) == 0


def test_a_short_noise_is_repeated(rng):
    noise = np.arange(10, dtype=np.float32)
    assert excerpt(noise, 25, rng).shape == (25,)
    assert len(excerpt(np.arange(100, dtype=np.float32), 25, rng)) == 25


def test_a_fade_begins_and_ends_at_zero():
    faded = fade(np.ones(100, np.float32), 10)
    assert faded[0] == faded[-1] == 0
    assert (faded[10:90] == 1).all()


def test_frames_are_those_that_hold_the_last_sample():
    batch = collate([(np.zeros(700, np.float32), [320, 321, 700], [0, 1, 0])], chunk=320)
    assert batch.audio.shape == (1, 960)
    assert batch.frames.tolist() == [[0, 1, 2]]
