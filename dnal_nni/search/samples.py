"""Batches of other sizes, in whatever form a model or a loss takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules.running import FORWARD_ERRORS, flatten_tensors, map_tensors


def examples_of(batch: Any) -> int:
    """How many a batch has: along the first dimension of its first tensor."""
    first = next(flatten_tensors(batch), None)
    return len(first) if first is not None and first.dim() else 1


def samples_of(batch: Any) -> Iterator[Any]:
    """A batch in batches of one."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, Mapping):
        for values in zip(*map(samples_of, batch.values())):
            yield dict(zip(batch, values))
    else:
        yield from zip(*map(samples_of, batch))


def as_one(batches: Sequence[Any], examples: int, run: Callable[[Any], Any]) -> Any:
    """The first so many examples as one batch; the first batch, where ``run`` takes no such number.

    Args:
        batches: one at least; those count whose tensors have the shapes of the first one's, but for the examples.
        examples: at most so many.
        run: takes a batch, and is tried.
    """
    try:
        found = _joined(batches, examples)
        run(found)
    except FORWARD_ERRORS:
        return batches[0]
    return found


def _joined(batches: Sequence[Any], examples: int) -> Any:
    parts: list[list[Tensor]] = []
    shapes, found = [x.shape[1:] for x in flatten_tensors(batches[0])], 0
    for batch in batches:
        tensors = list(flatten_tensors(batch))
        if found < examples and [x.shape[1:] for x in tensors] == shapes:
            parts.append([x[: examples - found] if x.dim() else x for x in tensors])
            found += examples_of(batch)
    wholes = iter([torch.cat(same) if same[0].dim() else same[0] for same in zip(*parts)])
    return map_tensors(lambda x: next(wholes), batches[0])
