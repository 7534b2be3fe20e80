"""Blocks of the supernets that are tested."""

from torch import nn


def mbconv(inputs: int, outputs: int, kernel: int, expand: int) -> nn.Sequential:
    hidden = inputs * expand
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, hidden, kernel, 1, kernel // 2, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip
