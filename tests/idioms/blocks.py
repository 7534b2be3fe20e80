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
class FiLM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(c, 2 * c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.fc(x.mean([2, 3])).chunk(2, dim=-1)
        return self.conv(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]


@block()
class AdaIN(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.style = nn.Conv2d(c, c, 3, padding=1), nn.Linear(c, 2 * c)
        self.norm = nn.InstanceNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.style(x.mean((2, 3)))
        h = h.view(h.size(0), h.size(1), 1, 1)
        gamma, beta = torch.chunk(h, chunks=2, dim=1)
        return (1 + gamma) * self.norm(self.conv(x)) + beta


@block()
class HandInstanceNorm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.c = nn.Conv2d(c, c, 3, padding=1), c
        self.weight = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        mean, std = x.mean([2, 3], keepdim=True), x.std([2, 3], keepdim=True)
        return self.weight * (x - mean) / (std + 1e-5)


@block(left="mean runs over the channels", share=1.0)
class GRN(nn.Module):
    """ConvNeXt V2's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gx = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


@block(left="runs over the channels", share=1.0)
class LRN(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LocalResponseNorm(3), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@block()
class RMSNorm2d(nn.Module):
    """Wan's VAE: 2-norm times the root of a constant."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.scale, self.gamma = nn.Conv2d(c, c, 1), c**0.5, nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.conv(x), dim=1) * self.scale * self.gamma


@block()
class LayerScaleReZero(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.gamma, self.alpha = nn.Parameter(1e-6 * torch.ones(c)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma[..., None, None] * self.conv1(x)
        return x + self.alpha * self.conv2(x)


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
class FunctionalInstanceNorm(nn.Module):
    """Instance norm as a function."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(self.conv(x)))


@block()
class Checkerboard(nn.Module):
    """Space to depth by slices (YOLO's focus)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Any] = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(parts, 1))
