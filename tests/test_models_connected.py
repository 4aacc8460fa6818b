import numpy as np
import pytest

from cnngru_edge.export.training.connected import (
    ConnectedConfig,
    Joiner,
    RowBuilder,
    Utterance,
    collate,
    connect,
    speech_edges,
)

RATE = 16_000
WORDS = ("go", "stop", "left", "two")
CALM = ConnectedConfig(
    silence_share=0.0,
    noise_probability=0.0,
    gain_db=(0.0, 0.0),
    speed=(1.0, 1.0),
    phrase_share=0.0,
)


def spoken(text, speaker, level=0.5):
    """Half a second of a tone in a second of silence."""
    samples = np.zeros(RATE, np.float32)
    samples[4000:12_000] = level * np.sin(np.arange(8000) / 5)
    return Utterance(samples, text, speaker)


@pytest.fixture
def clips():
    return [spoken(word, speaker) for speaker in ("s1", "s2", "s3") for word in WORDS]


def builder(clips, config, noises=()):
    return RowBuilder(clips, list(noises), sample_rate=RATE, chunk_length=640, config=config)


def test_strings_are_of_one_speaker_and_no_clip_is_in_one_twice(clips, rng):
    joiner = Joiner(clips, RATE, ConnectedConfig(phrase_share=0.5))
    lengths = set()
    for first in range(len(clips)):
        for _ in range(20):
            chosen = joiner.choose(first, rng, (1, 6))
            assert {clips[i].speaker for i in chosen} == {clips[first].speaker}
            assert len(set(chosen)) == len(chosen)
            lengths.add(len(chosen))
    assert lengths == {1, 2, 3, 4}  # a speaker has no more


def test_a_clip_of_nobody_known_is_joined_with_no_other(rng):
    clips = [spoken(word, "") for word in WORDS]
    assert Joiner(clips, RATE, CALM).choose(2, rng, (3, 3)) == [2]


def test_phrases_are_of_the_grammar(clips, rng):
    joiner = Joiner(clips, RATE, ConnectedConfig(phrase_share=1.0))
    strings = {joiner.text(joiner.choose(0, rng, (1, 2))) for _ in range(400)}
    assert "go left" in strings
    ordinary = Joiner(clips, RATE, CALM)
    assert "left go" in {ordinary.text(ordinary.choose(0, rng, (2, 2))) for _ in range(200)}


def test_a_gap_is_between_speech_and_silent_edges_overlap(clips, rng):
    config = ConnectedConfig(gap_s=(0.3, 0.3))
    joined = Joiner(clips, RATE, config).join([0, 1], rng)
    first, last = speech_edges(clips[0].samples, RATE)
    assert len(joined) == last + round(0.3 * RATE) - first + RATE
    start = len(joined) - RATE
    assert start < RATE  # the edges of the two lie over each other
    assert np.abs(joined[start + 4100 : start + 11_900]).max() == pytest.approx(0.5, rel=0.01)


def test_speech_has_edges_with_a_margin():
    first, last = speech_edges(spoken("go", "s").samples, RATE)
    assert 4000 - 0.08 * RATE <= first < 4000
    assert 12_000 < last <= 12_000 + 0.12 * RATE
    assert speech_edges(np.zeros(1000, np.float32), RATE) == (0, 1000)
    assert speech_edges(np.ones(100, np.float32), RATE) == (0, 100)  # shorter than a frame


def test_the_same_seed_gives_the_same_rows(clips):
    made = builder(clips, ConnectedConfig(), [np.linspace(-1, 1, 9000, dtype=np.float32)])
    first, again = (next(made.epoch(4, np.random.default_rng(7))) for _ in range(2))
    assert np.array_equal(first.audio, again.audio)
    assert (first.texts, first.ends) == (again.texts, again.ends)
    assert next(made.epoch(4, np.random.default_rng(8))).texts != first.texts


def test_rows_are_cut_where_their_strings_end(clips, rng):
    for batch in builder(clips, CALM).epoch(4, rng):
        for audio, ends, texts in zip(batch.audio, batch.ends, batch.texts, strict=True):
            assert len(ends) == len(texts)
            assert sum(len(text.split()) for text in texts) >= CALM.words_in_row
            for start, end, text in zip((0, *ends), ends, texts, strict=False):
                loud = np.abs(audio[start * 640 : end * 640]) > 0.2
                # A word is half a second of tone, above 0.2 for 74 % of it.
                assert loud.sum() >= 0.7 * 5900 * len(text.split())
                assert not loud[-320:].any()  # a part ends with silence


def test_it_begins_with_single_words_without_noise(clips, rng):
    noises = [np.ones(9000, np.float32)]
    config = ConnectedConfig(
        noise_probability=1.0, silence_share=0.0, gain_db=(0.0, 0.0), speed=(1.0, 1.0)
    )
    made = builder(clips, config, noises)
    for batch in made.epoch(4, rng, ease=0.0):
        assert all(len(text.split()) == 1 for texts in batch.texts for text in texts)
        assert (batch.audio == 0).any()
    later = [text for batch in made.epoch(4, rng) for texts in batch.texts for text in texts]
    assert max(len(text.split()) for text in later) == 4


def test_silences_have_no_text(clips, rng):
    made = builder(clips, ConnectedConfig(silence_share=0.5))
    texts = [text for row in next(made.epoch(20, rng)).texts for text in row]
    assert 0.2 < texts.count("") / len(texts) < 0.8


def test_rows_are_never_louder_than_full_scale(clips, rng):
    loud = ConnectedConfig(gain_db=(20.0, 30.0))
    assert np.abs(next(builder(clips, loud).epoch(8, rng)).audio).max() <= 1.0


def test_sentences_are_heard_as_they_are(rng):
    sentences = [spoken("go left at two", "s1"), spoken("stop", "s1")]
    config = ConnectedConfig(words=(1, 1), words_in_row=5)
    texts = [text for row in next(builder(sentences, config).epoch(9, rng)).texts for text in row]
    assert set(texts) == {"go left at two", "stop", ""}


def test_strings_to_evaluate_with_hold_every_clip(clips):
    strings = connect(clips, RATE, CALM, np.random.default_rng(1))
    again = connect(clips, RATE, CALM, np.random.default_rng(1))
    assert len(strings) == len(clips)
    for clip, string, same in zip(clips, strings, again, strict=True):
        assert clip.text in string.text.split()
        assert clip.speaker == string.speaker
        assert np.array_equal(string.samples, same.samples)


def test_a_part_ends_with_the_frame_that_holds_its_last_sample():
    batch = collate([(np.ones(1300, np.float32), [640, 1300], ["go", "stop"])], chunk=640)
    assert batch.audio.shape == (1, 1920)
    assert batch.ends == ((1, 3),)
