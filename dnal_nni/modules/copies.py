"""Deep copies of somebody's model, also of what does not let itself be copied: locks, open files, generators."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DNALError, reason

# what copying somebody else's objects raises
_COPY_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, pickle.PickleError)


def deep_copy(model: nn.Module, memo: Callable[[], dict[int, Any]]) -> nn.Module:
    """A deep copy. What cannot be copied is shared: the copy waits for the same lock. Modules and tensors never are.

    Args:
        model: any module.
        memo: makes the copies that are known, by the id of what they are of.

    Raises:
        DNALError: that does not help.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return _with_compiled(model, memo)
    return _copied(model, memo)


def _with_compiled(model: nn.Module, memo: Callable[[], dict[int, Any]]) -> nn.Module:
    """What torch.jit has compiled copies parameters like any tensors: with the graph of their gradients, or without."""
    with torch.no_grad():
        copied = _copied(model, memo)
    for mine, theirs in zip(model.parameters(), copied.parameters()):
        theirs.requires_grad_(mine.requires_grad)
    return copied


def _copied(model: nn.Module, memo: Callable[[], dict[int, Any]]) -> nn.Module:
    try:
        return _quickly(model, memo())
    except _COPY_ERRORS:
        shared = memo()
    for module in model.modules():
        for value in list(vars(module).values()):
            shared |= {id(part): part for part in _parts(value) if not _can_be_copied(part)}
    rebuilt = [module for module in model.modules() if not _copies_itself(module, shared)]
    for module in rebuilt:
        shared[id(module)] = type(module).__new__(type(module))
    try:
        for module in rebuilt:
            vars(shared[id(module)]).update({name: copy.deepcopy(v, shared) for name, v in vars(module).items()})
        return _quickly(model, shared)
    except _COPY_ERRORS as error:
        raise DNALError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy: {reason(error)}): keep what holds tensors in "
            "modules, parameters and buffers"
        ) from error


def _parts(value: Any) -> Iterator[Any]:
    """What containers of Python hold; modules and tensors are copied as such."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _parts(part)
    elif not isinstance(value, (Tensor, nn.Module)):
        yield value


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except _COPY_ERRORS:
        return False
    return True


def _copies_itself(module: nn.Module, shared: Mapping[int, Any]) -> bool:
    """Whether a module with a ``__deepcopy__`` of its own can be copied."""
    if not _says_how(type(module)) or isinstance(module, torch.jit.ScriptModule):
        return True
    try:
        copy.deepcopy(module, dict(shared))
    except _COPY_ERRORS:
        return False
    return True


def _quickly(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)`` in a tenth of the time: most of what a module holds is empty, or a number."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    return _copy(model, memo)


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if _says_how(type(module)):
        return copy.deepcopy(module, memo)
    memo[id(module)] = made = type(module).__new__(type(module))
    state = vars(made)
    for name, value in vars(module).items():
        if name == "_compiled_call_impl":
            continue
        if name == "_modules":
            state[name] = type(value)(
                (key, None if child is None else _copy(child, memo)) for key, child in value.items()
            )
        elif _is_plain(value) or type(value) is tuple and all(map(_is_plain, value)):
            state[name] = value
        elif type(value) in (OrderedDict, dict, set) and not value:
            state[name] = memo.setdefault(id(value), type(value)())
        else:
            state[name] = copy.deepcopy(value, memo)
    return made


def _says_how(kind: type[nn.Module]) -> bool:
    """Whether a class says how it is copied, other than ``nn.Module`` does."""
    names = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__")
    own = any(getattr(kind, name, None) not in (getattr(nn.Module, name, None), None) for name in names)
    return own or not kind.__setstate__.__module__.startswith("torch.nn.")


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)
