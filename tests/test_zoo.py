"""The table of the models that come with the project: how it is made, and that of the README."""

import sys
from pathlib import Path

import click
import needs_torchaudio  # noqa: F401
import pytest

from cnngru_edge.calibration.corpus.read import DEMO, DEMO_DIGITS, DEMO_PHRASES
from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import zoo

    monkeypatch.setattr(zoo, "OUT", tmp_path)
    yield zoo
    for name in ("zoo", "large_ctc", "connected_words"):
        sys.modules.pop(name, None)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def in_readme(zoo):
    return README.split(zoo.BEGIN)[1].split(zoo.END)[0].strip().splitlines()


def test_the_readme_has_a_row_for_each_model(zoo):
    header, _, *lines = [line for line in in_readme(zoo) if line.startswith("|")]
    assert cells(header) == list(zoo.HEADERS)
    rows = {cells(line)[0]: cells(line) for line in lines}
    assert all(len(row) == len(zoo.HEADERS) for row in rows.values())
    pretrained = {path.stem: path for path in PRETRAINED.iterdir() if path.suffix == ".safetensors"}
    assert len(pretrained) >= 4
    assert rows.keys() == pretrained.keys() | {zoo.EXAMPLE.weights.stem, "large_ctc"}
    for name, path in pretrained.items():
        model = load_checkpoint(path)
        count = sum(p.numel() for p in model.parameters())
        assert rows[name][1:3] == [model.spec.family, f"{count:,}"]
    assert rows["large_ctc"][4:6] == ["-", "-"]
    streams = {name for name, row in rows.items() if row[-1] != "-"}
    assert streams == {"kws12", "ctc", "large_ctc"}


def test_the_readme_says_by_which_command(zoo):
    last = in_readme(zoo)[-1]
    assert last.startswith("Made by `make zoo DATA=DIR TASK=sc12` on one thread of ")
    assert f"medians of {zoo.ROUNDS} rounds" in last
    assert "onnxruntime 1." in last


def test_rows_become_a_table(zoo):
    step = zoo.Speed("20 ms", 0.0614, 0.125)
    shares = ("97.0%", "96.5%")
    heard = zoo.Row(
        "a", "kws", 1_234, "one of 3 labels", shares, (2_600, 1_400), zoo.Speed("1 s", 1.0, 2), step
    )
    whole = zoo.Row(
        "b", "crnn", 5, "a text", None, (1_234_567, 9), zoo.Speed("8 words", 3, 4), None
    )
    header, rule, first, second = zoo.table([heard, whole]).splitlines()
    assert cells(header) == list(zoo.HEADERS)
    assert set(cells(rule)) == {"---"}
    assert cells(first)[:6] == ["a", "kws", "1,234", "one of 3 labels", "97.0%", "96.5%"]
    assert cells(first)[6:] == ["3 / 1", "1.000 / 2.000 (1 s)", "0.061 / 0.125 (20 ms)"]
    assert cells(second)[4:] == ["-", "-", "1,235 / 0", "3.000 / 4.000 (8 words)", "-"]


def test_a_table_replaces_the_one_before(zoo):
    text = f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n"
    made = zoo.replaced(text, "new\n")
    assert made == f"before\n{zoo.BEGIN}\nnew\n{zoo.END}\nafter\n"
    assert zoo.replaced(made, "old\n") == text
    with pytest.raises(click.ClickException, match="needs one line"):
        zoo.replaced("no markers", "new\n")


def test_the_command_is_the_one_that_was_given(zoo):
    assert zoo.origin(DEMO, None).startswith("Made by `make zoo` on")
    assert zoo.origin(Path("own"), None).startswith("Made by `make zoo DATA=DIR` on")
    assert zoo.origin(Path("own"), "sc12").startswith("Made by `make zoo DATA=DIR TASK=sc12` on")


@pytest.mark.parametrize(
    ("name", "root", "examples"),
    [
        ("kws12", DEMO, "clips of demo"),
        ("intent", DEMO_PHRASES, "phrases of demo_phrases"),
        ("digits", DEMO_DIGITS, "images of demo_digits"),
        ("ctc", None, "strings joined from demo"),
    ],
)
def test_each_model_has_data_of_its_kind(zoo, name, root, examples):
    spec = load_checkpoint(PRETRAINED / f"{name}.safetensors").spec
    corpus, said = zoo.corpus_for(spec, DEMO, None)
    assert said == examples
    assert corpus.root == (root or zoo.OUT / "connected")
    if root is None:
        texts = [clip.text for clip in corpus.of("eval")]
        assert max(len(text.split()) for text in texts) > 2


def test_both_take_turns_on_a_stream_and_on_a_clip(zoo, exported, monkeypatch):
    monkeypatch.setattr(zoo, "ROUNDS", 2)
    monkeypatch.setattr(zoo, "ROUND_S", 0.01)
    whole, step = zoo.speeds(exported)
    assert (whole.what, step.what) == ("1 s", "20 ms")
    assert 0 < step.int8_ms < whole.int8_ms
    assert 0 < step.float_ms < whole.float_ms
