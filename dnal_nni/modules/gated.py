"""Modules that compute with their parameters times gates, while the parameters stay where they are, under their names.

A state dict that is written with gates on is the plain model's, and one of the plain model goes into a gated one; a
gated model can be copied and pickled. A norm's affine is read in every forward: a property costs next to nothing.
"""

from __future__ import annotations

import copyreg
from typing import Any

from torch import Tensor, nn

from .gates import AffineGate

_SLOT = "dnal_gate_"  # and the name of the parameter: where its gates are


class Gated:
    """What the classes of gated modules share; each is derived from this and from the module's own class.

    Attributes:
        dnal_gated: names of the parameters with a gate.
    """

    dnal_gated: tuple[str, ...] = ()


def gate_parameter(module: nn.Module, name: str, gate: AffineGate) -> None:
    """Let ``gate`` act on a parameter of ``module``, behind those that do already, in place."""
    gated, slot = _names(module), _SLOT + name
    if name in gated:
        module._modules[slot] = nn.Sequential(module.get_submodule(slot), gate)
        return
    kind = _plain(module)
    module.add_module(slot, gate)
    module.__class__ = _class(kind, (*gated, name))


def ungate(module: nn.Module) -> None:
    """Take every gate off the parameters of ``module``, where there are some."""
    for name in _names(module):
        delattr(module, _SLOT + name)
    if issubclass(type(module), Gated):
        module.__class__ = _plain(module)


def _names(module: object) -> tuple[str, ...]:
    """The parameters with a gate."""
    kind = type(module)
    return kind.dnal_gated if issubclass(kind, Gated) else ()


def _plain(module: object) -> type[nn.Module]:
    """The class that a module has without gates."""
    kind: Any = type(module)
    return kind.__bases__[1] if issubclass(kind, Gated) else kind


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of modules of a kind with gates on some parameters, one for all of them."""
    if (kind, names) not in _classes:
        members: dict[str, Any] = {name: _gated_parameter(kind, name) for name in names}
        members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "dnal_gated": names}
        _classes[kind, names] = type(kind.__name__, (Gated, kind), members)
        copyreg.pickle(_classes[kind, names], _reduced)  # it is made here: pickle finds it nowhere
    return _classes[kind, names]


def _gated_parameter(kind: type[nn.Module], name: str) -> property:
    slot = _SLOT + name
    computed = vars(kind).get(name)  # as a copy that computes in float64 widens it

    def value(module: Any) -> Tensor:
        parameter = module._parameters.get(name)
        if parameter is None:
            raise AttributeError(name)  # somebody has taken it away: nn.Module says the rest
        if isinstance(computed, property):
            parameter = computed.__get__(module)
        gated: Tensor = module._modules[slot].forward(parameter)
        return gated

    return property(value)


def _reduced(module: Any) -> Any:
    """For pickle: the module's own class, the gated parameters and the state."""
    kind = _plain(module)
    made: Any = kind.__reduce_ex__(module, 2)
    return _blank, (kind, _names(module)), *made[2:]


def _blank(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A gated module without a state, for pickle and copy."""
    made = _class(kind, names)
    return made.__new__(made)
