"""Adam on architecture parameters, whose state is there from the start: a search can go on from any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Adam:
    """Betas and weight decay are DARTS's (arXiv 1806.09055).

    Args:
        parameters: float64; trained in place.
        lr: learning rate.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr, betas=(0.5, 0.999), weight_decay=1e-3)
        for parameter in self.parameters:
            moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def step(self, loss: Callable[[], Tensor]) -> None:
        """One step down ``loss``, which is computed from the parameters, 0-d."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        state: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            state |= {f"parameter.{i}": parameter.detach()} | {f"{name}.{i}": t for name, t in moments.items()}
        return state
