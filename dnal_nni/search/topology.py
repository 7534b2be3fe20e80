"""Which inputs a node reads, decided apart from the operations on them (after TopoNAS, arXiv 2011.09300)."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.cells import Node, Topology
from ..modules.choices import Inputs
from .mixed import MixedScores
from .picks import Pick, picks_of

LARGEST = 4096  # sets of inputs that one decision may have a probability for
AGGRESSIVE = 1.0  # C of the passive-aggressive step: the larger, the less is left of a violation after it


class Wires(abc.ABC):
    """The decision of one node about its inputs: what is learned, and what follows from it.

    Args:
        label: name of the decision.
        inputs: how many there are.
        sizes: the least and the most that may stay.
    """

    def __init__(self, label: str, inputs: int, sizes: tuple[int, int]) -> None:
        self.label, self.inputs, self.sizes = label, inputs, sizes

    @abc.abstractmethod
    def start(self) -> Tensor:
        """Where the logits begin, float64 ``[logits]``."""

    @abc.abstractmethod
    def marginals(self, logits: Tensor, temperature: float) -> Tensor:
        """The probability of every input to stay, ``[inputs]``, differentiable."""

    @abc.abstractmethod
    def chosen(self, logits: Tensor) -> Tensor:
        """The most probable set, bool ``[inputs]``."""

    @abc.abstractmethod
    def invalid(self, logits: Tensor, temperature: float) -> Tensor:
        """The probability of sets of a size that may not stay, 0-d, differentiable."""


class Subsets(Wires):
    """A softmax over all sets of inputs that may stay. Of one size k, the marginals add up to k at all times."""

    def __init__(self, label: str, inputs: int, sizes: tuple[int, int]) -> None:
        super().__init__(label, inputs, sizes)
        many = sum(math.comb(inputs, size) for size in range(sizes[0], sizes[1] + 1))
        if many > LARGEST:
            raise DNALError(
                f"{label} has {many} sets of {sizes[0]} to {sizes[1]} of its {inputs} inputs, too many for a "
                "probability each: use Topology(distribution='edges')"
            )
        sets = [s for size in range(sizes[0], sizes[1] + 1) for s in itertools.combinations(range(inputs), size)]
        self.sets = torch.tensor([[float(i in s) for i in range(inputs)] for s in sets], dtype=torch.float64)

    def start(self) -> Tensor:
        return torch.zeros(len(self.sets), dtype=torch.float64)

    def marginals(self, logits: Tensor, temperature: float) -> Tensor:
        return torch.softmax(logits / temperature, 0) @ self.sets.to(logits.device)

    def chosen(self, logits: Tensor) -> Tensor:
        return self.sets.to(logits.device)[logits.argmax()] > 0.5

    def invalid(self, logits: Tensor, temperature: float) -> Tensor:
        return logits.new_zeros(())


class Edges(Wires):
    """Every input by itself, with its own probability: how many stay is then a matter of chance (Poisson-binomial)."""

    def start(self) -> Tensor:
        share = sum(self.sizes) / 2 / self.inputs
        return torch.full((self.inputs,), math.log(share / (1 - share)), dtype=torch.float64)

    def marginals(self, logits: Tensor, temperature: float) -> Tensor:
        return torch.sigmoid(logits / temperature)

    def chosen(self, logits: Tensor) -> Tensor:
        return (logits > 0) | (logits == logits.max())  # a node without any input computes nothing

    def invalid(self, logits: Tensor, temperature: float) -> Tensor:
        return 1 - counts(self.marginals(logits, temperature))[self.sizes[0] : self.sizes[1] + 1].sum()


def counts(q: Tensor) -> Tensor:
    """The probability that 0, 1, ... of independent events happen, ``[n + 1]``; ``q``: of each, ``[n]``."""
    p = torch.cat([q.new_ones(1), q.new_zeros(len(q))])
    for one in q:
        p = p * (1 - one) + torch.cat([p.new_zeros(1), p[:-1]]) * one
    return p


def wires_of(model: nn.Module, active: Sequence[ChannelGroup], topology: Topology) -> list[Wires | None]:
    """The decisions about inputs, in the order of the gates; None for any other decision.

    Raises:
        DNALError: for inputs of which nobody says how many stay.
    """
    kinds: dict[str, type[Wires]] = {"subsets": Subsets, "edges": Edges}
    found: list[Wires | None] = []
    for group in active:
        choice = model.get_submodule(group.members[0].path) if group.choice else None
        if not isinstance(choice, (Node, Inputs)):
            found.append(None)
            continue
        sizes = (group.least, group.most) if group.most is not None else topology.sizes(group.channels)
        found.append(kinds[topology.distribution](choice.label, group.channels, sizes))
    return found


def cooled(step: int, steps: int, start: float, end: float) -> float:
    """``start`` up to the middle of a search, then down to ``end`` by equal factors."""
    return start * (end / start) ** max(0.0, 2 * step / max(steps - 1, 1) - 1)


class TopologyScores(MixedScores):
    """Marginals of inputs, and a softmax over the operations on each of them; both learn from the weights' own loss.

    Args:
        picks: the decisions about anything but inputs; None where there is one about inputs.
        wires: the decisions about inputs; None where there is another. In the order of the gates.
        topology: temperatures and slack.
        steps: planned number of steps.
        reach: how far a logit moves over all steps where its gradient does not change its sign.
        cost: what the network costs at gates ``[units]``, as a fraction of the supernet, 0-d.
        device: of the logits.
        held: hold off sets of inputs of a size that may not stay.
    """

    held_out = False

    def __init__(
        self,
        picks: Sequence[Pick | None],
        wires: Sequence[Wires | None],
        topology: Topology,
        steps: int,
        *,
        reach: float,
        cost: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        held: bool = True,
    ) -> None:
        self.picks, self.wires, self.topology, self.held = list(picks), list(wires), topology, held
        starts = [w.start() if w is not None else torch.zeros(p.options if p else 0, dtype=torch.float64)
                  for p, w in zip(picks, wires)]  # fmt: skip
        self.sizes = [len(start) for start in starts]
        self.logits = torch.cat(starts).to(device)
        units = sum(w.inputs if w is not None else p.units if p else 0 for p, w in zip(picks, wires))
        super().__init__([self.logits], units, steps, reach / max(1, steps), cost)

    def temperature(self, step: int) -> float:
        """Of the probabilities of inputs."""
        return cooled(step, self.steps, *self.topology.temperature)

    def weights(self, step: int) -> Tensor:
        parts = []
        for pick, wires, logits in zip(self.picks, self.wires, self.logits.split(self.sizes)):
            if wires is not None:
                parts.append(wires.marginals(logits, self.temperature(step)))
            elif pick is not None:
                parts.append(pick.gates(pick.activated(logits)))
        return torch.cat(parts)

    @torch.no_grad()
    def chosen(self) -> Tensor:
        parts = []
        for pick, wires, logits in zip(self.picks, self.wires, self.logits.split(self.sizes)):
            if wires is not None:
                parts.append(wires.chosen(logits))
            elif pick is not None:
                parts.append(pick.gates(pick.rule(logits)) > 0.5)
        return torch.cat(parts)

    def stepped(self, step: int) -> None:
        if not self.held:
            return
        slack = cooled(step, self.steps, 1.0, self.topology.slack)
        for wires, logits in zip(self.wires, self.logits.detach().split(self.sizes)):
            if wires is not None:
                held_off(wires, logits, self.temperature(step), slack)

    def invalid(self) -> list[str]:
        """The decisions about inputs that, as they are, keep a number of them that may not stay."""
        wires = zip(self.wires, self.logits.detach().split(self.sizes))
        return [w.label for w, logits in wires if w and not w.sizes[0] <= int(w.chosen(logits).sum()) <= w.sizes[1]]


def held_off(wires: Wires, logits: Tensor, temperature: float, slack: float) -> None:
    """A passive-aggressive step (PA-II) against invalid sets, in place.

    Passive: nothing happens as long as they have at most the probability ``slack``. Aggressive: what is above it is
    taken back in one step along the gradient, as far as AGGRESSIVE says.
    """
    with torch.enable_grad():
        own = logits.clone().requires_grad_()
        over = wires.invalid(own, temperature) - slack
        if not over.requires_grad or float(over.detach()) <= 0:
            return
        (gradient,) = torch.autograd.grad(over, own)
    logits.sub_(gradient * (over.detach() / (gradient.square().sum() + 1 / (2 * AGGRESSIVE))))


def topology_of(
    model: nn.Module, active: Sequence[ChannelGroup], topology: Topology
) -> tuple[list[Pick | None], list[Wires | None]]:
    """The decisions of a network whose candidates alone are searched, as :class:`TopologyScores` takes them."""
    wires = wires_of(model, active, topology)
    others = iter(picks_of(model, [group for group, w in zip(active, wires) if w is None]))
    return [None if w is not None else next(others) for w in wires], wires
