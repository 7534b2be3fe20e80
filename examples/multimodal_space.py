"""A model space for two modalities, and what people make by hand, for multimodal.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    import nni
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableBatchNorm2d, MutableConv2d, MutableLinear, Repeat

WIDTHS = [4, 8, 16]


def conv(fan_in: Any, width: Any, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    around = dilation * (kernel - 1) // 2
    layer = MutableConv2d(fan_in, width, kernel, stride, around, dilation=dilation, bias=False)
    return nn.Sequential(layer, MutableBatchNorm2d(width), nn.ReLU())


def separable(width: Any) -> nn.Sequential:
    depthwise = MutableConv2d(width, width, 3, 1, 1, groups=width, bias=False)
    return nn.Sequential(depthwise, MutableBatchNorm2d(width), *conv(width, width, 1))


def stage(fan_in: Any, width: Any, label: str) -> nn.Sequential:
    """A step down, then one or two blocks, each of its own kind."""

    def block(i: int) -> nn.Module:
        candidates = {
            "conv3": conv(width, width), "conv5": conv(width, width, 5), "dil3": conv(width, width, dilation=2),
            "sep3": separable(width), "pool": nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(width, width, 1)),
        }  # fmt: skip
        return LayerChoice(candidates, label=f"{label}_op{i}")

    return nn.Sequential(conv(fan_in, width, 3, 2), Repeat(block, (1, 2), label=f"{label}_depth"))


class Concat(nn.Module):
    def __init__(self, width: Any) -> None:
        super().__init__()
        self.mix = conv(2 * width, width, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.mix(torch.cat((a, b), 1))
        return y


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Gated(nn.Module):
    """A sum in which each modality says how much of the other is heard."""

    def __init__(self, width: Any) -> None:
        super().__init__()
        self.of_a, self.of_b = MutableConv2d(width, width, 1), MutableConv2d(width, width, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * torch.sigmoid(self.of_b(b)) + b * torch.sigmoid(self.of_a(a))


class Fused(nn.Module):
    """Both modalities by themselves up to a place, from there on together."""

    def __init__(self, place: int, widths: list[Any], label: str) -> None:
        super().__init__()

        def stages(first: int, last: int, name: str) -> nn.Sequential:
            made = [stage(widths[i], widths[i + 1], f"{label}_{name}{i + 1}") for i in range(first, last)]
            return nn.Sequential(*made)

        self.a, self.b = stages(0, place, "picture"), stages(0, place, "sound")
        width = widths[place]
        self.fusion = LayerChoice(
            {"concat": Concat(width), "sum": Sum(), "gated": Gated(width)}, label=f"{label}_fusion"
        )
        self.rest = stages(place, len(widths) - 1, "both")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.rest(self.fusion(self.a(a), self.b(b)))
        return y


class Space(ModelSpace):
    """Stem, fusion behind none, one or two of two stages, head; the code is the same for both modalities."""

    def __init__(self) -> None:
        super().__init__()
        widths = [nni.choice(f"width{i}", WIDTHS) for i in range(3)]
        hidden = nni.choice("hidden", [16, 32, 64])
        self.picture, self.sound = conv(1, widths[0]), conv(1, widths[0])
        places = {name: Fused(i, widths, name) for i, name in enumerate(("early", "middle", "late"))}
        self.place = LayerChoice(places, label="place")
        self.head = nn.Sequential(
            nn.Flatten(), MutableLinear(16 * widths[2], hidden), nn.ReLU(), MutableLinear(hidden, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.place(self.picture(x[:, :1]), self.sound(x[:, 1:]))
        scores: Tensor = self.head(y)
        return scores


def tower(width: int) -> nn.Sequential:
    """A LeNet with norms, by hand."""
    layers: list[nn.Module] = []
    for fan_in, wide in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(fan_in, wide, 5, 1, 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


class ByHand(nn.Module):
    """Late fusion by concatenation, or one modality by itself."""

    def __init__(self, modalities: tuple[int, ...] = (0, 1), width: int = 8, hidden: int = 84) -> None:
        super().__init__()
        self.modalities = modalities
        self.towers = nn.ModuleList(tower(width) for _ in modalities)
        self.head = nn.Sequential(nn.Linear(32 * width * len(modalities), hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        seen = [tower(x[:, i : i + 1]) for i, tower in zip(self.modalities, self.towers)]
        scores: Tensor = self.head(torch.cat(seen, 1))
        return scores
