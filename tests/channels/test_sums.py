"""Sums over channels, which those that are 0 leave unchanged: cut where a gate zeroes, by proof."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.modules.gates import ScaledSigmoidGate
from dnal_nni.surgery.inject import attach, detach

C = 8
X = torch.randn(2, 3, 6, 6)
Use = Callable[[Any, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two layers, with batch norms or without, whose channels a function puts together."""

    def __init__(self, use: Use, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3)
        self.na, self.nb = (nn.BatchNorm2d(C), nn.BatchNorm2d(C)) if norm else (nn.Identity(), nn.Identity())
        self.gamma, self.beta = nn.Parameter(torch.rand(C, 1, 1) + 0.5), nn.Parameter(torch.randn(C, 1, 1))
        self.c, self.one = nn.Conv2d(C, 4, 1), nn.Conv2d(1, 4, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, F.relu(self.na(self.a(x))), F.relu(self.nb(self.b(x))))


def attention(net: Net, x: Tensor, y: Tensor) -> Tensor:
    weights = (x.flatten(2).transpose(1, 2) @ y.flatten(2)).softmax(-1)
    return net.one(weights[:, None])


SUMS: dict[str, Use] = {
    "normalize": lambda net, x, y: net.c(F.normalize(x, dim=1) * net.gamma) + net.c(y),
    "normalize, affine": lambda net, x, y: net.c(F.normalize(x, dim=1) * net.gamma + net.beta) + net.c(y),
    "normalize, plus one": lambda net, x, y: net.c(1 + F.normalize(x, dim=1)) + net.c(y),
    "distance to a parameter": lambda net, x, y: net.one((x - net.beta).square().sum(1, keepdim=True)) + net.c(y),
    "a parameter": lambda net, x, y: net.c(x * net.gamma / net.gamma.norm()) + net.c(y),
    "squares": lambda net, x, y: net.c(x * torch.rsqrt(x.pow(2).sum(1, keepdim=True) + 1e-6)) + net.c(y),
    "norm": lambda net, x, y: net.c(x) + net.one(y.norm(dim=1, keepdim=True)),
    "vector norm": lambda net, x, y: net.c(x) + net.one(torch.linalg.vector_norm(y, 1, 1, keepdim=True)),
    "largest": lambda net, x, y: net.c(x) + net.one(torch.linalg.vector_norm(y, float("inf"), 1, keepdim=True)),
    "products": lambda net, x, y: net.one((x * y).sum(1, keepdim=True)),
    "distance": lambda net, x, y: net.one((x - y).square().sum(1, keepdim=True)),
    "cosine": lambda net, x, y: net.one(F.cosine_similarity(x, y, 1)[:, None]),
    "einsum": lambda net, x, y: net.one(torch.einsum("bcij,bckl->bijkl", x, y).flatten(1, 2).flatten(2)[:, None]),
    "attention": attention,
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", SUMS)
def test_channels_that_are_added_up_are_cut(how: str, norm: bool) -> None:
    torch.manual_seed(0)
    net = Net(SUMS[how], norm)
    pruner = DNALPruner(net, [{"op_types": ["Conv2d"]}], dummy_input=X)
    left = {g.name: g.frozen for g in pruner.groups if g.name in "ab"}
    assert not any(left.values()), left
    pruner.harden({name: torch.arange(C) < 3 for name in left})
    slim = pruner.speedup()  # which compares
    assert slim.a.out_channels == slim.b.out_channels == 3


AVERAGES: dict[str, Use] = {
    "mean": lambda net, x, y: net.c(x - x.mean(1, keepdim=True)) + net.c(y),
    "sum divided by their number": lambda net, x, y: net.c(x) + net.one(y.sum(1, keepdim=True) / y.shape[1]),
    "max": lambda net, x, y: net.c(x) + net.one(y.neg().amax(1, keepdim=True)),
    "smallest": lambda net, x, y: net.c(x) + net.one(torch.linalg.vector_norm(y, -1, 1, keepdim=True)),
    "softmax": lambda net, x, y: net.c(x.softmax(1)) + net.c(y),
    "scaled by their number": lambda net, x, y: net.one((x * y).sum(1, keepdim=True) * x.shape[1] ** -0.5),
    "of exponentials": lambda net, x, y: net.c(x / x.exp().sum(1, keepdim=True)) + net.c(y),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", AVERAGES)
def test_what_counts_them_or_compares_them_leaves_them_whole(how: str, norm: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3), Net(AVERAGES[how], norm), nn.Conv2d(4, 4, 1))
    groups = DNALPruner(net, [{"op_types": ["Conv2d"]}], dummy_input=torch.randn(2, 3, 8, 8)).groups
    reason = "; ".join(g.frozen or "" for g in groups if g.name in ("1.a", "1.b"))
    assert "runs over the channels in Net.forward" in reason or "would change the output" in reason


def first(net: nn.Module) -> ChannelGroup:
    return find_groups(net, X)[0]


def test_where_their_gates_act() -> None:
    assert (first(Net(SUMS["squares"], True)).site, first(Net(SUMS["squares"], True)).norms[0]) == ("norm", "na")
    assert (first(Net(SUMS["squares"], False)).site, first(Net(SUMS["squares"], False)).norms[0]) == ("output", "a")
    assert first(Net(SUMS["normalize, plus one"], False)).site == "both"
    far = first(Net(SUMS["distance to a parameter"], False))
    assert (far.site, "beta" in far.norms, "gamma" in far.norms) == ("output", True, False)
    plain = nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 3))
    assert (first(plain).site, first(plain).norms) == ("input", ())  # no sum, no gate on an output


def test_gates_on_outputs_are_taken_off_without_a_trace() -> None:
    net = Net(SUMS["distance to a parameter"], False)
    names, y = list(net.state_dict()), net(X)
    group = first(net)
    gate = ScaledSigmoidGate(group.channels)
    attach(net, [group], {group.name: gate})
    gate.harden(torch.arange(group.channels) > 2)
    assert bool((net.a(X)[:, :3] == 0).all()) and not torch.equal(net(X), y)
    detach(net)
    assert torch.equal(net(X), y) and list(net.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
