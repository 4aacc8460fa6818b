import itertools
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cnngru_edge.calibration.corpus import digits
from cnngru_edge.calibration.corpus.digits import draw_line, make_lines
from cnngru_edge.calibration.corpus.read import read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.models.spec.whole import ImageInput
from cnngru_edge.runtime.inputs.read import read_image


@pytest.fixture(scope="module")
def lines():
    return list(make_lines(60, 30, 0))


def test_each_is_a_line_of_four_to_eight_digits(lines):
    assert Counter(line.set for line in lines) == {"train": 60, "calib": 30, "eval": 30}
    for line in lines:
        assert line.text.isdecimal()
        assert 4 <= len(line.text) <= 8
        assert line.image.height == 32
        assert line.image.width >= 8 * len(line.text)  # two columns of a CRNN and more for each
    assert {len(line.text) for line in lines} == {4, 5, 6, 7, 8}
    assert set("".join(line.text for line in lines)) == set("0123456789")


def test_a_style_is_seen_in_the_held_out_sets_only(lines):
    styles: dict[str, set[str]] = {}
    for line in lines:
        styles.setdefault(line.set, set()).add(line.style)
    assert styles["train"] == {"round", "angular", "font"}
    assert styles["calib"] == styles["eval"] == {"round", "angular", "font", "dashed"}


def test_the_same_seed_draws_the_same(lines):
    again = list(make_lines(60, 30, 0))
    assert [line.image.tobytes() for line in again] == [line.image.tobytes() for line in lines]
    other = next(iter(make_lines(1, 1, 1)))
    assert other.image.tobytes() != lines[0].image.tobytes()


def test_what_is_held_out_does_not_depend_on_the_count(lines):
    few = make_lines(0, 30, 0)
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(few, lines[:60], strict=True))


def test_there_is_ink_wherever_there_is_a_digit(lines):
    for line in lines:
        grey = np.asarray(line.image.convert("L"), np.float64)
        ground = np.median(grey)
        parts = np.array_split(np.abs(grey - ground).max(axis=0)[4:-4], len(line.text))
        assert min(part.max() for part in parts) >= 255 / 5  # a level of grey


@pytest.mark.parametrize("glyphs", [digits._ROUND, digits._ANGULAR], ids=["round", "angular"])
def test_the_strokes_of_every_digit_fill_its_box(glyphs):
    assert sorted(glyphs) == list("0123456789")
    for digit, variants in glyphs.items():
        for strokes in variants:
            points = np.array(list(itertools.chain.from_iterable(strokes)))
            assert points.min() >= -0.02, digit
            assert points.max() <= 1.02, digit
            assert np.ptp(points[:, 1]) > 0.9, digit


def test_the_command_writes_images_that_a_model_reads(tmp_path):
    out = tmp_path / "digits"
    options = ["demo", "digits", "--out", str(out), "--count", "4", "--held-out", "3"]
    result = CliRunner().invoke(main, options)
    assert (result.exit_code, result.stdout) == (0, f"{out / 'manifest.csv'}\n")
    corpus = read_corpus(out)
    assert [len(corpus.of(name)) for name in ("train", "calib", "eval")] == [4, 3, 3]
    for k, clip in enumerate(corpus.of("eval")):
        line = draw_line("eval", np.random.default_rng([0, 1, k]))
        assert clip.text == line.text
        grey = read_image(clip.path, ImageInput(32))[0]
        np.testing.assert_allclose(grey, np.asarray(line.image.convert("L")) / 255, atol=1e-6)
        assert len(np.unique(grey)) <= 6
    with Image.open(corpus.clips[0].path) as image:
        assert image.mode == "P"


def test_a_killed_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "draw_line", stop)
    CliRunner().invoke(main, ["demo", "digits", "--out", str(tmp_path / "new/digits")])
    assert list(tmp_path.iterdir()) == []
