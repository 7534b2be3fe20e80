"""Tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from .record import Report


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Columns under their heads; ``align`` has an "l" or "r" a column: by default numbers behind a name."""
    sides = [{"l": "left", "r": "right"}[side] for side in align or "l" + "r" * (len(head) - 1)]
    return tabulate(list(rows), head, tablefmt="plain", disable_numparse=True, colalign=sides)


def side_by_side(names: Sequence[str], reports: Sequence[Report]) -> tuple[list[list[str]], list[list[str]]]:
    """What reports say after the cut, and the width of every channel group in each: rows, the head first.

    The first column is the uncut network, where all have the same.
    """
    sizes = [{row[0]: row[2] for row in report.rows()} for report in reports]
    widths = [{group.name: f"{group.kept}" for group in report.groups} for report in reports]
    if all(report.before == reports[0].before for report in reports):
        names = ["uncut", *names]
        sizes.insert(0, {row[0]: row[1] for row in reports[0].rows()})
        widths.insert(0, {group.name: f"{group.units}" for group in reports[0].groups})

    def rows(what: str, columns: list[dict[str, str]]) -> list[list[str]]:
        keys = dict.fromkeys(key for column in columns for key in column)
        return [[what, *names], *([key, *(column.get(key, "-") for column in columns)] for key in keys)]

    return rows("", sizes), rows("channel group", widths)


def compared(names: Sequence[str], reports: Sequence[Report]) -> str:
    """Reports side by side."""
    return "\n\n".join(table(rows[0], rows[1:]) for rows in side_by_side(names, reports))
