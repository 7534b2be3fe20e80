"""The table of idioms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

C = 16


@dataclasses.dataclass(frozen=True)
class Idiom:
    """A network, and what must become of it.

    Attributes:
        make: the network.
        inputs: its dummy input.
        left: a part of the reason for which some layers are left whole; None: every layer is cut, but for those whose
            output the network returns.
        share: the largest share of the FLOPs that may remain at a random cut of 30 %.
    """

    make: Callable[[], nn.Module]
    inputs: Any
    left: str | None
    share: float


IDIOMS: dict[str, Idiom] = {}


class Around(nn.Module):
    """A block between two convolutions."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.block = block
        self.head: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        y = self.block(self.stem(x))
        return y if self.head is None else self.head(y)


def around(block: nn.Module) -> nn.Module:
    """``block`` for ``[B, 16, 8, 8]``, with a head for what it returns."""
    net = Around(block)
    net.eval()
    with torch.no_grad():
        out = net(torch.randn(2, 3, 8, 8))
    net.head = nn.Conv2d(out.shape[1], 4, 1) if out.dim() == 4 else nn.Linear(out.shape[-1], 4)
    return net.train()


def block(left: str | None = None, share: float = 0.78, **given: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a block ``[B, 16, 8, 8] -> [B, ...]``, made of the number of channels."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        IDIOMS[cls.__name__] = Idiom(lambda: around(cls(C, **given)), torch.randn(2, 3, 8, 8), left, share)
        return cls

    return register


def network(inputs: Any, left: str | None = None, share: float = 0.78) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a whole network, and its dummy input."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        IDIOMS[cls.__name__] = Idiom(cls, inputs, left, share)
        return cls

    return register
