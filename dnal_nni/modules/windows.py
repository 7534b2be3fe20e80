"""torchvision's window attention, without the sizes that it keeps: imported where a model has some."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from .attention import heads_of


class SlimShiftedWindowAttention(ShiftedWindowAttention):
    """Swin's window attention (arXiv 2103.14030, section 3.2) with the head size read from the projection."""

    def _qkv(self, x: Tensor) -> Tensor:
        projected: Tensor = self.qkv(x)
        return projected

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), window = x.shape[1:3], self.window_size
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        size = x.shape[1:3]
        shift = [0 if w >= n else s for s, w, n in zip(self.shift_size, window, size)]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        batch, grid = x.shape[0], (size[0] // window[0], size[1] // window[1])
        q, k, v = heads_of(self._qkv(self._windows(x).flatten(0, 1)), 3, self.num_heads)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shift):
            region = self._regions(size, shift, x.device)
            mask = -100.0 * (region[:, None] != region[:, :, None]).to(scores.dtype)  # [windows, L, L]
            scores = (scores.unflatten(0, (batch, -1)) + mask[None, :, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        x = self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = F.dropout(x, self.dropout, self.training)
        x = x.unflatten(1, tuple(window)).unflatten(0, (batch, *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _windows(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` -> ``[B, windows, window area, C]``."""
        x = x.unflatten(2, (-1, self.window_size[1])).unflatten(1, (-1, self.window_size[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _regions(self, size: Any, shift: list[int], device: torch.device) -> Tensor:
        """``[windows, window area]``: the part of the unshifted map that each position comes from."""
        lines = []
        for n, w, s in zip(size, self.window_size, shift):
            position = torch.arange(n, device=device)
            lines.append((position >= n - w).long() + (position >= n - s).long() if s else position * 0)
        region = lines[0][:, None] * 3 + lines[1]
        return self._windows(region[None, :, :, None])[0, :, :, 0]


class SlimShiftedWindowAttentionV2(ShiftedWindowAttentionV2, SlimShiftedWindowAttention):
    """Swin V2's cosine attention (arXiv 2111.09883): the key projection has no bias."""

    forward = SlimShiftedWindowAttention.forward

    def _qkv(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        return F.linear(x, self.qkv.weight, bias)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=4.605170185988092).exp()  # log 100
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale


class SlimRelativePositionalMultiHeadAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention (arXiv 2204.01697) with the number of heads read from the projection."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, windows, window area, C]`` -> the same."""
        q, k, v = (
            part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(2, 3) for part in self.to_qkv(x).chunk(3, -1)
        )
        weights = (q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()).softmax(-1)
        merged: Tensor = self.merge((weights @ v).transpose(2, 3).flatten(3))
        return merged
