"""Run an operation, and let the labels of its channels follow.

Unknown is left alone: an operation without a rule freezes everything that enters it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...modules.running import FORWARD_ERRORS, flatten_tensors
from ..flow import Flow, Operation
from . import convolutions, indexing, joining, moving, normalisation, products, reductions, windows  # noqa: F401
from .elementwise import pointwise
from .registry import RULES, Rule, in_place, key_of


def rule_of(func: Any) -> Rule | None:
    """The rule for an overload: one that is registered, or, by torch's own tag, that for elements that meet."""
    name = key_of(func)
    found = RULES.get(name)
    if found is None and func.namespace == "aten" and _is_pointwise(func, name.removeprefix("aten::")):
        return pointwise
    return found


def _is_pointwise(func: Any, functional: str) -> bool:
    # in-place variants do not all carry the tag
    packet = getattr(torch.ops.aten, functional, None)
    overloads = [func] if packet is None else [func, *(getattr(packet, o) for o in packet.overloads())]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def run(flow: Flow, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation, and label what it returns. Where no rule can follow, what enters is frozen."""
    labels = [flow.of(t) for t in flatten_tensors([args, list(kwargs.values())])]
    if all(entering is None for entering in labels):
        return func(*args, **kwargs)
    rule = rule_of(func)
    if rule in (pointwise, None) and in_place(func) and isinstance(args[0], Tensor):
        flow.forget_sites(args[0])
    out = func(*args, **kwargs)
    name = func.overloadpacket.__name__
    why = f"{name} mixes channels, or is not known,"
    if rule is not None:
        try:
            rule(flow, Operation(func, args, kwargs, out, labels))
            return out
        except FORWARD_ERRORS as error:  # a form of the operation that the rule does not expect
            why = f"{name} cannot be followed ({type(error).__name__})"
            for tensor in flatten_tensors(out):
                flow.put(tensor, (), None)
    for entering in labels:
        flow.freeze(entering, why)
    return out
