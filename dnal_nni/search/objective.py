"""What a search is held to, and the price that holds it there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..budget import Budget, Complexity
from ..cost.model import CostModel
from ..errors import DNALError


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many units of each group a search may leave.

    Attributes:
        least: at least so many, ``[groups]``.
        most: at most so many, ``[groups]``.
        multiples: units that go together, ``[groups]``; a group keeps a multiple of that, or all that it has.
        asked: the multiple of channels that these amount to; of several, the largest.
    """

    least: Sequence[int]
    most: Sequence[int]
    multiples: Sequence[int]
    asked: int = 1


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
        pinned: units (int64) whose gates somebody else sets, and what these are; None: none.
    """

    pinned: tuple[Tensor, Tensor] | None = None

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
            self.fractions = budget.fractions(cost.dense)
            self.targets = torch.tensor([min(self.fractions.values())], dtype=torch.float64)
            self.owner = torch.zeros_like(self.group_of)
        else:
            self.owner = torch.tensor(pools)[self.group_of]
            self.targets = torch.tensor(kept, dtype=torch.float64) / self.owner.bincount()
        self.pool_sizes = self.owner.bincount()
        self.whole = self.unit_costs(torch.ones(len(self.group_of), dtype=torch.bool))

    def to(self, device: torch.device | str) -> Objective:
        """Move to a device, in place."""
        self.cost.to(device)
        for name in ("group_of", "targets", "owner", "pool_sizes", "whole", "_must", "_may"):
            setattr(self, name, getattr(self, name).to(device))
        if self.pinned is not None:
            self.pinned = self.pinned[0].to(device), self.pinned[1].to(device)
        return self

    def relative(self, g: Tensor) -> Tensor:
        """Cost ``[..., k]`` at gates ``g`` (float ``[..., units]``), as fractions of the dense one.

        Of several limits, the cost is that which is over its limit by the largest factor, times the lowest limit.
        """
        if self.pinned is not None:
            where, values = self.pinned
            g = g.index_copy(-1, where, values.to(g).expand(*g.shape[:-1], -1))
        if self.budget is None:
            open_units = g.new_zeros(*g.shape[:-1], len(self.targets)).index_add(-1, self.owner, g)
            return open_units / self.pool_sizes
        return self._tightest({kind: getattr(self.cost, kind)(g) for kind in self.fractions}).unsqueeze(-1)

    def unit_costs(self, units: Tensor) -> Tensor:
        """What each unit costs, or would cost, in the network of these (bool ``[units]``): float64 ``[units]``."""
        g = units.double().requires_grad_()
        with torch.enable_grad():
            costs: Tensor = torch.autograd.grad(self.relative(g).sum(), g)[0]
        return costs

    def measured(self, size: Complexity) -> float:
        """The same of a network that was measured."""
        return float(self._tightest({kind: torch.tensor(float(getattr(size, kind))) for kind in self.fractions}))

    def _tightest(self, spent: Mapping[str, Tensor]) -> Tensor:
        lowest = min(self.fractions.values())
        over = [
            spent[kind] / getattr(self.cost.dense, kind) * (lowest / fraction)
            for kind, fraction in self.fractions.items()
        ]
        return torch.stack(over).amax(0)

    def candidates(self, score: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """What must be open of every choice, and what may, bool ``[units]`` each; channels must not, and may.

        The candidates that are worth most, or lose least. A candidate is worth its score, less the price, times its
        cost. Scores are per cost: by themselves they would keep the dearest one where nothing but the cheapest fits.
        """
        worth = (score - price) * (self.whole + 1e-3 * self.whole.mean())  # those that cost nothing are ranked too
        must, may = best_of_group(worth, self.group_of, torch.stack([self._must, self._may]))
        return must, may

    def neighbours(self, keep: Tensor) -> Tensor:
        """Bool ``[n, units]``: ``keep`` with a candidate more, or another one of a choice of which no more may stay."""
        found = []
        for unit in range(len(keep)):
            group = self.group_of[unit]
            if keep[unit] or not self.choices[group]:
                continue
            same = self.group_of == group
            now = (keep & same).nonzero().flatten().tolist()
            for other in [unit] if len(now) < int(self._may[same].sum()) else now:
                mask = keep.clone()
                mask[other] = False
                mask[unit] = True
                found.append(mask)
        return torch.stack(found) if found else keep.new_zeros(0, len(keep))

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
                0 if choice else min(most, max(least, multiple * math.ceil(fraction * size / multiple)))
                for size, least, most, multiple, choice in zip(
                    self.sizes, self.limits.least, self.limits.most, self.limits.multiples, self.choices
                )
            ]
            # leave room: with every group at its floor there would be nothing left to learn
            if float(self.relative(self._smallest(floor))[0]) <= 0.8 * float(self.targets[0]) or fraction < 1e-3:
                return floor
            fraction *= 0.8

    def check_reachable(self) -> None:
        """Raise where no structure that the limits allow costs what the budget is."""
        if self.budget is None:
            return
        target = float(self.targets[0])
        nothing = torch.zeros_like(self.whole)
        most = (first_ranks(self.sizes, self.limits.most) & self.candidates(nothing + 1.0, nothing)[1]).double()
        least = self._smallest(self.limits.least)
        if float(self.relative(least)[0]) > target:
            multiple = f"channel_multiple={self.limits.asked}" if self.limits.asked > 1 else "max_sparse_ratio"
            left = "one unit left" if max(self.limits.least) == 1 else f"what {multiple} keeps"
            raise DNALError(
                f"{self.budget} cannot be reached: with {left} in each of the {len(self.sizes)} channel groups that "
                f"may be cut, {self._as_asked(least)} remains; raise it or exclude fewer layers"
            )
        # all of it may cost less than the dense network: a cut leaves no weight standardised
        if float(self.relative(most)[0]) < 0.99 * target and not bool(most.all()):
            limit, remedy = "min_sparse_ratio", "min_sparse_ratio"
            if not bool(self._may.all()):
                limit, remedy = "single_path", "do without single_path"
            raise DNALError(
                f"{self.budget} is more than {limit} leaves ({self._as_asked(most)}): lower the budget or {remedy}"
            )

    def _as_asked(self, g: Tensor) -> str:
        """What the network costs at gates ``g``, float64 ``[units]``: numbers or fractions, as the budget has them."""
        assert self.budget is not None
        costs = []
        for kind, limit in self.budget.limits.items():
            cost = float(getattr(self.cost, kind)(g))
            share = f"{cost / getattr(self.cost.dense, kind):.3g}"
            costs.append(f"{kind}={share if limit <= 1 else round(cost, 3 if kind == 'latency' else None)}")
        return ", ".join(costs)


def best_of_group(score: Tensor, group_of: Tensor, ranks: Tensor) -> Tensor:
    """bool ``[..., units]``: the best-scored units of every group, as many as ``ranks`` (:func:`first_ranks`) says."""
    order = score.argsort(descending=True, stable=True)
    order = order[group_of[order].argsort(stable=True)]  # best first, group by group
    return torch.zeros_like(ranks).scatter(-1, order.expand_as(ranks), ranks)


def first_ranks(sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """bool ``[units]``: true for the first ``counts`` ranks of each group."""
    return torch.cat([torch.arange(size) < count for size, count in zip(sizes, counts)])


def price(objective: Objective, score: Tensor, delta: Tensor, held: Tensor, allowed: Tensor, targets: Tensor) -> Tensor:
    """The price per target at which ``sigmoid(delta * (score - price))`` costs ``targets``, without a host sync.

    The cost falls as the price rises, so a bracket is narrowed: 16 prices at a time (one pass over the cost model), to
    1 / 15 ** 4 of its width, in which the cost is taken for a straight line. Units in ``held`` stay open whatever the
    price, those not in ``allowed`` closed. Shapes: score, held, allowed ``[units]``; targets and the result ``[k]``.
    """
    reach = 12.0 / delta
    low = (score.min() - reach).expand_as(targets)
    high = (score.max() + reach).expand_as(targets)
    fixed = torch.where(held, torch.inf, delta * score)
    fixed = torch.where(allowed, fixed, -torch.inf)
    fractions = torch.linspace(0, 1, 16, dtype=score.dtype, device=score.device).unsqueeze(1)
    for _ in range(4):
        trial = low + (high - low) * fractions  # [16, k]
        prices = (delta * trial).index_select(1, objective.owner) if len(targets) > 1 else delta * trial
        cost = objective.relative(torch.sigmoid(fixed - prices))
        dear = (cost > targets).sum(0, keepdim=True).clamp(1, 15)
        low, high = trial.gather(0, dear - 1)[0], trial.gather(0, dear)[0]
    over, under = cost.gather(0, dear - 1)[0], cost.gather(0, dear)[0]
    part = ((over - targets) / (over - under).clamp(min=1e-30)).clamp(0, 1)
    return low + (high - low) * part
