"""A search of candidates alone: paths, gains, and the set that is best for what it costs."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import Budget
from dnal_nni.modules.choices import Depth, Mixture
from dnal_nni.plan import Method, Plan
from dnal_nni.search.objective import Objective
from dnal_nni.search.paths import SPENT, Decision, PathScores, best_set, decisions_of
from dnal_nni.session import Session


def conv(kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, kernel, 1, kernel // 2), nn.BatchNorm2d(4), nn.ReLU())


def plan_of(flops: float, layers: int = 3) -> tuple[nn.Module, Plan]:
    """Layers that each have one of four candidates, and a depth."""
    torch.manual_seed(0)
    mixtures = []
    for i in range(layers):
        mixture = Mixture({"no": nn.Identity(), **{f"k{k}": conv(k) for k in (1, 3, 5)}}, f"layer{i}")
        mixture.least = mixture.most = 1
        mixtures.append(mixture)
    blocks = Depth([conv(3) for _ in range(3)], [1, 2, 3], "depth")
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *mixtures, blocks, *head)
    return model, Plan.of(model, torch.randn(1, 1, 8, 8), budget=Budget(flops=flops), selected={})


def every_set(objective: Objective) -> Tensor:
    parts = []
    for decision in decisions_of(objective):
        units = torch.arange(decision.units)
        if decision.chain:
            parts.append([units < n for n in range(decision.units + 1)])
        else:
            assert decision.count == 1
            parts.append([units == i for i in range(decision.units)])
    return torch.stack([torch.cat(one) for one in itertools.product(*parts)])


def test_nothing_but_candidates_is_searched() -> None:
    _, plan = plan_of(0.4)
    assert all(group.choice for group in plan.active)
    assert sorted(map(repr, decisions_of(plan.objective))) == sorted(
        map(repr, [Decision(4, 1), Decision(4, 1), Decision(4, 1), Decision(2, None, True)])
    )


@pytest.mark.parametrize("decision", [Decision(5, 1), Decision(6, 2), Decision(3, None, True)])
def test_every_candidate_runs_as_often_as_any_other(decision: Decision) -> None:
    generator = torch.Generator().manual_seed(0)
    dealt = [decision.deal(decision.fair, generator) for _ in range(5)]
    assert len({tuple(one.flatten().tolist()) for one in dealt}) > 1
    for paths in dealt:
        if decision.chain:
            assert sorted(paths.sum(1).tolist()) == [0, 1, 2, 3]
            assert torch.equal(paths, paths.cumprod(1).bool())
        else:
            assert paths.sum(1).tolist() == [decision.count] * decision.fair
            assert paths.sum(0).tolist() == [1] * decision.units


def test_any_number_is_one_at_least() -> None:
    paths = Decision(3).deal(500, torch.Generator().manual_seed(0))
    assert bool(paths.any(1).all()) and 0.5 < float(paths.double().mean()) < 0.65


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("flops", [0.2, 0.35, 0.5])
def test_the_best_set_is_the_best_of_all(seed: int, flops: float) -> None:
    _, plan = plan_of(flops)
    objective = plan.objective
    assert objective is not None
    gain = torch.randn(len(objective.group_of), generator=torch.Generator().manual_seed(seed)).double()
    masks = every_set(objective)
    costs = objective.relative(masks.double())[:, 0]
    low, most = float(costs.min()), float(costs[costs <= flops].max())
    inside = (costs <= flops) & (costs >= low + SPENT * (most - low) - 1e-9)
    expected = float((masks[inside].double() @ gain).max())
    found = best_set(objective, gain, flops)
    assert bool((masks == found).all(1).any())  # one of each choice, and the first blocks
    cost = float(objective.relative(found[None].double())[0, 0])
    assert low + SPENT * (most - low) - 1e-9 <= cost <= flops + 1e-9
    assert float(found.double() @ gain) == pytest.approx(expected)


def test_gains_are_told_from_losses_whatever_the_batch_is() -> None:
    _, plan = plan_of(0.4)
    assert plan.objective is not None
    torch.manual_seed(0)
    scores = PathScores(plan.objective, 100, 0, lambda units: plan.cost.dense)
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(len(scores.value), generator=generator).double()
    for step in range(60):
        paths = scores.deal()
        noise = 0.3 * torch.randn(len(paths), generator=generator)
        scores.learn(paths, 5 / (step + 1) + 3 * torch.rand(1) - paths.double() @ truth + noise)
    first = 0
    for decision in scores.decisions:
        mine, theirs = (v[first : first + decision.units] for v in (scores.value, truth))
        if not decision.chain:  # of one of several, only differences can be told
            mine, theirs = mine - mine.mean(), theirs - theirs.mean()
        torch.testing.assert_close(mine, theirs, atol=0.25, rtol=0)
        first += decision.units


def test_a_candidate_that_destroys_the_input_goes() -> None:
    torch.manual_seed(0)

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * self.conv(x)

    mixture = Mixture({"zero": Zero(), "conv": nn.Conv2d(4, 4, 1)}, "layer")
    mixture.least = mixture.most = 1
    model = nn.Sequential(nn.Conv2d(1, 4, 1), mixture, nn.Flatten(), nn.Linear(4 * 16, 2))
    plan = Plan.of(model, torch.randn(1, 1, 4, 4), budget=Budget(flops=0.64), selected={})
    session = Session(model, plan, Method(paths=0.25))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with session.search(40, optimizer=optimizer, progress=False) as search:
        for step in range(40):
            x = torch.randn(32, 1, 4, 4)
            y = (x.mean((1, 2, 3)) > 0).long()
            ran = [nn.functional.cross_entropy(model(x), y) for _ in search.paths()]
            assert len(ran) == (2 if step < 10 + 22 else 1)
            search.step(search.of_step(ran))
    slim = session.speedup()
    assert list(slim[1].names) == ["conv"]
