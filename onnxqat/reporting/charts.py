"""Draw charts as SVG, with text that stays readable on a narrow page, and with a description."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from onnxqat.reporting.elements import element

__all__ = ["Curve", "Mark", "Picture", "bar", "chart_of_curves", "chart_of_levels", "ticks"]

# One unit is about one pixel. The page puts as many charts of this width side by side as fit.
WIDTH, HEIGHT = 380.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 14.0, 40.0
MOST = 600  # the most points of a curve that are drawn
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps or epochs.

    Attributes
    ----------
    points : sequence of (float, float)
        The points, in order.
    kind : {"main", "other", "earlier"}
        The style of the curve.
    dots : bool
        Whether each point has a dot.
    """

    points: Sequence[tuple[float, float]]
    kind: str = "main"
    dots: bool = True


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled point of a curve.

    Attributes
    ----------
    point : (float, float)
        Its coordinates.
    text : str
        Its label.
    kind : {"start", "kept"}
        Its style.
    """

    point: tuple[float, float]
    text: str
    kind: str


class Picture:
    """The drawing area of a chart, with its axes.

    Parameters
    ----------
    title, description : str
        The title above the chart, and the text for screen readers.
    xs, ys : (float, float)
        Smallest and largest value of each axis.
    """

    def __init__(
        self, title: str, description: str, xs: tuple[float, float], ys: tuple[float, float]
    ) -> None:
        self.xs, self.ys = _wide(xs), _wide(ys)
        self.svg = element(
            "svg",
            element("title", title),
            element("desc", description),
            viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
            role="img",
            aria_label=f"{title}: {description}",
        )
        self.title = title

    def x(self, value: float) -> float:
        """Return the position of a value on the horizontal axis."""
        low, high = self.xs
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the position of a value on the vertical axis."""
        low, high = self.ys
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """Add an SVG element; numbers are rounded."""
        rounded = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in attributes.items()}
        self.svg.append(element(tag, text, **rounded))

    def horizontal(self, label: str, at: Sequence[float], text: Callable[[float], str]) -> None:
        """Draw the horizontal axis."""
        base = HEIGHT - BOTTOM
        self.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis")
        for value in at:
            place = self.x(value)
            self.add("line", x1=place, x2=place, y1=base, y2=base + 4, class_="axis")
            self.add("text", text(value), x=place, y=base + 17, class_="middle")
        self.add("text", label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="middle label")

    def vertical(self, at: Sequence[float], text: Callable[[float], str]) -> None:
        """Draw the vertical axis, with a horizontal line for each of its numbers."""
        for value in at:
            place = self.y(value)
            self.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid")
            self.add("text", text(value), x=LEFT - 7, y=place + 4, class_="end")

    def figure(self) -> Element:
        """Return the chart with its title above it."""
        return element("figure", element("figcaption", self.title), self.svg)


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if high > low:
        return low, high
    around = abs(low) / 10 or 1.0
    return low - around, high + around


