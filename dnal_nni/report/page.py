"""The report as one HTML page: pictures are inline SVG, nothing is fetched, no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import GroupReport, Report


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
p.note, footer { color: #666; } table { border-collapse: collapse; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; } th { border-bottom: 1px solid #999; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; } figcaption { font-weight: 600; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
.bar { background: #ddd; height: .8rem; margin-top: .35rem; } .bar div { background: #1f77b4; height: 100%; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 220, 52, 34  # of a chart in pixels; room for its numbers


def page(report: Report) -> str:
    """The whole page, for ``report.to_html()``."""
    parts = ["<h1>DNAL report</h1>", _origin(report), _summary(report), _equality(report), _search(report)]
    cut = [group for group in report.groups if group.frozen is None]
    whole = [group for group in report.groups if group.frozen is not None]
    if cut:
        parts += ["<h2>Widths</h2>", _widths(cut)]
    if whole:
        parts += ["<h2>Left whole</h2>", _whole(whole)]
    parts.append(_footer(report))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>DNAL report</title>'
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _origin(report: Report) -> str:
    return f'<p class="note"><code>{escape(report.command)}</code></p>' if report.command else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def cells(kind: str, row: Sequence[str]) -> str:
        right = ' class="number"'
        return "".join(f"<{kind}{right if i in numbers else ''}>{cell}</{kind}>" for i, cell in enumerate(row))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>\n<tr>{cells('th', head)}</tr>\n{body}\n</table>"


def _summary(report: Report) -> str:
    rows = [[escape(cell) for cell in row] for row in report.rows()]
    table = _table(["", "before", "after", "change"], rows, (1, 2, 3))
    aims = ", ".join(f"{value:.1%} of the {kind}" for kind, value in report.targets.items())
    target = f"<p>Target: {aims}.</p>" if aims else ""
    return f"<h2>Before and after</h2>\n{table}\n{target}"


def _equality(report: Report) -> str:
    if report.max_abs_diff is None:
        return ""
    exact = f", relative, in float64: {report.relative_diff:.1e}" if report.relative_diff is not None else ""
    return (
        "<p>The cut network was compared with the hard-gated one in eval and train mode: the largest difference of an "
        f"output is {report.max_abs_diff:.1e}{exact}.</p>"
    )


def _search(report: Report) -> str:
    history, charts = report.history, []
    cost = f"{' and '.join(report.targets)}, as a fraction of the dense network's" if report.targets else "Open gates"
    for key, title, mark in (("cost", cost, min(report.targets.values(), default=None)), ("loss", "loss", None)):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if len(points) > 1:
            charts.append(_line(title, points, mark))
    counts = [(entry["step"], entry["gates"]) for entry in history if entry.get("gates")]
    if len(counts) > 1:
        charts.append(_heat("Gates: from closed (0) to open (1)", counts))
    return f'<h2>The search</h2>\n<div class="charts">\n{"".join(charts)}</div>' if charts else ""


def _frame(title: str, steps: Sequence[float], low: float, high: float, inside: str) -> str:
    """A chart's figure: ``inside``, its axes, and the numbers at their ends."""
    right, base = _WIDTH - 12, _HEIGHT - _BOTTOM
    axes = f'<path d="M{_LEFT} 8V{base}H{right}" fill="none" stroke="#999"/>'
    labels = [
        (_LEFT - 6, 14, "end", f"{high:.3g}"),
        (_LEFT - 6, base, "end", f"{low:.3g}"),
        (_LEFT, _HEIGHT - 16, "middle", f"{steps[0]:g}"),
        (right, _HEIGHT - 16, "end", f"{steps[-1]:g}"),
        ((_LEFT + right) / 2, _HEIGHT - 4, "middle", "step"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{at}">{text}</text>' for x, y, at, text in labels)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(title)}">{inside}{axes}{texts}</svg>'
        "</figure>\n"
    )


def _line(title: str, points: Sequence[tuple[float, float]], mark: float | None) -> str:
    """A curve, and a dashed line at ``mark``."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    across, up = _WIDTH - 12 - _LEFT, _HEIGHT - _BOTTOM - 8
    span, rise = max(steps[-1] - steps[0], 1), max(high - low, 1e-12)
    path = " ".join(
        f"{_LEFT + across * (step - steps[0]) / span:.1f},{8 + up * (high - value) / rise:.1f}"
        for step, value in points
    )
    inside = f'<polyline points="{path}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>'
    if mark is not None:
        y = 8 + up * (high - mark) / rise
        inside += f'<path d="M{_LEFT} {y:.1f}h{across}" stroke="#d62728" stroke-dasharray="4 4"/>'
        inside += f'<text x="{_WIDTH - 12}" y="{y - 4:.1f}" text-anchor="end">target {mark:.3g}</text>'
    return _frame(title, steps, low, high, inside)


def _heat(title: str, counts: Sequence[tuple[float, Sequence[int]]]) -> str:
    """A column for every entry of the history, a row for every bin; darker: more gates."""
    steps = [step for step, _ in counts]
    bins = len(counts[0][1])
    wide, high = (_WIDTH - 12 - _LEFT) / len(counts), (_HEIGHT - _BOTTOM - 8) / bins
    cells = [
        f'<rect x="{_LEFT + i * wide:.1f}" y="{8 + (bins - 1 - b) * high:.1f}" width="{wide + 0.3:.1f}" '
        f'height="{high:.1f}" fill="#1f77b4" fill-opacity="{(count / max(sum(column), 1)) ** 0.5:.2f}"/>'
        for i, (_, column) in enumerate(counts)
        for b, count in enumerate(column)
        if count
    ]
    return _frame(title, steps, 0, 1, "".join(cells))


def _widths(groups: Sequence[GroupReport]) -> str:
    widest = max(group.units for group in groups)
    rows = [
        [
            escape(group.name),
            str(group.units),
            str(group.kept),
            f'<div class="bar" style="width:{300 * group.units / widest:.0f}px">'
            f'<div style="width:{100 * group.kept / group.units:.1f}%"></div></div>',
            escape(", ".join(f"{layer} {count}" for layer, count in group.asked.items())),
        ]
        for group in groups
    ]
    asked = any(group.asked for group in groups)
    head = ["channel group", "before", "after", "", *(["asked to remove"] if asked else [])]
    return _table(head, [row if asked else row[:-1] for row in rows], (1, 2))


def _whole(groups: Sequence[GroupReport]) -> str:
    rows = [[escape(group.name), str(group.units), escape(group.frozen or "")] for group in groups]
    return _table(["channel group", "channels", "why"], rows, (1,))


def _footer(report: Report) -> str:
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report.versions.items())
    lines = "<br>".join(line for line in (seconds, versions) if line)
    return f"<footer><p>{lines}</p></footer>" if lines else ""
