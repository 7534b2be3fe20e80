"""Numbers that a forward reads from shapes: tested, converted, computed with."""

from __future__ import annotations

import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block


@block()
class IsInt(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        assert isinstance(c, int) and type(b) is int
        return self.conv(x).view(b, c, h * w).view(b, c, h, w)


@block()
class TypeOfInt(nn.Module):
    """No other than Python's ints will do, of attributes too."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.conv = dim, nn.Conv2d(dim, dim, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(dim, dim * 2), nn.Linear(dim * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if type(C) is not int or type(self.dim) is not int:
            raise TypeError("dynamic shapes are not supported")
        if C != self.dim:
            raise ValueError(f"expected {self.dim} channels, got {C}")
        y = self.fc2(F.gelu(self.fc1(self.conv(x).flatten(2).transpose(1, 2))))
        return y.transpose(1, 2).contiguous().view(B, self.dim, H, W)


@block()
class ToInt(nn.Module):
    """As code for exporters has it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.groups, self.conv = 4, nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (int(s) for s in x.shape)
        each = int(x.shape[1] // self.groups)
        y = self.conv(x).view(b, c, h * w).view(b, self.groups, each, h, w)
        return y.transpose(1, 2).reshape(b, c, h, w)


@block()
class ShapeAsTensor(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.tensor(x.shape)
        return self.conv(x).view(int(s[0]), int(s[1]), -1).mean(-1)


@block()
class NotScripting(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        if not torch.jit.is_scripting():
            assert isinstance(c, (int, torch.SymInt))
            torch._assert(c == self.conv.in_channels, f"{c} channels")
        return self.conv(x).reshape(-1, c, *x.shape[2:])


@block()
class NumFlatFeatures(nn.Module):
    """PyTorch's own tutorial, and three more ways to say the same."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(c, c, 3, padding=1), nn.Linear(c * 64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(-1, self.num_flat_features(x)).view(x.shape[0], math.prod(x.shape[1:]))
        x = x.view(x.shape[0], functools.reduce(operator.mul, x.shape[1:]))
        return self.fc(x.view(x.shape[0], x.numel() // x.shape[0]))

    def num_flat_features(self, x: Tensor) -> int:
        num_features = 1
        for s in x.size()[1:]:
            num_features *= s
        return num_features


@block()
class StoredFlatFeatures(nn.Module):
    """The same as an attribute: positions times channels, channels first, last (as CREPE has it), and a layer's own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.features, self.spatial = c * 64, 64
        self.first, self.last, self.own = (nn.Conv2d(c, c, 3, padding=1) for _ in range(3))
        self.fc1, self.fc2, self.fc3 = (nn.Linear(self.features, 8) for _ in range(3))
        self.size = c * self.spatial

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1(self.first(x).view(-1, self.features))
        last = self.fc2(self.last(x).permute(0, 2, 3, 1).reshape(-1, self.size))
        return first + last + self.fc3(self.own(x).view(-1, self.fc3.in_features))


@block()
class WhatIsLeft(nn.Module):
    """Parts by an attribute and by what is left, and by a fraction."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.c1, self.p = c // 4, nn.Conv2d(c, c, 1)
        self.conv = nn.Conv2d(c // 4, c // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(x)
        a, b = torch.split(x, [self.c1, x.shape[1] - self.c1], 1)
        x = torch.cat([self.conv(a), b], 1)
        half = int(x.shape[1] * 0.5)
        return torch.cat([x[:, half:], x[:, :half]], 1)
