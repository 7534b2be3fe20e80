"""Scores, price and structure of a search under a budget."""

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.modules.gates import ChannelFactor
from dnal_nni.search.close import exact_cut
from dnal_nni.search.objective import Objective, best_of_group, price
from dnal_nni.search.scores import SETTLED, Scores


def objective_of(model: nn.Module, x: Tensor, fraction: float = 0.5) -> Objective:
    objective = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=fraction)).plan.objective
    assert objective is not None
    return objective


def test_the_price_meets_the_aim(small: nn.Module, x: Tensor) -> None:
    objective = objective_of(small, x)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), delta=st.floats(1, 1e4), aim=st.floats(0.4, 0.95))
    def meets(seed: int, delta: float, aim: float) -> None:
        score = torch.randn(sum(objective.sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        held, closed = torch.zeros_like(score, dtype=torch.bool), torch.zeros_like(score, dtype=torch.bool)
        held[:2], closed[-2:] = True, True
        at = torch.tensor(delta, dtype=torch.float64)
        found = price(objective, score, at, held, ~closed, torch.tensor([aim], dtype=torch.float64))
        g = torch.sigmoid(at * (score - found)).masked_fill(held, 1.0).masked_fill(closed, 0.0)
        assert float(objective.relative(g)[0]) == pytest.approx(aim, abs=1e-3)

    meets()


def test_the_best_of_every_group_are_held_open(small: nn.Module, x: Tensor) -> None:
    objective = objective_of(small, x)
    scores = Scores(objective, torch.randn(sum(objective.sizes), dtype=torch.float64), 10)
    held = best_of_group(scores.value, objective.group_of, scores.ranks[0])
    for score, mask, floor in zip(scores.value.split(objective.sizes), held.split(objective.sizes), scores.floor):
        assert set(mask.nonzero().flatten().tolist()) == set(score.topk(floor).indices.tolist())


def test_arch_lr_is_how_fast_gates_learn(small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
    def moved(arch_lr: float | None, preset: Literal["default", "paper"]) -> Tensor:
        model = copy.deepcopy(small)
        pruner = DNALPruner(
            model, CONV, dummy_input=x, preset=preset, arch_lr=arch_lr, lambda_=0, budget=Budget(flops=0.5)
        )
        with pruner.search(20, progress=False) as search:
            before = search.score.clone()
            search.step(F.cross_entropy(model(batches[0][0]), batches[0][1]))
        return search.score - before

    for preset, usual in (("default", 0.3), ("paper", 0.01)):
        assert not bool(moved(0.0, preset).any())
        assert torch.allclose(moved(2 * usual, preset), 2 * moved(None, preset)) and bool(moved(None, preset).any())
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DNALError, match="arch_lr=.*must be a number >= 0"):
            DNALPruner(small, CONV, dummy_input=x, arch_lr=wrong)


def test_a_search_reads_the_gradient_of_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd has it through ``sigmoid(delta * s)`` of every gate, where tensors are concatenated too."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 5, 3)
            self.bn, self.last, self.fc = nn.BatchNorm2d(11), nn.Conv2d(11, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
            return self.fc(F.relu(self.last(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Dense().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    seen = []
    monkeypatch.setattr(Scores, "update", lambda self, grad, g, step: seen.append((grad, g)))
    with pruner.search(20, progress=False) as search:
        model(x).square().sum().backward()
        search.update()
        for module in model.modules():
            if isinstance(module, ChannelFactor):
                assert module.value is not None
                module.value = None
        gates = list(pruner.gates.values())
        for gate in gates:
            gate.s.requires_grad_(True)
        of_s = torch.autograd.grad(model(x).square().sum(), [gate.s for gate in gates])
    g = torch.cat([gate().detach() for gate in gates])
    grad, at = seen[0]
    assert len(gates) == 3 and torch.allclose(at.float(), g, rtol=1e-6)
    slope = torch.cat([(gate.delta * gate() * (1 - gate())).detach() for gate in gates])
    assert torch.allclose((grad * slope).float(), torch.cat(of_s), rtol=1e-5)
    assert not any(isinstance(m, ChannelFactor) and m.value is not None for m in model.modules())


def test_skipped_steps_and_repeated_closures(small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
    """What a GradScaler and LBFGS do: a backward pass without a step, and several of them in one step."""
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))

    def backward(factor: float = 1.0) -> None:
        images, labels = batches[0]
        (search.penalised(F.cross_entropy(small(images), labels)) * factor).backward()

    with pruner.search(10, progress=False) as search:
        backward(float("inf"))  # overflowed: neither before_ nor after_optimizer_step is called
        for _ in range(2):
            backward()
            search.before_optimizer_step()
            backward()
            backward()
            search.after_optimizer_step()
            assert all(leaf.grad is None for leaf in search.leaves.tensors)
        assert search.done == 2 and bool(search.score.isfinite().all()) and int(search.bad_step) == -1


def test_no_group_closes_past_its_floor_whatever_the_gradient_says(small: nn.Module, x: Tensor) -> None:
    objective = objective_of(small, x, 0.35)
    steps = 200
    scores = Scores(objective, torch.ones(sum(objective.sizes), dtype=torch.float64), steps)
    against = (objective.group_of == 1).double()  # the task wants this group gone, and all others kept
    for step in range(steps):
        if step == scores.moving:
            scores.settle()
        s, delta = scores.gates(step)
        g = torch.sigmoid(delta * s)
        for part, floor in zip(g.split(objective.sizes), scores.floor):
            assert int((part > 0.5).sum()) >= floor
        scores.update(2 * against - 1, g, step)
    kept = [int(part.sum()) for part in exact_cut(objective, scores.value, scores.floor).split(objective.sizes)]
    assert kept[1] == scores.floor[1] and all(number >= floor for number, floor in zip(kept, scores.floor))


def test_a_closed_channel_comes_back_while_the_structure_may_change(small: nn.Module, x: Tensor) -> None:
    objective = objective_of(small, x)
    start = torch.ones(sum(objective.sizes), dtype=torch.float64)
    start[0] = 0.5  # the worst unit: closed first
    steps = 200
    scores = Scores(objective, start, steps)
    history = []
    for step in range(steps):
        if step == scores.moving:
            scores.settle()
        s, delta = scores.gates(step)
        g = torch.sigmoid(delta * s)
        history.append(float(g[0]))
        grad = torch.zeros_like(start)
        grad[0] = -1.0  # it would help if it were open
        scores.update(grad, g, step)
    assert min(history[:100]) < 0.05 and history[-1] > 0.95


@pytest.mark.parametrize("learning", [False, True])
def test_the_structure_stands_in_the_last_quarter_and_is_what_is_cut(
    small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]], learning: bool
) -> None:
    steps = 120
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9) if learning else None
    structures = []
    with pruner.search(steps, optimizer=optimizer, progress=False) as search:
        for step in range(steps):
            structures.append(torch.cat([gate().detach() > 0.5 for gate in pruner.gates.values()]))
            images, labels = batches[step % len(batches)]
            search.step(F.cross_entropy(small(images), labels))
    settled = structures[int(SETTLED * steps) :]
    assert all(torch.equal(settled[0], other) for other in settled)
    assert search.decided() == 1
    objective = pruner.plan.objective
    assert objective is not None
    assert torch.equal(exact_cut(objective, search.score, search.scores.floor), settled[-1])


@pytest.mark.parametrize(
    ("own", "steps", "expected"),
    [(0.01, 20, 0.1), (0.01, 500, 0.02), (0.01, 5000, 0.01), (0.0, 20, 0.1), (0.1, 20, 0.1), (None, 20, None)],
)
def test_statistics_keep_up_with_a_short_search(
    small: nn.Module, x: Tensor, own: float | None, steps: int, expected: float | None
) -> None:
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = own
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    with pruner.search(steps, optimizer=optimizer, progress=False) as search:
        search.step(small.train()(x).square().mean())
    slim = pruner.speedup()
    assert [m.momentum for m in slim.modules() if isinstance(m, nn.BatchNorm2d)] == [expected] * len(norms)
    told = any("follow with momentum" in note for note in pruner.report.notes)
    assert told == (own != expected)
    with pruner.search(5000, optimizer=optimizer, progress=False):  # not slower than the norms' own
        slow = None if own is None else max(own, 10 / 5000)
        assert [norm.momentum for norm in norms] == [slow] * len(norms)
    pruner.unwrap_model()
    assert [norm.momentum for norm in norms] == [own] * len(norms)


def test_a_short_search_leaves_statistics_of_the_cut_network(small: nn.Module, x: Tensor) -> None:
    """With a momentum of 0.01 the running means would still be two thirds of what they were ahead of it."""
    norms = {name: m for name, m in small.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.momentum = 0.01
        norm.running_mean.fill_(100.0)
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.0)
    with pruner.search(40, optimizer=optimizer, progress=False) as search:
        for _ in range(40):
            search.step(small.train()(x).square().mean())
    assert all(float(norm.running_mean.abs().max()) < 100 * 0.9**39 + 5 for norm in norms.values())
