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
from .elementwise import pointwise, same
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
    tensors = list(flatten_tensors([args, list(kwargs.values())]))
    out = _labelled(flow, func, args, kwargs, tensors)
    flow.uses.operation(func, tensors, out)
    return out


def _labelled(flow: Flow, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    labels = [flow.of(t) for t in tensors]
    target = tensors[0] if in_place(func) and tensors else None
    unlabelled = target is not None and labels[0] is None
    plain = unlabelled and flow.made.plain(tensors[0])
    if all(entering is None for entering in labels):
        out = func(*args, **kwargs)
        _note_made(flow, func, tensors, plain, out)
        return out
    rule = rule_of(func)
    if rule in (pointwise, None) and target is not None:
        flow.forget_sites(target)
    out = func(*args, **kwargs)
    why = f"there is no rule for {key_of(func)}" if rule is None else ""
    if rule is not None:
        try:
            rule(flow, Operation(func, args, kwargs, out, labels))
        except FORWARD_ERRORS as error:  # a form of the operation that the rule does not expect
            why = f"{func.overloadpacket.__name__} cannot be followed ({type(error).__name__})"
            for tensor in flatten_tensors(out):
                flow.put(tensor, (), None)
    for entering in labels if why else ():
        flow.freeze(entering, why)
    if unlabelled:
        flow.written(tensors[0], plain)
    return out


def _note_made(flow: Flow, func: Any, tensors: list[Tensor], plain: bool, out: Any) -> None:
    """Which tensors without channels are plain: see :class:`~dnal_nni.channels.made.Made`."""
    key = key_of(func)
    if in_place(func):
        if plain and not all(map(flow.made.plain, tensors)):
            flow.written(tensors[0], plain)
    elif key in FACTORIES or tensors and rule_of(func) in FOLLOWING and all(map(flow.made.plain, tensors)):
        for tensor in flatten_tensors(out):
            flow.made.mark(tensor, flow.sizes.given if key in FACTORIES else ())
    elif key == "aten::repeat":
        ahead = out.dim() - tensors[0].dim()
        flow.made.repeat(out, tuple(i for i in range(out.dim()) if i < ahead or tensors[0].shape[i - ahead] == 1))


_KINDS = ("zeros", "ones", "full", "empty", "rand", "randn")
FACTORIES = {f"aten::{form}" for kind in _KINDS for form in (kind, f"{kind}_like", f"new_{kind}")}
# what these make of plain tensors is plain
FOLLOWING = (pointwise, same, moving.move, moving.strided, moving.reshape, joining.split, joining.unbind)
