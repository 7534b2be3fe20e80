"""Sums of products: matrix products, fused attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...modules.running import flatten_tensors
from ..flow import Arrays, Flow, Labels, Operation, axes_of
from ..graph import on_norms
from .registry import rule


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul(flow: Flow, op: Operation) -> None:
    """Matrix products. What is summed over goes where it is zeroed, channel by channel, or stands and falls as a whole.

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
                flow.couple(reader.ids, x.reshape(-1), what)
                flow.graph.read_by(reader, la.site if la else None)
            else:
                flow.graph.freeze(x, flow.why(what))
        if not along_a:
            flow.graph.freeze(reader.ids, flow.why(what))
    elif not _added_up(flow, (la, along_a, summed_a), (lb, along_b, summed_b), what):
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
        operands.append((bias.shape, lbias.arrays) if lbias else (flow.adjustable(bias), ()))
    met = flow.meet(operands, what)
    sites = [x.site for x, others in ((la, others_a), (lb, others_b)) if x is not None and others]
    zeroed = bias is None and None not in sites  # rows of zeros, and columns
    flow.put(op.out, met, frozenset().union(*(site for site in sites if site is not None)) if zeroed else None)


Factor = tuple[Labels | None, list[Tensor], int]  # its labels, those that vary along the axis, and that axis


def _added_up(flow: Flow, a: Factor, b: Factor, what: str) -> bool:
    """Whether the products of two factors' channels are added up: query times key. Those of one number go together."""
    (la, along_a, axis_a), (lb, along_b, axis_b) = a, b
    if la is None or lb is None or not along_a or not along_b:
        return False
    site = next((site for site in sorted((la.site, lb.site), key=on_norms, reverse=True) if site is not None), None)
    lines = [
        x.reshape(-1) for along, axis in ((along_a, axis_a), (along_b, axis_b)) for x in along if axes_of(x) == (axis,)
    ]
    if site is None or len(lines) < len(along_a) + len(along_b):
        return False
    for line in lines[1:]:
        flow.couple(lines[0], line, what)
    flow.graph.add_up(lines[0], site)
    return True


def _for_every_head(labels: Labels | None, query: Tensor) -> Labels | None:
    """Labels of keys or values beside those of the queries, of which several may share a head (``enable_gqa``)."""
    if labels is None or query.dim() < 3 or labels.shape[-3] in (1, query.shape[-3]):
        return labels
    times, axis = query.shape[-3] // labels.shape[-3], len(labels.shape) - 3
    arrays = tuple(a.repeat_interleave(times, axis) if axis in axes_of(a) else a for a in labels.arrays)
    return Labels(torch.Size((*labels.shape[:-3], query.shape[-3], *labels.shape[-2:])), arrays, labels.site)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def attention(flow: Flow, op: Operation) -> None:
    """Fused attention: query and key are summed over their last axis, heads meet heads."""
    q, k, v = (_for_every_head(flow.of(t), op.args[0]) for t in op.args[:3])
    mask = op.argument("attn_mask", op.argument("attn_bias"))
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
            shape = labels.shape if labels else tensor.shape
            operands.append(((*shape[:-2], 1, 1), flow.mix(labels, summed, what)))
    shape = v.shape if v else op.args[2].shape
    operands.append(((*shape[:-2], 1, shape[-1]), v.arrays if v else ()))
    out, *sums = flatten_tensors(op.out)
    met = flow.meet(operands, what)
    flow.put(out, met, None)
    for tensor in sums:  # of a row's exponentials
        if tensor.dim() == out.dim() - 1:
            flow.put(tensor, [a[..., 0] for a in met if out.dim() - 1 not in axes_of(a)], None)
