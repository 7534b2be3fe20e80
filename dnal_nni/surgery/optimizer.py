"""An optimizer's state, through the cut: momentum and other averages lose the channels that their parameters lost."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.running import clone
from .changes import newly_baked
from .slim import Keep, slim_copy, slim_twin


def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep, slim: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer of ``model`` as one of ``slim``: see :meth:`DNALPruner.carry_optimizer`."""
    _check_cut(dict(slim_twin(model, groups, keep).named_parameters()), dict(slim.named_parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    baked = tuple(f"{path}." for path in newly_baked(model, slim))
    state = _state(optimizer, names, baked)
    cut = {key: _cut_like(model, groups, keep, tensors) for key, tensors in state.items()}
    left = dict(slim.named_parameters())

    carried = copy.copy(optimizer)  # with what its class sets up at unpickling
    carried.state = defaultdict(dict)
    carried.param_groups = []
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name in left:
                new = left.pop(name)
                parameters.append(new)
                for key, value in optimizer.state.get(parameter, {}).items() if not name.startswith(baked) else ():
                    carried.state[new][key] = cut[key][name] if name in cut.get(key, {}) else copy.deepcopy(value)
            elif name.startswith(baked):  # one of those that the layer's weight was computed from
                plain = next(path for path in baked if name.startswith(path)) + "weight"
                parameters += [left.pop(plain)] if plain in left else []
        carried.param_groups.append({**group, "params": parameters})
    return carried


def _check_cut(expected: Mapping[str, Tensor], slim: Mapping[str, Tensor]) -> None:
    for name in [*expected, *slim]:
        shapes = [list(of[name].shape) if name in of else "not there" for of in (expected, slim)]
        if shapes[0] != shapes[1]:
            raise DNALError(
                f"carry_optimizer: slim is not what the last speedup() returned: its {name} is {shapes[1]}, and was "
                f"{shapes[0]}"
            )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise for an optimizer that a search cannot step."""
    kind = type(optimizer).__name__
    known = {id(p) for p in model.parameters()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise DNALError(f"search(optimizer=...): this {kind} holds no parameter of the model")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise DNALError(
            f"search(optimizer=...): {kind} runs the model itself, in a closure, and a search makes one step for one "
            "loss: take SGD or Adam, or leave the weights to compress() with an evaluator"
        )


def _state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], baked: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer holds in the shape of its parameters: by key, then by the parameter's name."""
    state: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in names:
            raise DNALError("carry_optimizer: this optimizer holds a parameter that is not the model's")
        name = names[id(parameter)]
        for key, value in optimizer.state.get(parameter, {}).items():
            number = value is None or isinstance(value, (int, float)) or isinstance(value, Tensor) and not value.dim()
            if number:
                continue
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                raise DNALError(
                    f"carry_optimizer: {key!r} of {type(optimizer).__name__} does not have the shape of {name}, and "
                    "cannot be cut with it: make a new optimizer for the cut network"
                )
            if not name.startswith(baked):
                state[key][name] = value
    return state


def _cut_like(
    model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """These tensors in place of the parameters of a copy, through the very same cut."""
    holder = clone(model)
    for name, _ in list(holder.named_parameters()):
        if name in tensors:
            owner, _, attribute = name.rpartition(".")
            value = tensors[name].detach().clone()
            holder.get_submodule(owner)._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    cut: dict[str, Any] = dict(slim_copy(holder, groups, keep).named_parameters())
    return {name: cut[name].detach() for name in tensors if name in cut}
