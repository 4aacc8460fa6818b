"""The elements of a plot as inline SVG, and the axes that numbers are put on.

A plot is 360 units wide whatever the screen, one beside another on a desk and one below another on
a telephone, so that its text is about as large as the page's. Colours are classes of the page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

from markupsafe import Markup

PLOT, WIDE, SMALL = 360, 720, 240
"""Widths; a wide one scrolls on a telephone."""
LINE = 15
"""From one line of text to the next."""
BELOW = 34
"""Height of what stands below an axis: the numbers at its ticks, and its name."""

_LETTER = 7.1  # width of a wide font's, on average, at the 11 units of the style sheet


@dataclass(frozen=True)
class Axis:
    """Where a number lies on the paper."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, is_log: bool = False
    ) -> "Axis":
        """An axis on which all of these can be seen, be there none or one; zero gets no room."""
        found = sorted(values) or [0.0]
        low, high = found[0], found[-1]
        if is_log:
            return cls(low / 1.1, high * 1.1, start, end, is_log)
        room = (high - low) * 0.04 or abs(high) * 0.5 or 1.0
        return cls(low and low - room, high + room if high or not low else 0.0, start, end)

    def __call__(self, value: float) -> float:
        """Place of a value; one outside lies at the edge."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, about 45 units apart or more."""
        most = max(2, int(abs(self.end - self.start) / 45))
        if self.is_log:
            return self._powers(most)
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _powers(self, most: int) -> list[float]:
        """Powers of ten, with 2 and 5 or 3 between them where there is room."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            values = [10.0**exponent * factor for exponent in exponents for factor in factors]
            found = [value for value in values if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


def drawing(
    title: str, described: str, height: float, parts: Iterable[Markup], width: float = PLOT
) -> Markup:
    """The whole plot, with a title and a description for those who do not see it."""
    return element(
        "svg",
        Markup("").join([element("title", title), element("desc", described), *parts]),
        viewBox=f"0 0 {width} {number(height)}",
        role="img",
        class_={WIDE: "wide", SMALL: "small"}.get(int(width), "plot"),
    )


def element(tag: str, content: str = "", /, **attributes: str | float | None) -> Markup:
    """An element; `class_` and `text_anchor` stand for `class` and `text-anchor`."""
    pairs = (
        Markup(' {}="{}"').format(
            name.rstrip("_").replace("_", "-"),
            value if isinstance(value, str) else number(value),
        )
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(pairs), content)


def text_at(
    x: float, y: float, text: str, class_: str | None = None, anchor: str | None = None
) -> Markup:
    """Text of our own, which is short."""
    return element("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    """A rectangle; one of no width is drawn as a hair."""
    return element("rect", x=x, y=y, width=max(width, 0.5), height=height, class_=class_)


def label(
    x: float, y: float, text: str, room: float, font: float = 11.0, anchor: str = "end"
) -> Markup:
    """Text of any length: cut in its middle where it has no room, and whole when hovered."""
    most = int(room / (width_of(text) / max(len(text), 1) or 1.0) * 11 / font)
    shown = text
    if len(text) > most:
        before = (most - 1) // 3
        shown = f"{text[:before]}…{text[len(text) - (most - 1 - before) :]}"
    content = Markup("").join([element("title", text), shown])
    size = font if font < 11 else None
    return element("text", content, x=x, y=y, text_anchor=anchor, font_size=size)


def beside(x: float, y: float, text: str, room: tuple[float, float]) -> Markup:
    """Text centred over `x`, or as near to that as the room allows."""
    half = width_of(text) / 2
    return text_at(max(min(x, room[1] - half), room[0] + half), y, text, "quiet", "middle")


def legend(
    names: Sequence[str], sample: Callable[[int, float], Markup]
) -> tuple[list[Markup], float]:
    """A line for each name, and where they end; `sample(i, y)` draws one of what is named."""
    parts = []
    for i, name in enumerate(names):
        y = 11.0 + LINE * i
        parts += [sample(i, y), label(28, y, name, PLOT - 30, anchor="start")]
    return parts, 4.0 + LINE * len(names)


def x_axis(axis: Axis, top: float, bottom: float, name: str) -> list[Markup]:
    """A grid with its numbers below it, and the name of the axis."""
    parts = []
    for tick in axis.ticks:
        x = axis(tick)
        parts.append(line(x, top, x, bottom, "grid"))
        parts.append(beside(x, bottom + 13, tick_text(tick), (0, axis.end + 10)))
    if name:
        parts.append(beside((axis.start + axis.end) / 2, bottom + 28, name, (0, PLOT)))
    return parts


def width_of(text: str) -> float:
    """About how wide a text will be, at most."""
    return _LETTER * sum(
        1.9 if east_asian_width(letter) in "WF" else 1.55 if letter in "MWmw@%" else 1.0
        for letter in text
    )


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign."""
    text = f"{value:+.{digits}f}"
    return minus(text) if float(text) else text[1:]


def tick_text(value: float) -> str:
    """A number at an axis."""
    return minus(f"{value:.4g}")


def minus(text: str) -> str:
    """A number with a minus that is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
