"""Steps of a program that language models and vision transformers have: rotary heads, learned tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .layers import SOME
from .modules import Fn
from .program import Made, Value, ingredient


class Rotary(nn.Module):
    """Attention with rotary positions, from a buffer, from a tensor that is none, of neighbours, or as complex numbers.

    Several queries share a head of keys and values, if ``shared`` is more than one.
    """

    frequencies: Tensor

    def __init__(self, channels: int, shared: int, table: str, repeat: str) -> None:
        super().__init__()
        self.heads, self.shared, self.width, self.table, self.repeat = 2 * shared, shared, 4, table, repeat
        self.q, self.kv = nn.Linear(channels, 8 * shared), nn.Linear(channels, 16)
        self.project = nn.Linear(8 * shared, channels)
        if table == "buffer":
            self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))

    def turned(self, x: Tensor) -> Tensor:
        """``[B, heads, L, width]``."""
        turns = self.frequencies if self.table == "buffer" else torch.tensor([1.0, 0.1], dtype=x.dtype)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * turns
        if self.table == "complex":
            y = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(y * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        if self.table == "neighbours":
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
            angles = angles.repeat_interleave(2, -1)
            return x * angles.cos() + turned * angles.sin()
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.turned(self.q(x).view(b, n, self.heads, self.width).transpose(1, 2))
        k, v = (t.view(b, n, -1, self.width).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k = self.turned(k)
        if self.repeat == "interleave":
            k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        elif self.repeat == "expand":
            k, v = (t[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2) for t in (k, v))
        gqa = {"enable_gqa": True} if self.repeat == "fused" else {}
        y = F.scaled_dot_product_attention(q, k, v, **gqa)
        return self.project(y.transpose(1, 2).flatten(2))


REPEATS = ("interleave", "expand", *(["fused"] if "enable_gqa" in str(F.scaled_dot_product_attention.__doc__) else []))


@ingredient(
    shared=st.sampled_from((1, 2)),
    table=st.sampled_from(("buffer", "made", "neighbours", "complex")),
    repeat=st.sampled_from(REPEATS),
)
def rotary(x: Value, *, shared: int = 2, table: str = "buffer", repeat: str = "expand") -> Made:
    return Rotary(x.channels, shared, table, repeat) if x.kind == "tokens" else None


class Prompts(nn.Module):
    """Several learned tokens ahead of those of the input, or between them."""

    def __init__(self, channels: int, number: int, between: bool) -> None:
        super().__init__()
        self.prompts, self.between = nn.Parameter(torch.randn(1, number, channels)), between

    def forward(self, x: Tensor) -> Tensor:
        learned = self.prompts.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], learned, x[:, 1:]] if self.between else [learned, x], 1)


@ingredient(number=st.sampled_from((2, 3)), between=SOME)
def prompts(x: Value, *, number: int = 2, between: bool = False) -> Made:
    return Prompts(x.channels, number, between) if x.kind == "tokens" and x.tensor.shape[1] <= 64 else None


class Pixel(nn.Module):
    """Progressive GAN's norm over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.mean(x**2, dim=self.dim, keepdim=True) + 1e-8)


@ingredient(inline=SOME)
def pixel_norm(x: Value, *, inline: bool = False) -> Made:
    norm = Pixel(x.dim)
    return Fn(norm.forward) if inline else norm
