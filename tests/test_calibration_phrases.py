from collections import Counter

import pytest
from click.testing import CliRunner

from cnngru_edge.calibration.corpus.phrases import _INTENTS, _SLOTS, make_phrases
from cnngru_edge.calibration.corpus.read import read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.runtime.inputs.read import words_of


@pytest.fixture(scope="module")
def phrases():
    return list(make_phrases(600, 120, 0))


def of(phrases, set_name):
    return [phrase for phrase in phrases if phrase.set == set_name]


def words(phrases):
    return {word for phrase in phrases for word in phrase.text.split()}


def test_no_phrase_is_there_twice(phrases):
    assert len(phrases) == 840
    assert len({phrase.text for phrase in phrases}) == 840


def test_every_intent_is_as_frequent_in_each_set(phrases):
    for set_name, each in (("train", 50), ("calib", 10), ("eval", 10)):
        counts = Counter(phrase.label for phrase in of(phrases, set_name))
        assert counts == dict.fromkeys(_INTENTS, each)


def test_the_sets_are_worded_otherwise(phrases):
    train, held_out = words(of(phrases, "train")), of(phrases, "eval")
    assert {"attic", "reggae", "lisbon"} <= words(held_out) - train
    assert not any("nursery" in phrase.text for phrase in of(phrases, "train"))
    strange = [phrase for phrase in held_out if not set(phrase.text.split()) <= train]
    assert len(strange) > len(held_out) / 5


def test_the_same_seed_says_the_same(phrases):
    assert list(make_phrases(600, 120, 0)) == phrases
    assert not {p.text for p in make_phrases(60, 12, 1)} >= {p.text for p in phrases[:12]}


def test_what_is_held_out_does_not_depend_on_the_count(phrases):
    assert list(make_phrases(0, 120, 0)) == phrases[:240]


def test_each_is_written_as_it_is_read(phrases):
    assert all(" ".join(words_of(phrase.text)) == phrase.text for phrase in phrases)


def test_every_slot_of_every_pattern_is_known():
    for patterns in _INTENTS.values():
        for text in (*patterns.everywhere, *patterns.calib, *patterns.eval):
            assert text.format(**_SLOTS)
            assert text.count("(") == text.count(")")


def test_the_command_writes_a_corpus(tmp_path):
    out = tmp_path / "new" / "phrases"
    options = ["demo", "phrases", "--out", str(out), "--count", "24", "--held-out", "12"]
    result = CliRunner().invoke(main, options)
    assert (result.exit_code, result.stdout) == (0, f"{out / 'manifest.csv'}\n")
    corpus = read_corpus(out)
    assert [len(corpus.of(name)) for name in ("train", "calib", "eval")] == [24, 12, 12]
    made = list(make_phrases(24, 12, 0))
    assert [(c.source, c.label, c.set) for c in corpus.clips] == [
        (p.text, p.label, p.set) for p in made
    ]


def test_a_folder_with_something_in_it_is_left_as_it_is(refused, old):
    assert refused("demo", "phrases", "--out", old) == (
        f"{old}: not empty; a corpus goes into a folder of its own"
    )
