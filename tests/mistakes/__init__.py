"""What users do wrong, and what they should read: lists that ``tests/promises/test_mistakes.py`` walks.

A mistake is a function of a :class:`Stage`, and a pattern of the sentence that it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner

CONV = [{"op_types": ["Conv2d"]}]


class Net(nn.Module):
    """Two convolutions with norms, a residual, a linear layer; 8 + 12 channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc((x + F.relu(self.conv3(x))).mean((2, 3)))


class Stage:
    """A model that a mistake is made with, and how it was before."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        self.x, self.y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
        self.keep(self.model)

    def keep(self, model: nn.Module) -> nn.Module:
        """Remember how this model is now: that is how it must be afterwards."""
        self.model, self.before = model, snapshot(model)
        return model

    def prune(self, model: nn.Module | None = None, config: Any = CONV, **settings: Any) -> DNALPruner:
        """A pruner of the model, or of another one; from then on the gated model must not change."""
        if model is not None:
            self.keep(model)
        pruner = DNALPruner(self.model, config, **{"dummy_input": self.x, "budget": Budget(flops=0.5), **settings})
        self.keep(self.model)
        return pruner

    def loss(self) -> Tensor:
        """Of a batch."""
        return F.cross_entropy(self.model(self.x), self.y)

    def searched(self) -> DNALPruner:
        """A pruner whose search is over."""
        pruner = self.prune()
        with pruner.search(2, progress=False) as search:
            for _ in range(2):
                search.step(self.loss())
        self.keep(self.model)
        return pruner

    def cut(self) -> nn.Module:
        """The model, cut."""
        pruner = self.prune()
        pruner.harden({"conv1": torch.arange(8) < 3})
        slim = pruner.speedup()
        pruner.unwrap_model()
        self.keep(self.model)
        return slim


Mistake = Callable[[Stage], Any]
Mistakes = dict[str, tuple[Mistake, str]]


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a refusal must leave as it was."""
    if not isinstance(model, nn.Module):
        return {}
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        found[f"module {name}"] = type(module), module.training, hooks
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = id(parameter), parameter.requires_grad, parameter.grad is None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = not torch.nn.parameter.is_lazy(tensor) and not tensor.is_meta
        found[f"tensor {name}"] = repr(tensor.detach().cpu().tolist()) if plain else type(tensor)
    return found
