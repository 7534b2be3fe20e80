"""Attention that can lose whole heads: replacements for modules that take the head size from the embedding's width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def _heads(qkv: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``[B, L, parts * heads * d]`` -> ``parts`` tensors ``[B, heads, L, d]``."""
    return qkv.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class SlimMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` whose projection may have fewer rows than three times the embedding."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        given = {**dict(zip(names, args)), **kwargs}
        plain = (
            self._qkv_same_embed_dim
            and self.bias_k is None
            and not self.add_zero_attn
            and query.dim() == 3
            and given.get("key_padding_mask") is None
            and given.get("attn_mask") is None
        )
        if not plain:
            return super().forward(query, key, value, *args, **kwargs)
        to_itself = query is key and key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        bias = self.in_proj_bias
        if to_itself:
            q, k, v = _heads(F.linear(query, self.in_proj_weight, bias), 3, self.num_heads)
        else:
            biases = bias.chunk(3) if bias is not None else (None, None, None)
            q, k, v = (
                _heads(F.linear(x, w, b), 1, self.num_heads)[0]
                for x, w, b in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
            )
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not given.get("need_weights", True):
            return out, None
        return out, weights.mean(1) if given.get("average_attn_weights", True) else weights


class SlimTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` without the fused kernel of its eval mode, which wants whole projections."""

    activation_relu_or_gelu = property(lambda self: 0)  # "not an activation of the kernel"


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
        q, k, v = _heads(self._qkv(self._windows(x).flatten(0, 1)), 3, self.num_heads)
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
