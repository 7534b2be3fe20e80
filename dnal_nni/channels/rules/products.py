"""How channels pass through sums of products: matrix products, attention, convolutions and batch norms as functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ...modules.running import flatten_tensors
from ..flow import Arrays, Flow, Operation, axes_of, lay


def matmul(flow: Flow, op: Operation) -> None:
    """Matrix products. What is summed over stands or falls as a whole, unless one factor is a bare parameter.

    ``x @ parameter`` is a linear layer without a module: its input channels are read, its outputs produced, one by one.
    """
    names = ("mat1", "mat2") if op.name == "addmm" else ("batch1", "batch2") if op.name == "baddbmm" else None
    a, b = (op.argument(n) for n in names) if names else op.args[:2]
    bias = op.args[0] if names else None
    la, lb = flow.of(a), flow.of(b)
    what = f"{op.name} multiplies channels with a tensor whose channels are fixed"
    summed_a, summed_b = a.dim() - 1, max(b.dim() - 2, 0)
    arrays_a, arrays_b = list(la.arrays if la else ()), list(lb.arrays if lb else ())
    along_a = [x for x in arrays_a if summed_a in axes_of(x)]
    along_b = [x for x in arrays_b if summed_b in axes_of(x)]
    others_a = [x for x in arrays_a if summed_a not in axes_of(x)]
    others_b = [x for x in arrays_b if summed_b not in axes_of(x)]
    reader = flow.parameter(along_b[0]) if len(along_b) == 1 else None
    source = flow.parameter(others_b[0]) if len(others_b) == 1 else None
    if source is not None:
        flow.graph.producers.add(source.key)
    if reader is not None:
        for x in along_a:
            if axes_of(x) == (summed_a,):
                flow.graph.couple(reader.ids, x.reshape(-1), flow.why(what))
                flow.graph.read_by(reader, la.site if la else None)
            else:
                flow.graph.freeze(x, flow.why(what))
        if not along_a:
            flow.graph.freeze(reader.ids, flow.why(what))
    else:
        for mine, labels, axis, kept in ((along_a, la, summed_a, others_a), (along_b, lb, summed_b, others_b)):
            if labels is not None:
                kept += flow.mix(dataclasses.replace(labels, arrays=tuple(mine)), [axis], what)
    # the result has the rows of a and the columns of b
    if a.dim() == 1 or b.dim() == 1:
        for x in others_a + others_b:
            flow.graph.freeze(x, flow.why(what))
        return
    shape_a, shape_b = (*a.shape[:-1], 1), (*b.shape[:-2], 1, b.shape[-1])
    operands: list[tuple[Sequence[int], Arrays]] = [(shape_a, tuple(others_a)), (shape_b, tuple(others_b))]
    if bias is not None:
        lbias = flow.of(bias)
        operands.append((bias.shape, lbias.arrays if lbias else ()))
    met = flow.meet(operands, what)
    flow.put(op.out, met, None)


def attention(flow: Flow, op: Operation) -> None:
    """Fused attention: query and key are summed over their last axis, heads meet heads."""
    q, k, v = (flow.of(t) for t in op.args[:3])
    mask = op.argument("attn_mask")
    what = "attention over channels that are fixed elsewhere"
    for labels in (q, k, v):
        if labels is not None and any(len(labels.shape) - 2 in axes_of(array) for array in labels.arrays):
            for other in op.labels:
                flow.freeze(other, "attention over tokens that are channels")
            return
    operands: list[tuple[Sequence[int], Arrays]] = []
    for tensor, labels in ((op.args[0], q), (op.args[1], k), (mask, flow.of(mask))):
        if tensor is not None:
            summed = [-1] if tensor is not mask else [-1, -2]
            operands.append(((*tensor.shape[:-2], 1, 1), flow.mix(labels, summed, what)))
    value = op.args[2]
    operands.append(((*value.shape[:-2], 1, value.shape[-1]), v.arrays if v else ()))
    flow.put(next(flatten_tensors(op.out)), flow.meet(operands, what), None)


def convolution(flow: Flow, op: Operation) -> None:
    """A convolution that is no layer: its kernel may be one for each channel, or a bare parameter."""
    x, weight, bias = (flow.of(op.argument(name)) for name in ("input", "weight", "bias"))
    kernel, offset = op.argument("weight"), op.argument("bias")
    groups, channels = op.argument("groups", 1), op.argument("input").shape[1]
    if groups == channels == kernel.shape[0] and not op.argument("transposed", False):
        if x is None:
            flow.freeze(weight, "a convolution with fixed channels")
            return
        lines = flow.mix(x, [0, *range(2, len(x.shape))], "a convolution runs over the channels")
        columns: list[tuple[Sequence[int], Arrays]] = [
            ((channels,), tuple(a.reshape(-1) for a in lines)),
            ((channels,), tuple(a.reshape(-1) for a in weight.arrays if axes_of(a) == (0,)) if weight else ()),
        ]
        if offset is not None:
            columns.append((offset.shape, bias.arrays if bias else ()))
        met = flow.meet(columns, "a convolution with a fixed kernel")
        for array in met:
            flow.note_sizes([groups], array, (groups,))
        flow.put(op.out, [lay(array, 1, op.out.dim()) for array in met], x.site if offset is None else None)
        return
    reads, makes = (0, 1) if op.argument("transposed", False) else (1, 0)
    sides = [next((a for a in weight.arrays if axes_of(a) == (d,)), None) if weight else None for d in (reads, makes)]
    reader, source = (flow.parameter(a) if a is not None else None for a in sides)
    if groups > 1 or source is None or reader is None and x is not None:
        for labels in (x, weight, bias):
            flow.freeze(labels, "a convolution that is no layer")
        return
    arrived = [a for a in x.arrays if axes_of(a) == (1,)] if x is not None else []
    if reader is not None and len(arrived) == 1 and x is not None and len(x.arrays) == 1:
        flow.graph.couple(reader.ids, arrived[0].reshape(-1), flow.why("channels beside fixed ones"))
        flow.graph.read_by(reader, x.site)
    else:
        flow.freeze(x, "a convolution runs over the channels")
        if reader is not None:
            flow.graph.freeze(reader.ids, flow.why("a convolution reads fixed channels"))
    flow.graph.producers.add(source.key)
    if offset is not None:
        made = [((source.size,), (source.ids,)), (offset.shape, bias.arrays if bias else ())]
        flow.meet(made, "a convolution with a fixed bias")
    flow.put(op.out, [lay(source.ids, 1, op.out.dim())], None)


def batch_norm(flow: Flow, op: Operation) -> None:
    """Batch norm as a function: all its tensors are per channel."""
    x = flow.of(op.args[0])
    shape = op.args[0].shape
    operands: list[tuple[Sequence[int], Arrays]] = []
    arrays = flow.mix(x, [i for i in range(len(shape)) if i != 1], "batch norm over other axes than channels")
    operands.append(((1, shape[1]), tuple(a.reshape(a.shape[:2]) for a in arrays)))
    for tensor in op.args[1:5]:
        if isinstance(tensor, Tensor):
            labels = flow.of(tensor)
            operands.append((tensor.shape, labels.arrays if labels else ()))
    met = flow.meet(operands, "batch norm with fixed statistics")
    out = next(flatten_tensors(op.out))
    flow.put(out, [lay(a, 1, out.dim()) for a in met], None)
