"""The charts of the page, as inline SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 220, 62, 448, 8, 186  # in pixels; the axes leave room for words
_BLUE = "#1f77b4"
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Axes:
    """What the ends of the axes are: numbers, and for the upward one the words to write there."""

    across: Point
    up: Point
    words: tuple[str, str]
    name: str

    def place(self, x: float, y: float) -> Point:
        """Of a point, in pixels."""
        (first, last), (low, high) = self.across, self.up
        right = (x - first) / (last - first or 1) * (_RIGHT - _LEFT)
        return _LEFT + right, _BOTTOM - (y - low) / (high - low or 1) * (_BOTTOM - _TOP)

    def line(self, points: Sequence[Point], width: float) -> Markup:
        """Through all points."""
        path = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        return Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="{}"/>').format(path, _BLUE, width)

    def figure(self, title: str, note: str, inside: Markup) -> Markup:
        """``inside`` with its axes, and below it what it shows."""
        ends = [_text(_LEFT - 6, _TOP + 6, "end", self.words[1]), _text(_LEFT - 6, _BOTTOM, "end", self.words[0])]
        ends += [_text(_LEFT, _BOTTOM + 18, "middle", f"{self.across[0]:.4g}")]
        ends += [_text(_RIGHT, _BOTTOM + 18, "end", f"{self.across[1]:.4g}")]
        ends += [_text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, "middle", self.name)]
        return Markup(
            '<figure><figcaption>{title}</figcaption><svg width="{}" height="{}" role="img" aria-label="{title}">'
            '{}<path d="M{} {}V{}H{}" fill="none" stroke="#999"/>{}</svg><p class="note">{}</p></figure>\n'
        ).format(_WIDTH, _HEIGHT, inside, _LEFT, _TOP, _BOTTOM, _RIGHT, Markup().join(ends), note, title=title)


def _text(x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text x="{:g}" y="{:g}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def curve(title: str, note: str, points: Sequence[Point], mark: float | None = None, smooth: bool = False) -> Markup:
    """A value by step, a dashed line at ``mark``; if ``smooth``, thin, with its running mean over it."""
    values = [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    axes = _Axes((points[0][0], points[-1][0]), (low, high), (f"{low:.3g}", f"{high:.3g}"), "step")
    inside = axes.line(points, 0.4 if smooth else 1.5)
    if smooth:
        means = values[:1]
        for value in values[1:]:
            means.append(0.9 * means[-1] + 0.1 * value)
        inside += axes.line([(step, mean) for (step, _), mean in zip(points, means)], 1.5)
    if mark is not None:
        y = axes.place(0, mark)[1]
        inside += Markup('<path d="M{} {:.1f}H{}" stroke="#d62728" stroke-dasharray="4 4"/>').format(_LEFT, y, _RIGHT)
        inside += _text(_RIGHT, y - 4, "end", f"target {mark:.3g}")
    return axes.figure(title, note, inside)


def heat(title: str, note: str, counts: Sequence[tuple[float, Sequence[int]]], words: tuple[str, str]) -> Markup:
    """A column for every step, a row for every bin from 0 to 1; the darker, the more of the column are there."""
    bins = len(counts[0][1])
    wide, tall = (_RIGHT - _LEFT) / len(counts), (_BOTTOM - _TOP) / bins
    cell = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}" fill-opacity="{:.2f}"/>')
    cells = [
        cell.format(
            _LEFT + i * wide, _BOTTOM - (b + 1) * tall, wide + 0.3, tall, _BLUE, (count / max(sum(column), 1)) ** 0.5
        )
        for i, (_, column) in enumerate(counts)
        for b, count in enumerate(column)
        if count > 0
    ]
    return _Axes((counts[0][0], counts[-1][0]), (0, 1), words, "step").figure(title, note, Markup().join(cells))


def scatter(title: str, note: str, across_is: str, points: Sequence[tuple[float, float, str]]) -> Markup:
    """Points with their names, and a line through the highest so far, from left to right."""
    across, up, _ = zip(*points)
    low, high = math.floor(min(up)), math.ceil(max(up))
    axes = _Axes((0.0, max(across)), (low, high), (f"{low}", f"{high}"), across_is)
    line: list[Point] = []
    for x, y in sorted(zip(across, up), key=lambda point: (point[0], -point[1])):
        if not line or y > line[-1][1]:
            line.append((x, y))
    marks = []
    for x, y, label in points:
        right, down = axes.place(x, y)
        marks.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>').format(right, down, _BLUE))
        marks.append(_text(min(right, _RIGHT - 8), max(down - 7, _TOP + 12), "end", label))
    return axes.figure(title, note, axes.line(line, 1) + Markup().join(marks))


def bar(before: float, after: float) -> Markup:
    """What is left of what there was, both as fractions of the longest bar."""
    form = '<div class="bar" style="width:{:.0f}px"><div style="width:{:.1f}%"></div></div>'
    return Markup(form).format(300 * before, 100 * after / before if before else 0)
