"""Lines of digits as images, drawn by ourselves: strokes of our own, and Pillow's default font.

The sets differ: dashed strokes are seen in calib and eval only, which are blurred and noisier too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cnngru_edge.calibration.corpus.read import CALIB, EVAL, TRAIN

HEIGHT = 32  # pixels
LENGTHS = (4, 8)  # digits in a line, both included

Point: TypeAlias = tuple[float, float]
Stroke: TypeAlias = list[Point]
"""Points of a polyline, (0, 0) top left and (1, 1) bottom right of the digit's box."""

_SCALE = 3  # times as large are lines drawn, for smooth edges
_GREYS = 6  # levels that a file holds; few, for small files


@dataclass(frozen=True)
class Line:
    """An image of a line of digits."""

    image: Image.Image  # of few grey levels
    text: str
    set: str
    style: str


@dataclass(frozen=True)
class _Look:
    """What the digits of a line have in common, lengths in pixels."""

    style: str
    height: float
    width: float
    thickness: float
    slant: float  # pixels to the right for each upwards
    gap: float
    unrest: float  # how unlike each other digits are, as a share of their height


@dataclass(frozen=True)
class _Damage:
    """How bad an image can be."""

    blur: float  # pixels, standard deviation
    noise: float  # standard deviation, of 1 from black to white
    contrast: float  # the least between ink and ground


_STYLES = {
    TRAIN: ("round", "angular", "font"),
    CALIB: ("round", "angular", "font", "dashed"),
    EVAL: ("round", "angular", "font", "dashed"),
}
_DAMAGES = {
    TRAIN: _Damage(blur=0.9, noise=0.10, contrast=0.30),
    CALIB: _Damage(blur=1.1, noise=0.13, contrast=0.25),
    EVAL: _Damage(blur=1.1, noise=0.13, contrast=0.25),
}


def make_lines(count: int, held_out: int, seed: int) -> Iterator[Line]:
    """So many lines of each of the sets calib and eval, then `count` to train on.

    Each depends on the seed and its place in its set alone.
    """
    for i, (set_name, wanted) in enumerate(((CALIB, held_out), (EVAL, held_out), (TRAIN, count))):
        for k in range(wanted):
            yield draw_line(set_name, np.random.default_rng([seed, i, k]))


def draw_line(set_name: str, rng: np.random.Generator) -> Line:
    """A line of digits as they are in one of the sets."""
    low, high = LENGTHS
    text = "".join(str(digit) for digit in rng.integers(10, size=rng.integers(low, high + 1)))
    styles = _STYLES[set_name]
    height = rng.uniform(16, 27)
    look = _Look(
        styles[rng.integers(len(styles))],
        height,
        width=height * rng.uniform(0.42, 0.75),
        thickness=rng.uniform(1.2, 1.5 + height / 9),
        slant=rng.uniform(-0.15, 0.4),
        gap=height * rng.uniform(0.08, 0.45),
        unrest=rng.uniform(0, 0.07),
    )
    return Line(
        _photograph(_ink(text, look, rng), _DAMAGES[set_name], rng), text, set_name, look.style
    )


def _ink(text: str, look: _Look, rng: np.random.Generator) -> Image.Image:
    """Where there is ink, 255, on a line three times as large."""
    advance = look.width + look.gap
    left, right = rng.uniform(2, 12, size=2) + look.height * abs(look.slant) / 2
    width = math.ceil(left + len(text) * advance - look.gap + right)
    ink = Image.new("L", (width * _SCALE, HEIGHT * _SCALE))
    middle = HEIGHT / 2 + rng.uniform(-1, 1) * (HEIGHT - look.height) / 3
    for i, digit in enumerate(text):
        x = left + i * advance + look.width / 2 + rng.normal() * look.unrest * look.height / 2
        y = middle + rng.normal() * look.unrest * look.height / 2
        if look.style == "font":
            _print(ink, digit, (x, y), look, rng)
        else:
            _write(ink, digit, (x, y), look, rng)
    return ink


def _write(
    ink: Image.Image, digit: str, middle: Point, look: _Look, rng: np.random.Generator
) -> None:
    """A digit in strokes, each turned, stretched and bent a little otherwise."""
    glyphs = _ANGULAR if look.style == "angular" else _ROUND
    variants = glyphs[digit]
    turn = rng.normal() * look.unrest * 1.5
    stretch = np.array([look.width, look.height]) * (1 + rng.normal(size=2) * look.unrest)
    shape = np.array([[1, -look.slant], [0, 1]]) @ np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    draw = ImageDraw.Draw(ink)
    for stroke in variants[rng.integers(len(variants))]:
        points = np.array(stroke) - 0.5
        # The ends of a stroke move, and all between them in proportion.
        moves = rng.normal(size=(2, 2)) * look.unrest * 0.7
        share = np.linspace(0, 1, len(points))[:, None]
        points += moves[0] * (1 - share) + moves[1] * share
        points = ((points * stretch) @ shape.T + middle) * _SCALE
        for piece in _dashes(points, rng) if look.style == "dashed" else [points]:
            _draw(draw, piece, look.thickness * _SCALE)


