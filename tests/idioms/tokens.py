"""Language models and vision transformers as their authors write them: rotary tables, shared keys, windows, prompts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block, network

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(x.shape[1]).type_as(self.inv_freq)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos()[None, None], emb.sin()[None, None]


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


class LlamaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, form: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.num_key_value_groups, self.form = heads // kv_heads, form
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj, self.rotary_emb = nn.Linear(dim, dim, bias=False), RotaryEmbedding(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        bsz, q_len, _ = x.size()
        q = self.q_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(bsz, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(bsz, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary_emb(x)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if self.form == "expand":
            k, v = repeat_kv(k, self.num_key_value_groups), repeat_kv(v, self.num_key_value_groups)
        else:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        scores = scores + torch.full((q_len, q_len), float("-inf")).triu(1)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(bsz, q_len, -1))


class _Llama(nn.Module):
    def __init__(self, attention: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.embed, self.attn = nn.Embedding(12, dim), attention
        self.norm1, self.norm2, self.norm = LlamaRMSNorm(dim), LlamaRMSNorm(dim), LlamaRMSNorm(dim)
        self.gate_proj, self.up_proj = nn.Linear(dim, 32, bias=False), nn.Linear(dim, 32, bias=False)
        self.down_proj, self.lm_head = nn.Linear(32, dim, bias=False), nn.Linear(dim, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return self.lm_head(self.norm(x))


@network(IDS, share=0.85)
class Llama(_Llama):
    def __init__(self) -> None:
        super().__init__(LlamaAttention(16, 4, 2, "expand"))


@network(IDS, share=0.85)
class LlamaInterleaved(_Llama):
    def __init__(self) -> None:
        super().__init__(LlamaAttention(16, 4, 2, "interleave"))


class MetaAttention(nn.Module):
    """Meta's own: complex rotations, from a table that is computed once and is no buffer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.n_local_heads, self.head_dim = heads, dim // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        freqs = 10000 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        freqs = torch.outer(torch.arange(16), freqs)
        self.freqs_cis = torch.polar(torch.ones_like(freqs), freqs)

    def rotated(self, x: Tensor) -> Tensor:
        x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        freqs = self.freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, -1).to(x_.dtype)
        return torch.view_as_real(x_ * freqs).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (w(x).view(bsz, seqlen, self.n_local_heads, self.head_dim) for w in (self.wq, self.wk, self.wv))
        xq, xk, xv = (t.transpose(1, 2) for t in (self.rotated(xq), self.rotated(xk), xv))
        scores = torch.matmul(xq, xk.transpose(2, 3)) / math.sqrt(self.head_dim)
        y = torch.matmul(F.softmax(scores.float().type_as(xq), dim=-1), xv)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


@network(IDS, share=0.85)
class MetaLlama(_Llama):
    def __init__(self) -> None:
        super().__init__(MetaAttention(16, 4))


class GroupedQueries(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim * kv_heads // heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (t.view(b, n, self.kv_heads, -1).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


if "enable_gqa" in str(F.scaled_dot_product_attention.__doc__):  # torch 2.5

    @network(IDS, share=0.85)
    class LlamaGroupedQueries(_Llama):
        def __init__(self) -> None:
            super().__init__(GroupedQueries(16, 4, 2))


@block()
class DiffusersAttention(nn.Module):
    """Stable Diffusion's first attention: heads folded into the batch, an empty bias that counts for nothing."""

    def __init__(self, query_dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (query_dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(query_dim, query_dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(query_dim, query_dim)

    def head_to_batch_dim(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def batch_to_head_dim(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b // self.heads, self.heads, n, c).permute(0, 2, 1, 3)
        return x.reshape(b // self.heads, n, c * self.heads)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        q, k, v = (self.head_to_batch_dim(f(y)) for f in (self.to_q, self.to_k, self.to_v))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=self.scale)
        return self.to_out(self.batch_to_head_dim(torch.bmm(scores.softmax(dim=-1), v)))


@network(torch.randn(2, 3, 8, 8), share=0.85)
class RegisterViT(nn.Module):
    """DINOv2 with registers: several learned tokens beside those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 12, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.register_tokens = nn.Parameter(torch.randn(1, 4, 12))
        self.pos_embed, self.norm = nn.Parameter(torch.randn(1, 17, 12)), nn.LayerNorm(12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        x = self.norm(x + self.fc2(F.gelu(self.fc1(x))))
        return self.head(torch.cat((x[:, 0], x[:, 5:].mean(1)), dim=1))


class WindowAttention(nn.Module):
    """Microsoft's Swin."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window_size - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid([torch.arange(window_size)] * 2, indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window_size - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window_size - 1) + relative[..., 1])
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = q @ k.transpose(-2, -1) + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(B_, N, C))


@block()
class SwinBlock(nn.Module):
    """As many heads as the window is wide, and axes of that number."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.norm = 4, 2, nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, self.window_size, 4)

    def partition(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window_size
        x = x.view(B, H // w, w, W // w, w, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w, w, C)

    def reverse(self, windows: Tensor, H: int, W: int) -> Tensor:
        w = self.window_size
        B = int(windows.shape[0] / (H * W / w / w))
        x = windows.view(B, H // w, W // w, w, w, -1)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        _, H, W, C = x.shape
        w, s = self.window_size, self.shift_size
        windows = self.partition(torch.roll(self.norm(x), (-s, -s), (1, 2)))
        windows = self.attn(windows.view(-1, w * w, C)).view(-1, w, w, C)
        return (x + torch.roll(self.reverse(windows, H, W), (s, s), (1, 2))).permute(0, 3, 1, 2)


@block()
class QKVAttentionLegacy(nn.Module):
    """guided-diffusion's: heads times the batch, each with its query, key and value."""

    def __init__(self, channels: int, num_heads: int = 4) -> None:
        super().__init__()
        self.n_heads, self.norm = num_heads, nn.GroupNorm(4, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, channels * 3, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        bs, width, length = qkv.shape
        assert width % (3 * self.n_heads) == 0
        ch = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(bs * self.n_heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)
        return (x + self.proj_out(a)).reshape(b, c, *spatial)
