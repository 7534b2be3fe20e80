"""While a model is traced, sizes of tensors and attributes of modules are numbers that know their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modules.layers import layer_of
from .counts import Attribute, Count, Size
from .flow import Flow, axes_of


class Counting(TorchFunctionMode):
    """Makes sizes of labelled tensors such numbers, and tells :attr:`Sizes.given` what a call of torch was given.

    Args:
        flow: the labels.
        reading: whether a forward is followed now: not the inside of a layer.
        call: the number of the call of a module that is running.
        plain: whether sizes are any ints, since the forward does not run on others, and only remembered.
    """

    def __init__(self, flow: Flow, reading: Callable[[], bool], call: Callable[[], int], plain: bool) -> None:
        super().__init__()
        self.flow, self.reading, self.call, self.plain = flow, reading, call, plain

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.reading():
            return func(*args, **kwargs)
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._sizes(args[0], func(*args, **kwargs), *args[1:], **kwargs)
        sizes = self.flow.sizes
        numbers = (sizes.known(number, self.call()) for number in _numbers([args, list(kwargs.values())]))
        before, sizes.given = sizes.given, tuple(numbers)
        if func is torch.tensor:
            list(map(int, sizes.given))
        try:
            return func(*args, **kwargs)
        finally:
            sizes.given = before

    def _sizes(self, tensor: Tensor, sizes: Any, dim: int | None = None) -> Any:
        labels = self.flow.known(tensor)
        if labels is None:
            return sizes
        numbers = list(tensor.shape)
        for array in labels.arrays:
            axes = axes_of(array)
            sources = [Size(array.reshape(-1), self.call(), self.flow.sizes)] if len(axes) == 1 else []
            for axis in axes:  # heads and their channels are of no attribute either
                number = Count.of(numbers[axis], sources, plain=bool(sources))
                numbers[axis] = int(number) if self.plain else number
        return torch.Size(numbers) if dim is None else numbers[dim]


def _numbers(x: Any) -> Iterator[int]:
    """The ints among arguments, in their order; those of slices too."""
    if isinstance(x, int):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _numbers(y)
    elif isinstance(x, slice):
        yield from _numbers([x.start, x.stop])


@contextmanager
def counted(model: nn.Module) -> Iterator[None]:
    """Let the integer attributes of modules be such numbers, save those of layers, which are read whole."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        if layer_of(module) is not None or isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in list(vars(module).items()):
            new: Any = None
            if name.startswith("_"):
                continue
            if type(value) is int and value > 1:
                new = Count.of(value, [Attribute(path, name, (value,), None)], plain=True)
            elif type(value) in (list, tuple) and value and all(type(n) is int for n in value):
                sizes = tuple(value)
                each = (Count.of(n, [Attribute(path, name, sizes, i)], plain=True) for i, n in enumerate(sizes))
                new = type(value)(each)
            if new is not None:
                changed.append((vars(module), name, value))
                vars(module)[name] = new
    try:
        yield
    finally:
        for attributes, name, value in changed:
            attributes[name] = value
