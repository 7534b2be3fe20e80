"""Gated equals sliced, and the cost model equals fvcore's count of the sliced network."""

import copy
import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cifar_models import MODELS
from torch import nn

from dnal_nni import measure
from dnal_nni.channels.groups import find_groups
from dnal_nni.cost.model import CostModel
from dnal_nni.surgery.compare import difference
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import hard_gated_copy, random_keep, verify_and_freeze

ZOO = {
    **{name: (lambda build=build: build(10, 1.0), 32) for name, build in MODELS.items()},
    **{
        name: (lambda name=name: getattr(torchvision.models, name)(weights=None), 64)
        for name in ("resnet18", "resnet50", "densenet121", "efficientnet_b0")
    },
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 64),
}


def randomise_norms(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


class Returns(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values


@pytest.mark.parametrize(
    "a, b, gap",
    [
        ((1.0, 2.0), (1.0, 2.5), 0.5),
        ((1.0, math.nan), (1.0, math.nan), 0.0),
        ((1.0, math.inf), (1.5, math.inf), 0.5),
        ((1.0, math.nan), (1.0, 2.0), math.inf),
        ((1.0, math.inf), (1.0, -math.inf), math.inf),
        ((math.nan,), (math.nan,), math.inf),  # nothing was compared
    ],
)
def test_what_is_not_finite_must_be_the_same(a: tuple[float, ...], b: tuple[float, ...], gap: float) -> None:
    largest = max((abs(value) for value in a if math.isfinite(value)), default=1.0)
    assert difference(Returns(*a), Returns(*b), torch.zeros(1)) == (gap, gap / largest)


class FailsInTraining(nn.Module):
    """Like the Inceptions with a small image: the auxiliary head of train mode does not take it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.head(y).mean() if self.training else y


def test_a_train_mode_that_fails_moves_no_statistics() -> None:
    model, x = FailsInTraining(), torch.randn(4, 3, 4, 4) + 1
    assert difference(model, copy.deepcopy(model), x) == (0.0, 0.0)


@pytest.mark.parametrize("name", ZOO)
def test_gated_equals_sliced_and_costs_what_the_model_says(name: str) -> None:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build()
    randomise_norms(model)
    x = torch.randn(2, 3, size, size)
    groups = find_groups(model, x)
    assert [g.name for g in groups if g.frozen] == [groups[-1].name]  # the classifier alone stays whole
    assert "returns" in (groups[-1].frozen or "")
    cost = CostModel(model, groups, x)
    model.double()
    for seed in range(2):
        keep = random_keep(groups, fraction=0.5, seed=seed)
        slim = slim_copy(model, groups, keep)
        _, gap = difference(hard_gated_copy(model, groups, keep), copy.deepcopy(slim), x.double())
        assert gap < 1e-10
        counted = measure(slim, x.double())
        g = torch.cat([keep[group.name] for group in cost.active]).double()
        assert float(cost.flops(g)) == pytest.approx(counted.flops, rel=1e-3)
        assert float(cost.params(g)) == pytest.approx(counted.params, rel=1e-9)
        assert counted.flops < 0.5 * cost.dense.flops


class Sigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(self.bn(self.a(x))))


class ChannelMean(Sigmoid):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.a(x)))
        return self.b(y - y.mean(1, keepdim=True))


class Reshape(Sigmoid):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.a(x))
        return self.b(y.view(x.shape[0], 8, *y.shape[2:]))


class SigmoidNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(super().forward(x))


class HiddenSigmoid(Sigmoid):
    def __init__(self) -> None:
        super().__init__()
        self.bn = SigmoidNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.bn(self.a(x)))


@pytest.mark.parametrize(
    ("model", "site", "frozen"),
    [
        (Sigmoid, "input", ""),
        (ChannelMean, "", "mean runs over the channels in ChannelMean.forward"),
        (Reshape, "", r"does not run without some of its channels \(shape .* in Reshape.forward\)"),
        (HiddenSigmoid, "input", ""),
    ],
)
def test_what_is_not_exact_moves_its_gate_or_is_left_whole(model: type[nn.Module], site: str, frozen: str) -> None:
    torch.manual_seed(0)
    net, x = model(), torch.randn(2, 3, 9, 9)
    groups = find_groups(net, x)
    assert model is not HiddenSigmoid or groups[0].site == "norm"  # only a comparison can tell
    verify_and_freeze(net, groups, x, seconds=60)
    if site:
        assert groups[0].site == site and groups[0].frozen is None
    else:
        assert re.search(frozen, groups[0].frozen or "")


def test_state_is_carried_over(small: nn.Module, x: torch.Tensor) -> None:
    small.to(memory_format=torch.channels_last).eval()
    small.conv1.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    groups = find_groups(small, x)
    slim = slim_copy(small, groups, random_keep(groups))
    assert not slim.training and not slim.conv1.weight.requires_grad and slim.conv2.weight.requires_grad
    assert slim.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert slim.conv1.in_channels == slim.stem.out_channels < 12


class Picks(nn.Module):
    """Two convolutions, a function that takes channels by their place, and a layer that reads what it takes."""

    def __init__(self, channels: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), function
        self.head = nn.Linear(function(torch.zeros(1, channels, 2, 2)).shape[1], 3)
        self.whole = nn.Linear(channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(self.function(x).mean((2, 3))) + self.whole(x.mean((2, 3)))


PLACES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other": lambda x: x[:, ::2],
    "all but the first": lambda x: x[:, 1:],
    "first two": lambda x: x[:, :2],
    "first half": lambda x: x[:, : x.shape[1] // 2],
    "halves swapped": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "chunks swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "halves added": lambda x: x[:, : x.shape[1] // 2] + x[:, -(x.shape[1] // 2) :],
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "pick": lambda x: x.index_select(1, torch.tensor([1, 0])),
    "last": lambda x: x[:, -1:],
    "shuffle": lambda x: F.channel_shuffle(x, 2) if x.shape[1] % 2 == 0 else x,
    "tile": lambda x: x.repeat(1, 2, 1, 1),
    "unflatten": lambda x: x.reshape(len(x), -1, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    if x.shape[1] % 2 == 0
    else x,
}


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("name", PLACES)
def test_small_groups_are_exact_for_every_mask(name: str, channels: int) -> None:
    torch.manual_seed(0)
    net, x = Picks(channels, PLACES[name]).double(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    groups = find_groups(net, x)
    verify_and_freeze(net, groups, x, seconds=60)
    active = [g for g in groups if g.frozen is None]
    for chosen in itertools.product(*(list(itertools.product([True, False], repeat=g.channels))[:-1] for g in active)):
        keep = {g.name: torch.tensor(mask) for g, mask in zip(active, chosen)}
        gated, slim = hard_gated_copy(net, groups, keep), slim_copy(net, groups, keep)
        assert difference(gated, slim, x)[1] < 1e-9, (keep, [(g.name, g.frozen) for g in groups])
