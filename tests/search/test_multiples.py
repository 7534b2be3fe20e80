"""In multiples of what channels are kept where nobody says it, and budgets that no structure meets."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.plan import Plan
from dnal_nni.search.multiples import FAST, multiples

CONV = [{"op_types": ["Conv2d"]}]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in zip([1, *widths], widths):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


@pytest.mark.parametrize(
    ("asked", "budget", "device", "tried"),
    [
        (None, Budget(flops=0.5), CPU, (1,)),
        (None, Budget(flops=0.5), GPU, FAST),
        (None, Budget(latency=0.5, params=0.5), CPU, FAST),
        (None, None, GPU, (1,)),
        (4, Budget(latency=0.5), GPU, (4,)),
        (1, Budget(flops=0.5), GPU, (1,)),
    ],
)
def test_what_is_tried(asked: int | None, budget: Budget | None, device: torch.device, tried: tuple[int, ...]) -> None:
    assert multiples(asked, budget, device) == tried


def as_on_a_gpu(model: nn.Module, budget: Budget) -> Plan:
    plan = Plan.of(model, X, budget=Budget(flops=0.5), channel_multiple=1)
    return dataclasses.replace(plan, tried=FAST).with_budget(budget)


@pytest.mark.parametrize(
    ("widths", "flops", "multiple"),
    [
        ((32, 64, 64), 0.5, 8),
        ((24, 24), 0.5, 4),
        ((12, 24), 0.5, 2),
        ((8, 8), 0.5, 1),
    ],
)
def test_as_large_as_the_budget_allows(widths: tuple[int, ...], flops: float, multiple: int) -> None:
    plan = as_on_a_gpu(net(*widths), Budget(flops=flops))
    assert plan.channel_multiple == multiple
    assert all(step in (1, multiple) for step in plan.limits.multiples)


def test_a_budget_that_nothing_reaches_says_what_one_unit_leaves() -> None:
    with pytest.raises(DNALError, match=r"cannot be reached: with one unit left"):
        as_on_a_gpu(net(2, 2), Budget(flops=0.001))


def test_the_report_says_so_where_nobody_asked() -> None:
    model, x = net(64, 128, 128), torch.randn(2, 1, 24, 24)
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(latency=0.9))
    multiple = pruner.plan.channel_multiple
    assert multiple > 1
    with pruner.search(2, progress=False) as search:
        for _ in range(2):
            search.step(F.cross_entropy(model(x), torch.tensor([0, 1])))
    slim = pruner.speedup()
    assert all(conv.out_channels % multiple == 0 for conv in slim if isinstance(conv, nn.Conv2d))
    assert f"channels were kept in multiples of {multiple}" in str(pruner.report)
    assert pruner.report.interventions is not None and "channel_multiple" not in pruner.report.interventions.changed


def test_a_search_goes_on_with_the_multiple_that_it_began_with() -> None:
    """Latencies are never the same twice, so that another process may choose another."""
    wide, x = (64, 128, 128), torch.randn(2, 1, 24, 24)  # most of the time is in layers, on a busy machine too
    first = DNALPruner(net(*wide), CONV, dummy_input=x, budget=Budget(latency=0.9))
    state = first.state_dict()
    state["settings"]["channel_multiple"] = 2
    second = DNALPruner(net(*wide), CONV, dummy_input=x, budget=Budget(latency=0.9))
    second.load_state_dict(state)
    assert second.plan.channel_multiple == 2 and second.plan.limits.multiples == [2, 2, 2]
    state["settings"]["channel_multiple"] = 3
    with pytest.raises(DNALError, match="the search ran with channel_multiple=3"):
        second.load_state_dict(state)


@pytest.mark.parametrize(
    ("multiple", "why"),
    [(None, "since the layers that may be cut have so few channels"), (8, "channels go by multiples of 8")],
)
def test_a_budget_between_structures_is_said_at_once(
    multiple: int | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, budget = (net(2, 2), 0.5) if multiple is None else (net(16), 0.8)
    with caplog.at_level(logging.WARNING):
        pruner = DNALPruner(model, CONV, dummy_input=X, budget=Budget(flops=budget), channel_multiple=multiple)
    assert f"Budget(flops={budget}) lies between structures: the nearest costs " in caplog.text and why in caplog.text
    assert pruner.plan.nearest is not None
    pruner.harden(pruner.plan.by_group(torch.ones(sum(pruner.plan.sizes), dtype=torch.bool)))
    pruner.speedup()
    assert why in str(pruner.report)  # uncut, it is no nearer


def test_a_budget_of_a_large_network_is_not_looked_for() -> None:
    plan = Plan.of(net(128, 256, 256), X, budget=Budget(flops=0.5))
    assert plan.nearest is None
