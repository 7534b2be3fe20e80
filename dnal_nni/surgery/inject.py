"""Attach gates to a model where each group's site says, and take them off again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup, Member
from ..errors import DNALError
from ..modules.adapters import adapt, restore
from ..modules.choices import Choice
from ..modules.gated import gate_parameter, ungate
from ..modules.gates import AffineGate, ChannelFactor, InputGate, ScaledSigmoidGate, StatisticsGate, WeightGate
from ..modules.layers import layer_of, masked_statistics

_INPUT_GATE = "dnal_input_gate"
_OUTPUT_GATE = "dnal_output_gate"
_STATISTICS_GATE = "dnal_statistics_gate"


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # a global function and a submodule, not a closure: a copy of the model uses the copy's gates
    return (getattr(module, _INPUT_GATE)(args[0]), *args[1:])


def _gate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    gated: Tensor = getattr(module, _OUTPUT_GATE)(output)
    return gated


def _mask_statistics(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    gated: Tensor = getattr(module, _STATISTICS_GATE)(module, args[0], output)
    return gated


def is_gated(model: nn.Module) -> bool:
    """Whether gates are attached."""
    return any(isinstance(module, ChannelFactor) for module in model.modules())


def check_ungated(model: nn.Module) -> None:
    """Raise where gates are attached."""
    if is_gated(model):
        raise DNALError("the model already has gates of another DNALPruner: call its unwrap_model() first")


def check_members(model: nn.Module, active: Sequence[ChannelGroup]) -> None:
    """Raise where these groups are not those of this model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for member in (member for group in active for member in group.members):
        module = modules.get(member.module)
        if module is None:
            raise DNALError(f"the plan is of another model, with a layer {member.module}: make one of this, Plan.of()")
        layer = None if member.bare else layer_of(module)
        width = member.width if layer is None else layer.widths(module).get(member.side, member.width)
        if width != member.width:
            raise DNALError(f"the plan is of another model: {member.path} has {member.width} channels, not {width}")


def layers_of(model: nn.Module, active: Sequence[ChannelGroup]) -> dict[str, tuple[int, str]]:
    """Which object each layer of these groups is, and how wide, by path."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for path in dict.fromkeys(member.module for group in active for member in group.members):
        module = modules.get(path)
        layer = None if module is None else layer_of(module)
        widths = {} if module is None or layer is None else layer.widths(module)
        found[path] = id(module), ", ".join(f"{side} {width}" for side, width in widths.items())
    return found


def check_layers(model: nn.Module, active: Sequence[ChannelGroup], then: Mapping[str, tuple[int, str]]) -> None:
    """Raise where a layer is no longer what :func:`layers_of` said."""
    for path, (number, widths) in layers_of(model, active).items():
        if (number, widths) != then[path]:
            sizes = f" ({then[path][1]} channels then, {widths or 'none'} now)" if widths != then[path][1] else ""
            raise DNALError(
                f"{path} is no longer the layer that it was when the pruner was made{sizes}: change the model first, "
                "then make the pruner"
            )


def attach(model: nn.Module, groups: Sequence[ChannelGroup], gates: Mapping[str, ScaledSigmoidGate]) -> None:
    """Let ``gates`` (by group name) act in ``model``, in place; its parameters stay the same objects."""
    adapt(model, revertible=True)
    norms: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    inputs: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    outputs: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    statistics: dict[str, list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    weights: dict[tuple[str, int], list[tuple[Member, ScaledSigmoidGate]]] = defaultdict(list)
    for group in groups:
        if group.frozen is not None:
            continue
        for member in group.members:
            if group.choice:
                choice = model.get_submodule(member.path)
                assert isinstance(choice, Choice)
                choice.attach(gates[group.name])
            zeroing = group.site != "input" and member.path in group.norms and member.side in ("both", "out")
            if member.bare and (zeroing or (member.reads and group.site in ("input", "both"))):
                weights[member.path, member.dim or 0].append((member, gates[group.name]))
            elif zeroing:
                made_by = norms if member.side == "both" else outputs
                made_by[member.path].append((member, gates[group.name]))
            elif group.site in ("input", "both") and _gated_ahead(model, member):
                inputs[member.path].append((member, gates[group.name]))
            if member.axis is not None and masked_statistics(model.get_submodule(member.path)):
                statistics[member.path].append((member, gates[group.name]))
    for path, sources in statistics.items():
        norm = model.get_submodule(path)
        involved, index = _index(sources)
        axis = sources[0][0].axis
        assert axis is not None
        norm.add_module(_STATISTICS_GATE, StatisticsGate(involved, index, axis).to(_device(model)))
        norm.register_forward_hook(_mask_statistics)
    for path, sources in norms.items():
        norm = model.get_submodule(path)
        involved, index = _index(sources)
        gate = AffineGate(involved, index).to(_device(norm))
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                gate_parameter(norm, name, gate)
    for path, sources in inputs.items():
        _multiply(model, path, sources, _INPUT_GATE).register_forward_pre_hook(_gate_input)
    for path, sources in outputs.items():
        _multiply(model, path, sources, _OUTPUT_GATE).register_forward_hook(_gate_output)
    for (path, dim), sources in weights.items():
        owner, _, name = path.rpartition(".")
        involved, index = _index(sources)
        gate_parameter(model.get_submodule(owner), name, WeightGate(involved, index, dim).to(_device(model)))


def _multiply(model: nn.Module, path: str, sources: Sequence[tuple[Member, ScaledSigmoidGate]], name: str) -> nn.Module:
    """Give a layer a gate that multiplies what goes in or comes out; the layer."""
    module = model.get_submodule(path)
    involved, index = _index(sources)
    layer = layer_of(module)
    assert layer is not None
    module.add_module(name, InputGate(involved, index, layer.input_axis(module)).to(_device(model)))
    return module


def _gated_ahead(model: nn.Module, member: Member) -> bool:
    if member.side != "both" or member.bare:
        return member.side == "in"
    layer = layer_of(model.get_submodule(member.path))
    return layer is not None and layer.opaque


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
        if isinstance(module, Choice):
            module.detach()
        ungate(module)
        for name, hooks, ours in (
            (_INPUT_GATE, module._forward_pre_hooks, _gate_input),
            (_OUTPUT_GATE, module._forward_hooks, _gate_output),
            (_STATISTICS_GATE, module._forward_hooks, _mask_statistics),
        ):
            if name in module._modules:
                delattr(module, name)
                for key in [key for key, hook in hooks.items() if hook is ours]:
                    del hooks[key]
    restore(model)


def ungated(name: str) -> str:
    """The name that a parameter has, from the one that a gate gave it until 0.2."""
    return name.replace(".parametrizations", "").removesuffix(".original")
