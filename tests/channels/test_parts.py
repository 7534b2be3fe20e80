"""Channels taken apart into equal parts, in the ways in which people write that."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import DNALError, DNALPruner

C = 8
X = torch.randn(2, 3, 10, 10)
Halves = Callable[[Any, Tensor], Sequence[Tensor]]


class Block(nn.Module):
    """A cross-stage block: the first half passes, the second is convolved."""

    def __init__(self, halves: Halves) -> None:
        super().__init__()
        self.c, self.halves = C, halves
        self.expand, self.norm = nn.Conv2d(3, 2 * C, 1), nn.BatchNorm2d(2 * C)
        self.conv, self.mix = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(2 * C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(self, self.norm(self.expand(x)).relu())
        return self.mix(torch.cat((a, b + self.conv(b)), 1))


def computed(block: Block, y: Tensor) -> tuple[Tensor, ...]:
    c = y.shape[1] // 2
    return y.split((c, c), 1)


HALVES: dict[str, Halves] = {
    "chunk": lambda block, y: y.chunk(2, 1),
    "tensor_split": lambda block, y: y.tensor_split(2, 1),
    "split": lambda block, y: y.split(block.c, 1),
    "split by a tuple": lambda block, y: y.split((block.c, block.c), 1),
    "split by a list": lambda block, y: y.split([block.c, block.c], 1),
    "split by computed sizes": computed,
    "slices": lambda block, y: (y[:, : block.c], y[:, block.c :]),
    "slices from the end": lambda block, y: (y[:, : -block.c], y[:, -block.c :]),
    "slices of computed sizes": lambda block, y: (y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]),
    "narrow": lambda block, y: (y.narrow(1, 0, block.c), y.narrow(1, block.c, block.c)),
}


def pruner_of(net: nn.Module, x: Tensor = X) -> DNALPruner:
    return DNALPruner(net, [{"op_types": ["Conv2d", "Conv1d"]}], dummy_input=x)


@pytest.mark.parametrize("how", HALVES)
def test_halves(how: str) -> None:
    pruner = pruner_of(Block(HALVES[how]))
    left, *_ = pruner.groups
    assert (left.name, left.channels, left.frozen) == ("expand", C, None)
    pruner.harden({"expand": torch.arange(C) < 3})
    slim = pruner.speedup()  # which compares
    assert slim.expand.out_channels == 6 and slim.conv.in_channels == slim.conv.out_channels == 3


class Partial(nn.Module):
    """FasterNet: a quarter of the channels, of a width that is stored, is convolved in place."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write, self.dim = write, 4
        self.expand, self.conv, self.mix = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        if self.write:
            x = x.clone()
            x[:, : self.dim] = self.conv(x[:, : self.dim])
            return self.mix(x)
        return self.mix(torch.cat((self.conv(x[:, : self.dim]), x[:, self.dim :]), 1))


@pytest.mark.parametrize("write", [False, True])
def test_a_part_of_a_stored_width_and_the_rest(write: bool) -> None:
    net = Partial(write)
    pruner = pruner_of(net)
    open_groups = {g.name: g.channels for g in pruner.groups if g.frozen is None}
    assert open_groups == {"expand[0:]": 4, "expand[4:]": 12} | ({} if write else {"conv": 4})
    pruner.harden({"expand[0:]": torch.arange(4) < 3, "expand[4:]": torch.arange(12) < 5})
    slim = pruner.speedup()
    assert slim.dim == 3 and slim.expand.out_channels == 8


class Shift(nn.Module):
    """Temporal shift (TSM): of eighths of computed size, two move by a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        fold, out = x.shape[1] // 8, torch.zeros_like(x)
        out[:, :fold, :-1] = x[:, :fold, 1:]
        out[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return self.b(out)


def test_parts_of_a_computed_size() -> None:
    pruner = pruner_of(Shift(), torch.randn(2, 3, 6))
    assert {g.name: g.channels for g in pruner.groups if g.frozen is None} == {"a": 8}
    pruner.harden({"a": torch.arange(8) < 5})
    assert pruner.speedup().a.out_channels == 40


def test_constants_in_the_code_stay() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.a(x).split([8, 8], 1)
            return self.b(y) + self.c(z)

    with pytest.raises(DNALError, match="split_with_sizes expects split_sizes to sum exactly"):
        pruner_of(Literal())
