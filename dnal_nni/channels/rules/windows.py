"""Operations on the last axes, channel by channel: pooling, resizing, padding with values of their own, regions."""

from __future__ import annotations

import math

from ...modules.running import flatten_tensors
from ..flow import Flow, Operation
from .registry import Rule, rule


def windowed(spatial: int) -> Rule:
    """A rule for pooling and resizing over the last ``spatial`` axes."""

    def windows(flow: Flow, op: Operation) -> None:
        labels = op.labels[0]
        for other in op.labels[1:]:
            flow.freeze(other, f"{op.name} of two tensors")
        if labels is not None:
            axes = range(len(labels.shape) - spatial, len(labels.shape))
            arrays = flow.mix(labels, list(axes), f"{op.name} runs over the channels")
            for out in flatten_tensors(op.out):
                flow.put(out, arrays, labels.site if out.is_floating_point() else None)  # not indices

    return windows


for _n in (1, 2, 3):
    rule(
        *(f"{kind}_pool{_n}d" for kind in ("avg", "_adaptive_avg", "adaptive_avg", "max", "adaptive_max")),
        *(f"{kind}{_n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact")),
    )(windowed(_n))
rule("upsample_linear1d")(windowed(1))
rule("max_pool2d_with_indices", "upsample_bilinear2d", "upsample_bicubic2d", "grid_sampler_2d")(windowed(2))
rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "fractional_max_pool2d", "tril", "triu")(windowed(2))
rule("max_pool3d_with_indices", "upsample_trilinear3d", "fractional_max_pool3d", "grid_sampler_3d")(windowed(3))


@rule("max_unpool2d", "max_unpool3d")
def unpool(flow: Flow, op: Operation) -> None:
    """The values go where the maxima were; each channel has places of its own."""
    spatial = range(-len(op.argument("output_size")), 0)
    operands = []
    for tensor, labels in zip(op.args, op.labels):
        shape = labels.shape if labels else flow.adjustable(tensor)
        operands.append((shape, flow.mix(labels, spatial, f"{op.name} runs over the channels")))
    arrays = flow.meet(operands, f"{op.name} puts channels at fixed places")
    flow.put(op.out, arrays, op.labels[0].site if op.labels[0] else None)


@rule("im2col")
def unfold(flow: Flow, op: Operation) -> None:
    """``[*, C, H, W]`` becomes ``[*, C * places of the kernel, positions]``."""
    labels = op.labels[0]
    if labels is not None:
        arrays = flow.mix(labels, [-1, -2], f"{op.name} runs over the channels")
        places = math.prod(op.argument("kernel_size"))
        arrays = tuple(a[..., 0].repeat_interleave(places if a.shape[-3] > 1 else 1, -2) for a in arrays)
        flow.put(op.out, arrays, labels.site)


@rule("col2im")
def fold(flow: Flow, op: Operation) -> None:
    """The inverse, which sums: the places of a channel stand and fall together."""
    labels = op.labels[0]
    if labels is not None:
        arrays = []
        for array in flow.mix(labels, [-1], f"{op.name} runs over the channels"):
            if array.shape[-2] > 1:
                array = array.unflatten(-2, (-1, math.prod(op.argument("kernel_size"))))
                flow.couple(array[..., :1, :], array, f"{op.name} sums over fixed channels")
                array = array[..., :1, :]
            else:
                array = array.unsqueeze(-1)
            arrays.append(array)
        flow.put(op.out, arrays, labels.site)


@rule(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
def mirror_pad(flow: Flow, op: Operation) -> None:
    """Reflection and replication padding of spatial axes."""
    windowed(len(op.args[1]) // 2)(flow, op)


@rule("torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align")
def roi(flow: Flow, op: Operation) -> None:
    """Regions cut out of a feature map: axis 1 stays, the regions themselves are not channels."""
    labels = flow.of(op.args[0])
    for other in op.labels[1:]:
        flow.freeze(other, f"{op.name} with channels as regions")
    if labels is not None:
        arrays = flow.mix(labels, [0, 2, 3], f"{op.name} runs over the channels")
        flow.put(op.out, arrays, labels.site)
