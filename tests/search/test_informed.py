"""When gates learn: the rule itself, and a search that goes by it."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, Informed
from dnal_nni.search.informed import Rest, energy_of

Batches = list[tuple[Tensor, Tensor]]


def due_steps(when: Informed, energies: Sequence[float]) -> list[bool]:
    rest, found = Rest(when), []
    for energy in energies:
        found.append(bool(rest.due()))
        rest.advance(torch.tensor(energy, dtype=torch.float64))
    assert int(rest.taken) == sum(found)
    return found


def by_hand(when: Informed, energies: Sequence[float]) -> list[bool]:
    """The rule of the paper's code, whose level here starts at the first energy instead of 1."""
    average, level, found = -1.0, 0.0, []
    for energy in energies:
        due = 0 < average < level
        found.append(due)
        if average < 0:
            average = level = energy
            continue
        level *= when.growth ** (-when.every if due else 1)
        average = when.ewma * energy + (1 - when.ewma) * average
    return found


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000), every=st.integers(1, 20), spread=st.floats(0.1, 2), scale=st.floats(-20, 20),
    trend=st.floats(-4, 4),
)  # fmt: skip
def test_one_step_in_so_many_is_due_whatever_the_gradients_are(
    seed: int, every: int, spread: float, scale: float, trend: float
) -> None:
    noise = torch.randn(600, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    energies = [math.exp(scale + trend * t / 600 + spread * float(z)) for t, z in enumerate(noise)]
    when = Informed(every)
    found = due_steps(when, energies)
    assert found == by_hand(when, energies)
    # the level follows the trend, which takes or saves trend / ln(growth) steps of its growth
    drift = (abs(trend) + 4 * spread) / math.log(when.growth) * when.share + 2
    assert sum(found) == pytest.approx(600 * when.share, abs=drift)


def test_steps_are_due_where_the_energy_is_low() -> None:
    energies = [2.0 + math.sin(t / 8) for t in range(2000)]
    found = due_steps(Informed(10), energies)
    average = [e for e, due in zip(energies, found) if due]
    assert sum(average) / len(average) < 1.75  # 2 on average, 1 at least


def test_a_step_that_overflows_says_nothing() -> None:
    rest = Rest(Informed(2))
    for energy in (1.0, math.inf, math.nan, 1.0):
        rest.advance(torch.tensor(energy, dtype=torch.float64))
    assert float(rest.energy) == 1.0 and math.isfinite(float(rest.level))


def test_energy_is_the_sum_of_squared_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    model(torch.randn(5, 3)).square().sum().backward()
    by_sum = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    assert float(energy_of(model.parameters())) == pytest.approx(by_sum)
    assert math.isnan(float(energy_of([])))


def searched(model: nn.Module, x: Tensor, batches: Batches, when: Informed | None) -> tuple[DNALPruner, list[Tensor]]:
    model = copy.deepcopy(model).train()
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    moved = []
    with pruner.search(40, optimizer=optimizer, progress=False, when=when) as search:
        for step in range(40):
            images, labels = batches[step % len(batches)]
            moved.append(search.score.clone())
            search.step(F.cross_entropy(model(images), labels))
    return pruner, moved


def test_gates_move_in_the_steps_that_are_due(small: nn.Module, x: Tensor, batches: Batches) -> None:
    pruner, scores = searched(small, x, batches, Informed(3))
    moves = [not torch.equal(a, b) for a, b in zip(scores, scores[1:])]
    last = pruner.session.last
    assert last is not None and last.rest is not None
    # in the last quarter the pace is 0, so that steps that are due there move nothing
    assert 3 <= sum(moves) <= int(last.rest.taken) < 20
    slim = pruner.speedup()
    assert slim is not None and any("the gates learned in" in note for note in pruner.report.notes)
    # fewer steps are as much larger
    every, _ = searched(small, x, batches, None)
    assert every.session.last is not None
    assert torch.allclose(last.scores.pace, 4 * every.session.last.scores.pace)


def test_a_search_that_goes_by_it_goes_on(small: nn.Module, x: Tensor, batches: Batches) -> None:
    def run(stop: int, state: tuple[dict, dict] | None = None) -> tuple[dict, dict]:
        model = copy.deepcopy(small).train()
        pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
        if state is not None:
            model.load_state_dict(state[0])
            pruner.load_state_dict(state[1])
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        with pruner.search(40, optimizer=optimizer, progress=False, when=Informed(3)) as search:
            while search.done < stop:
                images, labels = batches[search.done % len(batches)]
                search.step(F.cross_entropy(model(images), labels))
            state = copy.deepcopy(model.state_dict()), copy.deepcopy(pruner.state_dict())
        return state

    whole, parted = run(40), run(40, run(17))
    assert all(torch.equal(whole[0][name], parted[0][name]) for name in whole[0])
    for part in ("score", "momentum"):
        assert torch.equal(whole[1]["search"][part], parted[1]["search"][part])
    assert whole[1]["search"]["rest"] == parted[1]["search"]["rest"]
    pruner = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x, budget=Budget(flops=0.5))
    pruner.load_state_dict(run(5)[1])
    with pytest.raises(DNALError, match="the search to be resumed had a when="):
        pruner.search(40, optimizer=torch.optim.SGD(pruner.bound_model.parameters(), 0.05), progress=False)


def test_errors(small: nn.Module, x: Tensor) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    with pytest.raises(DNALError, match="goes by the weights' gradients: let them learn too, optimizer="):
        pruner.search(10, when=Informed(10))
    with pytest.raises(DNALError, match="when"):
        pruner.search(10, when=10)
    with pytest.raises(DNALError, match=r"every=0\): must be a whole number >= 1"):
        Informed(0)
    with pytest.raises(DNALError, match=r"growth=1.0\): must be a number above 1"):
        Informed(growth=1.0)
    with pytest.raises(DNALError, match=r"ewma=0\): must be a number in \(0, 1\]"):
        Informed(ewma=0)
