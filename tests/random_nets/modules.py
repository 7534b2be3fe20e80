"""Modules of the kinds that people write: the parts of random networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Fn(nn.Module):
    """A function of its sources; whatever numbers it needs are constants in the user's code."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


class InPlace(Fn):
    """Writes into its source."""


class Uncalled(nn.Module):
    """Holds a module that the network never runs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


class Discard(Uncalled):
    """Runs a module and throws its output away."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.body(x)
        return ()


class TrainOnly(Uncalled):
    """An auxiliary head."""

    def forward(self, x: Tensor) -> Any:
        return self.body(x) if self.training else None


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None, act: nn.Module, drop: float, inplace: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act
        self.drop, self.inplace = drop, inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.drop and self.training:  # stochastic depth
            y = y * (torch.rand(len(y), *[1] * (y.dim() - 1), dtype=y.dtype) > self.drop)
        x = x if self.shortcut is None else self.shortcut(x)
        if self.inplace:
            y += x
        else:
            y = x + y
        return self.act(y)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class ChannelsLast(nn.Module):
    """A layer for [..., C] on a map [B, C, ...]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.movedim(1, -1)).movedim(-1, 1)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FunctionalNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)


class SqueezeExcite(nn.Module):
    def __init__(self, conv: Any, dims: int, channels: int, reduced: int, gate: nn.Module, form: str) -> None:
        super().__init__()
        self.channels, self.form, self.dims, self.gate = channels, form, dims, gate
        make = conv if form == "conv" else nn.Linear
        size = (1,) if form == "conv" else ()
        self.reduce, self.expand = make(channels, reduced, *size), make(reduced, channels, *size)

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, 2 + self.dims))
        if self.form == "conv":
            return x * self.gate(self.expand(F.relu(self.reduce(x.mean(axes, keepdim=True)))))
        scale = self.gate(self.expand(F.relu(self.reduce(x.mean(axes)))))
        width = self.channels if self.form == "stored" else x.shape[1]
        return x * scale.view(len(x), width, *[1] * self.dims)


class SpatialAttention(nn.Module):
    def __init__(self, conv: nn.Module, form: str) -> None:
        super().__init__()
        self.conv, self.form = conv, form

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        if self.form == "max":
            both = torch.cat([x.amax(1, keepdim=True)] * 2, 1)
        return x * torch.sigmoid(self.conv(both))


class ChannelConv(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv, self.dims = nn.Conv1d(1, 1, 3, padding=1, bias=False), dims

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(2, 2 + self.dims)))
        return x * torch.sigmoid(self.conv(pooled[:, None]))[:, 0].view(*x.shape[:2], *[1] * self.dims)


class Attention(nn.Module):
    """Self-attention between the tokens of [B, L, C]."""

    def __init__(self, channels: int, heads: int, width: int, form: str) -> None:
        super().__init__()
        self.heads, self.width, self.form = heads, width, form
        inner = heads * width
        self.qkv = nn.Linear(channels, 3 * inner)
        self.project = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.form == "fused":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(b, n, -1))


class NonLocal(nn.Module):
    """Self-attention between the places of a map, by 1x1 convolutions."""

    def __init__(self, conv: Any, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = conv(channels, heads * width, 1), conv(channels, heads * width, 1)
        self.v, self.project = conv(channels, heads * width, 1), conv(heads * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        q, k, v = (f(x).view(b, self.heads, -1, math.prod(x.shape[2:])) for f in (self.q, self.k, self.v))
        y = v @ (q.transpose(-2, -1) @ k).softmax(-1)
        return x + self.project(y.reshape(b, -1, *x.shape[2:]))


class MultiHead(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class MLP(nn.Module):
    """A transformer's MLP: pre-norm, residual, optional layer scale, on [..., C]."""

    def __init__(self, channels: int, hidden: int, scale: bool, gated: bool) -> None:
        super().__init__()
        self.norm, self.gated = nn.LayerNorm(channels), gated
        self.expand = nn.Linear(channels, hidden * (1 + gated))
        self.contract = nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(channels)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.norm(x))
        if self.gated:
            a, b = y.chunk(2, -1)
            y = self.contract(F.silu(a) * b)
        else:
            y = self.contract(F.gelu(y))
        return x + (y if self.gamma is None else self.gamma * y)


class Tokens(nn.Module):
    """A map as tokens with a class token and a learned position."""

    def __init__(self, channels: int, places: int, cls: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, places + cls, channels))
        self.cls = nn.Parameter(torch.randn(1, 1, channels)) if cls else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return x + self.position


class StoredSplit(nn.Module):
    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.widths, self.dim = list(widths), dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.widths, self.dim)


