"""The calls of a model's convolutions and linear layers, as they come in a forward pass."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CHUNK = 2**24  # numbers of a convolution's unfolded input at a time
COLUMNS = 5_000  # numbers that an output is a function of, at most: matrices of their products are inverted
ROWS = 20_000  # places of all examples together that a layer is looked at; every example has one at least

_CONVOLUTIONS: tuple[Any, ...] = (torch.conv1d, torch.conv2d)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """What a convolution or a linear layer is called with."""

    function: Callable[..., Tensor]
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Tensor:
        return self.function(self.x, *self.args, **self.kwargs)

    def columns(self, layer: nn.Module, places: Tensor, examples: slice) -> Tensor:
        """What each output at some ``places`` is a linear function of: ``[examples, places, n]``."""
        x = self.x[examples]
        if isinstance(layer, nn.Linear):
            columns = x.reshape(len(x), -1, x.shape[-1])[:, places]
        else:
            assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
            size, flat = layer.kernel_size, x.dim() == 3
            names = enumerate(("stride", "padding", "dilation"))
            stride, padding, dilation = (self._setting(i, name) for i, name in names)
            if flat:
                x, size, stride = x.unsqueeze(2), (1, *size), (1, *stride)
                padding, dilation = (0, *padding), (1, *dilation)
            columns = F.unfold(x, size, dilation, padding, stride)[:, :, places].transpose(1, 2)
        if layer.bias is not None:
            columns = torch.cat([columns, columns.new_ones(*columns.shape[:2], 1)], 2)
        return columns

    def chunks(self, columns: int) -> Iterator[tuple[int, slice]]:
        """Examples whose unfolded inputs fit into memory: the first one of each chunk, and the chunk."""
        positions = self.x[0].numel() // self.x.shape[1] if self.x.dim() > 2 else 1
        size = max(1, CHUNK // max(1, columns * positions))
        for start in range(0, len(self.x), size):
            yield start, slice(start, start + size)

    def _setting(self, position: int, name: str) -> tuple[int, ...]:
        # behind the weight and the bias
        value = self.args[2 + position] if len(self.args) > 2 + position else self.kwargs.get(name, position != 1)
        if isinstance(value, str):  # "same" with an even kernel and such are padded by torch itself
            assert value == "valid"
            value = 0
        return (int(value),) * (self.x.dim() - 2) if isinstance(value, (int, bool)) else tuple(value)


def unfolds(layer: nn.Module) -> bool:
    """Whether :meth:`LayerCall.columns` can tell what its outputs are functions of."""
    padding = getattr(layer, "padding", 0)
    return not isinstance(padding, str) or padding == "valid"


def by_place(layer: nn.Module, out: Tensor) -> Tensor:
    """What a layer returns as ``[examples, places, channels]``."""
    linear = isinstance(layer, nn.Linear)
    return out.reshape(len(out), -1, out.shape[-1]) if linear else out.flatten(2).transpose(1, 2)


def some_places(rows: Tensor, seed: int, examples: int | None = None) -> Tensor:
    """int64 ``[places]``: of ``rows`` (``[examples, places, channels]``), so many as ROWS allows.

    Args:
        rows: what a layer takes or returns.
        seed: of the choice.
        examples: of all batches together; None: these are all.
    """
    generator = torch.Generator().manual_seed(seed)
    places = max(1, ROWS // (len(rows) if examples is None else examples))
    return torch.randperm(rows.shape[1], generator=generator)[:places].to(rows.device)


class LayerCalls(TorchFunctionMode):
    """Hands the calls of a model's convolutions and linear layers to :meth:`layer`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {}
        for path, module in model.named_modules():  # by the first of several names, as groups have it
            plain = isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
            if (plain or isinstance(module, nn.Linear)) and isinstance(module.weight, nn.Parameter):
                self.layers[id(module.weight)] = path, module

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func in _CONVOLUTIONS or func is F.linear) and len(args) > 1 and id(args[1]) in self.layers:
            path, module = self.layers[id(args[1])]
            made = LayerCall(func, args[0], args[1:], kwargs)
            if made.x.dim() > (1 if func is F.linear else module.weight.dim() - 1):  # with examples
                return self.layer(path, module, made)
        return func(*args, **kwargs)

    @abc.abstractmethod
    def layer(self, path: str, module: nn.Module, made: LayerCall) -> Tensor:
        """What this layer returns, which has been called so."""
