"""Pure functions of the progress of a search."""

from __future__ import annotations

DELTA_END = 1e4  # the paper's final scale


def delta_per_step(step: int, steps: int) -> float:
    """delta at ``step`` in ``0 .. steps - 1``: geometric from 1 to 1e4 over the planned steps."""
    return float(DELTA_END ** (min(step, steps - 1) / max(steps - 1, 1)))


def delta_paper(step: int, steps: int, epochs: int = 10) -> float:
    """delta as in the authors' code: constant inside an epoch, ``1e4 ** ((k + 1) / 10)`` in epoch k of ten."""
    epoch = min(step * epochs // max(steps, 1), epochs - 1)
    return float(DELTA_END ** ((epoch + 1) / epochs))


def ramp(step: int, steps: int, start: float, end: float, until: float = 0.6) -> float:
    """Cubic descent from ``start`` to ``end`` over the first ``until`` of a search (Zhu & Gupta, arXiv 1710.01878)."""
    progress = min(1.0, (step + 1) / max(until * steps, 1.0))
    return end + (start - end) * (1 - progress) ** 3
