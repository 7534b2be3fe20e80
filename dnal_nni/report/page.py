"""The report as HTML: pictures are inline SVG, nothing is fetched, no script runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .charts import bar, curve, heat, scatter
from .record import NAMES
from .tables import side_by_side

if TYPE_CHECKING:
    from .record import Report

_TEMPLATES = Environment(
    loader=PackageLoader("dnal_nni", "report/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


class _Table(NamedTuple):
    """A table and its title; ``numbers`` are the columns that are aligned to the right."""

    title: str
    head: list[str]
    rows: list[list[str]]
    numbers: range


def page(report: Report) -> str:
    """A document of its own."""
    return _TEMPLATES.get_template("page.html").render(_parts(report))


def fragment(report: Report) -> str:
    """The same to be shown inside of another document, such as a notebook."""
    return _TEMPLATES.get_template("fragment.html").render(_parts(report))


def comparison(names: Sequence[str], reports: Sequence[Report]) -> str:
    """A document of several reports side by side, with a picture of what each costs and is worth."""
    sizes, widths = (
        _Table(title, head, rows, range(1, len(head)))
        for title, (head, *rows) in zip(("After the cut", "Widths"), side_by_side(names, reports))
    )
    parts: dict[str, Any] = {"title": "DNAL reports side by side", "heading": "What it costs, and what it is worth"}
    parts |= {"sizes": sizes, "charts": _pareto(names, reports), "tables": [widths]}
    parts |= {"note": "", "facts": [], "footer": []}
    return _TEMPLATES.get_template("page.html").render(parts)


def _parts(report: Report) -> dict[str, Any]:
    head = ["", "before", "after", "kept", "change"]
    found = (_accuracy(report), _widths(report), _layers(report), _whole(report), _decisions(report))
    tables = [table for table in found if table.rows]
    return {
        "title": "DNAL report",
        "note": report.command or "",
        "sizes": _Table("Before and after", head, [list(row) for row in report.rows()], range(1, 5)),
        "facts": report.facts(),
        "heading": "The search",
        "charts": _charts(report),
        "tables": tables,
        "footer": [
            [f"{name} {value:.1f} s" for name, value in report.seconds.items()],
            [f"{name} {version}" for name, version in report.versions.items()],
        ],
    }


def _accuracy(report: Report) -> _Table:
    stages: list[tuple[str, float]] = []
    if report.accuracy is not None and report.accuracy_cut is not None:
        names = ("before", "after the cut", "after fine-tuning")
        stages = list(zip(names, (report.accuracy[0], report.accuracy_cut, report.accuracy[1])))
    rows = [[name, f"{value:.2f}", f"{value - stages[0][1]:+.2f}", bar(1.0, value / 100)] for name, value in stages]
    return _Table("Accuracy", ["", "%", "change", ""], rows, range(1, 3))


def _widths(report: Report) -> _Table:
    cut = [group for group in report.groups if group.frozen is None]
    most = max((group.units for group in cut), default=1)
    rows = [[g.name, f"{g.units}", f"{g.kept}", bar(g.units / most, g.kept / most), g.asked_text()] for g in cut]
    head = ["channel group", "before", "after", "", "asked to remove" if any(g.asked for g in cut) else ""]
    return _Table("Widths", head, rows, range(1, 3))


def _layers(report: Report) -> _Table:
    """Those with at least 1 % of the FLOPs, and the sum of the others."""
    least = 0.01 * sum(before for before, _ in report.layer_flops.values())
    shown = {name: pair for name, pair in report.layer_flops.items() if pair[0] >= least}
    others = [pair for pair in report.layer_flops.values() if pair[0] < least]
    most = max((before for before, _ in shown.values()), default=0) or 1
    rows = [
        [name, f"{before / 1e6:.3f}", f"{after / 1e6:.3f}", bar(before / most, after / most)]
        for name, (before, after) in shown.items()
    ]
    if others:
        before, after = (sum(pair[i] for pair in others) / 1e6 for i in (0, 1))
        rows.append([f"{len(others)} others, below 1 % each", f"{before:.3f}", f"{after:.3f}", ""])
    return _Table("FLOPs of each layer (M)", ["layer", "before", "after", ""], rows, range(1, 3))


def _whole(report: Report) -> _Table:
    rows = [[group.name, f"{group.units}", group.frozen] for group in report.groups if group.frozen is not None]
    return _Table("Left whole", ["channel group", "channels", "why"], rows, range(1, 2))


def _decisions(report: Report) -> _Table:
    """What people decided, and what was decided for them; the sentences about it are rows of one cell."""
    made = report.interventions
    rows = [] if made is None else [*made.rows(), *([fact] for fact in made.facts())]
    return _Table("Decisions", ["", "searched", "by hand"], rows, range(1, 3))


def _charts(report: Report) -> list[Markup]:
    """The search: what it was held to, what it lost, and where its gates were."""
    costs, losses = (
        [(e["step"], e[name]) for e in report.history if e.get(name) is not None and math.isfinite(e[name])]
        for name in ("cost", "loss")
    )
    gates = [(entry["step"], entry["gates"]) for entry in report.history if entry.get("gates")]
    charts = []
    if len(costs) > 1:
        kinds = " and ".join(NAMES.get(kind, kind) for kind in report.targets)
        title = f"Cost: {kinds}, as a fraction of the dense network's" if kinds else "Open gates"
        note = "With each channel counted by its gate. It follows a planned descent to the target." if kinds else ""
        charts.append(curve(title, note, costs, mark=min(report.targets.values(), default=None)))
    if len(losses) > 1:
        charts.append(curve("Loss", "Thin: of single batches. Thick: their running mean.", losses, smooth=True))
    if len(gates) > 1:
        last = gates[-1][1]
        closed = sum(last[: len(last) // 2])
        note = (
            "Each channel has a gate. Across: the search. Upwards: a gate's value; the darker a place, the more of the "
            f"{sum(last)} gates are there. The search parts them: at its end {closed} are closed, and their channels "
            f"go, {sum(last) - closed} are open."
        )
        charts.append(heat("Gates", note, gates, ("closed (0)", "open (1)")))
    return charts


def _pareto(names: Sequence[str], reports: Sequence[Report]) -> list[Markup]:
    """Accuracy by FLOPs, of every run and of the networks that they start with."""
    points: dict[tuple[float, float, str], None] = {}  # in their order, each once
    for name, report in zip(names, reports):
        if report.accuracy is not None:
            points[report.before.flops / 1e6, report.accuracy[0], "uncut"] = None
            points[report.after.flops / 1e6, report.accuracy[1], name] = None
    note = "The line goes through the runs that none with as few FLOPs surpasses."
    return [scatter("Accuracy (%)", note, "FLOPs (M)", list(points))] if points else []
