"""Running somebody's model: what it takes, what it returns, what it raises; and copies of it."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DNALError

# what a forward pass of somebody else's module raises
FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def flatten_tensors(out: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns: nested lists, tuples, dicts, dataclasses, None and numbers included."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from flatten_tensors(value)
    elif out is None or isinstance(out, (int, float, str)):
        return
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from flatten_tensors(value)
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        for field in dataclasses.fields(out):
            yield from flatten_tensors(getattr(out, field.name))


Key = int | str


@dataclasses.dataclass(frozen=True)
class Example:
    """A dummy input, and what is needed of what the model returns for it.

    Attributes:
        inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        outputs: a position, a key or an attribute of what the model returns, several of them, or a function of it.
    """

    inputs: Any
    outputs: Key | Sequence[Key] | Callable[[Any], Any]

    def needed(self, returned: Any) -> Any:
        """The part of what the model returned that ``outputs`` names."""
        if callable(self.outputs):
            return self.outputs(returned)
        if isinstance(self.outputs, (int, str)):
            return _entry(returned, self.outputs)
        return tuple(_entry(returned, key) for key in self.outputs)


def _entry(returned: Any, key: Key) -> Any:
    try:
        return returned[key]
    except (TypeError, LookupError):
        if isinstance(key, str) and hasattr(returned, key):
            return getattr(returned, key)
        raise DNALError(f"outputs={key!r}: the model returns a {type(returned).__name__} without it") from None


def map_tensors(function: Callable[[Tensor], Any], inputs: Any) -> Any:
    """``function`` of every tensor in lists, tuples (tuples then) and dicts; anything else as it is."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Example):
        return dataclasses.replace(inputs, inputs=map_tensors(function, inputs.inputs))
    if isinstance(inputs, Mapping):
        return {key: map_tensors(function, value) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return tuple(map_tensors(function, value) for value in inputs)
    return inputs


def call(model: nn.Module, dummy_input: Any) -> Any:
    """Run the model on a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or an Example.

    Returns:
        what the model does; of an Example, what is needed of it.
    """
    if isinstance(dummy_input, Example):
        return dummy_input.needed(call(model, dummy_input.inputs))
    if isinstance(dummy_input, Mapping):
        return model(**dummy_input)
    if isinstance(dummy_input, (list, tuple)):
        return model(*dummy_input)
    return model(dummy_input)


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time, on the CPU and on the model's GPUs; the caller's are put back."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        torch.default_generator.manual_seed(0)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def clone(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps computed tensors as attributes (``torch.nn.utils.weight_norm`` does)."""
    return _copied(model, {})


def twin(model: nn.Module, values: Callable[[Tensor], Tensor] = torch.detach) -> nn.Module:
    """A copy whose parameters are ``values`` of the model's: by default they share its memory. Buffers are its own."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if type(p).__deepcopy__ is nn.Parameter.__deepcopy__:
            memo[id(p)] = type(p)(values(p.detach()), p.requires_grad)
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)`` in a tenth of the time: most of what a module holds is empty, or a number."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    return _copy(model, memo)


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if _copies_itself(type(module)):
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


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class says how it is copied, other than ``nn.Module`` does."""
    names = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__")
    own = any(getattr(kind, name, None) not in (getattr(nn.Module, name, None), None) for name in names)
    return own or not kind.__setstate__.__module__.startswith("torch.nn.")


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def raised_in(error: BaseException, torch_too: bool = False) -> nn.Module | None:
    """The innermost module in whose method an error was raised; torch's own layers only if asked for."""
    found, entry = None, error.__traceback__
    while entry is not None:
        owner = entry.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (torch_too or not type(owner).__module__.startswith("torch.nn.")):
            found = owner
        entry = entry.tb_next
    return found
