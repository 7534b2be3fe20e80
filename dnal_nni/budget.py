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


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many units of each group a search may leave: at least ``least`` and at most ``most``, each ``[groups]``."""

    least: Sequence[int]
    most: Sequence[int]


class Objective:
    """Costs relative to the dense network that a search holds to targets: one for a budget, one a pool for ratios.

    Args:
        cost: of the network.
        budget: what it may cost; None: ``kept`` rules.
        limits: of each group.
        kept: the number of units to keep in each pool, ``[pools]``.
        pools: the pool that each group belongs to, ``[groups]``.

    Attributes:
        targets: float64 ``[k]``.
        owner: int64 ``[units]``: the target that each unit's price belongs to.
        pool_sizes: int64 ``[k]``: units per target.
        choices: of each group, whether its units are candidates of a supernet instead of channels.
        whole: float64 ``[units]``: what each unit costs in the uncut network.
    """

    def __init__(
        self,
        cost: CostModel,
        budget: Budget | None,
        limits: Limits,
        kept: Sequence[int] = (),
        pools: Sequence[int] = (),
    ) -> None:
        self.cost, self.budget, self.limits = cost, budget, limits
        self.sizes = cost.sizes
        self.group_of = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        self.choices = [group.choice for group in cost.active]
        self._must = first_ranks(self.sizes, [g.least if g.choice else 0 for g in cost.active])
        self._may = first_ranks(self.sizes, [g.most or g.channels for g in cost.active])
        if budget is not None:
            self.targets = torch.tensor([budget.fraction(cost.dense)], dtype=torch.float64)
            self.owner = torch.zeros_like(self.group_of)
        else:
            self.owner = torch.tensor(pools)[self.group_of]
            self.targets = torch.tensor(kept, dtype=torch.float64) / self.owner.bincount()
        self.pool_sizes = self.owner.bincount()
        g = torch.ones(len(self.group_of), dtype=torch.float64, requires_grad=True)
        (self.whole,) = torch.autograd.grad(self.relative(g).sum(), g)
        if budget is not None:
            self._check_reachable()

    def to(self, device: torch.device | str) -> Objective:
        """Move to a device, in place."""
        self.cost.to(device)
        for name in ("group_of", "targets", "owner", "pool_sizes", "whole", "_must", "_may"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def relative(self, g: Tensor) -> Tensor:
        """Cost ``[..., k]`` at gates ``g`` (float ``[..., units]``), as fractions of the dense one."""
        if self.budget is None:
            open_units = g.new_zeros(*g.shape[:-1], len(self.targets)).index_add(-1, self.owner, g)
            return open_units / self.pool_sizes
        spent = getattr(self.cost, self.budget.kind)(g)
        return (spent / getattr(self.cost.dense, self.budget.kind)).unsqueeze(-1)

    def candidates(self, score: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """What must be open of every choice, and what may, bool ``[units]`` each; channels must not, and may.

        The candidates that are worth most, or lose least. A candidate is worth its score, less the price, times its
        cost. Scores are per cost: by themselves they would keep the dearest one where nothing but the cheapest fits.
        """
        worth = (score - price) * (self.whole + 1e-3 * self.whole.mean())  # those that cost nothing are ranked too
        must, may = best_of_group(worth, self.group_of, torch.stack([self._must, self._may]))
        return must, may

    def _smallest(self, counts: Sequence[int]) -> Tensor:
        """Gates with so many open channels in each group, and the cheapest candidates: float64 ``[units]``."""
        channels = [0 if choice else count for count, choice in zip(counts, self.choices)]
        nothing = torch.zeros_like(self.whole)
        return (first_ranks(self.sizes, channels) | self.candidates(nothing, nothing + 1.0)[0]).double()

    def floor(self) -> list[int]:
        """Channels of each group held open while searching: no group may close whole, or collapse.

        0 for choices: which candidate stays is a question of the price, see :meth:`candidates`.
        """
        if self.budget is None:
            return list(self.limits.least)
        fraction = float(self.targets[0])
        while True:
            floor = [
                0 if choice else min(most, max(least, math.ceil(fraction * size)))
                for size, least, most, choice in zip(self.sizes, self.limits.least, self.limits.most, self.choices)
            ]
            # leave room: with every group at its floor there would be nothing left to learn
            if float(self.relative(self._smallest(floor))[0]) <= 0.8 * float(self.targets[0]) or fraction < 1e-3:
                return floor
            fraction *= 0.8

    def _check_reachable(self) -> None:
        assert self.budget is not None
        kind, target = self.budget.kind, float(self.targets[0])
        nothing = torch.zeros_like(self.whole)
        most = (first_ranks(self.sizes, self.limits.most) & self.candidates(nothing + 1.0, nothing)[1]).double()
        lowest, highest = (float(self.relative(g)[0]) for g in (self._smallest(self.limits.least), most))
        if lowest > target:
            left = "one unit left" if max(self.limits.least) == 1 else "what max_sparse_ratio keeps"
            raise DNALError(
                f"Budget({kind}={target:.3g}) cannot be reached: with {left} in each of the {len(self.sizes)} channel "
                f"groups that may be cut, {lowest:.3g} of the {kind} remain; raise the budget or exclude fewer layers"
            )
        if highest < 0.99 * target:
            limit = "min_sparse_ratio" if bool(self._may.all()) else "single_path"
            raise DNALError(
                f"Budget({kind}={target:.3g}) is more than {limit} leaves ({highest:.3g} of the {kind}): lower the "
                f"budget or {'min_sparse_ratio' if limit == 'min_sparse_ratio' else 'switch it off'}"
            )


def best_of_group(score: Tensor, group_of: Tensor, ranks: Tensor) -> Tensor:
    """bool ``[..., units]``: the best-scored units of every group, as many as ``ranks`` (:func:`first_ranks`) says."""
    order = score.argsort(descending=True, stable=True)
    order = order[group_of[order].argsort(stable=True)]  # best first, group by group
    return torch.zeros_like(ranks).scatter(-1, order.expand_as(ranks), ranks)


def first_ranks(sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """bool ``[units]``: true for the first ``counts`` ranks of each group."""
    return torch.cat([torch.arange(size) < count for size, count in zip(sizes, counts)])


def price(
    objective: Objective, score: Tensor, delta: Tensor, held: Tensor, allowed: Tensor, targets: Tensor
) -> Tensor:
    """The price per target at which ``sigmoid(delta * (score - price))`` costs ``targets``, without a host sync.

    The cost falls as the price rises, so a bracket is narrowed: 32 prices at a time (one pass over the cost model), to
    1 / 31 ** 5 of its width. Units in ``held`` stay open whatever the price, those not in ``allowed`` closed. Shapes:
    score, held, allowed ``[units]``; targets and the result ``[k]``.
    """
    reach = 30.0 / delta
    low = (score.min() - reach).expand_as(targets)
    high = (score.max() + reach).expand_as(targets)
    fractions = torch.linspace(0, 1, 32, dtype=score.dtype, device=score.device).unsqueeze(1)
    for _ in range(5):
        trial = low + (high - low) * fractions  # [32, k]
        cost = objective.relative(gates(score - trial.index_select(1, objective.owner), delta, held, allowed))
        dear = (cost > targets).sum(0, keepdim=True).clamp(1, 31)
        low, high = trial.gather(0, dear - 1)[0], trial.gather(0, dear)[0]
    return high


def gates(s: Tensor, delta: Tensor, held: Tensor, allowed: Tensor) -> Tensor:
    """``sigmoid(delta * s)``, 1 where held open, 0 where not allowed to be."""
    return torch.where(held, torch.ones_like(s), torch.sigmoid(delta * s)) * allowed


def exact_cut(objective: Objective, s: Tensor, floor: Sequence[int], target: float | None = None) -> Tensor:
    """The units to keep, bool ``[units]``: in the order of ``s``, as many as the budget allows, to the channel.

    At least ``floor`` units of each group of channels stay, and one candidate of every choice. The threshold leaves a
    gap smaller than one unit; units next in rank that still fit close it.

    Args:
        target: fraction of the dense cost, instead of the budget's own (to correct for what the model cannot see).
    """
    s = s.detach().double().cpu()
    objective.to("cpu")
    floor = [0 if choice else count for count, choice in zip(floor, objective.choices)]
    keep = best_of_group(s, objective.group_of, first_ranks(objective.sizes, floor))
    allowed = best_of_group(s, objective.group_of, first_ranks(objective.sizes, objective.limits.most))
    ranked = [i for i in torch.argsort(s, descending=True, stable=True).tolist() if allowed[i] and not keep[i]]
    if objective.budget is None:
        room = (objective.targets * objective.pool_sizes).round().long()
        room -= torch.zeros_like(room).index_add(0, objective.owner, keep.long())
        for unit in ranked:
            if room[objective.owner[unit]] > 0:
                keep[unit] = True
                room[objective.owner[unit]] -= 1
        return keep
    limit = float(objective.targets[0]) if target is None else target

    def spent(mask: Tensor) -> float:
        return float(objective.relative(mask.double())[0])

    least = keep

    def best(count: int, above: float = 0.0) -> Tensor:
        trial = least.clone()
        trial[ranked[:count]] = True
        price = s[ranked[count]] if count < len(ranked) else s.min()
        must, may = objective.candidates(s, price + above)
        return (trial | must) & may

    low, high = 0, len(ranked)
    while low < high:  # the most units that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(best(middle)) <= limit else (low, middle - 1)
    keep = best(low)
    above = 1e-3
    while spent(keep) > limit and above < 1e6:  # cheaper candidates, at a price that no unit is worth
        keep, above = best(0, above), 1.5 * above
    for unit in ranked[low:]:
        if limit - spent(keep) < 5e-4 * limit:
            break
        if objective.choices[objective.group_of[unit]]:
            continue  # which candidates are open is settled with the price
        before = keep
        keep = keep.clone()
        keep[unit] = True
        if spent(keep) > limit:
            keep = before
    return keep
