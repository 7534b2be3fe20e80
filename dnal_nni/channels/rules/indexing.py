"""Operations that choose elements by their number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flow import Arrays, Flow, Operation, axes_of, compress, lay
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


@rule("gather")
def gather(flow: Flow, op: Operation) -> None:
    """Elements chosen along one axis; along the others, those at the same place as the index."""
    index = op.argument("index")
    operands = [_beside(flow, tensor, op.argument("dim"), index.shape, "gather") for tensor in (op.args[0], index)]
    flow.put(op.out, flow.meet(operands, "gather along fixed channels"), None)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def scatter(flow: Flow, op: Operation) -> None:
    """Elements written along one axis; along the others, at the same place as they had."""
    axis = op.argument("dim")
    tensors = [op.args[0], *(t for name in ("index", "src", "source") if isinstance(t := op.argument(name), Tensor))]
    tensors = [t for t in tensors if t.dim() == op.out.dim() and t.dim()]  # an index may be a line
    full = torch.Size(min(sizes) for sizes in zip(*(t.shape for t in tensors)))
    if any(n != op.out.shape[i] for i, n in enumerate(full) if i != axis % op.out.dim()):
        for labels in op.labels:  # only a part of some channels is written
            flow.freeze(labels, f"{op.name} into a part of the channels")
        return
    operands = [_beside(flow, tensor, axis, full, op.name) for tensor in tensors]
    flow.put(op.out, flow.meet(operands, f"{op.name} beside fixed channels"), None)


def _beside(flow: Flow, tensor: Tensor, axis: int, sizes: torch.Size, name: str) -> tuple[list[int], Arrays]:
    """An operand along ``axis``, as far as it lies beside the others."""
    labels = flow.of(tensor)
    shape = list(labels.shape if labels else flow.adjustable(tensor))
    axis = axis % max(1, len(shape))
    shape = [1 if i == axis else min(n, sizes[i]) for i, n in enumerate(shape)]
    arrays = flow.mix(labels, [axis], f"{name} runs over the channels")
    return shape, tuple(a[tuple(slice(sizes[i]) for i in range(a.dim()))] for a in arrays)


@rule("embedding")
def embedding(flow: Flow, op: Operation) -> None:
    """A table that is no layer: its columns are produced."""
    table, *others = op.labels
    for labels in others:
        flow.freeze(labels, "channels are looked up in a table")
    columns = flow.mix(table, [0], "rows of a table")
    for array in columns:
        if (source := flow.parameter(array)) is not None:
            flow.graph.producers.add(source.key)
    flow.put(op.out, [lay(array.reshape(-1), op.out.dim() - 1, op.out.dim()) for array in columns], None)
