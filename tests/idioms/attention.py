"""Attention, mixers, and what else runs over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block, network

TOKENS = torch.randn(2, 6, 12)


@block()
class NonLocalBlock(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.inter_channels = in_channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(in_channels, self.inter_channels, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(self.inter_channels, in_channels, 1), nn.BatchNorm2d(in_channels))

    def forward(self, x: Tensor) -> Tensor:
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter_channels, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(batch_size, self.inter_channels, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(batch_size, self.inter_channels, -1)
        f = torch.matmul(theta_x, phi_x)
        y = torch.matmul(F.softmax(f, dim=-1), g_x).permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter_channels, *x.size()[2:])
        return self.W(y) + x


@block()
class SAGANAttention(nn.Module):
    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(in_dim, in_dim // 4, 1), nn.Conv2d(in_dim, in_dim // 4, 1)
        self.value_conv, self.gamma = nn.Conv2d(in_dim, in_dim, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        m_batchsize, C, width, height = x.size()
        proj_query = self.query_conv(x).view(m_batchsize, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(m_batchsize, -1, width * height)
        attention = torch.bmm(proj_query, proj_key).softmax(-1)
        proj_value = self.value_conv(x).view(m_batchsize, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1)).view(m_batchsize, C, width, height)
        return self.gamma * out + x


@block()
class LinearAttention(nn.Module):
    """lucidrains' (DDPM)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 4) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        hidden = dim_head * heads
        self.to_qkv, self.to_out = nn.Conv2d(dim, hidden * 3, 1, bias=False), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(x).chunk(3, dim=1))
        q, k = q.softmax(dim=-1) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(out.reshape(b, -1, h, w))


@block(left="softmax runs over the channels", share=1.0)
class ChannelAttention(nn.Module):
    """DANet's CAM."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        query = x.view(b, c, -1)
        attention = torch.bmm(query, query.permute(0, 2, 1)).softmax(-1)
        return self.gamma * torch.bmm(attention, query).view(b, c, h, w) + x


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


@network(torch.randn(2, 3, 8, 8), share=0.85)
class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dim = 12
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, 4), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


@network(TOKENS)
class CrossAttention(nn.Module):
    """Learned queries (DETR, Perceiver)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.queries = nn.Linear(12, 16), nn.Parameter(torch.randn(4, 16))
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q = self.q(self.queries).unsqueeze(0).expand(x.size(0), -1, -1)
        attn = torch.softmax(q @ self.k(x).transpose(1, 2) / 4.0, -1)
        return self.head(self.out(attn @ self.v(x)))


@network(TOKENS)
class TorchMHA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(12, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, _ = self.attn(x, x, x)
        return self.head(self.norm(x + y).mean(1))


@network(TOKENS, share=0.85)
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


@network(torch.randn(2, 12, 6), left="add meets a tensor whose channels are fixed")
class Mixer(nn.Module):
    """Token and channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@network(TOKENS, left="mul meets a tensor whose channels are fixed")
class GatedMLP(nn.Module):
    """GEGLU and the spatial gate of gMLP."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.norm, self.spatial = nn.Linear(12, 32), nn.LayerNorm(16), nn.Conv1d(6, 6, 1)
        self.proj_out, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        return self.head(F.relu(self.proj_out(u * self.spatial(self.norm(v)))))


@network(TOKENS)
class FNetFourier(nn.Module):
    """Fourier transform over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ff, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + torch.fft.fft(x, dim=1).real
        return self.head(F.relu(self.ff(x)))


@block()
class GlobalFilter(nn.Module):
    """GFNet's complex weight, one value for every frequency and channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(8, 5, dim, 2) * 0.02)
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        y = y * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(y, s=x.shape[1:3], dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


@block()
class SpectralConv(nn.Module):
    """LaMa: real and imaginary parts as channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv_layer, self.bn = nn.Conv2d(2 * c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        f = torch.fft.rfft2(x, norm="ortho")
        f = torch.stack((f.real, f.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
        f = f.view((b, -1) + f.size()[3:])
        f = F.relu(self.bn(self.conv_layer(f)))
        f = f.view((b, -1, 2) + f.size()[2:]).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfft2(torch.complex(f[..., 0], f[..., 1]), s=x.shape[-2:], norm="ortho")


@network(torch.randn(2, 3, 8, 8), left="mm multiplies channels with a tensor whose channels are fixed", share=0.9)
class CosineHead(nn.Module):
    """Metric learning: the cosine of features and class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 12)
        self.weight = nn.Parameter(torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return F.linear(F.normalize(x), F.normalize(self.weight)) * 30.0


@network((torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (self.features(x).flatten(2).mean(2) for x in (a, b))
        return F.cosine_similarity(a, b), (a - b).pow(2).sum(1, keepdim=True).sqrt()


@network((torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
class Correlation(nn.Module):
    """Cost volume of optical flow."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()), nn.Conv2d(9, 2, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.features(a), self.features(b)
        h, w = a.shape[2:]
        b = F.pad(b, (1, 1, 1, 1))
        costs = [(a * b[:, :, i : i + h, j : j + w]).sum(1, keepdim=True) for i in range(3) for j in range(3)]
        return self.head(torch.cat(costs, 1))


@network(TOKENS)
class RepeatedIndex(nn.Module):
    """Tokens are gathered by an index that is repeated for every channel (MAE, EViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(12, 16), nn.Linear(16, 1)
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        ids = self.score(x).squeeze(-1).topk(3, dim=1).indices
        x = torch.gather(x, dim=1, index=ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        return self.head(F.relu(self.fc(x)).mean(1))


@network(torch.randn(2, 3, 8, 8), left="argmin runs over the channels")
class VectorQuantizer(nn.Module):
    """VQ-VAE: the rows of the codebook are compared, its columns go with the encoder's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding, self.dec = nn.Conv2d(3, 8, 3), nn.Embedding(12, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).permute(0, 2, 3, 1).contiguous()
        flat, codes = z.view(-1, z.shape[-1]), self.embedding.weight
        d = torch.sum(flat**2, dim=1, keepdim=True) + torch.sum(codes**2, dim=1) - 2 * torch.matmul(flat, codes.t())
        indices = torch.argmin(d, dim=1).unsqueeze(1)
        chosen = torch.zeros(indices.shape[0], 12, dtype=x.dtype).scatter_(1, indices, 1)
        q = torch.matmul(chosen, codes).view(z.shape)
        return self.dec((z + (q - z).detach()).permute(0, 3, 1, 2).contiguous())
