"""What pulls mixed candidates towards a network that can be cut: DARTS-PRIME's regularisers (arXiv 2106.11655)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

ROUND = 10  # architecture steps between two steps of the consensus


def distance(difference: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum over the decisions of ``||difference||_2``, 0-d. Not squared: near a corner it pulls as hard as far away.

    Args:
        difference: ``[options]`` of all decisions, one after the other.
        sizes: options of each decision.
    """
    return torch.stack([torch.linalg.vector_norm(part) for part in difference.split(list(sizes))]).sum()


class Consensus:
    """ADMM's copy of the weights that is discrete, and what they disagree by.

    The penalty is ``rho / 2 * ||a - z + u||``; after every ROUND architecture steps ``z = d(a + u)`` and then
    ``u += a - z``, where d is the rule by which a network is derived.

    Args:
        a: the weights at the start, float64 ``[options]``.
        rule: d: from a score to the 0/1 choice, both ``[options]``.
    """

    def __init__(self, a: Tensor, rule: Callable[[Tensor], Tensor]) -> None:
        self.rule = rule
        self.z, self.u = a.clone(), torch.zeros_like(a)  # no pull ahead of the first round
        self.count = torch.zeros((), dtype=torch.int64)

    def residual(self, a: Tensor) -> Tensor:
        """``a - z + u``, ``[options]``."""
        return a - self.z + self.u

    @torch.no_grad()
    def advance(self, a: Tensor) -> None:
        """Count an architecture step that led to ``a``."""
        self.count.add_(1)
        if int(self.count) % ROUND == 0:
            self.z.copy_(self.rule(a + self.u))
            self.u.add_(a - self.z)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {"z": self.z, "u": self.u, "rounds": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
