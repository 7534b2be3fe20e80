"""A controller that learns which candidates make good networks, by REINFORCE (as in RADARS, arXiv 2109.05691)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RATE = 0.05  # of Adam
ENTROPY = 0.01  # weight of the entropy at the start; none at the end


class Controller:
    """A distribution over the paths of a supernet, in which every decision is taken by itself.

    ``p(path) = prod_l softmax(theta_l)``. The gradient is that of REINFORCE: ``(R - b) grad log p(path)``, where b is
    the mean reward of the other paths on the same data, and R and b are divided by the deviation of the rewards.

    Args:
        options: by the label of a decision, its candidates.
        updates: planned number of :meth:`learn`.
        seed: of the paths that are drawn.
    """

    def __init__(self, options: Mapping[str, Sequence[str]], updates: int, seed: int) -> None:
        self.live = {label: list(names) for label, names in options.items()}
        self.updates, self.done = updates, 0
        self.generator = torch.Generator().manual_seed(seed)
        self._names = {label: list(names) for label, names in options.items()}
        self._theta = {label: torch.zeros(len(names), dtype=torch.float64) for label, names in options.items()}
        self._adam = torch.optim.Adam([theta.requires_grad_(True) for theta in self._theta.values()], RATE)

    def probabilities(self, label: str) -> dict[str, float]:
        """Of the candidates of a decision that are still there."""
        return dict(zip(self.live[label], self._log_p(label).detach().exp().tolist()))

    def sample(self, uniform: bool = False) -> dict[str, str]:
        """A path: a candidate for every decision; ``uniform``: each as likely as any other."""
        path = {}
        for label, names in self.live.items():
            p = torch.ones(len(names), dtype=torch.float64) if uniform else self._log_p(label).detach().exp()
            path[label] = names[int(torch.multinomial(p, 1, generator=self.generator))]
        return path

    def learn(self, paths: Sequence[Mapping[str, str]], rewards: Tensor) -> None:
        """One step from the rewards (float ``[paths]``) of some paths on the same data."""
        r = rewards.double().cpu()
        count = len(paths)
        others = (r.sum() - r) / (count - 1)
        advantage = (r - others) / (r.std() + 1e-12)
        spread = ENTROPY * max(0.0, 1 - self.done / self.updates)
        loss = torch.zeros((), dtype=torch.float64)
        for label, names in self.live.items():
            log_p = self._log_p(label)
            taken = log_p[[names.index(path[label]) for path in paths]]
            loss = loss - (advantage * taken).mean() + spread * (log_p.exp() * log_p).sum()
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()
        self.done += 1

    def drop(self, label: str, name: str) -> None:
        """Let no path have that candidate any more."""
        self.live[label].remove(name)

    def _log_p(self, label: str) -> Tensor:
        names = self._names[label]
        return self._theta[label][[names.index(name) for name in self.live[label]]].log_softmax(0)
