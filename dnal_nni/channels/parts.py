"""Equal parts of channels: a forward that takes them apart by computed sizes needs them equal when they are cut too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor, nn

from .graph import CouplingGraph

_MOST, _LEAST = 8, 5  # parts, and channels in each, that a computed size is taken to mean


@dataclasses.dataclass(frozen=True)
class Parts:
    """A tensor taken apart along an axis.

    Attributes:
        path: the module in whose forward.
        ids: channel ids, an axis for each axis of the tensor.
        axis: the one along which.
        sizes: of the parts, in order.
        split: whether the forward gave all of these sizes; else it named the part's ends, of a slice.
    """

    path: str
    ids: Tensor
    axis: int
    sizes: tuple[int, ...]
    split: bool


def couple_equal(graph: CouplingGraph, model: nn.Module, parts: Parts) -> None:
    """Let equal parts lose the same rows, unless the module keeps a size for each of them, which follows it."""
    attributes = [v for name, v in vars(model.get_submodule(parts.path)).items() if not name.startswith("_")]
    if parts.split:
        if any(isinstance(value, (list, tuple)) and tuple(value) == parts.sizes for value in attributes):
            return
        pieces = parts.ids.split(parts.sizes, parts.axis)
        for size in {n for n in parts.sizes if n > 1 and parts.sizes.count(n) > 1}:
            _couple(graph, [piece for piece in pieces if piece.shape[parts.axis] == size])
        return
    total, ends = sum(parts.sizes), [sum(parts.sizes[:i]) for i in range(1, len(parts.sizes))]
    size = math.gcd(total, *ends)
    halves, kept = total == 2 * size, all(type(end) is int and end in attributes for end in ends)
    if size > 1 and (halves or (not kept and total <= _MOST * size and size >= _LEAST)):
        _couple(graph, parts.ids.split(size, parts.axis))


def _couple(graph: CouplingGraph, pieces: Sequence[Tensor]) -> None:
    first, *others = [piece for piece in pieces if bool((piece >= 0).any())] or pieces  # others are not yet filled
    for piece in others:
        graph.couple(first, piece, "it is coupled with a part that is fixed")
