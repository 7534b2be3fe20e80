"""Search spaces for NNI: the paper's supernet, MBConv blocks of {3, 5, 7} x expansion {3, 6} on every layer; and cells.

``Supernet()`` has the published widths (16.0 M parameters in arXiv 2103.02126, for 224 x 224 images);
``Supernet(**FASHION)`` and ``Supernet(**DIGITS)`` are the same on small grey images. ``Cells()`` has two cells of three
nodes, each with two inputs and an operation on each, as in DARTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nni.nas.nn.pytorch import Cell, LayerChoice, ModelSpace
from torch import Tensor, nn

FASHION: dict[str, Any] = {
    "labels": 10, "channels": 1, "stem": 8, "first": 8, "head": 64, "stem_stride": 2,
    "widths": (12, 16, 24), "cells": (2, 2, 2), "strides": (2, 2, 1),
}  # fmt: skip
DIGITS: dict[str, Any] = {
    **FASHION, "stem_stride": 1, "head": 32, "widths": (12, 16), "cells": (2, 2), "strides": (1, 2)
}  # fmt: skip


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, norm and, as a rule, activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))


def mbconv(inputs: int, outputs: int, kernel: int, expand: float, stride: int) -> nn.Sequential:
    """Expansion, depthwise convolution, projection."""
    hidden = max(1, round(inputs * expand))
    first = [conv(inputs, hidden, 1)] if expand != 1 else []
    return nn.Sequential(*first, conv(hidden, hidden, kernel, stride, hidden), conv(hidden, outputs, 1, act=False))


class Layer(nn.Module):
    """A choice of six blocks; with a shortcut around it where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, hidden: float, label: str) -> None:
        super().__init__()
        kinds = [(kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6)]
        self.block = LayerChoice(
            {f"k{k}e{e}": mbconv(inputs, outputs, k, hidden * e, stride) for k, e in kinds}, label=label
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.shortcut else y


class Supernet(ModelSpace):
    """Stem, one fixed block, layers with six candidates each, head.

    Args:
        labels: number of classes.
        channels: of the images.
        stem, first, head: widths around the layers.
        stem_stride: of the first convolution.
        widths, cells, strides: of the stages: width, number of layers, stride of the first one.
        hidden: factor of the widths inside of the candidates.
    """

    def __init__(
        self,
        labels: int = 1000,
        channels: int = 3,
        stem: int = 32,
        first: int = 16,
        head: int = 1280,
        stem_stride: int = 2,
        widths: Sequence[int] = (24, 40, 80, 96, 192, 320),
        cells: Sequence[int] = (4, 4, 4, 4, 4, 1),
        strides: Sequence[int] = (2, 2, 2, 1, 2, 1),
        hidden: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem = conv(channels, stem, 3, stem_stride)
        self.first = mbconv(stem, first, 3, 1, 1)
        layers: list[nn.Module] = []
        width = first
        for stage, (outputs, count, stride) in enumerate(zip(widths, cells, strides)):
            for i in range(count):
                layers.append(Layer(width, outputs, stride if i == 0 else 1, hidden, f"stage{stage}_layer{i}"))
                width = outputs
        self.layers = nn.Sequential(*layers)
        self.head = conv(width, head, 1)
        self.classifier = nn.Linear(head, labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.layers(self.first(self.stem(x))))
        y: Tensor = self.classifier(x.mean((2, 3)))
        return y


def operation(width: int, kernel: int) -> nn.Module:
    """ReLU, depthwise and 1x1 convolution, norm."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


class Cells(ModelSpace):
    """A stem, two cells of one shape with a reduction between them, a classifier.

    Args:
        labels: number of classes.
        channels: of the images.
        width: of a node in the first cell; twice that in the second.
    """

    def __init__(self, labels: int = 10, channels: int = 1, width: int = 8) -> None:
        super().__init__()

        def cell(width: int) -> Cell:
            ops = {
                "conv3": lambda *place: operation(width, 3),
                "conv5": lambda *place: operation(width, 5),
                "pool": lambda *place: nn.AvgPool2d(3, 1, 1),
                "skip": lambda *place: nn.Identity(),
            }
            return Cell(ops, num_nodes=3, num_ops_per_node=2, num_predecessors=2, label="cell")

        self.stem = conv(channels, width, 3, act=False)
        self.side = conv(width, width, 1, act=False)
        self.first = cell(width)
        self.down = conv(3 * width, 2 * width, 3, 2, act=False)
        self.skipped = conv(width, 2 * width, 1, 2, act=False)
        self.second = cell(2 * width)
        self.classifier = nn.Linear(6 * width, labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first([x, self.side(x)])
        y = self.second([self.skipped(x), self.down(y)])
        out: Tensor = self.classifier(torch.relu(y).mean((2, 3)))
        return out
