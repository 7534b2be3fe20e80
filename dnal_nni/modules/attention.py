"""Attention that can lose whole heads: replacements for modules that take the head size from the embedding's width."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def heads_of(qkv: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
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
            q, k, v = heads_of(F.linear(query, self.in_proj_weight, bias), 3, self.num_heads)
        else:
            biases = bias.chunk(3) if bias is not None else (None, None, None)
            q, k, v = (
                heads_of(F.linear(x, w, b), 1, self.num_heads)[0]
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
