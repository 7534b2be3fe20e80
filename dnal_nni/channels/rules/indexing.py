"""Operations that choose elements by their number."""

from __future__ import annotations

import torch

from ..flow import Flow, Operation, axes_of, compress
from .moving import move
from .registry import rule


@rule("roll", "index_select")
def by_number(flow: Flow, op: Operation) -> None:
    """Channels are named by their numbers, which change when others go: a roll, a selection by a fixed index."""
    labels = op.labels[0]
    dims = op.argument("dims", op.argument("dim", 0))
    if labels is not None:
        rank = len(labels.shape)
        axes = {dims % rank} if isinstance(dims, int) else {axis % rank for axis in dims or range(rank)}
        for array in labels.arrays:
            if axes & set(axes_of(array)):
                flow.graph.freeze(array, flow.why(f"{op.name} names channels by number"))
    move(flow, op)


@rule("index")
def index(flow: Flow, op: Operation) -> None:
    """Advanced indexing: channels along an axis that is indexed are chosen by position, and stay."""
    labels = op.labels[0]
    indices = op.argument("indices")
    if labels is None:
        for other in op.labels:
            flow.freeze(other, "indexing with channels")
        return
    axes, axis = [], 0
    for entry in indices:
        width = entry.dim() if entry is not None and entry.dtype in (torch.bool, torch.uint8) else 1
        if entry is not None:
            axes += list(range(axis, axis + width))
        axis += width
    arrays = flow.mix(labels, axes, "indexing picks channels")
    on_cpu = [entry.cpu() if entry is not None else None for entry in indices]
    moved = [compress(torch.ops.aten.index(array.expand(labels.shape), on_cpu)) for array in arrays]
    flow.put(op.out, moved, labels.site)


@rule("index_put")
def index_put(flow: Flow, op: Operation) -> None:
    """Rows written into a tensor: their channels meet those of the other rows, or fill a new tensor."""
    target, values = flow.of(op.args[0]), flow.of(op.argument("values"))
    indices = op.argument("indices")
    rows = len(indices) == 1 and indices[0].dtype in (torch.int64, torch.bool) and indices[0].dim() == 1
    if not rows or values is None or len(values.shape) != op.out.dim() or any(0 in axes_of(a) for a in values.arrays):
        for labels in op.labels:
            flow.freeze(labels, "writing by index")
    elif target is None:
        flow.put(op.out, values.arrays, None)
    else:
        sides = (target, flow.mix(target, [0], "writing by index")), (values, values.arrays)
        one_row = [(labels.shape[1:], tuple(a[0] for a in arrays)) for labels, arrays in sides]
        met = flow.meet(one_row, "rows beside rows with fixed channels")
        flow.put(op.out, [a[None] for a in met], None)
