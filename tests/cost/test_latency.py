"""Latency: measured, fitted, and held to a budget. A clock of our own takes the place of time where numbers matter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.cost.latency import latencies, layer_latencies

Batches = list[tuple[Tensor, Tensor]]


def spent(module: nn.Module) -> float:
    """Milliseconds of the clock of these tests: by weights, and a little for every output."""
    own = 0.0
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            own += 1e-3 * layer.weight.numel() / 9 + 0.01 * layer.weight.shape[0]
    return own


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def tick(function: Callable[..., Any], model: nn.Module, *args: Any) -> float:
        function(model, *args)
        return spent(model) + 1e-6

    monkeypatch.setattr("dnal_nni.cost.latency.milliseconds", tick)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def pruner_of(net: nn.Module, x: Tensor, budget: Budget) -> DNALPruner:
    config = [{"op_types": ["Conv2d", "ConvTranspose2d"]}]
    return DNALPruner(copy.deepcopy(net), config, dummy_input=x, budget=budget)


@pytest.mark.usefixtures("clock")
def test_the_layers_add_up_to_the_whole(net: nn.Module, x: Tensor) -> None:
    whole, layers = layer_latencies(net, x)
    assert whole == pytest.approx(spent(net), rel=1e-3)
    assert sum(sum(parts) for parts in layers.values()) == pytest.approx(whole)
    for path, parts in layers.items():
        layer = net.get_submodule(path)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert sum(parts) == pytest.approx(spent(layer), rel=0.02), path


@pytest.mark.usefixtures("clock")
def test_the_model_tells_the_latency_of_cut_networks(x: Tensor, small: nn.Module) -> None:
    pruner = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x, budget=Budget(latency=0.6))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        keep = {name: torch.rand(gate.s.numel(), generator=generator) < 0.6 for name, gate in pruner.gates.items()}
        pruner.harden({name: mask | (torch.arange(len(mask)) == 0) for name, mask in keep.items()})
        slim = pruner.speedup()
        assert pruner.session.keep is not None
        expected = float(pruner.plan.cost.latency(torch.cat([mask.double() for mask in pruner.session.keep.values()])))
        assert expected == pytest.approx(spent(slim), rel=0.03)
        assert pruner.report.after.latency == pytest.approx(spent(slim), rel=0.01)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("asked", [0.6, "absolute"])
def test_the_latency_budget_is_hit(net: nn.Module, x: Tensor, batches: Batches, asked: Any) -> None:
    pruner = pruner_of(net, x, Budget(latency=0.6 if asked == 0.6 else 0.6 * spent(net)))
    with pruner.search(24, progress=False) as search:
        for images, labels in 3 * batches:
            search.step(F.cross_entropy(pruner.bound_model(images), labels))
    slim = pruner.speedup()
    assert spent(slim) / spent(net) == pytest.approx(0.6, rel=0.01)
    assert "latency (ms)" in str(pruner.report) and "target: 60.0% of the latency" in str(pruner.report)


@pytest.mark.usefixtures("clock")
def test_latency_is_differentiable_and_falls(net: nn.Module, x: Tensor) -> None:
    cost = pruner_of(net, x, Budget(latency=0.6)).plan.cost
    g = torch.rand(sum(cost.sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(cost.latency, g.requires_grad_())
    (slope,) = torch.autograd.grad(cost.latency(g), g)
    assert bool((slope >= 0).all()) and bool((slope > 0).any())


def test_what_one_width_does_not_explain_is_the_same_at_all(net: nn.Module, x: Tensor) -> None:
    cost = pruner_of(net, x, Budget(latency=0.9)).plan.cost
    half = (torch.rand(sum(cost.sizes), generator=torch.Generator().manual_seed(0)) < 0.5).double()
    assert cost.dense.latency is not None
    for measured in (0.9 * cost.dense.latency, 0.7 * cost.dense.latency):
        cost.calibrate(half, measured)
        assert float(cost.latency(torch.ones_like(half))) == pytest.approx(cost.dense.latency)
        assert float(cost.latency(half)) == pytest.approx(max(measured, float(cost.latency(half))))


@pytest.mark.usefixtures("clock")
def test_a_resumed_search_goes_on_with_what_was_measured(net: nn.Module, x: Tensor, monkeypatch: Any) -> None:
    first = pruner_of(net, x, Budget(latency=0.6 * spent(net)))
    g = torch.full((sum(first.plan.sizes),), 0.5, dtype=torch.float64)
    state = copy.deepcopy(first.state_dict())
    monkeypatch.setattr("dnal_nni.cost.latency.milliseconds", lambda f, m, *a: (f(m, *a), 1.5 * spent(m))[1])
    second = pruner_of(net, x, Budget(latency=0.6 * spent(net)))
    assert not torch.equal(second.plan.cost.latency(g), first.plan.cost.latency(g))
    second.load_state_dict(state)
    assert torch.equal(second.plan.cost.latency(g), first.plan.cost.latency(g))
    assert second.plan.objective is not None and first.plan.objective is not None
    assert torch.equal(second.plan.objective.targets, first.plan.objective.targets)


def test_real_time(net: nn.Module, x: Tensor) -> None:
    pruner = pruner_of(net, x, Budget(flops=0.5))
    pruner.harden({name: torch.arange(gate.s.numel()) < 4 for name, gate in pruner.gates.items()})
    gated = pruner.bound_model.train()
    slow, fast = latencies([gated, nn.Flatten()], x, rounds=5)
    assert slow > fast > 0
    assert gated.training and any("parametrizations" in name or "gate" in name for name, _ in gated.named_modules())


class ByName(nn.Module):
    """Calls a layer with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(input=torch.relu(self.a(x))).mean((2, 3)))


@pytest.mark.usefixtures("clock")
def test_layers_called_with_keywords_are_timed_too(x: Tensor) -> None:
    _, layers = layer_latencies(ByName(), x)
    assert set(layers) == {"a", "b", "fc"} and sum(layers["b"]) > 0


def test_a_latency_budget_that_closes_nothing(net: nn.Module, x: Tensor) -> None:
    cost = pruner_of(net, x, Budget(latency=1.0)).plan.cost
    everything = torch.ones(sum(cost.sizes), dtype=torch.float64)
    assert float(cost.latency(everything)) == pytest.approx(cost.dense.latency)


def test_more_than_there_is(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(DNALError, match=r"Budget\(latency=1000000\) is more than the model has"):
        pruner_of(net, x, Budget(latency=1e6))
