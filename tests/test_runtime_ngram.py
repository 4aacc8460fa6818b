import math

import pytest

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.stream import ALPHABET, CTC, ModelSpec
from cnngru_edge.runtime.decode.ngram import read_arpa, read_words

SPEC = ModelSpec(ALPHABET, family=CTC)
ARPA = """some words before

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-1.0\t</s>
-0.8\tgo\t-0.4
-0.9\tleft\t-0.3
-2.0\t<unk>

\\2-grams:
-0.2\t<s> go\t-0.1
-0.3 go left -0.25
-0.6\tleft </s>

\\3-grams:
-0.05\t<s> go left

\\end\\
"""


@pytest.fixture
def arpa(tmp_path):
    def write(text):
        path = tmp_path / "words.arpa"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("word", "context", "log10"),
    [
        ("go", ("<s>",), -0.2),
        ("left", ("<s>", "go"), -0.05),
        ("left", ("left", "go"), -0.3),  # of a context that is not there, no weight
        ("go", ("<s>", "go"), -0.1 - 0.4 - 0.8),
        ("go", ("a", "b", "<s>"), -0.2),  # only the last two count
        ("right", ("go", "left"), -0.25 - 0.3 - 2.0),
        ("go", (), -0.8),
    ],
)
def test_what_is_not_there_is_backed_off_to(arpa, word, context, log10):
    ngram = read_arpa(arpa(ARPA), SPEC)
    assert ngram.order == 3
    assert ngram.log_probability(word, context) == pytest.approx(log10 * math.log(10))


def test_the_end_of_a_text_has_a_probability(arpa):
    ngram = read_arpa(arpa(ARPA), SPEC)
    assert ngram.start == ("<s>",)
    assert ngram.end(("go", "left")) == pytest.approx((-0.25 - 0.6) * math.log(10))


def test_without_unknown_words_another_word_is_rare(arpa):
    ngram = read_arpa(arpa("\\data\\\nngram 1=1\n\\1-grams:\n-1 go\n\\end\\\n"), SPEC)
    assert ngram.log_probability("right", ()) == pytest.approx(-7 * math.log(10))
    assert ngram.end(("go",)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ARPA.replace("\\end\\", ""), "not an n-gram model in the ARPA format, or cut short"),
        (ARPA.replace("ngram 2=3", "ngram 2=4"), "not an n-gram model in the ARPA format, or cut"),
        ("go\nleft\n", "not an n-gram model in the ARPA format, or cut short"),
        (ARPA.replace("-0.8\tgo", "much\tgo"), "line 11 is not ARPA: 'much\\\\tgo\\\\t-0.4'"),
        (ARPA.replace("-0.6\tleft </s>", "-0.6\tleft"), "line 18 is not ARPA: '-0.6\\\\tleft'"),
        (ARPA.replace("go", "GO").replace("left", "LEFT"), "no word in it is one for this model"),
    ],
)
def test_what_is_no_arpa_file_is_named(arpa, text, message):
    path = arpa(text)
    with pytest.raises(SessionError, match=f"{path}: {message}"):
        read_arpa(path, SPEC)


def test_words_are_read_by_their_beginnings(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("on\n\no'clock\n  one \n")
    trie = read_words(path, SPEC)
    assert trie["o"]["n"] == {"": {}, "e": {"": {}}}
    assert trie.keys() == {"o"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"on\nUp\n", r"line 2 has 'U', and the characters of this model are \"'abc"),
        (b"go left\n", r"line 1 has ' ', .* give one word on each line"),
        (b"\n\n", r"no words; give one on each line"),
        (b"\xff\xfe", r"not text in UTF-8"),
    ],
)
def test_what_is_no_word_list_is_named(tmp_path, data, message):
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    with pytest.raises(SessionError, match=f"{path}: {message}"):
        read_words(path, SPEC)


def test_a_model_of_words_takes_lists_of_them(tmp_path, arpa):
    spec = ModelSpec(("<blank>", " go", " left"), family=CTC)
    path = tmp_path / "words.txt"
    path.write_text("go\n")
    assert read_words(path, spec) == {"g": {"o": {"": {}}}}
    for line in ("goo", "go left"):
        path.write_text(f"go\n{line}\n")
        with pytest.raises(SessionError) as caught:
            read_words(path, spec)
        assert str(caught.value) == (
            f"{path}: line 2 has '{line}', and the words of this model are go, left; give one word "
            "on each line"
        )
    assert read_arpa(arpa(ARPA), spec).order == 3
    with pytest.raises(SessionError, match="no word in it is one for this model: the words of"):
        read_arpa(arpa(ARPA), ModelSpec(("<blank>", " right"), family=CTC))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for read in (read_words, read_arpa):
        with pytest.raises(SessionError, match=f"{tmp_path / 'none'}: no such file"):
            read(tmp_path / "none", SPEC)
