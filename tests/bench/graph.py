"""A graph of lines as SVG, written by hand: readable on light and on dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_WIDTH, _HEIGHT = 760, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 20, 90
_COLOURS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_GREY: Final = "#888888"


@dataclass(frozen=True)
class Line:
    """Points of one line, x from 0 to 1, y as on the axis."""

    name: str
    """As the legend calls it; empty: like the one before it."""
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """The y axis: it ends at ``top``; a dashed line is drawn at ``limit``."""

    title: str
    top: float
    step: float
    limit: float


_PERCENT: Final = tuple((percent / 100, f"{percent} %") for percent in range(0, 101, 20))


def draw(
    lines: Sequence[Line],
    axis: Axis,
    below: str,
    ticks: Sequence[tuple[float, str]] = _PERCENT,
) -> str:
    """The graph; ``below`` says what the x axis is, ``ticks`` where it has which text."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = [*_grid(axis, ticks), _text(_WIDTH / 2, _HEIGHT - 52, below, "middle")]
    number = -1
    for line in lines:
        number += bool(line.name)
        colour = _COLOURS[number % len(_COLOURS)]
        body.append(_path(line, axis, colour))
        if line.name:
            body += _legend(number, line.name, colour)
    return "\n".join([f"{head} {style}>", *body, "</svg>", ""])


def _x(value: float) -> float:
    return _LEFT + value * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _HEIGHT - _BOTTOM - value / axis.top * (_HEIGHT - _TOP - _BOTTOM)


def _grid(axis: Axis, ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    value = 0.0
    while value <= axis.top:
        y = _y(value, axis)
        yield _rule(y, 'stroke-opacity="0.3"')
        yield _text(_LEFT - 8, y + 4, f"{value:g}", "end")
        value += axis.step
    yield _rule(_y(axis.limit, axis), 'stroke-width="2" stroke-dasharray="6 4"')
    yield _text(_LEFT, _TOP - 8, axis.title, "start")
    for at, text in ticks:
        yield _text(_x(at), _HEIGHT - _BOTTOM + 18, text, "middle")


def _rule(y: float, look: str) -> str:
    place = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {place} stroke="{_GREY}" {look}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{_GREY}">{escape(text)}</text>'


def _path(line: Line, axis: Axis, colour: str) -> str:
    points = " ".join(f"{_x(x):.1f},{_y(min(y, axis.top), axis):.1f}" for x, y in line.points)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _legend(number: int, name: str, colour: str) -> Iterator[str]:
    x, y = _LEFT + number % 2 * 340, _HEIGHT - 30 + number // 2 * 18
    place = f'x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}"'
    yield f'<line {place} stroke="{colour}" stroke-width="3"/>'
    yield _text(x + 32, y, name, "start")
