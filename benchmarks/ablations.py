"""The default search with one thing changed, beside it: same harness, same options as peers.py.

    python benchmarks/ablations.py run --data DIR --out benchmarks/results/peers --methods default hard

Lines go to OUT/ablations.jsonl; `python benchmarks/peers.py report` prints them below the peers. The form in which
weights and gates took turns was the default up to commit 41ee096 and is not here any more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator

import methods
import peers
import torch
from torch import Tensor

from dnal_nni.search.objective import Objective, first_ranks
from dnal_nni.search.scores import REACH, Scores


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs from the default.

    Args:
        delta: first value of delta; 1e4 means gates that are hard from the first step.
        reach: how far scores move; 0 leaves the trained weights' norms to decide.
        open: cost that the floors of all groups make up, as a share of the budget (0.8 by default).
        epochs: of the search.
        squared: rank by the mean square of dL/dg (the diagonal of the Fisher matrix) instead of collecting dL/dg, per
            cost to this power.
        zero: scores start at 0 instead of the norms.
        settled: scores stand still in the last quarter.
        frozen: weights do not learn in the search.
    """

    delta: float | None = None
    reach: float = REACH
    open: float | None = None
    epochs: int | None = None
    squared: float | None = None
    zero: bool = False
    settled: bool = True
    frozen: bool = False


def floor_of(objective: Objective, share: float) -> list[int]:
    """The same share of every group, so large that all floors together cost ``share`` of the budget."""
    fraction = 1.0
    while True:
        floor = [max(1, math.ceil(fraction * size)) for size in objective.sizes]
        least = first_ranks(objective.sizes, floor).double()
        if float(objective.relative(least)[0]) <= share * float(objective.targets[0]) or fraction < 1e-3:
            return floor
        fraction *= 0.97


class Changed(Scores):
    """:class:`Scores` with a change."""

    def __init__(self, objective: Objective, start: Tensor, steps: int, change: Change) -> None:
        super().__init__(objective, start, steps, change.reach)
        self.change = change
        if change.open is not None:
            self.floor = floor_of(objective.to("cpu"), change.open)
            objective.to(start.device)
            self.ranks[0] = first_ranks(objective.sizes, self.floor).to(start.device)
        if change.delta is not None:
            ratio = 1e4 / change.delta
            self.delta = torch.tensor([change.delta * ratio ** (t / max(1, steps - 1)) for t in range(steps)]).to(start)
        if not change.settled:
            self.moving = steps
            self.settled = torch.zeros_like(self.settled)
            self.pace = torch.full_like(self.pace, change.reach / steps)
        if change.zero:
            self.value.zero_()
        self.squares, self.count, self.first = torch.zeros_like(start), start.new_zeros(()), self.value.clone()

    @torch.no_grad()
    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        power = self.change.squared
        if power is None:
            return super().update(grad, g, step)
        g = g.detach().to(self.value.dtype).requires_grad_()
        with torch.enable_grad():
            (marginal,) = torch.autograd.grad(self.objective.relative(g).sum(), g)
        self.squares.add_(grad.to(self.value.dtype).square())
        self.count.add_(1)
        worth = 0.5 * (self.squares / self.count).clamp(min=1e-30).log() - power * marginal.clamp(min=1e-12).log()
        trust = (self.count / (0.1 * len(self.pace))).clamp(max=1)
        self.value.copy_(self.first + self.change.reach * trust * (worth - worth.mean()))


def method(change: Change) -> methods.Method:
    def run_it(run: methods.Run) -> Generator[None, None, methods.Outcome]:
        return (
            yield from methods.searched(
                run,
                change.epochs or run.args.search_epochs,
                lambda *args: Changed(*args, change),
                frozen=change.frozen,
            )
        )

    return run_it


CHANGES = {
    "default": Change(),
    "unsettled": Change(settled=False),
    "delta from 1": Change(delta=1.0),
    "hard": Change(delta=1e4),
    "norms only": Change(reach=0.0),
    "reach 1": Change(reach=1.0),
    "reach 3": Change(reach=3.0),
    "zero start": Change(zero=True),
    "floors 0.5": Change(open=0.5),
    "floors 0.95": Change(open=0.95),
    "floors 0.95, norms only": Change(open=0.95, reach=0.0),
    "1 epoch": Change(epochs=1),
    "3 epochs": Change(epochs=3),
    "squared, per sqrt cost": Change(squared=0.5, zero=True, reach=1.0),
    "squared, per cost": Change(squared=1.0, zero=True, reach=1.0),
    "frozen weights": Change(frozen=True),
}


def main() -> None:
    methods.METHODS.clear()
    methods.METHODS.update({name: method(change) for name, change in CHANGES.items()})
    peers.LINES = "ablations.jsonl"
    peers.main()


if __name__ == "__main__":
    main()
