"""Pure functions of the progress of a search."""

from __future__ import annotations

from torch import Tensor

DELTA_END = 1e4  # the paper's final scale
# The paper starts at 1. There, holding the expected cost to its descent half closes every gate; from 30 on, the gates
# that close are those with the lowest scores, and the norms' statistics are those of a network that can be cut.
DELTA_START = 30.0


def delta_per_step(step: int, steps: int) -> float:
    """delta at ``step`` in ``0 .. steps - 1``: geometric from 30 to 1e4 over the planned steps."""
    return DELTA_START * (DELTA_END / DELTA_START) ** (min(step, steps - 1) / max(steps - 1, 1))


def delta_paper(step: int, steps: int, epochs: int = 10) -> float:
    """delta as in the authors' code: constant inside an epoch, ``1e4 ** ((k + 1) / 10)`` in epoch k of ten."""
    epoch = min(step * epochs // max(steps, 1), epochs - 1)
    return float(DELTA_END ** ((epoch + 1) / epochs))


def ramp(step: int, steps: int, start: float, end: float, until: float = 0.6) -> float:
    """Cubic descent from ``start`` to ``end`` over the first ``until`` of a search (Zhu & Gupta, arXiv 1710.01878)."""
    progress = min(1.0, (step + 1) / max(until * steps, 1.0))
    return end + (start - end) * (1 - progress) ** 3


def at(table: Tensor, step: int | Tensor) -> Tensor:
    """The entry of a step: a number, or int64 ``[1]`` on the device of the table, where a CUDA graph counts.

    Past the end, where a search that was done is taken up, the last one.
    """
    return table.index_select(0, step)[0] if isinstance(step, Tensor) else table[min(step, len(table) - 1)]
