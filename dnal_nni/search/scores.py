"""What every unit is worth, and the gates that follow from it under a budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .close import exact_cut
from .leaves import FactorLeaves, Leaves
from .loop import Search
from .objective import Objective, best_of_group, first_ranks, price
from .ranks import broadcast_
from .schedule import at, delta_per_step, ramp

MOMENTUM = 0.9
# Measured: with 1, groups move as blocks down to their floors, and the widths end up worse than uniform ones on
# Fashion-MNIST; with 0, the norms of the trained weights decide alone.
REACH = 0.3
# Candidates of a supernet start alike, and must come apart: they move farther by this factor. They start below all
# channels: next to the whole supernet a budget is small, and with candidates and channels at one height the channels
# around the candidates, which count in each of them, go down to their floors (docs/benchmarks.md).
CANDIDATES_REACH = 1 / REACH
CANDIDATES_START = 0.0
# From this share of a search on, the structure is that of the cut. A unit that would help while closed and hurt while
# open keeps its score at the price: left alone, some 10 % of the gates end there, undecided.
SETTLED = 0.75
# From this share on, no more candidates of a choice are open than may stay, where that is limited.
NARROWED = 0.5


class Scores:
    """What every unit is worth, and what the gates should be at each step of a search under an objective.

    A gate's ``s`` is ``score - price``: the score starts at the relative norm of the unit's weights (in a supernet, at
    its rank by that; candidates start below) and collects
    ``-dL/dg`` per unit of cost; the price is set at every step so that the expected cost follows a descent to the
    target. A gate thus closes when it is worth less, per cost, than what the budget can afford, and reopens when it is
    worth more, until the last quarter of the search: there the structure stands, while weights and norm statistics
    settle. Everything stays on the device of the scores; a step has no host sync and can be put into a CUDA graph.

    Args:
        objective: what the search is held to.
        start: norms of the units, 1 on average in each group, float64 ``[units]``.
        steps: planned number of steps.
        reach: how far a steady task gradient of average size moves a score over a whole search.

    Attributes:
        value: the scores, float64 ``[units]``.
        floor: units that stay open in each group.
        moving: the number of steps after which :meth:`settle` is due.
    """

    kind: ClassVar[type[Search]] = Search
    leaves: ClassVar[type[Leaves]] = FactorLeaves
    lambda_ = 0.0  # what a search is held to is in the price, not in the loss

    def __init__(self, objective: Objective, start: Tensor, steps: int, reach: float = REACH) -> None:
        self.objective, self.steps = objective, steps
        self.floor: Sequence[int] = objective.to("cpu").floor()
        objective.to(start.device)
        limits = [first_ranks(objective.sizes, counts) for counts in (self.floor, objective.limits.most)]
        self.ranks = torch.stack(limits).to(start.device)
        self.value = start.clone()
        self.momentum = torch.zeros_like(start)
        self.scale = start.new_zeros(2)  # mean squares: of channels, of candidates
        chosen = torch.tensor(objective.choices, device=start.device)[objective.group_of]
        self.choices = chosen.nonzero().flatten()  # units that are candidates of a supernet
        if len(self.choices):
            self.value = _spread(start, objective.sizes).index_fill(0, self.choices, CANDIDATES_START)
        self.cheap = 0.1 * objective.whole[self.choices].mean()
        self.delta = torch.tensor([delta_per_step(t, steps) for t in range(steps)]).to(start)
        self.moving = max(1, round(SETTLED * steps))
        self.pace = torch.tensor([reach / self.moving if t < self.moving else 0.0 for t in range(steps)]).to(start)
        self.settled = torch.arange(steps, device=start.device) >= self.moving
        self.narrowed = torch.arange(steps, device=start.device) >= NARROWED * steps
        self.structure = torch.ones_like(start)  # 1 open, -1 closed; set by settle
        descent = torch.tensor([ramp(t, steps, 1.0, 0.0) for t in range(steps)]).to(start).unsqueeze(1)
        self.aims = objective.targets + (0.98 - objective.targets) * descent

    @torch.no_grad()
    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """One architecture step from dL/dg at the gates ``g``, both ``[units]``; ``step`` as in :meth:`gates`."""
        g = g.detach().to(self.value.dtype).requires_grad_()
        with torch.enable_grad():
            (marginal,) = torch.autograd.grad(self.objective.relative(g).sum(), g)
        # loss saved per unit of cost; that a unit costs (next to) nothing must not drown all others
        worth = -grad.to(self.value.dtype) / torch.maximum(marginal, 1e-3 * marginal.mean())
        if len(self.choices):
            # candidates among themselves: next to single channels they are few and steady, and some cost nothing
            own = -grad.to(self.value.dtype) / marginal.clamp(min=self.cheap)
            own = CANDIDATES_REACH * _normalised(own.index_select(0, self.choices), self.scale[1])
            worth = _normalised(worth.index_fill(0, self.choices, 0.0), self.scale[0]).index_copy(0, self.choices, own)
        else:
            worth = _normalised(worth, self.scale[0])
        self.momentum.mul_(MOMENTUM).add_(worth, alpha=1 - MOMENTUM)
        self.value.add_(self.momentum * at(self.pace, step))

    @torch.no_grad()
    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """``s`` ``[units]`` and ``delta`` (0-d) of a step (a number, or int64 ``[1]`` on the device)."""
        delta, settled, aims = (at(table, step) for table in (self.delta, self.settled, self.aims))
        if not isinstance(step, Tensor) and step >= self.moving:
            return self.structure, delta
        held, allowed = best_of_group(self.value, self.objective.group_of, self.ranks)
        if len(self.choices):
            free = price(self.objective, self.value, delta, held, allowed, aims)
            must, may = self.objective.candidates(self.value, free[self.objective.owner])
            held, allowed = held | must, allowed & (may | ~at(self.narrowed, step))
        s = self.value - price(self.objective, self.value, delta, held, allowed, aims)[self.objective.owner]
        s = torch.where(held, torch.maximum(s, 6.0 / delta), s)  # held open: far enough on the open side
        s = torch.where(allowed, s, torch.minimum(s, -6.0 / delta))
        return torch.where(settled, self.structure, s), delta

    def penalised(self, loss: Tensor, s: Sequence[Tensor]) -> Tensor:
        """``loss`` as it is: the price holds the gates to the objective."""
        return loss

    def slower(self, share: float) -> None:
        """Larger steps, as many times as they are rarer. Schedules stay on the clock of all steps."""
        self.pace.div_(share)

    def settle(self) -> None:
        """Fix the structure: what would be cut now, to the channel. Waits for the device, once in a search."""
        objective = copy.deepcopy(self.objective)  # a CUDA graph holds the tables of this one
        keep = exact_cut(objective, self.value, self.floor)
        self.structure.copy_(keep.double() * 2 - 1)
        broadcast_(self.structure)

    def cost(self, g: Tensor) -> Tensor:
        """For the history: the mean over the targets (0-d) of the cost at gates ``g``, ``[units]``."""
        return self.objective.relative(g).mean()

    def rank(self, s: Tensor) -> Tensor:
        """What orders the units in a cut: their scores, whatever ``s`` the gates have."""
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {"score": self.value, "momentum": self.momentum, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _spread(score: Tensor, sizes: Sequence[int]) -> Tensor:
    """The units of each group in the same order, at even distances from 0 to 2.

    At the high price of a supernet's budget, a group whose norms are nearly equal would close as a block.
    """
    parts = [2 * (part.argsort(stable=True).argsort() + 0.5) / len(part) for part in score.split(list(sizes))]
    return torch.cat(parts)


def _normalised(worth: Tensor, scale: Tensor) -> Tensor:
    """``worth`` by its running root mean square, whose square ``scale`` keeps."""
    mean_square = worth.square().mean()
    scale.copy_(torch.where(scale == 0, mean_square, 0.9 * scale + 0.1 * mean_square))
    return (worth / scale.sqrt().clamp(min=1e-30)).clamp(-5, 5)