class StoredView(nn.Module):
    """Out of its channels and back again, by numbers that it stores."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.channels, self.groups = channels, groups

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x), self.groups, self.channels // self.groups, *x.shape[2:])
        return y.reshape(len(x), self.channels, *x.shape[2:])


class StoredShuffle(StoredView):
    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x), self.groups, self.channels // self.groups, *x.shape[2:])
        return y.transpose(1, 2).reshape(len(x), self.channels, *x.shape[2:])


class Res2Net(nn.Module):
    """Slices of a stored width, each of which also reads the slice before it."""

    def __init__(self, channels: int, width: int, scale: int, conv: Any, norm: Any) -> None:
        super().__init__()
        self.width = width
        self.expand, self.norm = conv(channels, width * scale, 1, bias=False), norm(width * scale)
        self.convs = nn.ModuleList(conv(width, width, 3, padding=1, bias=False) for _ in range(scale - 1))
        self.norms = nn.ModuleList(norm(width) for _ in range(scale - 1))
        self.contract = conv(width * scale, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.norm(self.expand(x))), self.width, 1)
        done = [parts[0]]
        for conv, norm, part in zip(self.convs, self.norms, parts[1:]):
            done.append(F.relu(norm(conv(part if len(done) == 1 else part + done[-1]))))
        return x + self.contract(torch.cat(done, 1))


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: half of the channels pass, the others are convolved, then both are shuffled."""

    def __init__(self, channels: int, conv: Any, norm: Any) -> None:
        super().__init__()
        half = channels // 2
        self.a, self.norm_a = conv(half, half, 1, bias=False), norm(half)
        self.depthwise, self.norm_d = conv(half, half, 3, padding=1, groups=half, bias=False), norm(half)
        self.b, self.norm_b = conv(half, half, 1, bias=False), norm(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = self.norm_d(self.depthwise(F.relu(self.norm_a(self.a(right)))))
        y = torch.cat([left, F.relu(self.norm_b(self.b(right)))], 1)
        b, c, *space = y.shape
        return y.view(b, 2, c // 2, *space).transpose(1, 2).reshape(b, c, *space)


class Ghost(nn.Module):
    """GhostNet: cheap features beside the real ones, cut to a stored width."""

    def __init__(self, channels: int, width: int, conv: Any) -> None:
        super().__init__()
        self.width = width
        half = math.ceil(width / 2)
        self.primary, self.cheap = conv(channels, half, 1), conv(half, half, 3, padding=1, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.primary(x))
        return torch.cat([y, F.relu(self.cheap(y))], 1)[:, : self.width]


class Bare(nn.Module):
    """A bare parameter or buffer that meets the channels."""

    def __init__(self, tensor: Tensor, buffer: bool, how: str, last: int) -> None:
        super().__init__()
        self.how, self.last = how, last  # last: dimensions to append in forward, as layer scales do
        if buffer:
            self.register_buffer("values", tensor)
        else:
            self.values = nn.Parameter(tensor)

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.view(-1, *[1] * self.last) if self.last else self.values
        if self.how == "concat":
            return torch.cat([x, values.expand(len(x), *values.shape[1:])], 1)
        return x * values if self.how == "mul" else x + values


class FunctionalConv(nn.Module):
    def __init__(self, channels: int, width: int, dims: int, form: str) -> None:
        super().__init__()
        self.form, self.dims = form, dims
        size = [3] * dims if form == "conv" else []
        self.kernel = nn.Parameter(torch.randn(width, channels, *size) / channels)
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "conv":
            conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.dims]
            return conv(x, self.kernel, self.offset, padding=1)
        return torch.einsum("bc...,oc->bo...", x, self.kernel)


class Dropping(nn.Module):
    """Draws random numbers, for every channel others; most of it in train mode only."""

    FORMS = ("function", "noise", "sized", "features", "alpha", "features_alpha", "leaky", "drawn", "scaled", "always")

    def __init__(self, form: str = "function") -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "always":
            return x + 0.1 * torch.randn_like(x)
        if self.form == "leaky":
            return F.rrelu(x, training=self.training)
        if self.form in ("function", "alpha"):
            function = F.dropout if self.form == "function" else F.alpha_dropout
            return function(x, 0.3, training=self.training)
        if not self.training:
            return x
        if self.form == "noise":
            return x + 0.1 * torch.randn_like(x)
        if self.form == "sized":
            return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)
        if self.form == "drawn":
            return x * x.new_empty(x.shape).bernoulli_(0.7) / 0.7
        if self.form == "scaled":
            return x * (1 + 0.1 * torch.zeros_like(x).uniform_(-1, 1))
        if x.dim() < 3:
            return x
        if self.form == "features_alpha":
            return F.feature_alpha_dropout(x, 0.3)
        return F.dropout2d(x.flatten(2)[..., None], 0.3).view(x.shape)
