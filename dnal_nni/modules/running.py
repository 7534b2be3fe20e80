"""Running somebody's model: what it takes, what it returns, what it raises; and copies of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..arguments import shown
from ..errors import DNALError
from .copies import deep_copy

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


def rejected(dummy_input: Any, error: Exception) -> str:
    """Why a model does not run on an input, and what else to give."""
    inputs = dummy_input.inputs if isinstance(dummy_input, Example) else dummy_input
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    several = isinstance(parts, (list, tuple))
    if next(flatten_tensors(inputs), None) is None and not (several and len(parts) == 0):
        hint = ", torch.from_numpy(...)" if type(inputs).__module__ == "numpy" else ", such as one batch of your images"
        return f"the dummy_input is {shown(inputs)}, and has no tensor in it: give what your model takes{hint}"
    what = f" of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else ""
    why = next(iter(str(error).splitlines()), type(error).__name__)
    if several:
        names = list(inputs) if isinstance(inputs, Mapping) else [None] * len(parts)
        said = [f"{name}=" if name else "" for name in names]
        what = f" ({', '.join(name + shown(part) for name, part in zip(said, parts))})"
        kind = "a dict holds the keyword arguments" if isinstance(inputs, Mapping) else "a tuple holds the arguments"
        why += f"; {kind} of forward(), without labels"
    elif isinstance(inputs, Tensor) and "orward()" not in why:
        what += f", {str(inputs.dtype).removeprefix('torch.')}, on {inputs.device}"
    return f"the model rejects the dummy_input{what}: {why}"


class DispatchMode(TorchDispatchMode):
    """A mode that torch.compile knows nothing of: to tell it would import all of that, which takes as long as torch."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time: torch's, on the CPU and on the model's GPUs, numpy's and Python's.

    The caller's are put back.
    """
    others = random.getstate(), np.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(0)
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


def clone(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps computed tensors as attributes (``torch.nn.utils.weight_norm`` does)."""
    return deep_copy(model, dict)


def twin(model: nn.Module, values: Callable[[Tensor], Tensor] = torch.detach) -> nn.Module:
    """A copy whose parameters are ``values`` of the model's: by default they share its memory. Buffers are its own."""

    def known() -> dict[int, Any]:
        return {
            id(p): type(p)(values(p.detach()), p.requires_grad)
            for p in model.parameters()
            if type(p).__deepcopy__ is nn.Parameter.__deepcopy__
        }

    return deep_copy(model, known)


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of all that take hooks: what torch.jit has compiled takes none."""
    return ((path, m) for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))


def raised_in(error: BaseException, torch_too: bool = False) -> nn.Module | None:
    """The innermost module in whose method an error was raised; torch's own layers only if asked for."""
    found, entry = None, error.__traceback__
    while entry is not None:
        owner = entry.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (torch_too or not type(owner).__module__.startswith("torch.nn.")):
            found = owner
        entry = entry.tb_next
    return found
