"""The same input in other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modules.running import Example, flatten_tensors


def other_sizes(inputs: Any) -> list[Any]:
    """The same input in other sizes, the quickest first, and none larger than it in 3-D; none if it is no image."""
    scales = [_half, _smaller] if has_volumes(inputs) else [_half, _smaller, _larger]
    return [x for scale in scales if (x := _resized(inputs, scale)) is not None]


def has_volumes(inputs: Any) -> bool:
    """Whether there are volumes: one of them at a time is enough."""
    return any(x.dim() > 4 for x in flatten_tensors(inputs))


def numel(inputs: Any) -> int:
    """Of all tensors of an input together."""
    return sum(t.numel() for t in flatten_tensors(inputs))


def _half(n: int) -> int:
    return n // 64 * 32 if n >= 128 else n // 8 * 4 if n >= 16 else -(-n // 2)


def _smaller(n: int) -> int:
    return n * 3 // 16 * 4 if n >= 16 else max(1, n - 1)


def _larger(n: int) -> int:
    return n + n // 2


def _resized(inputs: Any, scale: Callable[[int], int]) -> Any:
    if isinstance(inputs, Example):
        other = _resized(inputs.inputs, scale)
        return None if other is None else dataclasses.replace(inputs, inputs=other)
    if isinstance(inputs, tuple) and all(isinstance(x, Tensor) for x in inputs):
        others = tuple(_resized(x, scale) for x in inputs)
        return None if any(x is None for x in others) else others
    if not isinstance(inputs, Tensor) or inputs.dim() < 3 or not inputs.is_floating_point():
        return None
    shape = (*inputs.shape[:2], *map(scale, inputs.shape[2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=inputs.dtype).to(inputs.device)
