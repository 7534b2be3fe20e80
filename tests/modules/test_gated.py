"""Gated parameters keep their names, and gated models can be saved, loaded, pickled and copied."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.storage.state import load_state, save_state


@pytest.fixture
def gated(small: nn.Module, x: Tensor) -> nn.Module:
    """A model with hard gates on norms, at inputs."""
    pruner = DNALPruner(small.eval(), CONV, dummy_input=x)
    pruner.harden({"conv1": torch.arange(8) < 3, "stem": torch.arange(12) > 2})
    return small


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_gated_model_goes_through(name: str, gated: nn.Module, x: Tensor) -> None:
    out = gated(x)
    assert not torch.equal(out, type(gated)().eval()(x))
    copied = COPIES[name](gated)
    assert torch.equal(copied(x), out)
    with torch.no_grad():
        copied.bn1.weight.detach()  # computed, not a parameter
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(gated(x), out)  # with parameters of its own


def test_state_dicts_go_both_ways_while_gates_are_on(small: nn.Module, x: Tensor) -> None:
    plain, names = copy.deepcopy(small), list(small.state_dict())
    before, parameters = copy.deepcopy(small.state_dict()), [name for name, _ in small.named_parameters()]
    pruner = DNALPruner(small, CONV, dummy_input=x)
    assert list(small.state_dict()) == names and [name for name, _ in small.named_parameters()] == parameters
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert plain.load_state_dict(small.state_dict()).missing_keys == []
    small.load_state_dict(before)
    pruner.unwrap_model()
    assert type(small.bn) is nn.BatchNorm2d
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_checkpoint_with_the_names_of_before_loads(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pruner, path = DNALPruner(small, CONV, dummy_input=x), tmp_path / "checkpoint"
    pruner.save_checkpoint(path)
    state, before = load_state(path), copy.deepcopy(small.state_dict())
    for name in [name for name in state["model"] if name in ("bn.weight", "bn1.bias")]:
        owner, _, parameter = name.rpartition(".")
        state["model"][f"{owner}.parametrizations.{parameter}.original"] = state["model"].pop(name)
    save_state(path, state)
    with torch.no_grad():
        small.bn.weight.zero_()
    pruner.load_checkpoint(path)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
