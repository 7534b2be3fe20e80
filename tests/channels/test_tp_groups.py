"""Our groups as torch-pruning's: the items that its own graph has, and what only ours has."""

from collections.abc import Iterator

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from dnal_nni import register_layer
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.channels.tp_groups import dependency_groups, roots


def open_groups(model: nn.Module, x: Tensor) -> list[ChannelGroup]:
    return [g for g in find_groups(model, x) if g.frozen is None]


def layers_of(group: "tp.Group") -> dict[tuple[nn.Module, str], dict[int, int]]:
    """By layer and function, the root's place of every channel; operations left out."""
    return {
        (item.dep.target.module, item.dep.handler.__name__): dict(zip(item.idxs, item.root_idxs))
        for item in group
        if not type(item.dep.target.module).__name__.startswith("_")
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1"])
def test_items_are_those_of_torch_prunings_own_graph(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    groups = open_groups(model, x)
    for group, ours in zip(groups, dependency_groups(model, groups)):
        root = ours[0].dep.target.module
        assert root is model.get_submodule(group.producers[0])
        assert ours[0].idxs == ours[0].root_idxs == list(range(group.width))
        function = graph.get_pruner_of_module(root).prune_out_channels
        assert layers_of(ours) == layers_of(graph.get_pruning_group(root, function, list(range(group.width))))
        assert ours[0].dep.handler == function


class Slices(nn.Module):
    """Two groups in one layer; units of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1)
        self.glu, self.fc = nn.Conv2d(5, 12, 1), nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.conv(x).split([3, 5], 1)
        gate, value = self.glu(self.one(one) + self.other(other)).chunk(2, 1)
        return self.fc((gate.sigmoid() * value).flatten(1))


def test_groups_of_a_part_of_a_layer_and_units_of_several_channels() -> None:
    model = Slices()
    groups = {g.name: g for g in open_groups(model, torch.randn(1, 3, 2, 2))}
    made = dict(zip(groups, dependency_groups(model, list(groups.values()))))
    part = made["conv[3:]"]
    assert part[0].idxs == [3, 4, 5, 6, 7] and part[0].root_idxs == [0, 1, 2, 3, 4]
    glu = made["glu"]
    assert roots(model, groups["glu"])[0].units.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert glu[0].root_idxs == list(range(12))
    flat = glu[1]
    assert flat.dep.target.module is model.fc
    # 4 columns of unit 0: two go with its first channel of the root, two with the other one
    assert flat.root_idxs[:8] == [0, 0, 6, 6, 1, 1, 7, 7]


def test_criteria_and_pruning_work_on_them() -> None:
    model = Slices()
    groups = open_groups(model, torch.randn(1, 3, 2, 2))
    made = {g.name: group for g, group in zip(groups, dependency_groups(model, groups))}
    assert tp.importance.RandomImportance()(made["glu"]).shape == (12,)
    group = made["conv[0:]"]
    assert not vars(group)["_DG"].check_pruning_group(group)  # all that `one` reads
    group[0].dep([1]), group[1].dep([1])
    assert model.conv.out_channels == 7 and model.one.in_channels == 2
    assert "conv" in str(group)


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.weight = 6, nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,c->bchw", x, self.weight)


class Odd(nn.Module):
    """What torch-pruning has no functions for: a kind of a user's, an RMS norm, a buffer; and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.filter, self.last = nn.Conv2d(3, 6, 1), Filter(), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.register_buffer("shift", torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.filter(self.conv(x)) * self.scale + self.shift).mean((2, 3)))


@pytest.fixture
def registered() -> Iterator[None]:
    undo = register_layer(Filter, {"weight": {"both": 0}}, {"width": "both"})
    yield
    undo()


@pytest.mark.usefixtures("registered")
def test_what_torch_pruning_does_not_know_is_there_too() -> None:
    model = Odd()
    groups = open_groups(model, torch.randn(2, 3, 4, 4))
    (group,) = dependency_groups(model, groups)
    targets = {item.dep.target.module: item for item in group}
    assert targets.keys() == {model.conv, model.filter, model.last, model.scale}
    assert targets[model.scale].dep.target.pruning_dim == 0
    assert vars(group)["_DG"].get_out_channels(model.filter) == 6
    targets[model.filter].dep([0, 2])
    assert model.filter.width == 4 and model.filter.weight.shape == (4,)
