"""Gates on parameters that a function computes with, without a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.channels.groups import find_groups
from dnal_nni.modules.gates import ScaledSigmoidGate
from dnal_nni.surgery.inject import attach, detach
from dnal_nni.surgery.verify import verify_and_freeze

X = torch.randn(2, 3, 12, 12)


class Equalised(nn.Module):
    """StyleGAN's and ProGAN's convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.Parameter(torch.zeros(outputs))
        self.scale = (9 * inputs) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale * self.gain, self.bias, padding=1)


class Unrolled(nn.Module):
    """ISTA-Net: steps with weights in a list, forward and transposed, on one channel of image."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.there = nn.ParameterList(0.1 * torch.randn(width, 1 if i == 0 else width, 3, 3) for i in range(2))
        self.back = nn.ParameterList(0.1 * torch.randn(1 if i else width, width, 3, 3) for i in range(2))
        self.step = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1]
        y = F.conv2d(F.relu(F.conv2d(x, self.there[0], padding=1)), self.there[1], padding=1)
        y = F.conv2d(F.relu(F.conv2d(y, self.back[0], padding=1)), self.back[1], padding=1)
        return x + self.step * y


class Turned(nn.Module):
    """A linear function and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 1)
        self.up, self.w = nn.Parameter(torch.randn(10, 8, 2, 2)), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(self.stem(x).relu(), self.up, stride=2)
        return F.linear(x.relu().mean((2, 3)), self.w)


NETS = {
    "equalised": lambda: nn.Sequential(
        Equalised(3, 16), nn.LeakyReLU(0.2), Equalised(16, 24), nn.LeakyReLU(0.2), Equalised(24, 1)
    ),
    "equalised among layers": lambda: nn.Sequential(
        Equalised(3, 16), nn.LeakyReLU(0.2), nn.Conv2d(16, 24, 3), nn.LeakyReLU(0.2), Equalised(24, 2)
    ),
    "unrolled": Unrolled,
    "turned": Turned,
}
WIDTHS = {"equalised": [16, 24], "equalised among layers": [16, 24], "unrolled": [12, 12, 12], "turned": [8, 10]}


@pytest.mark.parametrize("name", NETS)
def test_layers_without_a_module_are_cut(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().double()
    groups = find_groups(net, X.double())
    verify_and_freeze(net, groups, X.double(), 60)
    assert [group.channels for group in groups if group.frozen is None] == WIDTHS[name]


def test_gates_on_bare_parameters_come_and_go() -> None:
    net = NETS["equalised"]()
    groups = [group for group in find_groups(net, X) if group.frozen is None]
    before, parameters, expected = list(net.state_dict()), dict(net.named_parameters()), net(X)
    gates = {group.name: ScaledSigmoidGate(group.channels) for group in groups}
    attach(net, groups, gates)
    keep = torch.arange(16) % 3 > 0
    gates["0.weight"].harden(keep)
    closed = F.conv2d(
        net[:2](X)[:, keep], net[2].scale * parameters["2.weight"][:, keep], parameters["2.bias"], padding=1
    )
    assert torch.allclose(net[:3](X), closed, atol=1e-6)
    detach(net)
    assert list(net.state_dict()) == before and torch.equal(net(X), expected)
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    assert {type(module) for module in net} == {Equalised, nn.LeakyReLU}


def test_a_network_without_layers_is_searched_and_meets_its_budget() -> None:
    torch.manual_seed(0)
    net = NETS["equalised"]()
    before = measure(net, X).flops
    pruner = DNALPruner(net, [{"op_types": ["Equalised"]}], dummy_input=X, budget=Budget(flops=0.4))
    with pruner.search(20, progress=False) as search:
        for _ in range(20):
            search.step(net(X).square().mean())
    slim = pruner.speedup()
    assert measure(slim, X).flops == pytest.approx(0.4 * before, rel=0.05)
    assert pruner.report.relative_diff < 1e-9 and slim[0].weight.shape[0] < 16


class Borrowed(nn.Module):
    """BEiT reads the weight of a linear layer by itself; here it is large: the proof does not hold it in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 320), nn.Linear(320, 320), nn.Linear(320, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.linear(self.a(x).relu(), self.b.weight, self.b.bias).relu())


def test_large_weights_that_are_read_by_themselves() -> None:
    net, x = Borrowed(), torch.randn(2, 3)
    groups = find_groups(net, x)
    verify_and_freeze(net, groups, x, 60)
    assert [group.frozen for group in groups] == [None, None, "the model returns these channels"]
