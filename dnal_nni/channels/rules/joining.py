"""Operations that take a tensor apart, or put tensors side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import Flow, Labels, Operation, axes_of, compress
from ..graph import Site
from ..parts import Parts
from .moving import move
from .registry import rule


@rule("split", "split_with_sizes", "chunk", "unsafe_split")
def split(flow: Flow, op: Operation) -> None:
    """Parts of one given size stay equal: a forward unpacks a fixed number of them."""
    move(flow, op)
    labels = op.labels[0]
    axis = op.argument("dim", 0)
    size = op.argument("split_size") or op.argument("split_sizes")
    if labels is None:
        return
    axis = axis % len(labels.shape)
    for array in labels.arrays:
        total = array.shape[axis]
        if total == 1:
            continue
        flow.note_sizes([total], array, labels.shape)
        if isinstance(size, int) and size < total and total % size == 0:
            parts = array.movedim(axis, 0).unflatten(0, (total // size, size))
            flow.graph.require_rectangle(parts, range(1, parts.dim()))  # or whole slices along other axes
        elif not isinstance(size, int):
            flow.parts.append(Parts(flow.frame()[0], array, axis, tuple(size), split=True))
            for i, part in enumerate(array.split(size, axis)):
                flow.sizes.listed(tuple(size), i, part, axis)


@rule("unbind", "select")
def unbind(flow: Flow, op: Operation) -> None:
    """The parts are counted by the forward: none of them can go, but the same slice of all of them can."""
    labels = op.labels[0]
    axis = op.argument("dim", 0)
    if labels is None:
        return
    arrays = flow.mix(labels, [axis], f"{op.name} takes single channels")
    outs = op.out if isinstance(op.out, (list, tuple)) else [op.out]
    for out in outs:
        flow.put(out, [array.select(axis, 0) for array in arrays], labels.site)


@rule("glu")
def glu(flow: Flow, op: Operation) -> None:
    """The two halves of the channels meet."""
    labels = op.labels[0]
    if labels is None:
        return
    axis = op.argument("dim", -1) % len(labels.shape)
    arrays = []
    for array in labels.arrays:
        if array.shape[axis] > 1:
            first, second = array.chunk(2, axis)
            flow.couple(first, second, "the halves of glu")
            array = first
        arrays.append(array)
    flow.put(op.out, arrays, labels.site)


@rule("cat")
def concat(flow: Flow, op: Operation) -> None:
    """Channels side by side."""
    _side_by_side(flow, op, list(op.args[0]), op.argument("dim", 0), lambda array: array)


@rule("stack")
def stack(flow: Flow, op: Operation) -> None:
    """Concat along a new axis."""
    axis = op.argument("dim", 0) % (op.out.dim())
    _side_by_side(flow, op, list(op.args[0]), axis, lambda array: array.unsqueeze(axis))


def _side_by_side(
    flow: Flow, op: Operation, tensors: list[Tensor], axis: int, form: Callable[[Tensor], Tensor]
) -> None:
    axis = axis % op.out.dim()
    kinds = [[axes_of(array) for array in labels.arrays] for labels in op.labels if labels is not None]
    pieces: list[tuple[torch.Size, Tensor | None, Site]] = []  # shape as put side by side, labels there, site
    for tensor, labels in zip(tensors, op.labels):
        if tensor.numel() == 0 and (tensor.dim() == 1 or tensor.shape[axis] == 0):
            continue  # the empty start of a list that a forward concatenates to, or a slice of no length
        if labels is not None and len(labels.arrays) > 1:
            labels = _of_one_kind(flow, op, labels, kinds, axis)
        shape = form(torch.empty(labels.shape if labels else tensor.shape, device="meta")).shape
        array = form(labels.arrays[0]) if labels else flow.asked_for(tensor, axis) if op.name == "cat" else None
        pieces.append((shape, array, labels.site if labels else None))
    shown = [array for _, array, _ in pieces if array is not None]
    if not shown:
        return
    sites = [site for _, array, site in pieces if array is not None]
    site = None if any(s is None for s in sites) else frozenset().union(*(s for s in sites if s is not None))
    if not any(axis in axes_of(array) for array in shown):
        # tokens beside tokens: their channels meet
        operands = [
            ((*shape[:axis], 1, *shape[axis + 1 :]), (array,) if array is not None else ())
            for shape, array, _ in pieces
        ]
        flow.put(op.out, flow.meet(operands, f"{op.name} beside a tensor whose channels are fixed"), site)
        return
    varying = {a for array in shown for a in axes_of(array)} | {axis}
    lined_up = []
    for shape, array, _ in pieces:
        wanted = [n if i in varying else 1 for i, n in enumerate(shape)]
        lined_up.append(torch.full(wanted, -1) if array is None else array.expand(wanted))
    flow.put(op.out, [compress(torch.cat(lined_up, axis))], site)


def _of_one_kind(
    flow: Flow, op: Operation, labels: Labels, kinds: list[list[tuple[int, ...]]], axis: int
) -> Labels | None:
    """Of a tensor that has channels along several axes, those that all the tensors have (``kinds``: along which axes).

    The others stay, as the number of learned tokens does, which go beside the tokens of an image.
    """
    common = set(kinds[0]).intersection(*kinds[1:])
    kept = [array for array in labels.arrays if axes_of(array) in common]
    if len(kept) > 1:
        kept = [array for array in kept if axes_of(array) != (axis,)]
    if len(kept) != 1:
        kept = []
    for array in labels.arrays:
        if not any(array is other for other in kept):
            flow.graph.freeze(array, flow.why(f"{op.name} of a tensor with several kinds of channels"))
    return dataclasses.replace(labels, arrays=tuple(kept)) if kept else None


@rule("constant_pad_nd")
def pad(flow: Flow, op: Operation) -> None:
    """Padding positions are fixed, and zero only if that is the value."""
    labels = op.labels[0]
    if labels is not None:
        widths, value = op.args[1], op.argument("value", 0.0)
        padded = {len(labels.shape) - 1 - i // 2 for i, width in enumerate(widths) if width}
        # along a spatial axis the padding is no channel: it has no label of its own
        arrays = [
            compress(op.func(array.expand(labels.shape), widths, -1)) if padded & set(axes_of(array)) else array
            for array in labels.arrays
        ]
        flow.put(op.out, arrays, labels.site if value == 0 else None)
