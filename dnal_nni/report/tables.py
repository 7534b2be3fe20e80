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


def compared(names: Sequence[str], reports: Sequence[Report]) -> str:
    """What reports say after the cut, side by side, and the width of every channel group in each."""
    sizes = [{row[0]: row[2] for row in report.rows()} for report in reports]
    widths = [{group.name: f"{group.kept} of {group.units}" for group in report.groups} for report in reports]
    parts = []
    for what, columns in (("", sizes), ("channel group", widths)):
        keys = dict.fromkeys(key for column in columns for key in column)
        parts.append(table([what, *names], [[key, *(column.get(key, "-") for column in columns)] for key in keys]))
    return "\n\n".join(parts)
