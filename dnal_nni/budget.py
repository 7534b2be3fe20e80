"""The budget, the price that holds the search to it, and the cut that hits it to the channel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cost import Complexity, CostModel
from .errors import DNALError


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the compressed network may cost. Exactly one of the three; a value <= 1 is the fraction to keep.

    Args:
        flops: fvcore's count (one multiply-add is one flop).
        params: number of parameters.
        latency: not supported yet.
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.latency is not None:
            raise DNALError("Budget(latency=...) is not supported yet: give flops= or params= instead")
        if (self.flops is None) == (self.params is None):
            raise DNALError("Budget needs exactly one of flops= and params=, for example Budget(flops=0.5)")
        value = self.flops if self.flops is not None else self.params
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not ok:
            raise DNALError(
                f"Budget({self.kind}={value!r}): must be a number > 0; up to 1 it is the fraction to keep, above 1 an "
                "absolute count"
            )

    @property
    def kind(self) -> str:
        """The name of what is limited."""
        return "flops" if self.flops is not None else "params"

    def fraction(self, dense: Complexity) -> float:
        """The fraction of ``dense`` to keep; an error where it is more than there is."""
        value = self.flops if self.flops is not None else self.params
        assert value is not None
        whole = getattr(dense, self.kind)
        if value > whole:
            raise DNALError(
                f"Budget({self.kind}={value:g}) is more than the model has ({whole}): give less, or a fraction up to 1"
            )
        return value / whole if value > 1 else value


class Objective:
    """Costs relative to the dense network that a search holds to targets: one for a budget, one a group for ratios.

    Attributes:
        targets: float64 ``[k]``.
        owner: int64 ``[units]``: the target that each unit's price belongs to.
    """

    def __init__(self, cost: CostModel, budget: Budget | None, ratios: Sequence[float] | None = None) -> None:
        self.cost, self.budget = cost, budget
        self.sizes = cost.sizes
        self.group_of = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        if budget is not None:
            self.targets = torch.tensor([budget.fraction(cost.dense)], dtype=torch.float64)
            self.owner = torch.zeros_like(self.group_of)
            self._check_reachable()
        else:
            assert ratios is not None
            sizes = torch.tensor(self.sizes, dtype=torch.float64)
            # as many units as the ratio says, to the nearest, at least one
            kept = ((1 - torch.tensor(ratios, dtype=torch.float64)) * sizes).round().clamp(min=1)
            self.targets, self.owner = kept / sizes, self.group_of

    def to(self, device: torch.device | str) -> Objective:
        """Move to a device, in place."""
        self.cost.to(device)
        self.group_of, self.targets, self.owner = (t.to(device) for t in (self.group_of, self.targets, self.owner))
        return self

    def relative(self, g: Tensor) -> Tensor:
        """Cost ``[..., k]`` at gates ``g`` (float ``[..., units]``), as fractions of the dense one."""
        if self.budget is None:
            return torch.stack([part.mean(-1) for part in g.split(self.sizes, -1)], -1)
        spent = getattr(self.cost, self.budget.kind)(g)
        return (spent / getattr(self.cost.dense, self.budget.kind)).unsqueeze(-1)

    def floor(self) -> list[int]:
        """Units of each group held open while searching: no group may close whole, or collapse."""
        if self.budget is None:
            return [1] * len(self.sizes)
        fraction = float(self.targets[0])
        while True:
            floor = [max(1, math.ceil(fraction * size)) for size in self.sizes]
            least = torch.cat([(torch.arange(s) < f).double() for s, f in zip(self.sizes, floor)])
            # leave room: with every group at its floor there would be nothing left to learn
            if float(self.relative(least)[0]) <= 0.8 * float(self.targets[0]) or fraction < 1e-3:
                return floor
            fraction *= 0.8

    def _check_reachable(self) -> None:
        assert self.budget is not None
        least = torch.cat([(torch.arange(size) < 1).double() for size in self.sizes])
        lowest = float(self.relative(least)[0])
        target = float(self.targets[0])
        if lowest > target:
            raise DNALError(
                f"Budget({self.budget.kind}={target:.3g}) cannot be reached: with one unit left in each of the "
                f"{len(self.sizes)} channel groups that may be cut, {lowest:.3g} of the {self.budget.kind} remain; "
                "raise the budget or exclude fewer layers"
            )


def held_open(score: Tensor, group_of: Tensor, within: Tensor) -> Tensor:
    """bool ``[units]``: the best-scored units of every group, as many as :func:`floor_ranks` of it says."""
    order = score.argsort(descending=True, stable=True)
    order = order[group_of[order].argsort(stable=True)]  # best first, group by group
    return torch.zeros_like(within).scatter(0, order, within)


def floor_ranks(sizes: Sequence[int], floor: Sequence[int]) -> Tensor:
    """bool ``[units]``: true for the first ``floor`` ranks of each group."""
    return torch.cat([torch.arange(size) < least for size, least in zip(sizes, floor)])


def price(objective: Objective, score: Tensor, delta: Tensor, held: Tensor, targets: Tensor) -> Tensor:
    """The price per target at which ``sigmoid(delta * (score - price))`` costs ``targets``, without a host sync.

    The cost falls as the price rises, so a bracket is narrowed: 32 prices at a time (one pass over the cost model), to
    1 / 31 ** 5 of its width. Units in ``held`` stay open whatever the price. Shapes: score, held ``[units]``; targets
    and the result ``[k]``.
    """
    reach = 30.0 / delta
    low = (score.min() - reach).expand_as(targets)
    high = (score.max() + reach).expand_as(targets)
    fractions = torch.linspace(0, 1, 32, dtype=score.dtype, device=score.device).unsqueeze(1)
    for _ in range(5):
        trial = low + (high - low) * fractions  # [32, k]
        cost = objective.relative(gates(score - trial.index_select(1, objective.owner), delta, held))
        dear = (cost > targets).sum(0, keepdim=True).clamp(1, 31)
        low, high = trial.gather(0, dear - 1)[0], trial.gather(0, dear)[0]
    return high


def gates(s: Tensor, delta: Tensor, held: Tensor) -> Tensor:
    """``sigmoid(delta * s)``, 1 where held open."""
    return torch.where(held, torch.ones_like(s), torch.sigmoid(delta * s))


def exact_cut(objective: Objective, s: Tensor, floor: Sequence[int], target: float | None = None) -> Tensor:
    """The units to keep, bool ``[units]``: in the order of ``s``, as many as the budget allows, to the channel.

    At least ``floor`` units of each group stay. The threshold leaves a gap smaller than one unit; units next in rank
    that still fit close it.

    Args:
        target: fraction of the dense cost, instead of the budget's own (to correct for what the model cannot see).
    """
    s = s.detach().double().cpu()
    objective.to("cpu")
    keep = held_open(s, objective.group_of, floor_ranks(objective.sizes, floor))
    if objective.budget is None:
        for i, part in enumerate(s.split(objective.sizes)):
            best = part.topk(round(float(objective.targets[i]) * len(part))).indices
            start = sum(objective.sizes[:i])
            keep[start : start + len(part)] = False
            keep[start + best] = True
        return keep
    limit = float(objective.targets[0]) if target is None else target

    def spent(mask: Tensor) -> float:
        return float(objective.relative(mask.double())[0])

    ranked = [i for i in torch.argsort(s, descending=True, stable=True).tolist() if not keep[i]]
    low, high = 0, len(ranked)
    while low < high:  # the most units that fit
        middle = (low + high + 1) // 2
        trial = keep.clone()
        trial[ranked[:middle]] = True
        low, high = (middle, high) if spent(trial) <= limit else (low, middle - 1)
    keep[ranked[:low]] = True
    for unit in ranked[low:]:
        if limit - spent(keep) < 5e-4 * limit:
            break
        keep[unit] = True
        if spent(keep) > limit:
            keep[unit] = False
    return keep
