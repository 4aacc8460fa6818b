import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnngru_edge.models.spec.stream import BLANK, CTC, ModelSpec
from cnngru_edge.runtime.decode.ctc import (
    BeamDecoder,
    DecodeConfig,
    GreedyDecoder,
    Word,
    decoder_of,
    log_softmax,
)
from cnngru_edge.runtime.decode.ngram import Ngram

SPEC = ModelSpec((BLANK, " ", "a", "b"), family=CTC)
OF_WORDS = ModelSpec((BLANK, " a", " ab", " b"), family=CTC)
both = pytest.mark.parametrize("spec", [SPEC, OF_WORDS], ids=["characters", "words"])
FRAME_S = 0.02
NGRAM = Ngram(
    2,
    {
        ("<s>",): (-99.0, -0.2),
        ("</s>",): (-0.7, 0.0),
        ("a",): (-0.5, -0.1),
        ("<unk>",): (-1.5, 0.0),
        ("<s>", "a"): (-0.1, 0.0),
        ("a", "</s>"): (-0.3, 0.0),
    },
)
# No label is so rare that the beam does not try it.
LOGITS = st.integers(1, 5).flatmap(
    lambda frames: arrays(np.float32, (frames, 4), elements=st.floats(-3, 3, width=32))
)
WORDS = {"a": {"": {}, "b": {"": {}}}}  # a, ab


def every_text(logits, spec):
    """The log probability of each text: the sum over all alignments that write it."""
    log_p, found = log_softmax(logits), {}
    for path in itertools.product(range(4), repeat=len(logits)):
        written = "".join(spec.labels[label] for label, _ in itertools.groupby(path) if label)
        text = " ".join(written.split())
        here = sum(log_p[frame, label] for frame, label in enumerate(path))
        found[text] = np.logaddexp(found.get(text, -np.inf), here)
    return found


def logits_of(*frames):
    """Logits where each frame's probability is as given: of blank, space, a, b."""
    return np.log(np.maximum(np.array(frames, np.float32), 1e-9))


def beam(logits, spec=SPEC, **config):
    decoder = BeamDecoder(spec, DecodeConfig(**config))
    decoder.push(logits)
    return decoder


@both
@given(logits=LOGITS)
def test_a_beam_that_keeps_all_sums_over_all_alignments(spec, logits):
    expected = every_text(logits, spec)
    assert beam(logits, spec, beam=10**6).texts == pytest.approx(expected, abs=1e-9)


@both
@given(logits=LOGITS)
def test_a_word_list_leaves_the_texts_of_its_words(spec, logits):
    expected = {t: p for t, p in every_text(logits, spec).items() if set(t.split()) <= {"a", "ab"}}
    assert beam(logits, spec, beam=10**6, words=WORDS).texts == pytest.approx(expected, abs=1e-9)


@both
@given(logits=LOGITS)
def test_an_ngram_adds_what_it_says_to_each_word(spec, logits):
    expected = every_text(logits, spec)
    for text in expected:
        words = text.split()
        if words:
            said = sum(
                NGRAM.log_probability(word, ("<s>", *words[:i])) for i, word in enumerate(words)
            )
            expected[text] += 0.7 * (said + NGRAM.end(("<s>", *words))) + 0.3 * len(words)
    found = beam(logits, spec, beam=10**6, ngram=NGRAM, alpha=0.7, beta=0.3)
    assert found.texts == pytest.approx(expected, abs=1e-9)
    best = max(expected.values())
    assert expected[found.transcript.text] == pytest.approx(best, abs=1e-9)


@both
@given(logits=LOGITS, width=st.integers(1, 4))
def test_a_narrow_beam_never_thinks_a_text_more_probable_than_it_is(spec, logits, width):
    expected = every_text(logits, spec)
    for text, log_p in beam(logits, spec, beam=width).texts.items():
        assert log_p <= expected[text] + 1e-9


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(), DecodeConfig(beam=3), DecodeConfig(words=WORDS, ngram=NGRAM)],
    ids=["greedy", "beam", "words"],
)
@both
@given(data=st.data())
def test_however_the_frames_come_the_text_is_the_same(spec, config, data):
    logits = data.draw(arrays(np.float32, (12, 4), elements=st.floats(-8, 8, width=32)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), max_size=4)))
    whole, cut = decoder_of(spec, config), decoder_of(spec, config)
    whole.push(logits)
    for piece in np.split(logits, cuts):
        cut.push(piece)
    assert cut.transcript == whole.transcript


