"""DNAL's gates with inputs as decisions of their own: the budget's price decides about operations and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..budget import Complexity
from ..modules.cells import Topology
from .adam import Adam
from .close import cut
from .objective import Objective
from .scores import REACH, Scores
from .topology import Wires, cooled, held_off

CERTAIN = 1 - 1e-9  # marginals are kept so far from 0 and 1 that a gate's s is finite


class WiredScores(Scores):
    """:class:`Scores`, but for the gates of inputs, which are the marginals of their decisions.

    They are pinned in what a search is held to: the price is solved for with the marginals as they are. Of a decision
    with sets of one size they add up to that size at every step. When the structure is fixed, the most probable sets
    are.

    Args:
        objective: what the search is held to.
        start: as for :class:`Scores`.
        steps: planned number of steps.
        wires: the decisions about inputs, in the order of the gates; None where a gate is of anything else.
        topology: temperatures and slack.
        measure: what the network costs that keeps some units, bool ``[units]``.
        reach: as for :class:`Scores`.
        logits: how far a logit of the inputs moves where its gradient does not change its sign.
    """

    def __init__(
        self,
        objective: Objective,
        start: Tensor,
        steps: int,
        wires: Sequence[Wires | None],
        topology: Topology,
        measure: Callable[[Tensor], Complexity],
        *,
        reach: float = REACH,
        logits: float,
    ) -> None:
        super().__init__(objective, start, steps, reach)
        self.topology, self.measure = topology, measure
        self.wires = [w for w in wires if w is not None]
        own = torch.tensor([w is not None for w in wires], device=start.device)[objective.group_of]
        self.where = own.nonzero().flatten()
        self.choices = self.choices[~own[self.choices]]
        starts = [w.start() for w in self.wires]
        self.sizes = [len(part) for part in starts]
        self.logits = torch.cat(starts).to(start.device)
        self.adam = Adam([self.logits], logits / self.moving)

    def _each(self) -> list[tuple[Wires, Tensor]]:
        return list(zip(self.wires, self.logits.split(self.sizes)))

    def marginals(self, step: int) -> Tensor:
        """The probabilities of all inputs, ``[inputs]``, differentiable."""
        temperature = cooled(step, self.moving, *self.topology.temperature)
        return torch.cat([wires.marginals(logits, temperature) for wires, logits in self._each()])

    @torch.no_grad()
    def inputs(self) -> Tensor:
        """The most probable sets, bool ``[inputs]``."""
        return torch.cat([wires.chosen(logits) for wires, logits in self._each()])

    @torch.no_grad()
    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        super().update(grad, g, step)
        if (now := int(step)) >= self.moving:
            return
        own = grad.to(self.value.dtype).index_select(0, self.where)
        self.adam.step(lambda: (self.marginals(now) * own).sum())
        temperature = cooled(now, self.moving, *self.topology.temperature)
        for wires, logits in self._each():
            held_off(wires, logits.detach(), temperature, cooled(now, self.moving, 1.0, self.topology.slack))

    @torch.no_grad()
    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        if (now := int(step)) >= self.moving:
            return super().gates(step)
        m = self.marginals(now)
        self.objective.pinned = self.where, m
        s, delta = super().gates(step)
        return s.index_copy(0, self.where, torch.logit(m.clamp(1 - CERTAIN, CERTAIN)) / delta), delta

    def settle(self) -> None:
        """Fix the inputs first, then the rest of the structure beside them."""
        self._pin_chosen()
        super().settle()
        self.structure.index_copy_(0, self.where, self.inputs().to(self.structure) * 2 - 1)

    def _pin_chosen(self) -> None:
        chosen = self.inputs().to(self.value)
        self.objective.pinned = self.where, chosen
        others = self.value.index_fill(0, self.where, 0.0).abs().max()
        worth = 2 * others + 1  # ahead of all others, or behind
        self.value.index_copy_(0, self.where, (2 * chosen - 1) * worth)

    @torch.no_grad()
    def chosen(self) -> Tensor:
        """The units that stay, bool ``[units]``: the inputs that were fixed, the rest cut to the budget."""
        self._pin_chosen()
        objective = self.objective.to("cpu")
        where, chosen = self.where.cpu(), self.inputs().cpu()
        objective.pinned = where, chosen.double()

        def wired(units: Tensor) -> Tensor:
            return units.index_copy(0, where, chosen)

        return wired(cut(objective, self.value.cpu(), self.floor, lambda units: self.measure(wired(units))))

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **self.adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
