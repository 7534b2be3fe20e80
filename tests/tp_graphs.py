"""What the tests of torch-pruning's graphs share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnal_nni.channels.groups import ChannelGroup, groups_of
from dnal_nni.modules.layers import kinds, set_kind
from dnal_nni.surgery.verify import verify_and_freeze

GRAPH = "torch-pruning"


class Function(nn.Module):
    """Two convolutions with a function of channels between them; the second reads what the function makes of 8."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.bn, self.function = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), function
        self.b = nn.Conv2d(function(torch.zeros(1, 8, 2, 2)).shape[1], 6, 3, 1, 1)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(torch.relu(self.bn(self.a(x))))
        return self.fc(torch.relu(self.b(x)).flatten(1))


IMAGE = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def built(model: nn.Module, x: Tensor = IMAGE, **options: object) -> "tp.DependencyGraph":
    return tp.DependencyGraph().build_dependency(model, x, verbose=False, **options)


def verified(model: nn.Module, x: Tensor, graph: object = GRAPH) -> dict[str, ChannelGroup]:
    groups = groups_of(model, x, graph)
    verify_and_freeze(model, groups, x, seconds=60)
    return {group.name: group for group in groups}


def described(groups: list[ChannelGroup]) -> list[tuple]:
    """What a group is, whatever graph it is from."""
    return [
        (
            g.name,
            g.site,
            g.norms,
            g.frozen is None,
            [(m.path, m.side, m.channels.tolist(), m.units.tolist(), m.width, m.axis) for m in g.members],
        )
        for g in groups
    ]


class PruneNormalised(tp.BasePruningFunc):
    """Of a layer with a ``width``, a ``scale`` and a ``shift``, both ``[width]``."""

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        keep = [i for i in range(layer.width) if i not in set(idxs)]
        layer.width = len(keep)
        layer.scale, layer.shift = nn.Parameter(layer.scale.data[keep]), nn.Parameter(layer.shift.data[keep])
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.width

    get_in_channels = get_out_channels


@pytest.fixture
def unregistered() -> Iterator[None]:
    before = kinds()
    yield
    for kind in kinds().keys() - before.keys():
        set_kind(kind, None)