def test_the_best_text_is_not_always_that_of_the_best_path():
    logits = logits_of([0.6, 0, 0.4, 0], [0.6, 0, 0.4, 0])
    greedy = GreedyDecoder(SPEC)
    greedy.push(logits)
    assert greedy.transcript.text == ""
    found = beam(logits, beam=4)
    assert found.transcript.text == "a"
    assert found.texts == pytest.approx({"": math.log(0.36), "a": math.log(0.64)}, abs=1e-6)


@pytest.mark.parametrize("config", [DecodeConfig(), DecodeConfig(beam=8)], ids=["greedy", "beam"])
def test_words_lie_between_the_peaks_of_their_characters(config):
    decoder = decoder_of(SPEC, config)
    decoder.push(
        logits_of(
            [0.97, 0.01, 0.01, 0.01],
            [0.2, 0, 0.8, 0],  # a
            [0.1, 0, 0.9, 0],  # its peak
            [0.3, 0, 0.7, 0],
            [0.98, 0, 0.02, 0],
            [0.4, 0, 0.6, 0],  # another a
            [0.1, 0.9, 0, 0],
            [0.2, 0.8, 0, 0],
            [1, 0, 0, 0],
            [0.2, 0, 0, 0.8],
            [0.9, 0.1, 0, 0],
        )
    )
    found = decoder.transcript
    assert found.text == "aa b"
    assert found.score == pytest.approx((0.9 * 0.6 * 0.8) ** (1 / 3), rel=1e-3)
    assert found.words == (
        Word("aa", 0.04, 0.12, pytest.approx(math.sqrt(0.9 * 0.6), rel=1e-3)),
        Word("b", 0.18, 0.2, pytest.approx(0.8, rel=1e-3)),
    )


def test_a_text_begins_anew_at_the_frame_that_is_told():
    decoder = beam(logits_of([0.1, 0, 0.9, 0]), beam=2)
    decoder.reset(10)
    assert decoder.transcript == GreedyDecoder(SPEC).transcript
    assert (decoder.transcript.text, decoder.transcript.score) == ("", 0)
    decoder.push(logits_of([1, 0, 0, 0], [0.1, 0, 0, 0.9]))
    assert decoder.transcript.words[0].start == pytest.approx(11 * FRAME_S)


def test_a_word_list_corrects_a_character():
    a_or_b = [0.05, 0, 0.4, 0.55]
    logits = logits_of([0.1, 0, 0.9, 0], [0.9, 0, 0.1, 0], a_or_b, [0.1, 0.9, 0, 0], a_or_b)
    assert beam(logits, beam=8).transcript.text == "ab b"
    assert beam(logits, words=WORDS).transcript.text == "ab a"


@pytest.mark.parametrize(
    "config", [DecodeConfig(), DecodeConfig(beam=8), DecodeConfig(words=WORDS)]
)
def test_a_word_that_is_a_label_lies_at_its_peak(config):
    decoder = decoder_of(OF_WORDS, config)
    decoder.push(
        logits_of(  # blank, " a", " ab", " b"
            [0.2, 0.8, 0, 0],
            [0.1, 0.9, 0, 0],  # its peak
            [1, 0, 0, 0],
            [0.3, 0.7, 0, 0],  # once more
            [0, 0, 1, 0],
        )
    )
    found = decoder.transcript
    assert found.text == "a a ab"
    assert [(word.word, word.start, word.end) for word in found.words] == [
        ("a", FRAME_S, 2 * FRAME_S),
        ("a", 3 * FRAME_S, 4 * FRAME_S),
        ("ab", 4 * FRAME_S, 5 * FRAME_S),
    ]
    assert [word.score for word in found.words] == pytest.approx([0.9, 0.7, 1])


def test_an_unfinished_word_of_a_list_is_not_written():
    words = {"a": {"": {}}, "b": {"b": {"": {}}}}  # a, bb
    certain = logits_of([0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1])
    assert beam(certain, words=words).transcript.text == "a"
    more = logits_of([0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1])
    assert beam(more, words=words).transcript.text == "a bb"


def test_an_ngram_tells_alike_words_apart():
    either = [[0.02, 0, 0.48, 0.5], [0.1, 0.9, 0, 0]]
    ngram = Ngram(1, {("a",): (-0.2, 0.0), ("b",): (-2.0, 0.0)})
    assert beam(logits_of(*either, *either), beam=8).transcript.text == "b b"
    assert beam(logits_of(*either, *either), ngram=ngram).transcript.text == "a a"


def test_a_long_stream_of_sure_frames_has_one_text():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3_000)
    logits = np.eye(4, dtype=np.float32)[labels] * 20
    greedy = GreedyDecoder(SPEC)
    greedy.push(logits)
    assert beam(logits, beam=4).transcript.text == greedy.transcript.text
