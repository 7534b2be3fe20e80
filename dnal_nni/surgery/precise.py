"""Copies that compute in another dtype: in float64 where PyTorch is slow on a CPU, and without all weights in float64.

Its float64 convolutions unfold the input, 27 times as large for a 3-D kernel of three, and take the groups of a
depthwise convolution one after the other: here they are one product for every tap of the kernel. They also take the
samples one after the other, and read all weights for each: where an image has few positions, all are one product here.
Large weights are widened while they are used: nothing is allocated for them, which for a network as VGG-16 is most of
the work.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.running import twin

_LARGE = 2**16  # numbers in a weight that is widened as it is used
_AT_ONCE = 2**18  # of which a linear layer widens so many at a time
_COPIED = 2**19  # numbers of a volume that are copied at a time
_FEW = 25  # positions of an image for which one product of all samples takes half of the time and less

_ALL = slice(None)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in ``dtype``: its floating tensors are converted.

    In float64, the large weights of convolutions and linear layers stay as they are, share their memory with ``model``,
    and are widened whenever they are read.
    """
    kept = set()
    if dtype is torch.float64:
        weights = [layer.weight for layer in _layers(model)]
        kept = {w.data_ptr() for w in weights if w.numel() >= _LARGE and sum(n > 1 for n in w.shape) > 1}

    def converted(x: Tensor) -> Tensor:
        return x if x.data_ptr() in kept else x.to(dtype if x.is_floating_point() else x.dtype, copy=True)

    copy = twin(model, converted)
    copy._apply(lambda x: x if x.data_ptr() in kept or not x.is_floating_point() else x.to(dtype))
    if dtype is torch.float64:
        for layer in _layers(copy):
            slow = isinstance(layer, _CONVOLUTIONS) and not layer.weight.is_cuda
            slow = slow and (len(layer.kernel_size) == 3 or 1 < layer.groups == layer.in_channels)
            kind: Any = type(layer)
            layer.__class__ = _precise(kind, layer.weight.dtype is not dtype, slow)
    return copy


def _layers(model: nn.Module) -> list[Any]:
    """Convolutions and linear layers whose weight is a parameter of theirs, and not computed."""
    return [module for module in model.modules() if type(module) in _KINDS and "weight" in module._parameters]


@functools.cache
def _precise(kind: Any, widened: bool, taps: bool) -> Any:
    # under the name of torch's own: messages name the layer as its user knows it
    methods: dict[str, Any] = {"__module__": kind.__module__}
    if widened:
        methods["weight"] = property(lambda layer: layer._parameters["weight"].to(torch.float64))
        methods["__setattr__"] = _set
    if widened and kind is nn.Linear:
        methods["forward"] = _in_parts
    if taps:
        methods["_conv_forward"] = _by_taps
    elif widened and kind is nn.Conv2d:
        methods["_conv_forward"] = _in_one
    return type(kind.__name__, (kind,), methods) if widened or taps else kind


def _set(layer: Any, name: str, value: Any) -> None:
    if name == "weight":
        layer._parameters[name] = value  # torch would look whether there is one, and widen it
    else:
        nn.Module.__setattr__(layer, name, value)


def _in_parts(linear: Any, x: Tensor) -> Tensor:
    """A linear layer, some of its outputs at a time."""
    weight = linear._parameters["weight"]
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [F.linear(x, part.to(x.dtype)) for part in weight.split(rows)]
    out = torch.cat(parts, -1)
    return out if linear.bias is None else out.add_(linear.bias)


def _in_one(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``x [B, in, H, W]`` with ``weight``: of few positions, one product."""
    space = _space(conv, x, weight)
    if x.dim() < 4 or conv.groups > 1 or x.is_cuda or not 0 < math.prod(space) <= _FEW:
        return nn.Conv2d._conv_forward(conv, x, weight, bias)
    x = F.unfold(_padded(conv, x), weight.shape[2:], conv.dilation, 0, conv.stride)  # [B, in * taps, positions]
    out = F.linear(x.transpose(1, 2), weight.flatten(1), bias)
    return out.transpose(1, 2).reshape(len(x), len(weight), *space)


def _by_taps(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``x [B, in, *space]``, or ``[in, *space]``, with ``weight``."""
    if x.dim() < weight.dim():
        return _by_taps(conv, x[None], weight, bias)[0]
    space = _space(conv, x, weight)
    out = x.new_zeros(len(x), len(weight), *space)
    if len(space) == 3:
        for i in range(len(x)):
            _add_planes(conv, x[i : i + 1], weight, out[i : i + 1])
    else:
        _add_taps(conv, _padded(conv, x), weight, out)
    return out if bias is None else out.add_(bias.view(-1, *[1] * len(space)))


def _add_planes(conv: Any, x: Tensor, weight: Tensor, sums: Tensor) -> None:
    """:func:`_add_taps` of a volume, some planes at a time: it is padded and copied, and large."""
    planes = max(1, _COPIED // x[0, :, 0].numel())
    *sides, ahead, behind = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":  # the padding is what other planes hold
        x, sides, ahead = _padded(conv, x), [0] * 4, 0
    stride, span = conv.stride[0], conv.dilation[0] * (weight.shape[2] - 1) + 1
    for first in range(0, sums.shape[2], planes):
        part = torch.zeros_like(sums[:, :, first : first + planes], memory_format=torch.contiguous_format)
        start = first * stride - ahead
        end = start + (part.shape[2] - 1) * stride + span
        outside = max(0, -start), max(0, end - x.shape[2])
        seen = F.pad(x[:, :, max(0, start) : max(0, min(end, x.shape[2]))], (*sides, *outside))
        _add_taps(conv, seen, weight, part)
        sums[:, :, first : first + planes].copy_(part)


def _add_taps(conv: Any, x: Tensor, weight: Tensor, sums: Tensor) -> None:
    """Add the convolution of ``x``, padded, with ``weight`` to ``sums [B, out, *space]``."""
    batch, groups, space = len(x), conv.groups, sums.shape[2:]
    each = weight.view(groups, len(weight) // groups, *weight.shape[1:])  # [groups, out, in, *kernel], per group
    depthwise = each.shape[1:3] == (1, 1)
    copied = x.new_empty(0 if depthwise else (batch, x.shape[1], *space))  # or an allocator holds a copy a tap
    for tap in itertools.product(*map(range, weight.shape[2:])):
        starts = [i * d for i, d in zip(tap, conv.dilation)]
        places = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, space, conv.stride))
        seen = x[(_ALL, _ALL) + tuple(places)]
        factor = each[(_ALL, _ALL, _ALL) + tap]
        if depthwise:
            sums.addcmul_(seen, factor.view(-1, *[1] * len(space)))
        else:
            rows = copied.copy_(seen).view(batch * groups, factor.shape[2], -1)
            factor = factor.expand(batch, -1, -1, -1).reshape(batch * groups, *factor.shape[1:])
            sums.view(batch * groups, factor.shape[1], -1).baddbmm_(factor, rows)


def _space(conv: Any, x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The positions of what the convolution of ``x`` with ``weight`` gives, along each axis."""
    sides = conv._reversed_padding_repeated_twice[::-1]
    padded = [n + a + b for n, a, b in zip(x.shape[2:], sides[::2], sides[1::2])]
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, weight.shape[2:])]
    return tuple((n - span) // s + 1 for n, span, s in zip(padded, spans, conv.stride))


def _padded(conv: Any, x: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    sides = conv._reversed_padding_repeated_twice
    return F.pad(x, sides, mode) if any(sides) else x


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = {*_CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear}
