"""Norms by other names, and what stands in their place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block


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
class FunctionalInstanceNorm(nn.Module):
    """Instance norm as a function."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(self.conv(x)))


class PixelNorm(nn.Module):
    """Progressive GAN's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8)


@block()
class PixelNorms(nn.Module):
    """One module behind two convolutions, ahead of and behind activations."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.pn, self.to_rgb = PixelNorm(), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pn(F.leaky_relu(self.conv1(x), 0.2))
        return self.to_rgb(F.leaky_relu(self.pn(self.conv2(x)), 0.2))


@block(left="mean runs over the channels")
class PixelNormInline(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        return self.conv2(x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt())
