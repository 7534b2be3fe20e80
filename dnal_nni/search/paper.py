"""The paper's search: SGD on ``s`` from 0, against ``lambda * sum sigmoid(s)`` in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .leaves import Leaves
from .loop import Search
from .schedule import at, delta_paper

PAPER_LR, PAPER_MOMENTUM, PAPER_THRESHOLD = 0.01, 0.9, 0.9


class PaperScores:
    """``s`` of every unit as in arXiv 2103.02126, which leaves the final cost to lambda.

    The same protocol as :class:`~dnal_nni.search.scores.Scores`; a step can be put into a CUDA graph too.

    Args:
        units: how many there are in all gates.
        steps: planned number of steps.
        lambda_: weight of the regulariser.
        lr: learning rate of SGD on ``s``.
        floor: units of each group that a cut leaves, ``[groups]``; the search itself knows no floor.
        device: of the scores.

    Attributes:
        value: ``s``, float64 ``[units]``.
        momentum: of SGD, float64 ``[units]``.
    """

    kind: ClassVar[type[Search]] = Search
    leaves: ClassVar[type[Leaves]] = Leaves

    def __init__(
        self,
        units: int,
        steps: int,
        lambda_: float,
        lr: float = PAPER_LR,
        floor: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.floor, self.steps, self.moving, self.lambda_, self.lr = floor, steps, steps, lambda_, lr
        self.value = torch.zeros(units, dtype=torch.float64, device=device)
        self.momentum = torch.zeros_like(self.value)
        self.delta = torch.tensor([delta_paper(t, steps) for t in range(steps)], dtype=torch.float64, device=device)

    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """``s`` ``[units]`` and ``delta`` (0-d) of a step (a number, or int64 ``[1]`` on the device)."""
        return self.value, at(self.delta, step)

    def penalised(self, loss: Tensor, s: Sequence[Tensor]) -> Tensor:
        """``loss`` with the regulariser of the gates ``s``."""
        return loss + self.lambda_ * torch.stack([torch.sigmoid(part).sum() for part in s]).sum()

    @torch.no_grad()
    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """One step of SGD from ``grad``, dL/ds of the penalised loss, ``[units]``."""
        self.momentum.mul_(PAPER_MOMENTUM).add_(grad)
        self.value.sub_(self.momentum, alpha=self.lr)

    def slower(self, share: float) -> None:
        """A rate that is higher, as many times as steps are rarer."""
        self.lr /= share

    def settle(self) -> None:
        """Nothing: gates move to the end."""

    def cost(self, g: Tensor) -> Tensor:
        """For the history: the open fraction (0-d) at gates ``g``, ``[units]``."""
        return g.mean()

    def rank(self, s: Tensor) -> Tensor:
        """What orders the units in a cut: ``s`` as the gates have it."""
        return s

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves; a search under a budget has a scale besides, here 0."""
        return {"score": self.value, "momentum": self.momentum, "scale": self.value.new_zeros(())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.value.copy_(state["score"])
        self.momentum.copy_(state["momentum"])
