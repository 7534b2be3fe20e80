"""A model space for two modalities, and what people make by hand, for multimodal.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    import nni
    from nni.nas.nn.pytorch import (
        LayerChoice,
        ModelSpace,
        MutableBatchNorm1d,
        MutableBatchNorm2d,
        MutableConv2d,
        MutableLinear,
        Repeat,
    )

WIDTHS = [4, 8, 12], [8, 16, 24]
HIDDEN = [42, 84]
Layer = Callable[[Any], nn.Module]  # made for so many channels


def conv(fan_in: Any, width: Any, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    around = dilation * (kernel - 1) // 2
    layer = MutableConv2d(fan_in, width, kernel, 1, around, dilation=dilation, bias=False)
    return nn.Sequential(layer, MutableBatchNorm2d(width), nn.ReLU())


def separable(fan_in: Any, width: Any) -> nn.Sequential:
    """Across channels first: of a single one, a filter by channel ahead of that would make a single feature."""
    mix = MutableConv2d(fan_in, width, 1, bias=False)
    depthwise = MutableConv2d(width, width, 3, 1, 1, groups=width, bias=False)
    return nn.Sequential(mix, MutableBatchNorm2d(width), depthwise, MutableBatchNorm2d(width), nn.ReLU())


def stage(fan_in: Any, width: Any, label: str) -> nn.Sequential:
    """One or two blocks, each of its own kind, then half the size."""

    def block(i: int) -> nn.Module:
        before = width if i else fan_in
        candidates = {
            "conv3": conv(before, width), "conv5": conv(before, width, 5), "dil3": conv(before, width, dilation=2),
            "sep3": separable(before, width), "pool": nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(before, width)),
        }  # fmt: skip
        return LayerChoice(candidates, label=f"{label}_op{i}")

    return nn.Sequential(Repeat(block, (1, 2), label=f"{label}_depth"), nn.MaxPool2d(2))


class Concat(nn.Module):
    def __init__(self, width: Any, layer: Layer) -> None:
        super().__init__()
        self.layer = layer(2 * width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.cat((a, b), 1))
        return y


class Sum(nn.Module):
    def __init__(self, width: Any, layer: Layer) -> None:
        super().__init__()
        self.layer = layer(width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.layer(a + b)
        return y


class Gated(nn.Module):
    """A sum in which each modality says how much of the other is heard."""

    def __init__(self, width: Any, layer: Layer) -> None:
        super().__init__()
        self.of_a, self.of_b = MutableConv2d(width, width, 1), MutableConv2d(width, width, 1)
        self.layer = layer(width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.layer(a * torch.sigmoid(self.of_b(b)) + b * torch.sigmoid(self.of_a(a)))
        return y


class Fused(nn.Module):
    """Each modality by itself for some of two stages, then a layer on both, and the other stages on what that gives.

    Args:
        place: stages ahead of the fusion.
        widths: behind the first stage and behind the second.
        hidden: of the head.
        label: of the choices.
    """

    def __init__(self, place: int, widths: tuple[Any, Any], hidden: Any, label: str) -> None:
        super().__init__()
        first, second = widths

        def stages(which: tuple[int, ...], before: Any, name: str) -> list[nn.Module]:
            fan_in = {1: before, 2: first}
            return [stage(fan_in[i], widths[i - 1], f"{label}_{name}{i}") for i in which]

        def dense(width: Any) -> nn.Module:
            layer = MutableLinear(16 * width, hidden, bias=False)
            # the norm: sums of candidates come in many sizes
            return nn.Sequential(nn.Flatten(), layer, MutableBatchNorm1d(hidden), nn.ReLU())

        def layer(width: Any) -> nn.Module:
            return conv(width, first) if place < 2 else dense(width)

        alone, together = (1, 2)[:place], (1, 2)[place:]
        width = (1, first, second)[place]
        self.a, self.b = (nn.Sequential(*stages(alone, 1, name)) for name in ("picture", "sound"))
        self.fusion = LayerChoice(
            {"concat": Concat(width, layer), "sum": Sum(width, layer), "gated": Gated(width, layer)},
            label=f"{label}_fusion",
        )
        self.rest = nn.Sequential(*stages(together, first, "both"), *([dense(second)] if together else []))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.rest(self.fusion(self.a(a), self.b(b)))
        return y


class Space(ModelSpace):
    """Fusion ahead of two stages, between them or behind them; the code is the same for both modalities."""

    def __init__(self) -> None:
        super().__init__()
        widths = nni.choice("width1", WIDTHS[0]), nni.choice("width2", WIDTHS[1])
        hidden = nni.choice("hidden", HIDDEN)
        places = {name: Fused(i, widths, hidden, name) for i, name in enumerate(("early", "middle", "late"))}
        self.place = LayerChoice(places, label="place")
        self.scores = MutableLinear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scores(self.place(x[:, :1], x[:, 1:]))
        return y


def tower(width: int) -> nn.Sequential:
    """A LeNet with norms, by hand."""
    layers: list[nn.Module] = []
    for fan_in, wide in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(fan_in, wide, 5, 1, 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


class ByHand(nn.Module):
    """Late fusion by concatenation, which `Space` contains, or one modality by itself."""

    def __init__(self, modalities: tuple[int, ...] = (0, 1), width: int = 8, hidden: int = 84) -> None:
        super().__init__()
        self.modalities = modalities
        self.towers = nn.ModuleList(tower(width) for _ in modalities)
        first = nn.Linear(32 * width * len(modalities), hidden, bias=False)
        self.head = nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        seen = [tower(x[:, i : i + 1]) for i, tower in zip(self.modalities, self.towers)]
        scores: Tensor = self.head(torch.cat(seen, 1))
        return scores
