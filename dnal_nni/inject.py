"""Attach gates to a model where each group's site says, and take them off again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .gate import AffineGate, InputGate, ScaledSigmoidGate
from .groups import ChannelGroup, Member

_INPUT_GATE = "dnal_input_gate"


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # a global function and a submodule, not a closure: a copy of the model uses the copy's gates
    return (getattr(module, _INPUT_GATE)(args[0]), *args[1:])


def attach(model: nn.Module, groups: Sequence[ChannelGroup], gates: Mapping[str, ScaledSigmoidGate]) -> None:
    """Let ``gates`` (by group name) act in ``model``, in place; its parameters stay the same objects."""
    norms: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    inputs: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    for group in groups:
        if group.frozen is not None:
            continue
        for member in group.members:
            if group.site == "norm" and member.path in group.norms:
                norms[member.path].append((member, gates[group.name]))
            elif group.site == "input" and member.side == "in":
                inputs[member.path].append((member, gates[group.name]))
    for path, sources in norms.items():
        norm = model.get_submodule(path)
        involved, index = _index(sources)
        for name in ("weight", "bias"):
            factor = AffineGate(involved, index.clone()).to(getattr(norm, name).device)
            parametrize.register_parametrization(norm, name, factor)
    for path, sources in inputs.items():
        consumer = model.get_submodule(path)
        involved, index = _index(sources)
        dim = -1 if isinstance(consumer, nn.Linear) else -(len(consumer.kernel_size) + 1)  # type: ignore[arg-type]
        weight = consumer.weight
        assert isinstance(weight, Tensor)
        consumer.add_module(_INPUT_GATE, InputGate(involved, index, dim).to(weight.device))
        consumer.register_forward_pre_hook(_gate_input)


def _index(sources: Sequence[tuple[Member, ScaledSigmoidGate]]) -> tuple[list[ScaledSigmoidGate], Tensor]:
    offset = 0
    index = torch.full((sources[0][0].width,), sum(gate.s.numel() for _, gate in sources))
    for member, gate in sources:
        index[member.channels] = member.units + offset
        offset += gate.s.numel()
    return [gate for _, gate in sources], index


def detach(model: nn.Module) -> None:
    """Take every gate off. What the gates did is not folded in: the model computes its ungated function again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module) and _is_gated(module):
            # not parametrize.remove_parametrizations: it edits the class, which copies of the module share
            parametrizations = module._modules.pop("parametrizations")
            module.__class__ = type(module).__bases__[0]
            for name, chain in parametrizations.items():  # type: ignore[operator, union-attr]
                module.register_parameter(name, chain.original)
        if _INPUT_GATE in module._modules:
            delattr(module, _INPUT_GATE)
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _gate_input:
                    del module._forward_pre_hooks[key]


def _is_gated(module: nn.Module) -> bool:
    return any(isinstance(child, AffineGate) for child in module.parametrizations.modules())  # type: ignore[union-attr]
