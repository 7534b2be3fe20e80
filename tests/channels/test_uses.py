"""A mix of channels freezes them where its result reaches something, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.channels.groups import find_groups

X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(1, 1, 1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.a(x))


def dead(net: Any, x: Tensor) -> Tensor:
    scores = x.softmax(1).mean(1, keepdim=True)
    net.one(scores * 2).relu()
    return net.b(x)


def later(net: Any, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return net.b(x) + net.one(mean.relu())


def kept(net: Any, x: Tensor) -> Tensor:
    net.mean = x.mean(1)
    return net.b(x)


def branch(net: Any, x: Tensor) -> Tensor:
    return net.b(x) if float(x.mean(1).sum()) < 1e9 else x


def counted(net: Any, x: Tensor) -> Tensor:
    return net.b(x)[: len(x.mean(1).flatten().unique())]


def written(net: Any, x: Tensor) -> Tensor:
    out = torch.zeros(2, 1, 6, 6)
    out += x.mean(1, keepdim=True)
    return net.b(x) + out


USES = {"reaches the output": later, "is kept": kept, "decides": branch, "counts": counted, "is written": written}


def frozen(function: Callable[[Any, Tensor], Any]) -> str | None:
    return find_groups(Net(function), X)[0].frozen


def test_a_mix_that_nobody_uses_is_free() -> None:
    assert frozen(dead) is None


@pytest.mark.parametrize("use", USES)
def test_a_mix_that_is_used_is_not(use: str) -> None:
    assert frozen(USES[use]) == "mean runs over the channels in Net.forward"


def test_a_mix_that_the_model_returns_is_not() -> None:
    assert frozen(lambda net, x: (net.b(x), x.amax(1))) == "amax runs over the channels in Net.forward"


def test_statistics_that_move_are_a_use() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.norm(x.mean(1, keepdim=True))
            return self.b(x)

    assert find_groups(Counts(), X)[0].frozen == "mean runs over the channels in Counts.forward"


@pytest.mark.parametrize("need_weights", [False, True])
def test_heads_whose_averaged_weights_are_thrown_away(need_weights: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head((x + self.attention(x, x, x, need_weights=need_weights)[0]).mean(1))

    pruner = DNALPruner(Block(), [{"op_types": ["Linear", "MultiheadAttention"]}], dummy_input=torch.randn(2, 5, 8))
    assert {g.name: (g.channels, g.frozen) for g in pruner.groups}["attention.in_proj_weight"] == (4, None)
