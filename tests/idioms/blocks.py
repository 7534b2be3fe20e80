"""Blocks of convolutional networks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .table import block


@block()
class GhostModule(nn.Module):
    def __init__(self, inp: int, ratio: int = 2) -> None:
        super().__init__()
        self.oup = inp
        init = math.ceil(inp / ratio)
        self.primary_conv = nn.Sequential(nn.Conv2d(inp, init, 1, bias=False), nn.BatchNorm2d(init), nn.ReLU(True))
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init, init * (ratio - 1), 3, 1, 1, groups=init, bias=False), nn.BatchNorm2d(init), nn.ReLU(True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.oup, :, :]


@block()
class DenseBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c + i * 8, 8, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.leaky_relu(layer(torch.cat(features, 1)), 0.2))
        return torch.cat(features, 1)


@block()
class InvertedResidual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        h = 4 * c
        self.conv = nn.Sequential(
            nn.Conv2d(c, h, 1, bias=False),
            nn.BatchNorm2d(h),
            nn.ReLU6(inplace=True),
            nn.Conv2d(h, h, 3, 1, 1, groups=h, bias=False),
            nn.BatchNorm2d(h),
            nn.ReLU6(inplace=True),
            nn.Conv2d(h, c, 1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@block()
class CoordConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c + 2, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        xs = torch.linspace(-1, 1, w, dtype=x.dtype, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.conv(torch.cat([x, ys, xs], dim=1))


@block()
class PReLUMaxout(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.act, self.a, self.b = nn.PReLU(c), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return torch.max(self.a(x), self.b(x))


@block()
class MaxFeatureMap(nn.Module):
    """LightCNN's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.out_channels = c
        self.filter = nn.Conv2d(c, 2 * c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.split(self.filter(x), self.out_channels, 1)
        return torch.max(out[0], out[1])


@block()
class SharedConv(nn.Module):
    """One convolution at three dilations (TridentNet)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(c, c, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(c) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for bn in self.bns:
            x = F.relu(bn(self.conv(x)), inplace=True)
        return x


@block()
class OctaveConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.h2h, self.h2l = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 8, 3, padding=1)
        self.l2h, self.l2l = nn.Conv2d(8, c, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.h2h(x), self.h2l(self.pool(x))
        low, high = F.relu(self.l2l(low)), F.relu(high + F.interpolate(self.l2h(low), scale_factor=2, mode="nearest"))
        return torch.cat([high, F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=False)], 1)


@block(left="deform_conv2d takes these channels as offsets")
class Deformable(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.offset, self.weight = nn.Conv2d(c, 18, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torchvision.ops.deform_conv2d(x, self.offset(x), self.weight.weight, self.weight.bias, padding=1)


@block(left="takes these channels as a further input")
class DeformableLayer(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.offset, self.mask = nn.Conv2d(c, 18, 3, padding=1), nn.Conv2d(c, 9, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x, self.offset(x), torch.sigmoid(self.mask(x))))


@block()
class Pyramid(nn.Module):
    """PSPNet's pooling."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(c, c // 2, 1, bias=False), nn.ReLU(True)) for s in (1, 2)
        )
        self.bottleneck = nn.Conv2d(c + c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.size(2), x.size(3)
        priors = [F.interpolate(stage(x), size=(h, w), mode="bilinear", align_corners=True) for stage in self.stages]
        return F.relu(self.bottleneck(torch.cat([*priors, x], 1)))


@block()
class PixelShuffleHead(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(c, c * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@block(left="its channels can only be removed all at once", share=1.0)
class ChannelShuffle(nn.Module):
    def __init__(self, c: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.conv1, self.conv2 = nn.Conv2d(c, c, 1, groups=groups), nn.Conv2d(c, c, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        b, num, h, w = x.data.size()
        x = x.view(b, self.groups, num // self.groups, h, w)
        x = torch.transpose(x, 1, 2).contiguous()
        return self.conv2(x.view(b, -1, h, w))


@block()
class InPlace(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).relu_()
        y += x
        y.mul_(0.5).clamp_(max=6)
        return self.conv2(y).add_(y)


@block()
class Masked(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = torch.where(y > 0.1, y, 0.01 * y)
        y = y.masked_fill(y < -1, 0.0)
        y = torch.clamp(y, -2, 2)
        return self.conv2(y * (x > 0).float().to(y.dtype))


@block()
class BlurPool(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.channels, self.conv = c, nn.Conv2d(c, c, 1)
        a = torch.tensor([1.0, 2.0, 1.0])
        filt = a[:, None] * a[None, :]
        self.register_buffer("filt", (filt / filt.sum())[None, None].repeat((c, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filt, stride=2, groups=x.shape[1])


@block()
class RepVGG(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.one = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.identity = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.one(x) + self.identity(x))


@block()
class Involution(nn.Module):
    def __init__(self, c: int, groups: int = 4) -> None:
        super().__init__()
        self.groups, self.group_channels, self.k = groups, c // groups, 3
        self.reduce, self.span = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, 9 * groups, 1)
        self.unfold = nn.Unfold(3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.span(F.relu(self.reduce(x)))
        b, _, h, w = weight.shape
        weight = weight.view(b, self.groups, 9, h, w).unsqueeze(2)
        out = self.unfold(x).view(b, self.groups, self.group_channels, 9, h, w)
        return (weight * out).sum(dim=3).view(b, -1, h, w)


@block()
class ASPP(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.pool, self.project = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 8, 1)), nn.Conv2d(32, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        outs = [branch(x) for branch in self.branches]
        outs.append(self.pool(x).expand(-1, -1, *x.shape[-2:]))
        return self.project(torch.cat(outs, dim=1))


@block()
class Parameters(nn.Module):
    """ParameterList and ParameterDict."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1, c, 1, 1)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1, c, 1, 1))})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = self.conv(x) * scale
        return x + self.shifts["a"]


@block()
class Checkerboard(nn.Module):
    """Space to depth by slices (YOLO's focus)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Any] = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(parts, 1))