def _draw(draw: ImageDraw.ImageDraw, points: npt.NDArray[np.float64], thickness: float) -> None:
    path = [(float(x), float(y)) for x, y in points]
    draw.line(path, fill=255, width=max(1, round(thickness)), joint="curve")
    radius = thickness / 2
    for x, y in (path[0], path[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _dashes(
    points: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[npt.NDArray[np.float64]]:
    """A polyline in pieces with gaps between them, as of a worn-out pen or a dot-matrix printer."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    dash, gap = rng.uniform(3, 6) * _SCALE, rng.uniform(2.0, 3.5) * _SCALE
    pieces = []
    for start in np.arange(0, at[-1], dash + gap):
        places = np.linspace(start, min(start + dash, at[-1]), 6)
        pieces.append(np.stack([np.interp(places, at, axis) for axis in points.T], axis=1))
    return pieces


def _print(
    ink: Image.Image, digit: str, middle: Point, look: _Look, rng: np.random.Generator
) -> None:
    """A digit of the font, as wide and as slanted as the others of the line."""
    font = ImageFont.load_default(look.height * 1.35 * _SCALE)
    bold = round(max(0.0, look.thickness - 2) * _SCALE / 4)
    left, top, right, bottom = font.getbbox(digit, stroke_width=bold)
    glyph = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(glyph).text(
        (-left, -top), digit, fill=255, font=font, stroke_width=bold, stroke_fill=255
    )
    narrow = look.width / look.height / 0.6  # of this font's own 0.6
    size = (max(1, round(glyph.width * narrow)), glyph.height)
    lean = abs(look.slant) * size[1]
    canvas = Image.new("L", (round(size[0] + lean), size[1]))
    canvas.paste(glyph.resize(size), (round(lean / 2), 0))
    slanted = canvas.transform(
        canvas.size,
        Image.Transform.AFFINE,
        (1, look.slant, -look.slant * size[1] / 2, 0, 1, 0),
        Image.Resampling.BILINEAR,
    ).rotate(math.degrees(rng.normal() * look.unrest), Image.Resampling.BILINEAR, expand=True)
    x = round(middle[0] * _SCALE - slanted.width / 2)
    y = round(middle[1] * _SCALE - slanted.height / 2)
    ink.paste(255, (x, y), slanted)


def _photograph(ink: Image.Image, damage: _Damage, rng: np.random.Generator) -> Image.Image:
    """Ink on a ground, dark on light or the other way, blurred and with noise."""
    size = (ink.width // _SCALE, HEIGHT)
    covered = np.asarray(ink.resize(size, Image.Resampling.BOX), np.float64) / 255
    contrast = rng.uniform(damage.contrast, 0.95)
    dark = rng.uniform(0, 1 - contrast)
    ground, pen = (dark + contrast, dark) if rng.random() < 0.7 else (dark, dark + contrast)
    grey = ground + _ground(size, rng) * contrast
    grey += (pen - grey) * covered
    image = Image.fromarray(np.uint8(np.clip(grey, 0, 1) * 255 + 0.5))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, damage.blur)))
    grey = np.asarray(image, np.float64) / 255
    if rng.random() < 0.3:
        grains = rng.normal(size=(HEIGHT, size[0] // 2 + 1)).repeat(2, axis=1)[:, : size[0]]
        grey = grey + grains * rng.uniform(0.02, damage.noise)
    levels = np.uint8(np.clip(np.rint(grey * (_GREYS - 1)), 0, _GREYS - 1))
    found = Image.fromarray(levels)
    found.putpalette([level * 255 // (_GREYS - 1) for level in range(_GREYS) for _ in "rgb"])
    return found


def _ground(size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """What is on the paper already, -0.5 to 0.5: nothing, light from a side, blotches or rules."""
    width, height = size
    kind = rng.integers(4)
    if kind == 0:
        return np.zeros((height, width))
    if kind == 1:
        across = np.linspace(-0.25, 0.25, width) * rng.uniform(-1, 1)
        return across[None] + np.linspace(-0.2, 0.2, height)[:, None] * rng.uniform(-1, 1)
    if kind == 2:
        coarse = np.uint8(rng.uniform(0, 255, size=(3, max(2, width // 12))))
        blotches = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        return (np.asarray(blotches, np.float64) / 255 - 0.5) * rng.uniform(0.1, 0.5)
    ground = np.zeros((height, width))
    ground[rng.integers(4, 9) :: rng.integers(8, 14)] -= rng.uniform(0.1, 0.5)
    return ground


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Part of an ellipse; degrees clockwise from the right, as seen."""
    angles = np.radians(np.linspace(start, end, max(3, round(abs(end - start) / 15))))
    return [(x + rx * float(math.cos(a)), y + ry * float(math.sin(a))) for a in angles]


def _turned(strokes: list[Stroke]) -> list[Stroke]:
    return [[(1 - x, 1 - y) for x, y in stroke] for stroke in strokes]


_SIX = [[*[(0.72, 0.0), (0.4, 0.25), (0.18, 0.55)], *_arc(0.5, 0.7, 0.36, 0.3, 180, 540)]]
_ROUND: dict[str, list[list[Stroke]]] = {
    "0": [[_arc(0.5, 0.5, 0.4, 0.5, -90, 270)]],
    "1": [[[(0.25, 0.22), (0.55, 0.0), (0.55, 1.0)]], [[(0.5, 0.0), (0.5, 1.0)]]],
    "2": [[[*_arc(0.5, 0.28, 0.37, 0.28, 190, 400), (0.1, 1.0), (0.9, 1.0)]]],
    "3": [[_arc(0.45, 0.25, 0.36, 0.25, 200, 450), _arc(0.45, 0.74, 0.42, 0.26, 270, 520)]],
    "4": [[[(0.68, 1.0), (0.68, 0.0), (0.06, 0.68), (0.95, 0.68)]]],
    "5": [
        [
            [(0.85, 0.0), (0.22, 0.0), (0.17, 0.45), *_arc(0.46, 0.68, 0.4, 0.32, 235, 505)],
        ]
    ],
    "6": [_SIX],
    "7": [[[(0.08, 0.0), (0.92, 0.0), (0.38, 1.0)]]],
    "8": [[_arc(0.5, 0.25, 0.33, 0.25, 90, 450), _arc(0.5, 0.75, 0.4, 0.25, -90, 270)]],
    "9": [_turned(_SIX)],
}
_ANGULAR: dict[str, list[list[Stroke]]] = {
    "0": [
        [[(0.5, 0), (0.88, 0.2), (0.88, 0.8), (0.5, 1), (0.12, 0.8), (0.12, 0.2), (0.5, 0)]],
        [[(0.12, 0), (0.88, 0), (0.88, 1), (0.12, 1), (0.12, 0)], [(0.75, 0.15), (0.25, 0.85)]],
    ],
    "1": [[[(0.2, 0.3), (0.5, 0.0), (0.5, 1.0)], [(0.2, 1.0), (0.8, 1.0)]]],
    "2": [[[(0.1, 0.2), (0.3, 0), (0.7, 0), (0.9, 0.2), (0.9, 0.4), (0.1, 1), (0.9, 1)]]],
    "3": [[[(0.1, 0), (0.88, 0), (0.42, 0.42), (0.88, 0.62), (0.88, 0.85), (0.65, 1), (0.1, 1)]]],
    "4": [
        [[(0.25, 0.0), (0.1, 0.6), (0.92, 0.6)], [(0.72, 0.3), (0.72, 1.0)]],
        [[(0.12, 0.0), (0.12, 0.5), (0.88, 0.5)], [(0.88, 0.0), (0.88, 1.0)]],
    ],
    "5": [[[(0.88, 0), (0.14, 0), (0.14, 0.45), (0.88, 0.45), (0.88, 1), (0.1, 1)]]],
    "6": [[[(0.8, 0), (0.14, 0.5), (0.14, 1), (0.88, 1), (0.88, 0.55), (0.14, 0.55)]]],
    "7": [[[(0.1, 0), (0.9, 0), (0.38, 1)], [(0.3, 0.5), (0.85, 0.5)]]],
    "8": [
        [[(0.12, 0), (0.88, 0), (0.12, 1), (0.88, 1), (0.12, 0)]],
        [[(0.14, 0), (0.86, 0), (0.86, 1), (0.14, 1), (0.14, 0)], [(0.14, 0.5), (0.86, 0.5)]],
    ],
    "9": [[[(0.86, 0.45), (0.12, 0.45), (0.12, 0), (0.86, 0), (0.86, 0.5), (0.2, 1)]]],
}
