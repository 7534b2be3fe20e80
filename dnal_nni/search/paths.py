"""Which candidates of a supernet stay, where they alone are searched: gains by comparison, not worth per cost.

How many channels stay is a question of more or less; one candidate of several is another question: what is gained by
the dearer one against the cheaper, at equal cost of the whole. A sum of all candidates does not say that. They learn to
correct each other, and dL/dg of a gate is what a little of a candidate adds to all others. So every step runs whole
paths: networks as they may be found, each candidate in as many as any other (strict fairness, as in FairNAS, arXiv
1907.01845). Their losses on one batch differ by what they are made of, and a linear regression tells what each
candidate is worth. The set is chosen at last, among those that spend the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..budget import Complexity
from ..errors import DNALError
from ..modules.gates import ScaledSigmoidGate
from .close import CHUNK, CORRECTIONS, TOLERANCE
from .learner import ArchOptimizer
from .leaves import Leaves
from .loop import Search
from .objective import Objective
from .ranks import mean_
from .schedule import DELTA_END
from .scores import SETTLED

RIDGE = 1.0  # observations' worth of doubt about every candidate
# A candidate that learns is trained in one path of several, and its loss flatters those that need not learn: poolings
# and shortcuts, which are free, win everywhere. Sets are compared that spend at least this share of what can be spent.
SPENT = 0.95
PRICES = 33  # prices at which sets are tried ahead of exchanges
EXCHANGED = 60  # dearer ones, and as many cheaper ones, of which pairs are exchanged


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice among candidates.

    Attributes:
        units: how many candidates, or steps of depth.
        count: so many stay; None: any number, at least one, or the first ones where ``chain``.
        chain: whether the units are blocks, of which the first ones stay.
    """

    units: int
    count: int | None = None
    chain: bool = False

    @property
    def fair(self) -> int:
        """The number of paths in which every unit can be as often as any other."""
        if self.chain:
            return self.units + 1
        return 2 if self.count is None else math.ceil(self.units / self.count)

    def deal(self, paths: int, generator: torch.Generator) -> Tensor:
        """Random units for each of ``paths``: bool ``[paths, units]``."""
        if self.chain:
            order = torch.randperm(self.units + 1, generator=generator)
            return torch.arange(self.units) < order[torch.arange(paths) % len(order)].unsqueeze(1)
        if self.count is None:
            open_ = torch.rand(paths, self.units, generator=generator) < 0.5
            one = torch.randint(self.units, (paths, 1), generator=generator)
            return open_ | (~open_.any(1, keepdim=True) & (torch.arange(self.units) == one))
        order = torch.randperm(self.units, generator=generator)
        places = (torch.arange(paths).unsqueeze(1) * self.count + torch.arange(self.count)) % self.units
        return torch.zeros(paths, self.units, dtype=torch.bool).scatter(1, order[places], True)

    def best(self, worth: Tensor) -> Tensor:
        """What is worth most: bool ``[units]``."""
        if self.chain:
            sums = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
            return torch.arange(self.units) < sums.argmax()
        if self.count is None:
            return (worth > 0) | (worth == worth.max())
        return torch.zeros(self.units, dtype=torch.bool).index_fill(0, worth.topk(self.count).indices, True)

    def others(self, keep: Tensor) -> list[Tensor]:
        """The sets next to ``keep``: another unit for one, or one more or less."""
        if self.chain:
            return [m for n in range(self.units + 1) if not torch.equal(m := torch.arange(self.units) < n, keep)]
        if self.count is None:
            near = [keep ^ (torch.arange(self.units) == i) for i in range(self.units)]
            return [mask for mask in near if mask.any()]
        found = []
        for out in keep.nonzero().flatten():
            for new in (~keep).nonzero().flatten():
                mask = keep.clone()
                mask[out], mask[new] = False, True
                found.append(mask)
        return found


def decisions_of(objective: Objective) -> list[Decision]:
    """The decisions of a network of which nothing but candidates is searched, in the order of the gates."""
    return [Decision(g.channels, g.most if g.least else None, not g.least) for g in objective.cost.active]


