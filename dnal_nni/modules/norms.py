"""Layer and RMS norms under other names: modules that compute one, whatever their code calls it.

ConvNeXt as its authors publish it has a ``LayerNorm`` of its own, transformers an RMS norm for every family. What such
a module computes is found out by running it; gated and cut, it runs as the norm that it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gates import ChannelFactor
from .layers import PixelNorm, RMSNorm
from .running import FORWARD_ERRORS

_EPS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3)  # that a forward may have in its code
_OF_ANY = vars(nn.Module()).keys()
_TOLERANCE = 2e-6  # some compute in float32; of outputs of size 1, and inputs so small that 1e-6 and 1e-5 differ


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the dimension ``axis``, of as many channels as it has weights."""

    axis: int

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalised along ``axis``; same shape and dtype."""
        y = x.movedim(self.axis, -1)
        if y.shape[-1] == len(self.weight):
            y = F.layer_norm(y, self.weight.shape, self.weight, self.bias, self.eps)
            return _placed(self, x, y)
        y = F.layer_norm(y, y.shape[-1:], None, None, self.eps) * self.weight  # what is written by hand broadcasts
        return _placed(self, x, y if self.bias is None else y + self.bias)


class ChannelRMSNorm(RMSNorm if RMSNorm else nn.Module):  # type: ignore[misc]
    """An RMS norm over the dimension ``axis``, of as many channels as it has weights."""

    axis: int

    def forward(self, x: Tensor) -> Tensor:
        """``x`` divided by its root mean square along ``axis``, in float32 or more; same shape and dtype."""
        y = x.movedim(self.axis, -1)
        wide = y if y.dtype == torch.float64 else y.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return _placed(self, x, self.weight * wide.to(x.dtype))


def _placed(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    """The output of a norm of ``x``, from ``y`` with its channels last."""
    y = y.movedim(-1, norm.axis)
    # as the norm written by hand gives it: what comes next may ask for a view
    return _followed(norm, y.contiguous() if x.is_contiguous() else y)


def _followed(norm: nn.Module, y: Tensor) -> Tensor:
    """What the activation makes of it that a norm may hold (timm's ``RmsNormAct2d``)."""
    for child in norm.children():
        if not isinstance(child, ChannelFactor):
            y = child(y)
    return y


def _only_follow(children: Sequence[nn.Module]) -> bool:
    """Whether these have no parameters, and are no dropout, which is another function in train mode."""
    tensors = (t for child in children for t in (*child.parameters(), *child.buffers()))
    chance = (nn.modules.dropout._DropoutNd, nn.RReLU)
    return next(tensors, None) is None and not any(isinstance(m, chance) for child in children for m in child.modules())


def recognise(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The norm that a module computes, and what it needs beside its parameters; None where it is none.

    Asked of modules of other classes than torch's that have a weight ``[C]``, perhaps a bias ``[C]``, and nothing else
    but an activation that follows; and of those that have nothing but numbers.
    """
    tensors = {**module._parameters, **module._buffers}
    if not tensors and not module._modules:
        return _pixel_norm(module)
    weight = tensors.get("weight")
    if (
        type(module).__module__.startswith("torch.")
        or weight is None
        or weight.dim() != 1
        or len(weight) < 3
        or weight.is_meta
        or not tensors.keys() <= {"weight", "bias"}
        or any(t is not None and t.shape != weight.shape for t in tensors.values())
        or not _only_follow(list(module.children()))
    ):
        return None
    channels = len(weight)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(channels, generator=generator, dtype=torch.float64).to(t.device)
        for name, t in tensors.items()
        if t is not None
    }
    for axis, shape in ((-1, (2, 1, 2, channels)), (1, (2, channels, 1, 2))):
        x = 1e-2 * (torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(weight.device)
        try:
            found = _matches(module, x, axis, values)
        except FORWARD_ERRORS:
            continue
        if found is not None:
            kind, eps = found
            missing = {"bias": None} if kind is ChannelNorm and "bias" not in tensors else {}
            return kind, {"axis": axis, "eps": eps, "normalized_shape": (channels,), **missing}
    return None


def _pixel_norm(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """:func:`recognise` for a module without tensors."""
    own = [value for name, value in vars(module).items() if name not in _OF_ANY]
    if type(module).__module__.startswith("torch.") or not all(isinstance(v, (int, float, str)) for v in own):
        return None
    for axis in (1, -1):
        x = 1e-2 * (torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                got = _Bare(copy.copy(module))(x.clone())  # what its forward counts is not ours
        except FORWARD_ERRORS:
            continue
        for eps in dict.fromkeys((*(v for v in own if isinstance(v, float) and 0 < v < 0.1), *_EPS)):
            expected = x * (x.square().mean(axis, keepdim=True) + eps).rsqrt()
            if isinstance(got, Tensor) and got.shape == x.shape and bool(((got - expected).abs() <= _TOLERANCE).all()):
                return PixelNorm, {"axis": axis, "eps": eps}
    return None


def _matches(
    module: nn.Module, x: Tensor, axis: int, values: dict[str, Tensor]
) -> tuple[type[nn.Module], float] | None:
    with torch.no_grad():
        got = torch.func.functional_call(_Bare(module), {f"module.{name}": v for name, v in values.items()}, (x,))
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    y, weight, bias = x.movedim(axis, -1), values["weight"], values.get("bias")
    for eps in dict.fromkeys((*(v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1), *_EPS)):
        layer = F.layer_norm(y, weight.shape, weight, bias, eps)
        square = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        for kind, expected in ((ChannelNorm, layer), (ChannelRMSNorm, square)):
            if kind is ChannelRMSNorm and (bias is not None or not RMSNorm):
                continue
            if bool(((got - _followed(module, expected.movedim(-1, axis))).abs() <= _TOLERANCE).all()):
                return kind, eps
    return None


class _Bare(nn.Module):
    """A module's forward without its hooks, with other parameters (by functional_call)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)
