"""Steps that are layers of rarer kinds: tables, recurrent layers that read a map, deformable convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from hypothesis import strategies as st
from torch import Tensor, nn

from .layers import SOME, WIDTHS
from .modules import Fn
from .program import CONV, Made, Value, ingredient


class Positions(nn.Module):
    """Adds a learned vector to every position (ViT, Whisper): ``[B, L, C]`` or ``[B, C, ...]``."""

    def __init__(self, channels: int, positions: int, last: bool) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(positions, channels), last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return x + self.table(torch.arange(x.shape[1]))
        added = self.table(torch.arange(math.prod(x.shape[2:])) % self.table.num_embeddings)
        return x + added.t().unflatten(1, x.shape[2:])


@ingredient()
def positions(x: Value) -> Made:
    if x.kind == "vector":
        return None
    length = x.tensor.shape[1] if x.kind == "tokens" else math.prod(x.space)
    return Positions(x.channels, length, x.kind == "tokens") if length <= 64 else None


class Read(nn.Module):
    """A recurrent layer over the last axis of a map, as in a CRNN: ``[B, C, ...] -> [B, L, H]``."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        while x.dim() > 3:
            x = x.mean(2)
        return self.layer(x.transpose(1, 2))[0]


@ingredient(form=st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)), width=WIDTHS, both=SOME)
def read(x: Value, *, form: type[nn.RNNBase] = nn.LSTM, width: int = 4, both: bool = False) -> Made:
    if not x.dims:
        return None
    return Read(form(x.channels, width, num_layers=1 + both, bidirectional=both, batch_first=True)), "tokens"


class Deformable(nn.Module):
    def __init__(self, channels: int, width: int, function: bool) -> None:
        super().__init__()
        self.offset, self.function = nn.Conv2d(channels, 18, 3, padding=1), function
        self.conv = (nn.Conv2d if function else torchvision.ops.DeformConv2d)(channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        offset = 0.1 * self.offset(x)
        if self.function:
            return torchvision.ops.deform_conv2d(x, offset, self.conv.weight, self.conv.bias, padding=1)
        return self.conv(x, offset)


@ingredient(width=WIDTHS, function=SOME)
def deformable(x: Value, *, width: int = 8, function: bool = False) -> Made:
    return Deformable(x.channels, width, function) if x.dims == 2 else None


class Context(nn.Module):
    """GCNet's context, with a layer norm of shape ``[C, 1, 1]``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(channels, width, 1), nn.LayerNorm([width, 1, 1])
        self.expand = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(F.relu(self.norm(self.reduce(x.mean((2, 3), keepdim=True)))))


@ingredient(width=WIDTHS)
def context(x: Value, *, width: int = 8) -> Made:
    return Context(x.channels, width) if x.dims == 2 else None


class Positioned(nn.Module):
    """gMLP: a convolution of kernel one over the positions of tokens."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.norm, self.spatial = nn.LayerNorm(channels), nn.Conv1d(length, length, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.spatial(self.norm(x)))


@ingredient()
def positioned(x: Value) -> Made:
    return Positioned(x.channels, x.tensor.shape[1]) if x.kind == "tokens" else None


class TwoNames(nn.Module):
    """One convolution under two names (nnU-Net), and once more in a container."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1)
        self.stages = nn.Sequential(self.conv, nn.ReLU(), self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


@ingredient()
def two_names(x: Value) -> Made:
    return TwoNames(x.channels, x.dims) if x.dims else None


class OwnNorm(nn.Module):
    """A layer norm over channels, written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        line = [-1, *[1] * (x.dim() - 2)]
        return self.weight.view(line) * x + self.bias.view(line)


@ingredient()
def own_norm(x: Value) -> Made:
    return OwnNorm(x.channels) if x.dims == 2 else None


ADDED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "squares": lambda x, dim: x * torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-2),
    "normalize": lambda x, dim: F.normalize(x, dim=dim, eps=1e-2),
    "norm": lambda x, dim: x / (1 + x.norm(dim=dim, keepdim=True)),
    "affine": lambda x, dim: 1 + 2 * F.normalize(x, dim=dim, eps=1e-2),
    "product": lambda x, dim: x * torch.sigmoid((x * x.relu()).sum(dim, keepdim=True)),
    "cosine": lambda x, dim: x * F.cosine_similarity(x, x.relu() + 0.1 * x, dim, eps=1e-2).unsqueeze(dim),
    "counted": lambda x, dim: x / (1 + x.abs().sum(dim, keepdim=True) / x.shape[dim]),
}


@ingredient(often=2, how=st.sampled_from(tuple(ADDED)))
def added_up(x: Value, *, how: str = "squares") -> Made:
    """Sums over channels to which those that are 0 add nothing; and one that counts them."""
    dim = x.dim
    return Fn(lambda x: ADDED[how](x, dim))


class Similar(nn.Module):
    """Places are mixed by the products of their channels: queries times keys, one head."""

    def __init__(self, channels: int, width: int, last: bool, norm: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(channels, width), nn.Linear(channels, width)
        self.last, self.norm = last, norm

    def forward(self, x: Tensor) -> Tensor:
        tokens = x if self.last else x.flatten(2).transpose(1, 2)
        q, k = self.q(tokens), self.k(tokens)
        if self.norm:
            q, k = F.normalize(q, dim=-1, eps=1e-2), F.normalize(k, dim=-1, eps=1e-2)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ tokens
        return y if self.last else y.transpose(1, 2).unflatten(2, x.shape[2:])


@ingredient(width=WIDTHS, norm=SOME)
def similar(x: Value, *, width: int = 8, norm: bool = False) -> Made:
    if x.kind == "vector" or (x.kind == "map" and math.prod(x.space) > 64):
        return None
    return Similar(x.channels, width, x.kind == "tokens", norm)


@ingredient(how=st.sampled_from(("mean", "entropy", "attention")))
def unused(x: Value, *, how: str = "mean") -> Made:
    """A mix of channels that nobody uses; the averaged weights of attention, for one."""
    dim = x.dim
    if how == "attention":
        return Averaging(x.channels) if x.kind == "tokens" and x.channels % 2 == 0 else None

    def computed(x: Tensor) -> Tensor:
        mixed = x.mean(dim, keepdim=True) if how == "mean" else x.softmax(dim)
        (mixed * mixed.log1p()).sum(dim)
        return F.relu(x)

    return Fn(computed)


class Averaging(nn.Module):
    """``nn.MultiheadAttention`` as most code calls it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


class Modulated(nn.Module):
    """StyleGAN2: a kernel of its own for every sample, scaled, and demodulated if it is to be."""

    def __init__(self, channels: int, width: int, demodulate: bool) -> None:
        super().__init__()
        self.width, self.demodulate = width, demodulate
        self.weight, self.style = nn.Parameter(torch.randn(width, channels, 3, 3)), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.weight * self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
        if self.demodulate:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-2).rsqrt()
        x = F.conv2d(x.reshape(1, b * c, h, w), weight.view(b * self.width, c, 3, 3), padding=1, groups=b)
        return x.view(b, self.width, h, w)


@ingredient(width=WIDTHS, demodulate=SOME)
def modulated(x: Value, *, width: int = 8, demodulate: bool = True) -> Made:
    return Modulated(x.channels, width, demodulate) if x.dims == 2 else None
