"""Convolutions in float64 where PyTorch has only slow ones on a CPU: one product for every tap of the kernel.

Its own way unfolds the input, 27 times as large for a 3-D kernel of three, and takes the groups of a depthwise
convolution one after the other.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ALL = slice(None)


def speed_up_convolutions(model: nn.Module) -> None:
    """Let the float64 convolutions of ``model`` that would be slow run tap by tap, in place; copies of it do so too."""
    convolutions: list[Any] = [module for module in model.modules() if type(module) in _TAPS]
    for conv in convolutions:
        slow = len(conv.kernel_size) == 3 or 1 < conv.groups == conv.in_channels
        if slow and conv.weight.dtype is torch.float64 and not conv.weight.is_cuda:
            conv.__class__ = _TAPS[type(conv)]


def _by_taps(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``x [B, in, *space]``, or ``[in, *space]``, with ``weight``."""
    if x.dim() < weight.dim():
        return _by_taps(conv, x[None], weight, bias)[0]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, weight.shape[2:])]
    space = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, conv.stride)]
    batch, groups = len(x), conv.groups
    out = x.new_zeros(batch, len(weight), *space)
    each = weight.view(groups, len(weight) // groups, *weight.shape[1:])  # [groups, out, in, *kernel], per group
    for tap in itertools.product(*map(range, weight.shape[2:])):
        starts = [i * d for i, d in zip(tap, conv.dilation)]
        places = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, space, conv.stride))
        seen = x[(_ALL, _ALL) + tuple(places)]
        factor = each[(_ALL, _ALL, _ALL) + tap]
        if factor.shape[1:] == (1, 1):
            out.addcmul_(seen, factor.view(-1, *[1] * len(space)))
        else:
            seen = seen.reshape(batch * groups, factor.shape[2], -1)
            factor = factor.expand(batch, -1, -1, -1).reshape(batch * groups, *factor.shape[1:])
            out.view(batch * groups, factor.shape[1], -1).baddbmm_(factor, seen)
    return out if bias is None else out.add_(bias.view(-1, *[1] * len(space)))


def _with_taps(kind: type[nn.Module]) -> type[nn.Module]:
    # under the name of torch's own: messages name the layer as its user knows it
    return type(kind.__name__, (kind,), {"_conv_forward": _by_taps, "__module__": kind.__module__})


_TAPS: dict[type[nn.Module], Any] = {kind: _with_taps(kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
