"""Attach gates to a model where each group's site says, and take them off again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..channels.groups import ChannelGroup, Member
from ..errors import DNALError
from ..modules.adapters import adapt, restore
from ..modules.choices import Choice
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


def check_model(model: nn.Module) -> None:
    """Raise where a model cannot be given gates, or cut."""
    if not isinstance(model, nn.Module):
        raise DNALError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise DNALError("the model has no parameters: there is nothing to prune")
    if isinstance(model, torch.jit.ScriptModule):
        raise DNALError("torch.jit has compiled the model: pass the module that it was made of; compile the cut one")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise DNALError(f"the model is wrapped in {type(model).__name__}: pass model.module; train with the wrapper")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise DNALError(f"{name} is on the meta device and has no values: model.to_empty(device=...), load weights")
    for name, module in model.named_modules():
        if hasattr(module, "_nni_wrapper"):
            raise DNALError(f"{name} is already wrapped by another NNI compressor: call its unwrap_model() first")


def is_gated(model: nn.Module) -> bool:
    """Whether gates are attached."""
    return any(isinstance(module, ChannelFactor) for module in model.modules())


def check_ungated(model: nn.Module) -> None:
    """Raise where gates are attached."""
    if is_gated(model):
        raise DNALError("the model already has gates of another DNALPruner: call its unwrap_model() first")


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
            if group.site != "input" and member.path in group.norms and member.side in ("both", "out"):
                made_by = norms if member.side == "both" else outputs
                made_by[member.path].append((member, gates[group.name]))
            elif group.site in ("input", "both") and member.reads:
                weights[member.path, member.dim or 0].append((member, gates[group.name]))
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
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                factor = AffineGate(involved, index.clone()).to(getattr(norm, name).device)
                parametrize.register_parametrization(norm, name, factor)
                _shorten(type(norm), name)
    for path, sources in inputs.items():
        _multiply(model, path, sources, _INPUT_GATE).register_forward_pre_hook(_gate_input)
    for path, sources in outputs.items():
        _multiply(model, path, sources, _OUTPUT_GATE).register_forward_hook(_gate_output)
    order = {path: list(model.get_submodule(path)._parameters) for path in {p.rpartition(".")[0] for p, _ in weights}}
    for (path, dim), sources in weights.items():
        owner, _, name = path.rpartition(".")
        involved, index = _index(sources)
        gate = WeightGate(involved, index, dim, order[owner]).to(_device(model))
        parametrize.register_parametrization(model.get_submodule(owner), name, gate)


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


def _shorten(parametrized: type[nn.Module], name: str) -> None:
    """Let a norm's affine be computed without what torch does around it: it is read in every forward of every norm.

    ``parametrized`` is the class that torch made for this one module (its copies share it).
    """
    usual = getattr(parametrized, name)

    def affine(norm: Any) -> Tensor:
        chain = norm._modules["parametrizations"]._modules[name]
        if len(chain._modules) > 1:  # somebody else's behind it
            value: Tensor = usual.fget(norm)
        else:
            value = chain._modules["0"].forward(chain.original)
        return value

    setattr(parametrized, name, property(affine, usual.fset))


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
        if parametrize.is_parametrized(module) and (gates := _parametrizing(module)):
            # not parametrize.remove_parametrizations: it edits the class, which copies of the module share
            parametrizations = module._modules.pop("parametrizations")
            module.__class__ = type(module).__bases__[0]
            for name, chain in parametrizations.items():  # type: ignore[operator, union-attr]
                module.register_parameter(name, chain.original)
            order = gates[0].order if isinstance(gates[0], WeightGate) else ()
            module._parameters = {name: module._parameters.pop(name) for name in order} | module._parameters
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


def _parametrizing(module: nn.Module) -> list[AffineGate]:
    """The gates that act on parameters of a module."""
    return [gate for gate in module.get_submodule("parametrizations").modules() if isinstance(gate, AffineGate)]


def ungated(name: str) -> str:
    """The name that a parameter has while no gate acts on it."""
    return name.replace(".parametrizations", "").removesuffix(".original")
