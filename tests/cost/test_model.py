"""The cost model at 0/1 gates is fvcore's count of the cut network."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.channels.groups import groups_of
from dnal_nni.cost.model import CostModel
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze


class Gated(nn.Module):
    """Functional convolutions with the module's own parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(outputs, inputs, 3) * 0.1)
        self.w2 = nn.Parameter(torch.randn(outputs, inputs, 5) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w1, padding=1) * torch.sigmoid(F.conv1d(x, self.w2, padding=2))


def gated() -> nn.Module:
    first = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(first, Gated(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 3, 1))


class Recognition(nn.Module):
    """A CRNN."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
        self.rnn, self.fc = nn.LSTM(24, 16, bidirectional=True, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.cnn(x).mean(2).transpose(1, 2))[0])


class Pyramid(nn.Module):
    """Functional pooling and resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.inner, self.last = nn.Conv2d(16, 12, 1), nn.Conv2d(28, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.inner(F.adaptive_avg_pool2d(x, 4)) + self.inner(F.adaptive_avg_pool2d(x, 1))
        return self.last(torch.cat([x, F.interpolate(y, size=x.shape[2:], mode="bilinear")], 1))


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1, times a gain; the cut network has them as numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, self.gain, training=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, self.stride, self.padding)


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 24), nn.ReLU(), Standardised(24, 48), nn.ReLU(), nn.Conv2d(48, 4, 1))


class CrossCovariance(nn.Module):
    """Attention between channels (XCiT): heads go whole, and both factors of a product say which."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        qkv = self.qkv(x).reshape(batch, places, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.permute(0, 3, 1, 2).flatten(2))


def cross_covariance() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), CrossCovariance(32, 4), nn.Linear(32, 5))


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=5)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 40, 48, num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "functional convolutions": (gated, (2, 4, 20)),
    "recurrent": (Recognition, (2, 1, 12, 16)),
    "pooling and resizing": (Pyramid, (2, 3, 8, 8)),
    "standardised weights": (standardised, (2, 3, 4, 4)),
    "attention between channels": (cross_covariance, (2, 10, 6)),
    "swin": (swin, (2, 3, 32, 32)),
    "vit": (vit, (2, 3, 32, 32)),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_at_a_random_cut_and_with_one_unit_left(name: str) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    groups = groups_of(net, x)
    verify_and_freeze(net, groups, x, 60)
    model = CostModel(net, groups, x)
    one = {group.name: torch.arange(group.channels) < group.least for group in model.active}
    for keep in (random_keep(groups), one):
        size = measure(slim_copy(net, groups, keep), x)
        g = torch.cat([keep[group.name] for group in model.active]).double()
        assert float(model.flops(g)) == pytest.approx(size.flops, rel=1e-6)
        assert float(model.params(g)) == pytest.approx(size.params, rel=1e-6)
    assert size.flops < 0.15 * model.dense.flops


@pytest.mark.parametrize("name", ["functional convolutions", "swin", "recurrent"])
@pytest.mark.parametrize("budget", [0.5, 0.3])
def test_budgets_are_accepted_and_hit(name: str, budget: float) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    types = sorted({type(m).__name__ for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear, Gated))})
    pruner = DNALPruner(net, [{"op_types": types}], dummy_input=x, budget=Budget(flops=budget))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with pruner.search(10, optimizer=optimizer, progress=False) as search:
        for _ in range(10):
            search.step(net(x).square().mean())
    slim = pruner.speedup()
    assert measure(slim, x).flops / measure(build(), x).flops == pytest.approx(budget, rel=0.01)
