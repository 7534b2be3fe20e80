"""What a training holds, counted, and ended above a limit."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni.cost.memory import Meter, kept_storages, mib, state_bytes
from dnal_nni.errors import DNALError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_each_storage_counts_once_and_until_the_backward_pass() -> None:
    model, x, meter = net(), torch.randn(5, 8), Meter()
    meter.weigh(model, [])
    weights = 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert meter.fixed == 2 * weights  # a gradient for each
    with meter.watching():
        loss = model(x).sum()
        # the input of the first layer, and what ReLU returns, which the second layer keeps too
        assert meter.held == 4 * (5 * 8 + 5 * 16)
        loss.backward()
        assert meter.held == 0
        out = model(x)
        del out
        assert meter.held == 0
    assert meter.peak == 2 * weights + 4 * (5 * 8 + 5 * 16)
    found: list[int] = []
    kept_storages(model, lambda: model(x), lambda address, size: found.append(size))
    assert sorted(found) == [4 * 5 * 8, 4 * 5 * 16]


def test_a_graph_that_is_walked_in_part_is_let_go_of() -> None:
    """An operation that keeps what it returns must not be kept by it."""
    model, scale, meter = net(), torch.ones((), requires_grad=True), Meter()
    with meter.watching():
        loss = (model[:2](torch.randn(5, 8)) * scale).sum()
        loss.backward(inputs=[scale])
        del loss
    assert meter.held == 0


class Marked(torch.autograd.Function):
    """Nothing, with a mark that lives as long as the graph."""

    marks: list[weakref.ref[nn.Module]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = nn.Identity()
        Marked.marks.append(weakref.ref(ctx.mark))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_graph_that_is_only_looked_at_is_let_go_of() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    kept_storages(net(), lambda: torch.relu(Marked.apply(x)) * 2, lambda address, size: None)
    assert [mark() for mark in Marked.marks] == [None]


def test_gradients_are_what_they_are_without_it() -> None:
    x = torch.randn(5, 8)
    plain, watched = net(), net()
    plain(x).square().sum().backward()
    with Meter().watching():
        watched(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters()))


def test_above_the_limit_it_ends() -> None:
    model, meter = net(), Meter(limit=2100)
    meter.weigh(model, [])
    told = r"more than memory=2100 bytes \(0.0 MiB\): it would hold 2176"
    with meter.watching(), pytest.raises(DNALError, match=told):
        model(torch.randn(5, 8) + 0)
    assert meter.held == 0 and meter.peak <= 2100
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    states, of = state_bytes([optimizer])
    assert (states, of) == (2 * meter.fixed // 2, meter.fixed // 2)
    with pytest.raises(DNALError, match="of them parameters, gradients and optimizer states; give it more"):
        meter.weigh(model, [optimizer])
    assert mib(3 * 2**20) == "3.0 MiB"
