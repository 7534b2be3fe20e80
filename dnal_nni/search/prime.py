"""DARTS-PRIME's architecture (arXiv 2106.11655): weights of candidates, what pulls them apart, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .mixed import MixedScores
from .picks import Pick
from .proximity import Consensus, distance

Activation = Literal["softmax", "bounded"]
Regularizer = Literal["proximity", "consensus"]
LEAST = 0.01  # of bounded weights: what those that would be derived are held at, so that the network goes on
NOISE = 1e-4  # of bounded weights at the start, which else have no first step that differs


class PrimeScores(MixedScores):
    """One alpha for every option of every decision.

    Args:
        picks: the decisions, in the order of the gates.
        steps: planned number of steps.
        activation: "softmax" in each slot, or "bounded", ``a = clamp(alpha, 0, 1)``, in which options do not compete;
            what falls to 0 stays there. A depth is a softmax in any case: its ends exclude each other.
        regularizer: what pulls the weights to the choice that would follow from them, or None.
        rho: its weight.
        reach: how far alpha moves over all architecture steps where its gradient does not change its sign.
        every: steps of the weights for one of the architecture.
        share: of the steps that the architecture is expected to learn in.
        cost: what the network costs at gates ``[units]``, as a fraction of the supernet, 0-d.
        device: of alpha.
    """

    def __init__(
        self,
        picks: Sequence[Pick],
        steps: int,
        *,
        activation: Activation,
        regularizer: Regularizer | None,
        rho: float,
        reach: float,
        every: int,
        share: float,
        cost: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.picks, self.regularizer, self.rho, self.every = list(picks), regularizer, rho, every
        self.sizes = [pick.options for pick in self.picks]
        self.bounded = [activation == "bounded" and not pick.chain for pick in self.picks]
        alpha = torch.zeros(sum(self.sizes), dtype=torch.float64)
        for pick, part, bounded in zip(self.picks, alpha.split(self.sizes), self.bounded):
            if bounded:
                part += pick.activated(part) + NOISE * torch.randn(len(part), dtype=torch.float64)
        self.alpha = alpha.to(device)
        self.open = torch.ones_like(self.alpha)  # 0 once a bounded weight has fallen to 0
        super().__init__([self.alpha], sum(p.units for p in picks), steps, reach / max(1.0, share * steps), cost)
        a = self.activated().detach()
        self.consensus = Consensus(a, self.derived) if regularizer == "consensus" else None

    def activated(self) -> Tensor:
        """``a``, ``[options]``."""
        parts = zip(self.picks, (self.alpha * self.open).split(self.sizes), self.bounded)
        return torch.cat([part.clamp(0, 1) if bounded else pick.activated(part) for pick, part, bounded in parts])

    def derived(self, score: Tensor) -> Tensor:
        """What DARTS's rule makes of a score, 0/1, both ``[options]``."""
        return torch.cat([pick.rule(part) for pick, part in zip(self.picks, score.split(self.sizes))])

    def _gates(self, a: Tensor) -> Tensor:
        return torch.cat([pick.gates(part) for pick, part in zip(self.picks, a.split(self.sizes))])

    def weights(self, step: int) -> Tensor:
        return self._gates(self.activated())

    def penalty(self, step: int) -> Tensor:
        if self.regularizer is None:
            return super().penalty(step)
        a = self.activated()
        if self.consensus is not None:
            return self.rho / 2 * distance(self.consensus.residual(a), self.sizes)
        return step / self.steps * self.rho / 2 * distance(a - self.derived(a), self.sizes)

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        for part, open_, pick, bounded in zip(
            self.alpha.split(self.sizes), self.open.split(self.sizes), self.picks, self.bounded
        ):
            if bounded:
                best = pick.rule(part.masked_fill(open_ == 0, -torch.inf)).bool()  # what would be derived goes on
                open_.mul_((part > 0) | best)
                part.copy_(torch.where(best, part.clamp(min=LEAST), part.clamp(min=0)))
        if self.consensus is not None:
            self.consensus.advance(self.activated())

    def resting(self, label: str) -> frozenset[int]:
        for pick, open_, bounded in zip(self.picks, self.open.split(self.sizes), self.bounded):
            if bounded and pick.label == label:
                return frozenset((open_ == 0).nonzero().flatten().tolist())
        return frozenset()

    @torch.no_grad()
    def chosen(self) -> Tensor:
        return self._gates(self.derived(self.activated())) > 0.5

    def entropy(self) -> float:
        """Of the weights, in nats, the mean over the decisions; of bounded ones, as shares of their sum."""
        parts = [part / part.sum() for part in self.activated().detach().split(self.sizes)]
        return float(torch.stack([torch.special.entr(part).sum() for part in parts]).mean())

    def state_dict(self) -> dict[str, Tensor]:
        consensus = {} if self.consensus is None else self.consensus.state_dict()
        return {**super().state_dict(), "open": self.open, **consensus}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