def best_set(objective: Objective, gain: Tensor, limit: float) -> Tensor:
    """The candidates with the largest sum of gains that cost at most ``limit``, and nearly that: bool ``[units]``.

    Exchanges of one or two decisions at a time, from the best sets at a price. SPENT says how near; of what is decided,
    fixed layers do not count.

    Args:
        objective: costs, on the CPU.
        gain: of each unit, float64 ``[units]``.
        limit: as a fraction of the supernet's cost.
    """
    decisions = decisions_of(objective)
    cheapest = _at_prices(objective, decisions, torch.zeros_like(gain), [1.0])
    dearest = _exchanged(objective, decisions, cheapest[0], objective.whole, 0.0, limit)
    low, most = (float(_spent(objective, mask[None])) for mask in (cheapest[0], dearest))
    window = low + SPENT * (most - low), limit
    steepest = float(gain.abs().max()) / max(float(objective.whole[objective.whole > 0].min()), 1e-12)
    prices = [steepest * math.sinh(8 * t / PRICES) / math.sinh(4) for t in range(-PRICES // 2, PRICES // 2 + 1)]
    starts = torch.stack([dearest, *_at_prices(objective, decisions, gain, prices)])
    costs = _spent(objective, starts)
    starts = starts[(costs >= window[0] - 1e-9) & (costs <= window[1] + 1e-9)]
    start = starts[(starts.double() @ gain).argmax()]
    return _exchanged(objective, decisions, start, gain, *window)


def _spent(objective: Objective, masks: Tensor) -> Tensor:
    parts = [objective.relative(part.double())[:, 0] for part in masks.split(CHUNK)]
    return torch.cat(parts)


def _at_prices(
    objective: Objective, decisions: Sequence[Decision], gain: Tensor, prices: Iterable[float]
) -> list[Tensor]:
    """The sets that are worth most at each price."""
    sizes = [decision.units for decision in decisions]
    found = []
    for price in prices:
        parts = (gain - price * objective.whole).split(sizes)
        found.append(torch.cat([decision.best(part) for decision, part in zip(decisions, parts)]))
    return found


def _exchanged(
    objective: Objective, decisions: Sequence[Decision], keep: Tensor, value: Tensor, low: float, high: float
) -> Tensor:
    """``keep`` after all changes of one or two decisions that raise the sum of ``value`` within the limits."""
    while True:
        near, owner, first = [], [], 0
        for number, decision in enumerate(decisions):
            for mask in decision.others(keep[first : first + decision.units]):
                near.append(torch.cat([keep[:first], mask, keep[first + decision.units :]]))
                owner.append(number)
            first += decision.units
        masks, owners = torch.stack(near), torch.tensor(owner)
        now, costs = float(_spent(objective, keep[None])), _spent(objective, masks)
        change = (masks.double() - keep.double()) @ value
        order = change.argsort(descending=True, stable=True)
        some = torch.cat([order[costs[order] > now][:EXCHANGED], order[costs[order] <= now][:EXCHANGED]])
        a, b = torch.combinations(some).unbind(1) if len(some) > 1 else (some[:0], some[:0])
        a, b = a[owners[a] != owners[b]], b[owners[a] != owners[b]]
        both = keep ^ (masks[a] ^ keep) ^ (masks[b] ^ keep)
        trials, gains = torch.cat([masks, both]), torch.cat([change, change[a] + change[b]])
        better = (gains > 1e-12).nonzero().flatten()
        if len(better):
            costs = _spent(objective, trials[better])
            better = better[(costs >= low - 1e-9) & (costs <= high + 1e-9)]
        if not len(better):
            return keep
        keep = trials[better[gains[better].argmax()]]


class PathLeaves(Leaves):
    """No leaves: gates are open or closed, and closed candidates do not run."""

    def __init__(self, model: nn.Module, gates: Sequence[ScaledSigmoidGate]) -> None:
        self.tensors = []
        self.gates = list(gates)

    def show(self, g: Tensor) -> None:
        for gate, part in zip(self.gates, g.split([gate.s.numel() for gate in self.gates])):
            gate.harden(part > 0.5)


class PathSearch(Search):
    """A search of candidates alone: every step runs the batch through several paths, one after the other.

    ``losses = [loss(model(x)) for _ in search.paths()]``, then :meth:`step` with :meth:`of_step` of them.

    Attributes:
        compared: what the paths tell.
    """

    def __init__(self, model: nn.Module, gates: Iterable[ScaledSigmoidGate], scores: ArchOptimizer, **kw: Any) -> None:
        super().__init__(model, gates, scores, **kw)
        assert isinstance(scores, PathScores)
        self.compared = scores
        self._paths: Tensor | None = None
        self._losses: list[Tensor] = []

    def paths(self) -> Iterator[None]:
        """Let the gates show each path of the coming step in turn."""
        self._paths = self.compared.deal()
        for path in self._paths:
            self.compared.path = path
            self._set_gates()
            yield

    def of_step(self, losses: Sequence[Tensor]) -> Tensor:
        """The loss of a step: the mean of its paths' losses (0-d each), which are what the gates learn from."""
        self._losses = [loss.detach() for loss in losses]
        return torch.stack(list(losses)).mean()

    def before_optimizer_step(self) -> None:
        if self.compared.warmup <= self.done < self.compared.moving and self._paths is not None:
            losses = mean_(torch.stack(self._losses)).cpu()
            if bool(torch.isfinite(losses).all()):  # a GradScaler skips such steps
                self.compared.learn(self._paths, losses)

    def stop(self, error: BaseException | None = None) -> None:
        super().stop(error)
        if error is None and self.done:
            self.leaves.show(self.compared.chosen().double())


class PathScores:
    """What every candidate gains, and the paths that tell it.

    Args:
        objective: what the network found is held to; all its units are candidates.
        steps: planned number.
        warmup: so many of them in which the paths' weights learn alone.
        measure: what the network costs that keeps some units, bool ``[units]``.
        device: of the gates.

    Attributes:
        value: loss that each candidate saves, against the others of its choice, float64 ``[units]``.
        paths: how many a step runs, so that each candidate runs in one of them at least.
    """

    kind: ClassVar[type[Search]] = PathSearch
    leaves: ClassVar[type[Leaves]] = PathLeaves
    lambda_ = 0.0

    def __init__(
        self,
        objective: Objective,
        steps: int,
        warmup: int,
        measure: Callable[[Tensor], Complexity],
        device: torch.device | str = "cpu",
    ) -> None:
        self.objective, self.steps, self.warmup, self.measure = objective.to("cpu"), steps, warmup, measure
        self.decisions = decisions_of(objective)
        self.floor: Sequence[int] = [0] * len(self.decisions)
        self.paths = max(2, *(decision.fair for decision in self.decisions))
        self.moving = warmup + max(1, round(SETTLED * (steps - warmup)))
        units = len(objective.group_of)
        self.value = torch.zeros(units, dtype=torch.float64)
        self.gram = torch.zeros(units, units, dtype=torch.float64)
        self.moment = torch.zeros_like(self.value)
        self.path = torch.ones(units, dtype=torch.bool)  # what the gates show
        self.settled = False
        self.device = device
        self.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)

    def deal(self) -> Tensor:
        """The paths of a step, bool ``[paths, units]``; one, the one that was found, once it is."""
        if self.settled:
            return self.path[None]
        return torch.cat([decision.deal(self.paths, self.generator) for decision in self.decisions], 1)

    def learn(self, paths: Tensor, losses: Tensor) -> None:
        """Take in the ``losses`` ``[paths]`` of one batch on ``paths`` (bool ``[paths, units]``)."""
        x, y = paths.double(), losses.double()
        x, y = x - x.mean(0), y - y.mean()  # what the batch and the state of the weights do to all of them
        self.gram.add_(x.T @ x)
        self.moment.add_(x.T @ y)
        doubt = RIDGE * torch.eye(len(x[0]), dtype=torch.float64)
        self.value.copy_(-torch.linalg.solve(self.gram + doubt, self.moment))

    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The path of now: open 1, closed -1, at the largest delta."""
        s = (self.path.double() * 2 - 1).to(self.device)
        return s, s.new_tensor(DELTA_END)

    def settle(self) -> None:
        """Fix the path that is found. fvcore has the last word on what it costs."""
        target = aim = float(self.objective.targets[0])
        for _ in range(CORRECTIONS):
            self.path = best_set(self.objective, self.value, aim)
            ratio = self.objective.measured(self.measure(self.path)) / target
            if ratio <= 1 + TOLERANCE:
                break
            aim /= ratio
        self.settled = True

    def chosen(self) -> Tensor:
        """The candidates that stay, bool ``[units]``."""
        if not self.settled:
            self.settle()
        return self.path

    def slower(self, share: float) -> None:
        """No: every step has losses to compare."""
        raise DNALError("search(when=): candidates alone learn from the losses of paths, in every step; leave it out")

    def penalised(self, loss: Tensor, s: Sequence[Tensor]) -> Tensor:
        """``loss`` as it is."""
        return loss

    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """Nothing: gates learn from losses, see :meth:`learn`."""

    def cost(self, g: Tensor) -> Tensor:
        """For the history: the cost (0-d) of the path that the gates ``g`` show, ``[units]``."""
        return self.objective.relative(g.cpu()).mean()

    def rank(self, s: Tensor) -> Tensor:
        """The gains."""
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        dealt = self.generator.get_state()
        return {"score": self.value, "gram": self.gram, "moment": self.moment, "dealt": dealt}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.generator.set_state(state["dealt"].cpu())
