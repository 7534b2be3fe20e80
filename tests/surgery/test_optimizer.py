"""The optimizer of a network, through the cut: momentum goes with the weights it belongs to."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Odd
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_goes_through_the_cut(name: str, small: nn.Module, x: Tensor, batches: Any) -> None:
    """Trained on with the carried optimizer, the cut network goes the way of the hard-gated one: channel by channel."""
    model = small.double()
    decay, rest = [small.fc.weight], [p for p in small.parameters() if p is not small.fc.weight]
    optimizer = OPTIMIZERS[name]([{"params": decay, "lr": 0.02}, {"params": rest}])
    pruner = DNALPruner(model, CONV, dummy_input=x.double(), budget=Budget(flops=0.6))
    train(model, optimizer, batches)
    keep = {"stem": torch.arange(12) % 3 != 1, "conv1": torch.arange(8) > 2, "last": torch.arange(16) % 2 == 0}
    pruner.harden(keep)
    slim = pruner.speedup()
    carried = pruner.carry_optimizer(optimizer, slim)
    assert type(carried) is type(optimizer) and [len(g["params"]) for g in carried.param_groups] == [1, len(rest)]
    assert carried.param_groups[0]["lr"] == 0.02 and carried.param_groups[0]["params"][0] is slim.fc.weight
    fresh = copy.deepcopy(slim)
    train(model, optimizer, batches)
    train(slim, carried, batches)
    train(fresh, OPTIMIZERS[name](fresh.parameters()), batches)
    pruner.unwrap_model()
    stem, conv1, last = keep["stem"], keep["conv1"], keep["last"]
    kept = {
        "stem.weight": lambda w: w[stem],
        "bn.bias": lambda w: w[stem],
        "conv1.weight": lambda w: w[conv1][:, stem],
        "conv2.weight": lambda w: w[stem][:, conv1],
        "last.weight": lambda w: w[last][:, stem],
        "last.bias": lambda w: w[last],
        "fc.weight": lambda w: w[:, last],
        "fc.bias": lambda w: w,
    }
    for path, part in kept.items():
        expected = part(model.get_parameter(path))
        assert torch.allclose(slim.get_parameter(path), expected, rtol=1e-9, atol=1e-12), path
    assert not torch.allclose(fresh.fc.weight, slim.fc.weight, rtol=1e-3)  # the momentum does matter


def test_a_carried_optimizer_of_computed_weights() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(x).square().mean().backward()
    optimizer.step()
    pruner = DNALPruner(model, CONV, dummy_input=x)
    with pytest.raises(DNALError, match="carry_optimizer: nothing has been cut yet"):
        pruner.carry_optimizer(optimizer, model)
    pruner.harden({"a": torch.arange(8) < 5})
    slim = pruner.speedup()
    carried = pruner.carry_optimizer(optimizer, slim)
    held = [p for group in carried.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in slim.parameters()} and len(held) == len(set(map(id, held)))
    assert slim.a.weight not in carried.state and carried.state[slim.b.weight]["exp_avg"].shape == slim.b.weight.shape
    slim(x).square().mean().backward()
    carried.step()
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.step(lambda: model(x).square().mean())
    with pytest.raises(DNALError, match="does not have the shape of .*make a new optimizer"):
        pruner.carry_optimizer(lbfgs, slim)
    with pytest.raises(DNALError, match="a parameter that is not the model's"):
        pruner.carry_optimizer(carried, slim)
