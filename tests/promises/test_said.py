"""Results that look learned, or as small as was asked, and are not: an error, or a sentence in log and report."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner

Batches = list[tuple[Tensor, Tensor]]


def pruner_of(model: nn.Module, x: Tensor, **settings: object) -> DNALPruner:
    return DNALPruner(model, CONV, dummy_input=x, **{"budget": Budget(flops=0.5), **settings})


def test_a_search_that_no_gradient_reaches_is_an_error(small: nn.Module, x: Tensor, batches: Batches) -> None:
    other, pruner = copy.deepcopy(small), pruner_of(small, x)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(DNALError, match="in 3 steps no gradient has reached a gate.*not of a copy"):
        with pruner.search(len(batches), progress=False) as search:
            for images, labels in batches:
                search.step(F.cross_entropy(other(images).requires_grad_(), labels))
    assert search.done == 2
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items() if name in before)


def test_a_search_that_ended_early_says_so(
    small: nn.Module, x: Tensor, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = pruner_of(small, x)
    with pruner.search(300, progress=False) as search:
        for images, labels in batches[:3]:
            search.step(F.cross_entropy(small(images), labels))
    pruner.speedup()
    sentence = "the search ended after 3 of the 300 steps that it was planned for"
    assert any(sentence in record.message for record in caplog.records)
    assert sentence in str(pruner.report)


@pytest.mark.parametrize("learning", ["weights too", "gates alone", "somebody else's loop"])
def test_eval_mode_in_a_search_is_said(
    learning: str, small: nn.Module, x: Tensor, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = pruner_of(small.eval(), x)
    optimizer = None if learning == "gates alone" else torch.optim.SGD(small.parameters(), 0.01)
    with pruner.search(2, optimizer=optimizer, progress=False) as search:
        for images, labels in batches[:2]:
            loss = F.cross_entropy(small(images), labels)
            if learning == "somebody else's loop":
                loss.backward()
                search.before_optimizer_step()
                search.after_optimizer_step()
            else:
                search.step(loss)
    said = [record.message for record in caplog.records if "eval mode" in record.message]
    assert len(said) == 1 and "model.train()" in said[0]


def test_speedup_behind_unwrap_model_says_what_to_do(small: nn.Module, x: Tensor) -> None:
    pruner = pruner_of(small, x)
    pruner.harden({"conv1": torch.arange(8) < 3})
    pruner.unwrap_model()
    with pytest.raises(DNALError, match="unwrap_model.. has taken the gates off.*call speedup.. ahead of it"):
        pruner.speedup()
    pruner.wrap_model()
    assert pruner.speedup().conv1.out_channels == 3


def test_a_ratio_beside_a_budget_is_not_used_and_that_is_said(
    small: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        DNALPruner(small, [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}], dummy_input=x, budget=Budget(flops=0.5))
    assert "the budget rules: the sparse_ratio of config_list is not used" in caplog.text


def test_a_budget_between_two_structures_is_said(batches: Batches, x: Tensor) -> None:
    coarse = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pruner = DNALPruner(coarse, CONV, dummy_input=x, budget=Budget(flops=0.6))
    with pruner.search(len(batches), progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(coarse(images), labels))
    pruner.speedup()
    kept = pruner.report.after.flops / pruner.report.before.flops
    assert kept < 0.59  # 2 of 4 channels; 3 are some three quarters
    assert f"the cut costs {kept / 0.6:.3g} times the budget" in str(pruner.report)


@pytest.mark.parametrize(("width", "expected"), [(16, (8, 24))])
def test_multiples_of_eight_on_a_small_network(width: int, expected: tuple[int, int]) -> None:
    """34 % were left where half was asked, and a structure of half was there."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 1, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    pruner = DNALPruner(net, CONV, dummy_input=x[:2], budget=Budget(flops=0.39), channel_multiple=8)
    with pruner.search(10, progress=False) as search:
        for _ in range(10):
            search.step(F.cross_entropy(net(x), y))
    slim = pruner.speedup()
    assert (slim[0].out_channels, slim[2].out_channels) == expected


def test_no_size_is_said_where_a_search_decides_it(
    small: nn.Module, x: Tensor, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = pruner_of(small, x, budget=None)
    with pruner.search(len(batches), progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(small(images), labels))
    pruner.speedup()
    sentence = "no size was asked for, neither by a budget nor by a sparse_ratio: lambda_=0.0001 alone rules"
    assert [sentence in record.message for record in caplog.records].count(True) == 1
    assert sentence in str(pruner.report)


@pytest.mark.parametrize("flops", [0.999, 0.5])
def test_nothing_to_cut_is_said(flops: float, small: nn.Module, x: Tensor, batches: Batches) -> None:
    pruner = pruner_of(small, x, budget=Budget(flops=flops))
    with pruner.search(len(batches), progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(small(images), labels))
    pruner.speedup()
    assert ("nothing was cut: uncut, the network costs" in str(pruner.report)) == (flops == 0.999)


def test_steps_beyond_the_last_say_so_once(
    small: nn.Module, x: Tensor, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    with pruner_of(small, x).search(2, progress=False) as search:
        for images, labels in batches[:4]:
            search.step(F.cross_entropy(small(images), labels))
    said = [record.message for record in caplog.records if "made its 2 steps: further calls" in record.message]
    assert len(said) == 1
