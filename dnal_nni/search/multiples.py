"""In multiples of what channels are kept, and how near to a budget the structures lie that this allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..budget import Budget
from ..errors import DNALError
from .close import CLOSE, OVER, exact_cut
from .objective import Limits, Objective

FAST = (8, 4, 2, 1)  # the first with which the budget is reached: what tensor cores and vector units like


def multiples(asked: int | Sequence[int] | None, budget: Budget | None, device: torch.device) -> Sequence[int]:
    """What to try, in turn: what was asked; else those of :data:`FAST` on a GPU and for a latency, and 1 elsewhere.

    What that is worth: docs/benchmarks.md, "What half of the FLOPs is worth in milliseconds".
    """
    if asked is not None:
        return (asked,) if isinstance(asked, int) else tuple(asked)
    timed = budget is not None and (budget.latency is not None or device.type != "cpu")
    return FAST if timed else (1,)


class Held(NamedTuple):
    """What a search is held to in multiples of so many channels; ``nearest`` as :class:`~dnal_nni.plan.Plan` has it."""

    limits: Limits
    objective: Objective | None
    channel_multiple: int
    nearest: float | None


def first_that_fits(
    tried: Sequence[int], objective_of: Callable[[int], tuple[Limits, Objective | None]]
) -> Held:
    """The first of the multiples that has a structure as dear as the objective asks, within 1 %; or the last.

    Args:
        tried: multiples.
        objective_of: from a multiple to limits and objective; a DNALError where that cannot be reached.
    """
    for multiple in tried:
        last = multiple == tried[-1]
        try:
            within, objective = objective_of(multiple)
        except DNALError:
            if last:
                raise
            continue
        far = None if objective is None else _nearest(objective)
        if far is None or last:
            break
    return Held(within, objective, multiple, far)


def _nearest(objective: Objective) -> float | None:
    """What the nearest structure found costs, of the dense network; None where it is within 1 % of the target.

    Not looked for where the channels of every second group come in steps that are finer than that.
    """
    if objective.budget is None:
        return None
    target = float(objective.targets[0])
    steps = [
        float(part.mean()) * multiple
        for part, multiple in zip(objective.whole.split(list(objective.sizes)), objective.limits.multiples)
    ]
    if sorted(steps)[len(steps) // 2] <= CLOSE * target:
        return None
    units = exact_cut(objective, torch.ones_like(objective.whole), objective.floor())
    cost = float(objective.relative(units.double())[0])
    return cost if abs(cost / target - 1) > OVER else None
