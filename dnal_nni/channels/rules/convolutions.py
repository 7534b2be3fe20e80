"""Convolutions that are no layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..flow import Arrays, Flow, Labels, Operation, axes_of, lay
from .registry import rule

_CHANNELS = (("input", 1), ("weight", 0), ("bias", 0))  # of which the groups are samples, where these are


@rule("convolution", "_convolution")
def convolution(flow: Flow, op: Operation) -> None:
    """A convolution that is no layer: its kernel may be one for each channel, or a bare parameter."""
    x, weight, bias = (flow.of(op.argument(name)) for name in ("input", "weight", "bias"))
    kernel, offset = op.argument("weight"), op.argument("bias")
    groups, channels = op.argument("groups", 1), op.argument("input").shape[1]
    reads, makes = (0, 1) if op.argument("transposed", False) else (1, 0)
    if groups == channels == kernel.shape[0] and kernel.shape[1] == 1:
        if x is None:
            for labels in (weight, bias):
                flow.freeze(labels, "a convolution with fixed channels")
            return
        lines = flow.mix(x, [0, *range(2, len(x.shape))], "a convolution runs over the channels")
        kernels = flow.mix(weight, range(1, kernel.dim()), "a convolution runs over its kernel")
        same = not kernels and bool((kernel == kernel[:1]).all())  # as many as the forward asks for
        columns: list[tuple[Sequence[int], Arrays]] = [
            ((channels,), tuple(a.reshape(-1) for a in lines)),
            ((1 if same else channels,), tuple(a.reshape(-1) for a in kernels)),
        ]
        if offset is not None:
            columns.append((offset.shape, bias.arrays if bias else ()))
        met = flow.meet(columns, "a convolution with a fixed kernel")
        for array in met:
            flow.note_sizes([groups], array, (groups,))
        flow.put(op.out, [lay(array, 1, op.out.dim()) for array in met], x.site if offset is None else None)
        return
    entering = [(labels, axis) for name, axis in _CHANNELS if (labels := flow.of(op.argument(name))) is not None]
    if reads == 1 and all(_once(labels, axis, groups) is not None for labels, axis in entering):
        _layer(flow, op, 1, reads, makes, samples=groups)
    else:
        _layer(flow, op, groups, reads, makes)


@rule("torchvision::deform_conv2d")
def deformable(flow: Flow, op: Operation) -> None:
    """A deformable convolution that is no layer; how many offsets and masks it takes is up to its kernel."""
    for name in ("offset", "mask"):
        flow.freeze(flow.of(op.argument(name)), f"{op.name} takes these channels as offsets")
    _layer(flow, op, op.argument("groups"), 1, 0)


def _once(labels: Labels | None, axis: int, times: int) -> Labels | None:
    """Labels of one sample, of a tensor that has the channels of several along ``axis``; None if these differ."""
    if labels is None or times == 1:
        return labels
    arrays = []
    for array in labels.arrays:
        if axis in axes_of(array):
            parts = array.unflatten(axis, (times, -1))
            array = parts.select(axis, 0)
            if not bool((parts == array.unsqueeze(axis)).all()):
                return None
        arrays.append(array)
    return dataclasses.replace(labels, arrays=tuple(arrays))


def _layer(flow: Flow, op: Operation, groups: int, reads: int, makes: int, samples: int = 1) -> None:
    """A convolution with a bare parameter; ``reads`` and ``makes``: the dimensions of its kernel.

    Several ``samples``, each with a kernel of its own, may lie side by side; ``groups`` are those of one of them.
    """
    x, weight, bias = (_once(flow.of(op.argument(name)), axis, samples) for name, axis in _CHANNELS)
    kernel, offset = op.argument("weight"), op.argument("bias")
    sides = [next((a for a in weight.arrays if axes_of(a) == (d,)), None) if weight else None for d in (reads, makes)]
    reader, source = (flow.parameter(a) if a is not None else None for a in sides)
    alone = kernel.shape[makes] == samples  # a single channel, which stays
    if groups > 1 or source is None and not alone or reader is None and x is not None:
        for labels in (x, weight, bias):
            flow.freeze(labels, "a convolution that is no layer")
        return
    for array in weight.arrays if weight else ():
        if not any(array is side for side in sides):
            flow.graph.freeze(array, flow.why("a convolution runs over its kernel"))
    arrived = [a for a in x.arrays if axes_of(a) == (1,)] if x is not None else []
    for array in x.arrays if x is not None and len(arrived) == 1 else ():
        if array is not arrived[0]:
            flow.graph.freeze(array, flow.why("a convolution runs over these channels as over positions"))
    if reader is not None and len(arrived) == 1 and x is not None:
        flow.couple(reader.ids, arrived[0].reshape(-1), "channels beside fixed ones")
        flow.graph.read_by(reader, x.site)
    else:
        flow.freeze(x, "a convolution runs over the channels")
        if reader is not None:
            flow.graph.freeze(reader.ids, flow.why("a convolution reads fixed channels"))
    if source is None:
        return
    flow.graph.producers.add(source.key)
    if offset is not None:
        made = [((source.size,), (source.ids,)), ((source.size,), bias.arrays if bias else ())]
        flow.meet(made, "a convolution with a fixed bias")
    flow.put(op.out, [lay(source.ids.repeat(samples), 1, op.out.dim())], None)
