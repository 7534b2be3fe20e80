"""Norms under other names are recognised by what they compute, gated with masked statistics, cut, saved and loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import DNALPruner, load_compressed, save_compressed
from dnal_nni.modules.adapters import adapt, restore
from dnal_nni.modules.layers import PixelNorm, RMSNorm
from dnal_nni.modules.norms import ChannelNorm, ChannelRMSNorm, recognise


class LayerNorm(nn.Module):
    """ConvNeXt's, as its authors publish it: channels last or first."""

    def __init__(self, channels: int, first: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.shape, self.first = (channels,), first

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            return F.layer_norm(x, self.shape, self.weight, self.bias, 1e-6)
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RootMeanSquare(nn.Module):
    """Of the LLaMA family."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(channels)), 1e-4

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(kind)


class WithActivation(LayerNorm):
    """As timm's norms hold what follows them."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Affine(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Nearly(LayerNorm):
    """Divides by the standard deviation of a sample, as MAE's targets are."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)
        return self.weight * x + self.bias


def test_what_is_recognised() -> None:
    assert recognise(LayerNorm(16)) == (ChannelNorm, {"axis": -1, "eps": 1e-6, "normalized_shape": (16,)})
    assert recognise(LayerNorm(16, True)) == (ChannelNorm, {"axis": 1, "eps": 1e-6, "normalized_shape": (16,)})
    if RMSNorm:
        assert recognise(RootMeanSquare(8)) == (ChannelRMSNorm, {"axis": -1, "eps": 1e-4, "normalized_shape": (8,)})
    assert recognise(WithActivation(16)) == (ChannelNorm, {"axis": -1, "eps": 1e-6, "normalized_shape": (16,)})
    for other in (WithActivation(8, nn.Dropout(0.1)), WithActivation(8, nn.PReLU())):
        assert recognise(other) is None
    for other in (Affine(8), Nearly(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Sequential(LayerNorm(8))):
        assert recognise(other) is None


@pytest.mark.parametrize("make", [LayerNorm, lambda c: LayerNorm(c, True), RootMeanSquare, WithActivation])
def test_it_computes_the_same_and_comes_back(make: Callable[[int], nn.Module]) -> None:
    if make is RootMeanSquare and not RMSNorm:
        pytest.skip("torch has no RMSNorm before 2.4")
    norm = make(6)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    before, x = dict(vars(norm)), torch.randn(2, 6, 5, 6)
    expected = norm(x)
    adapt(norm, revertible=True)
    assert isinstance(norm, (ChannelNorm, ChannelRMSNorm))
    assert torch.allclose(norm(x), expected, atol=1e-6)
    restore(norm)
    assert type(norm) in (LayerNorm, RootMeanSquare, WithActivation)
    assert vars(norm).keys() == before.keys()


class Block(nn.Module):
    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), norm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    between = nn.Sequential(LayerNorm(16, True), nn.Conv2d(16, 24, 2, 2))
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), Block(16, norm), between, Block(24, norm), nn.Conv2d(24, 5, 1))


@pytest.mark.parametrize("norm", [LayerNorm, RootMeanSquare, WithActivation])
def test_a_network_of_them_loses_its_stream(norm: Callable[[int], nn.Module], tmp_path: Path) -> None:
    if norm is RootMeanSquare and not RMSNorm:
        pytest.skip("torch has no RMSNorm before 2.4")
    torch.manual_seed(0)
    net, x = network(norm), torch.randn(2, 3, 16, 16)
    pruner = DNALPruner(net, [{"op_types": ["Conv2d", "Linear"]}], dummy_input=x)
    whole = {group.name: group.frozen for group in pruner.groups if group.frozen}
    assert list(whole) == ["4"], whole  # what the network returns
    pruner.harden({name: torch.arange(gate.s.numel()) % 3 > 0 for name, gate in pruner.gates.items()})
    slim = pruner.speedup()
    assert pruner.report.relative_diff < 1e-9
    assert slim[1].norm.weight.shape == (10,)
    save_compressed(slim, tmp_path / "slim.safetensors")
    again = load_compressed(network(norm), tmp_path / "slim.safetensors")
    assert torch.equal(again.eval()(x), slim.eval()(x))
    pruner.unwrap_model()
    assert type(net[1].norm) is norm


class WithoutParameters(nn.Module):
    """StyleGAN's, over dimension 1, or another function of one number; it counts its calls."""

    def __init__(self, factor: float = 1.0, eps: float = 1e-4) -> None:
        super().__init__()
        self.factor, self.epsilon, self.calls = factor, eps, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + self.epsilon)


def test_a_pixel_norm_is_recognised_and_restored() -> None:
    net = nn.Sequential(WithoutParameters(), WithoutParameters(2.0), nn.Sequential(nn.ReLU()))
    x = torch.randn(2, 5, 4, 4)
    expected, state = net(x), torch.get_rng_state()
    adapt(net, revertible=True)
    assert type(net[0]) is PixelNorm and type(net[1]) is WithoutParameters
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net(x), expected)
    restore(net)
    assert type(net[0]) is WithoutParameters and vars(net[0]).keys() == vars(WithoutParameters()).keys()
    assert net[0].calls == 1 and net[1].calls == 2


def test_a_pixel_norm_is_cut_saved_and_loaded(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 12, 1), WithoutParameters(), nn.Conv2d(12, 4, 1))

    x = torch.randn(2, 3, 5, 5)
    net = make()
    pruner = DNALPruner(net, [{"op_types": ["Conv2d"]}], dummy_input=x)
    keep = torch.arange(12) % 3 != 0
    pruner.harden({"0": keep})
    small = pruner.speedup()
    with torch.no_grad():  # by hand: the channels that are left, normalised among themselves
        y = make()[0](x)[:, keep]
        y = y * (y.square().mean(1, keepdim=True) + 1e-4).rsqrt()
        expected = F.conv2d(y, make()[2].weight[:, keep], make()[2].bias)
    torch.testing.assert_close(small(x), expected)
    save_compressed(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(load_compressed(make(), tmp_path / "small.safetensors")(x), expected)
