"""Blocks that weight, choose or mix channels by what is in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block


@block()
class SELayer(nn.Module):
    def __init__(self, channel: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


@block(left="conv runs over these channels as over positions", share=1.0)
class ECALayer(nn.Module):
    def __init__(self, channel: int, k_size: int = 3) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, k_size, padding=(k_size - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


@block(left="runs over the channels in CBAM.forward", share=1.0)
class CBAM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(c, c // 4, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 4, c, 1, bias=False))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(a)
        s = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.conv(s))


@block()
class GlobalContext(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(c, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(c, c // 2, 1), nn.LayerNorm([c // 2, 1, 1]), nn.ReLU(), nn.Conv2d(c // 2, c, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        weights = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), weights).view(b, c, 1, 1)
        return x + self.transform(context)


@block()
class SplitAttention(nn.Module):
    def __init__(self, c: int, radix: int = 2) -> None:
        super().__init__()
        self.radix = radix
        self.conv, self.bn = nn.Conv2d(c, c * radix, 3, padding=1, groups=radix), nn.BatchNorm2d(c * radix)
        self.fc1, self.fc2 = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        batch, rchannel = x.shape[:2]
        splited = torch.split(x, rchannel // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splited), 1)
        atten = self.fc2(F.relu(self.fc1(gap)))
        atten = F.softmax(atten.view(batch, self.radix, -1), dim=1).view(batch, -1, 1, 1)
        attens = torch.split(atten, rchannel // self.radix, dim=1)
        return sum(att * split for att, split in zip(attens, splited))


@block()
class SelectiveKernel(nn.Module):
    def __init__(self, features: int, branches: int = 2) -> None:
        super().__init__()
        self.features = features
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(features, features, 3 + 2 * i, padding=1 + i), nn.BatchNorm2d(features), nn.ReLU())
            for i in range(branches)
        )
        self.fc = nn.Linear(features, 8)
        self.fcs = nn.ModuleList(nn.Linear(8, features) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        feas = torch.cat([conv(x).unsqueeze(1) for conv in self.convs], dim=1)
        z = self.fc(feas.sum(1).mean(-1).mean(-1))
        vectors = torch.cat([fc(z).unsqueeze(1) for fc in self.fcs], dim=1)
        vectors = vectors.softmax(1).unsqueeze(-1).unsqueeze(-1)
        return (feas * vectors).sum(dim=1)


@block()
class GatedConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 2 * c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f, g = torch.chunk(self.conv(x), 2, dim=1)
        return torch.tanh(f) * torch.sigmoid(g)


@block()
class SimpleGate(nn.Module):
    """NAFNet's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.conv3 = nn.Conv2d(c, c, 1)
        self.beta = nn.Parameter(torch.zeros((1, c, 1, 1)), requires_grad=True)

    def forward(self, inp: Tensor) -> Tensor:
        x = self.conv2(self.conv1(inp))
        x1, x2 = x.chunk(2, dim=1)
        x = x1 * x2
        x = x * self.sca(x)
        return inp + self.conv3(x) * self.beta


@block()
class SwiGLU(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Conv2d(c, 24, 1), nn.Conv2d(24, c, 1), nn.Conv2d(c, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@block()
class FiLM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(c, 2 * c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.fc(x.mean([2, 3])).chunk(2, dim=-1)
        return self.conv(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]


@block(left="softmax runs over the channels")
class MixtureOfExperts(nn.Module):
    """Dense: every expert runs, weighted."""

    def __init__(self, c: int, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(c, experts)
        self.experts = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w = self.gate(x.mean((2, 3))).softmax(-1)
        return torch.stack([e(x) for e in self.experts], 1).mul(w[:, :, None, None, None]).sum(1)


@block()
class CondConv(nn.Module):
    """Dynamic depthwise kernel, one for every example."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.kernel = nn.Conv2d(c, c, 1), nn.Linear(c, c * 9)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        k = self.kernel(x.mean((2, 3))).view(b * c, 1, 3, 3)
        y = F.conv2d(self.conv(x).reshape(1, b * c, h, w), k, padding=1, groups=b * c)
        return y.view(b, c, h, w)


@block()
class CoordinateAttention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(c, 8, 1), nn.BatchNorm2d(8)
        self.conv_h, self.conv_w = nn.Conv2d(8, c, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        x_h = F.adaptive_avg_pool2d(x, (None, 1))
        x_w = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        y = F.hardswish(self.bn(self.conv1(torch.cat([x_h, x_w], dim=2))))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        return x * self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(x_h).sigmoid()
