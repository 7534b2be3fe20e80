"""Layers that are cut by a user's functions: what is found out about them, cut, saved, loaded, counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, measure, register_layer, save_compressed
from dnal_nni.channels.groups import groups_of
from dnal_nni.modules.functions import FunctionLayer
from dnal_nni.modules.layers import layer_of
from dnal_nni.surgery.verify import verify_and_freeze


class Block(nn.Module):
    """A convolution inside of a module that mixes by means that no rule follows, with numbers of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sizes, self.name = [inputs, outputs], "block"
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.linalg.qr(torch.ones(2, 2) + torch.eye(2)).Q  # nothing to do with channels
        y = self.conv(x).unflatten(0, (-1, 2)).movedim(1, -1)
        return torch.linalg.multi_dot([y.flatten(0, -2), basis, basis.T]).view(y.shape).movedim(-1, 1).flatten(
            0, 1
        ) + self.shift.view(-1, 1, 1)


class PruneBlock:
    """In torch-pruning's form, without torch-pruning."""

    def prune_out_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.sizes[1]) if i not in idxs]
        layer.conv.weight = nn.Parameter(layer.conv.weight.data[keep])
        layer.conv.bias = nn.Parameter(layer.conv.bias.data[keep])
        layer.shift = nn.Parameter(layer.shift.data[keep])
        layer.sizes[1] = len(keep)
        return layer

    def prune_in_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.sizes[0]) if i not in idxs]
        layer.conv.weight = nn.Parameter(layer.conv.weight.data[:, keep])
        layer.sizes[0] = len(keep)
        return layer

    def get_out_channels(self, layer: Block) -> int:
        return layer.sizes[1]

    def get_in_channels(self, layer: Block) -> int:
        return layer.sizes[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()), Block(16, 24)
        self.norm, self.last = nn.BatchNorm2d(24), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.block(self.stem(x))))).mean((2, 3))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registered() -> Iterator[None]:
    undo = register_layer(Block, functions=PruneBlock())
    yield
    undo()
    assert layer_of(Block(2, 2)) is None


@pytest.mark.usefixtures("registered")
def test_what_the_functions_do_is_found_by_trying() -> None:
    block = Block(6, 8)
    layer = layer_of(block)
    assert isinstance(layer, FunctionLayer)
    assert layer.sides == ["in", "out"] and layer.widths(block) == {"in": 6, "out": 8}
    assert layer.dims(block, "conv.weight") == {"out": 0, "in": 1}
    assert layer.dims(block, "shift") == layer.dims(block, "conv.bias") == {"out": 0}
    assert list(layer.weights(block)) == ["conv.weight"] and layer.vectors(block, "out") == 16
    assert layer.moves(block) == {"in", "out"} and layer.numbers(block)["sizes"] == [6, 8]
    assert block.sizes == [6, 8] and block.conv.weight.shape == (8, 6, 3, 3)  # on copies


@pytest.mark.usefixtures("registered")
def test_a_cut_keeps_what_is_trained_and_the_sizes_of_layers_inside() -> None:
    block = Block(6, 8).eval()
    block.shift.requires_grad_(False)
    whole = block.conv.weight.detach().clone()
    layer = layer_of(block)
    assert layer is not None
    keep_in, keep_out = torch.arange(6) != 2, torch.arange(8) % 2 == 0
    layer.cut(block, {"in": keep_in, "out": keep_out})
    assert torch.equal(block.conv.weight, whole[keep_out][:, keep_in])
    assert (block.conv.in_channels, block.conv.out_channels) == (5, 4)
    assert not block.shift.requires_grad and block.conv.weight.requires_grad and not block.training


@pytest.mark.usefixtures("registered")
def test_it_is_searched_cut_saved_loaded_and_counted(tmp_path: Path) -> None:
    net = Net()
    config = [{"op_types": ["Conv2d"]}, {"op_names": ["block"]}]
    pruner = DNALPruner(net, config, dummy_input=X, budget=Budget(flops=0.4))
    assert {g.name: g.frozen is None for g in pruner.groups} == {"stem.0": True, "block": True, "last": False}
    with pruner.search(4, progress=False) as search:
        for _ in range(4):
            search.step(net(X).square().mean())
    slim = pruner.speedup()
    left = slim.block.sizes
    assert list(slim.block.conv.weight.shape[:2]) == left[::-1] and sum(left) < 40
    assert pruner.report.after.flops == measure(slim, X).flops == pytest.approx(0.4 * measure(Net(), X).flops, rel=0.1)
    save_compressed(slim, tmp_path / "slim.safetensors")
    again = load_compressed(Net(), tmp_path / "slim.safetensors")
    assert again.block.sizes == left and again.block.conv.in_channels == left[0]
    assert torch.equal(again.eval()(X), slim.eval()(X))


def test_the_file_needs_no_functions_to_be_loaded(tmp_path: Path) -> None:
    undo = register_layer(Block, functions=PruneBlock())
    try:
        pruner = DNALPruner(Net(), [{"op_types": ["Conv2d"]}, {"op_names": ["block"]}], dummy_input=X)
        pruner.harden({"stem.0": torch.arange(16) < 9, "block": torch.arange(24) % 2 == 0})
        slim = pruner.speedup()
        save_compressed(slim, tmp_path / "slim.safetensors")
    finally:
        undo()
    again = load_compressed(Net(), tmp_path / "slim.safetensors")
    assert again.block.sizes == [9, 12]
    assert torch.equal(again.eval()(X), slim.eval()(X))


def frozen(functions: Any) -> str:
    undo = register_layer(Block, functions=functions)
    try:
        net = Net()
        groups = groups_of(net, X)
        verify_and_freeze(net, groups, X, seconds=60)
        return next(g.frozen for g in groups if g.name == "block") or ""
    finally:
        undo()


def test_functions_that_do_something_else_leave_the_layer_whole() -> None:
    class Backwards(PruneBlock):
        def prune_out_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
            return super().prune_out_channels(layer, [layer.sizes[1] - 1 - i for i in idxs])

    class Lazy(PruneBlock):
        def prune_out_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
            return layer

    class Renames(PruneBlock):
        def prune_out_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
            layer.name = "narrow block"
            return super().prune_out_channels(layer, idxs)

    class Raises(PruneBlock):
        def prune_out_channels(self, layer: Block, idxs: Sequence[int]) -> nn.Module:
            raise RuntimeError("only pairs can go")

    assert "would change the output" in frozen(Backwards())
    assert "Lazy leaves 24 channels, not" in frozen(Lazy())
    assert "Renames changes name, which is no number of channels: it could not be saved" in frozen(Renames())
    assert "only pairs can go" in frozen(Raises())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": PruneBlock}, "functions=PruneBlock is a class: pass an object of it"),
        ({"functions": object()}, r"has no prune_out_channels\(\)"),
        ({"functions": PruneBlock(), "sizes": {"a": "in"}}, "give tensors and sizes, or functions, not both"),
    ],
)
def test_what_are_no_functions_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DNALError, match=message):
        register_layer(Block, **arguments)
