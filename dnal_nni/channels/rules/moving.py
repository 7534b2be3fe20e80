"""Operations that only move elements: they are run on the labels themselves."""

from __future__ import annotations

from torch import Tensor

from ..flow import Flow, Operation, axes_of, compress, reshaped
from ..parts import Parts
from .registry import rule


@rule("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "flip", "rot90", "repeat", "repeat_interleave")
@rule("pixel_shuffle", "pixel_unshuffle", "diagonal", "unfold")
def move(flow: Flow, op: Operation) -> None:
    """Elements change places only: the operation is run on the labels."""
    labels = op.labels[0]
    if labels is None:  # only an index is labelled
        for other in op.labels:
            flow.freeze(other, f"{op.name} indexes with channels")
        return
    outs = op.out if isinstance(op.out, (list, tuple)) else [op.out]
    kept: list[list[Tensor]] = [[] for _ in outs]
    further = [a.cpu() if isinstance(a, Tensor) else a for a in op.args[1:]]  # labels stay on the CPU
    for array in labels.arrays:
        moved = op.func(array.expand(labels.shape), *further, **op.kwargs)
        for i, piece in enumerate(moved if isinstance(moved, (list, tuple)) else [moved]):
            kept[i].append(compress(piece))
        flow.note_sizes(op.numbers, array, labels.shape)
    for out, arrays in zip(outs, kept):
        for array in arrays:
            flow.note_sizes(op.numbers, array, out.shape)
        flow.put(out, arrays, labels.site)


@rule("slice")
def strided(flow: Flow, op: Operation) -> None:
    """A slice; of one that takes every n-th channel, whole rows of n channels can go, or slices along other axes."""
    move(flow, op)
    labels, step = op.labels[0], op.argument("step", 1)
    if labels is None:
        return
    axis = op.argument("dim", 0) % len(labels.shape)
    for array in labels.arrays:
        if axis not in axes_of(array):
            continue
        if step == 1:
            _between(flow, array, axis, op.argument("start"), op.argument("end"))
        elif array.shape[axis] % step:
            flow.graph.freeze(array, flow.why(f"one of {step} channels is taken"))
        else:
            rows = array.movedim(axis, 0).unflatten(0, (-1, step))
            flow.graph.require_rectangle(rows, (0, *range(2, rows.dim())))


def _between(flow: Flow, array: Tensor, axis: int, start: int | None, end: int | None) -> None:
    """The channels ahead of a slice's ends are counted by the numbers that were given; from behind, those behind."""
    total = array.shape[axis]
    first, last = slice(start, end).indices(total)[:2]
    for place, given in ((first, start), (last, end)):
        if given is not None and 0 < place < total:
            counted = array.narrow(axis, 0, place) if given > 0 else array.narrow(axis, place, total - place)
            flow.sizes.counts(counted.shape[axis], counted, axis)
    sizes = tuple(n for n in (first, last - first, total - last) if n > 0)
    if len(sizes) > 1 and first < last:
        flow.parts.append(Parts(flow.frame()[0], array, axis, sizes, split=False))


@rule("channel_shuffle", "native_channel_shuffle")
def shuffle(flow: Flow, op: Operation) -> None:
    """Channel shuffle: the same slice of all parts can go."""
    labels = op.labels[0]
    for array in labels.arrays if labels else ():
        if 1 in axes_of(array):
            flow.graph.require_rectangle(array.movedim(1, 0).reshape(op.argument("groups"), -1), 1)
    move(flow, op)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def reshape(flow: Flow, op: Operation) -> None:
    """Where an axis is split, only whole slices along one of its parts can go."""
    labels = op.labels[0]
    if labels is None:
        return
    arrays = []
    for array in labels.arrays:
        new = reshaped(array, labels.shape, op.out.shape)
        arrays.append(new)
        if len(axes_of(new)) > 1:
            flow.graph.require_rectangle(new)
        flow.sizes.shaped(new, op.out.shape, op.args[1], labels.arrays, labels.shape)
    flow.put(op.out, arrays, labels.site)


@rule("as_strided")
def as_strided(flow: Flow, op: Operation) -> None:
    """torch changes the memory format of some results in place; any other use is not followed."""
    labels = op.labels[0]
    if labels is not None and tuple(op.args[1]) == tuple(labels.shape):
        flow.put(op.out, labels.arrays, labels.site)
    else:
        flow.freeze(labels, "as_strided")


@rule("view_as_real")
def view_as_real(flow: Flow, op: Operation) -> None:
    """A new last axis for real and imaginary parts."""
    if labels := op.labels[0]:
        flow.put(op.out, [array.unsqueeze(-1) for array in labels.arrays], labels.site)


@rule("view_as_complex")
def view_as_complex(flow: Flow, op: Operation) -> None:
    """The last axis becomes real and imaginary parts of one number."""
    if labels := op.labels[0]:
        arrays = flow.mix(labels, [-1], "two channels become one complex number")
        flow.put(op.out, [array[..., 0] for array in arrays], labels.site)
