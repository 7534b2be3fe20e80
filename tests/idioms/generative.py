"""Convolutions with a kernel of its own for every sample: StyleGAN2, dynamic convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block, network


class ModulatedConv2d(nn.Module):
    """rosinality's."""

    def __init__(self, in_channel: int, out_channel: int, kernel_size: int, style_dim: int, demodulate: bool) -> None:
        super().__init__()
        self.in_channel, self.out_channel, self.kernel_size = in_channel, out_channel, kernel_size
        self.scale, self.demodulate = 1 / math.sqrt(in_channel * kernel_size**2), demodulate
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = nn.Linear(style_dim, in_channel)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, in_channel, height, width = x.shape
        style = self.modulation(style).view(batch, 1, in_channel, 1, 1)
        weight = self.scale * self.weight * style
        if self.demodulate:
            demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * demod.view(batch, self.out_channel, 1, 1, 1)
        weight = weight.view(batch * self.out_channel, in_channel, self.kernel_size, self.kernel_size)
        out = F.conv2d(x.view(1, batch * in_channel, height, width), weight, padding="same", groups=batch)
        return out.view(batch, self.out_channel, height, width)


class Conv2DMod(nn.Module):
    """lucidrains'."""

    def __init__(self, in_chan: int, out_chan: int, kernel: int, style_dim: int, demod: bool) -> None:
        super().__init__()
        self.filters, self.demod, self.kernel = out_chan, demod, kernel
        self.weight = nn.Parameter(torch.randn((out_chan, in_chan, kernel, kernel)))
        self.to_style = nn.Linear(style_dim, in_chan)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, _c, h, w = x.shape
        weights = self.weight[None, :, :, :, :] * (self.to_style(style)[:, None, :, None, None] + 1)
        if self.demod:
            weights = weights * torch.rsqrt((weights**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, -1, h, w)
        _, _, *ws = weights.shape
        x = F.conv2d(x, weights.reshape(b * self.filters, *ws), padding=(self.kernel - 1) // 2, groups=b)
        return x.reshape(-1, self.filters, h, w)


class SynthesisLayer(nn.Module):
    """NVIDIA's, not fused: the activations are scaled instead of the weights."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, w_dim: int, demodulate: bool) -> None:
        super().__init__()
        self.weight, self.demodulate = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel)), demodulate
        self.affine = nn.Linear(w_dim, in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles, batch_size = self.affine(w), x.shape[0]
        x = x * styles.to(x.dtype).reshape(batch_size, -1, 1, 1)
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            weights = self.weight.unsqueeze(0) * styles.reshape(batch_size, 1, -1, 1, 1)
            dcoefs = (weights.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()
            x = x * dcoefs.to(x.dtype).reshape(batch_size, -1, 1, 1)
        return x


class _Generator(nn.Module):
    conv: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16))
        self.const = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.conv1, self.conv2 = self.conv(16, 16, 3, 16, True), self.conv(16, 12, 3, 16, True)
        self.to_rgb = self.conv(12, 3, 1, 16, False)
        self.bias1, self.bias2 = nn.Parameter(torch.randn(1, 16, 1, 1)), nn.Parameter(torch.randn(1, 12, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        w = self.style(z)
        x = F.leaky_relu(self.conv1(self.const.repeat(z.shape[0], 1, 1, 1), w) + self.bias1, 0.2)
        x = F.leaky_relu(self.conv2(F.interpolate(x, scale_factor=2.0), w) + self.bias2, 0.2)
        return self.to_rgb(x, w)


@network(torch.randn(2, 8))
class StyleGAN2(_Generator):
    conv = ModulatedConv2d


@network(torch.randn(2, 8))
class LightweightGAN(_Generator):
    conv = Conv2DMod


@network(torch.randn(2, 8))
class StyleGAN2ADA(_Generator):
    conv = SynthesisLayer


@block(left="softmax runs over the channels")
class DynamicConv2d(nn.Module):
    """Kernels mixed for every sample: all but the weights of the mixture are cut."""

    def __init__(self, planes: int, K: int = 4) -> None:
        super().__init__()
        self.in_planes, self.out_planes, self.kernel_size, self.K = planes, planes, 3, K
        self.fc1, self.fc2 = nn.Conv2d(planes, 6, 1), nn.Conv2d(6, K, 1)
        self.weight = nn.Parameter(torch.randn(K, planes, planes, 3, 3))
        self.bias = nn.Parameter(torch.randn(K, planes))

    def forward(self, x: Tensor) -> Tensor:
        attention = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).view(x.size(0), -1)
        attention = F.softmax(attention / 30, 1)
        batch_size, _, height, width = x.size()
        x, size = x.view(1, -1, height, width), self.kernel_size
        weight = torch.mm(attention, self.weight.view(self.K, -1))
        weight = weight.view(batch_size * self.out_planes, self.in_planes, size, size)
        bias = torch.mm(attention, self.bias).view(-1)
        out = F.conv2d(x, weight, bias, padding=1, groups=batch_size)
        return out.view(batch_size, self.out_planes, out.size(-2), out.size(-1))