def ticks(low: float, high: float, *, most: int = TICKS, whole: bool = False) -> list[float]:
    """Return round numbers between two ends, in steps of 1, 2 or 5 times a power of ten.

    Examples
    --------
    >>> ticks(0.0, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    >>> ticks(0, 3, whole=True)
    [0.0, 1.0, 2.0, 3.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def chart_of_curves(
    title: str,
    description: str,
    curves: Sequence[Curve],
    *,
    axis: str,
    text: Callable[[float], str],
    marks: Sequence[Mark] = (),
    level: tuple[float, str] | None = None,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> Element:
    """Return a chart of curves over steps or epochs.

    Parameters
    ----------
    axis : str
        The label of the horizontal axis.
    text : callable
        Formats a number of the vertical axis.
    marks : sequence of Mark
        Labelled points.
    level : (float, str), optional
        A value and its name, drawn as a dashed horizontal line.
    ends : (float, float)
        The vertical axis shows no numbers beyond these.
    """
    points = [point for curve in curves for point in curve.points]
    values = [y for _, y in points] + ([level[0]] if level else [])
    low, high = min(values), max(values)
    room = (high - low) * 0.2 or abs(low) * 0.1 or 1.0
    ys = low - room, high + room
    xs = min(x for x, _ in points), max(x for x, _ in points)
    picture = Picture(title, description, xs, ys)
    picture.vertical([v for v in ticks(*picture.ys) if ends[0] <= v <= ends[1]], text)
    picture.horizontal(axis, ticks(*picture.xs, whole=True), lambda value: f"{value:g}")
    if level:
        _draw_level(picture, *level)
    for curve in curves:
        _draw_curve(picture, curve)
    for mark in marks:
        _draw_mark(picture, mark, curves[-1].points)
    return picture.figure()


def _draw_level(picture: Picture, value: float, name: str) -> None:
    place = picture.y(value)
    picture.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="level")
    under = place < TOP + 16
    picture.add("text", name, x=LEFT + 6, y=place + (15 if under else -5), class_="level")


def _draw_curve(picture: Picture, curve: Curve) -> None:
    places = [(picture.x(x), picture.y(y)) for x, y in thinned(curve.points)]
    path = " L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    picture.add("path", d=f"M{path}", class_=f"curve {curve.kind}")
    for x, y in places if curve.dots and len(places) <= 60 else ():
        picture.add("circle", cx=x, cy=y, r=2.6, class_=f"dot {curve.kind}")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST` points: the ends and the extremes of each piece of the curve."""
    if len(points) <= MOST:
        return list(points)
    size = -(-4 * len(points) // MOST)
    return [point for piece in _pieces(points, size) for point in _outline(piece)]


def _pieces(
    points: Sequence[tuple[float, float]], size: int
) -> Iterator[Sequence[tuple[float, float]]]:
    for start in range(0, len(points), size):
        yield points[start : start + size]


def _outline(piece: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    order = range(len(piece))
    kept = {0, len(piece) - 1, min(order, key=lambda i: piece[i][1])}
    return [piece[i] for i in sorted(kept | {max(order, key=lambda i: piece[i][1])})]


def _draw_mark(picture: Picture, mark: Mark, points: Sequence[tuple[float, float]]) -> None:
    """Draw a ring around a point, and its label on the side that is free."""
    x, y = picture.x(mark.point[0]), picture.y(mark.point[1])
    picture.add("circle", cx=x, cy=y, r=5.5, class_=f"mark {mark.kind}")
    place = "start" if x < LEFT + 60 else "end" if x > WIDTH - RIGHT - 60 else "middle"
    before = [v for at, v in points if at < mark.point[0]][-1:]
    behind = [v for at, v in points if at > mark.point[0]][:1]
    risen = sum(v - mark.point[1] for v in (*before, *behind)) > 0
    down = (risen or y < TOP + 18) and y < HEIGHT - BOTTOM - 22
    shift = {"start": 9.0, "end": -9.0, "middle": 0.0}[place]
    picture.add("text", mark.text, x=x + shift, y=y + (20 if down else -11), class_=f"{place} note")


def chart_of_levels(
    title: str,
    description: str,
    *,
    first: int,
    width: int,
    counts: Sequence[int],
    inside: tuple[int, int],
    ends: tuple[str, str],
) -> Element:
    """Return a histogram of a tensor over its integers, with clipped values in another colour.

    Parameters
    ----------
    first, width, counts
        See `onnxqat.analysis.Histogram`.
    inside : (int, int)
        The quantized range.
    ends : (str, str)
        The floats that its ends stand for, as text.
    """
    tallest = math.log10(1 + max(counts))
    edges = first - 0.5, first - 0.5 + width * len(counts)
    picture = Picture(title, description, edges, (0.0, tallest or 1.0))
    low, high = picture.x(inside[0] - 0.5), picture.x(inside[1] + 0.5)
    for left, right in ((LEFT, low), (high, WIDTH - RIGHT)):
        tall = HEIGHT - TOP - BOTTOM
        picture.add("rect", x=left, y=TOP, width=right - left, height=tall, class_="outside")
    powers = range(math.floor(tallest) + 1)
    picture.vertical([math.log10(1 + 10.0**p) for p in powers], lambda v: f"{10**v - 1:,.0f}")
    for index, number in enumerate(counts):
        start = edges[0] + width * index
        place, top = picture.x(start), picture.y(math.log10(1 + number))
        kind = "bin" if inside[0] <= start + 0.5 <= inside[1] else "bin clipped"
        wide, tall = picture.x(start + width) - place - 1, HEIGHT - BOTTOM - top
        if number:
            picture.add("rect", x=place, y=top, width=wide, height=tall, class_=kind)
    stands = dict(zip(inside, ends, strict=True))
    picture.horizontal(
        "integer (values, logarithmic)",
        inside,
        lambda value: f"{value:g} ({stands[int(value)]})" if stands[int(value)] else f"{value:g}",
    )
    for place in (low, high):
        picture.add("line", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, class_="limit")
    return picture.figure()


def bar(share: float, kind: str = "main") -> Element:
    """Return a bar that fills a share of a table cell's width, to draw behind its number."""
    filled = min(max(share, 0.0), 1.0)
    return element(
        "svg",
        element("rect", x=0, y=0, width=100, height=10, class_="track"),
        element("rect", x=0, y=0, width=f"{100 * filled:.2f}", height=10, class_=f"bar {kind}"),
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )
