"""Pruning functions of torch-pruning, for layers of a user's own: cut by them, and then by our own graph."""

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from tp_graphs import IMAGE, Function, PruneNormalised, built, unregistered, verified

from dnal_nni.modules.layers import kinds
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep


class Normalised(nn.Module):
    """Every place divided by its length over the channels, then scaled: torch-pruning's example of a custom layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().cumsum(1).amax(1, keepdim=True).sqrt().clamp(min=1e-3) * self.scale + self.shift


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.middle = Normalised(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(torch.relu(self.fc2(torch.relu(self.fc1(x))))))


@pytest.mark.usefixtures(unregistered.__name__)
def test_a_layer_is_cut_by_the_function_that_the_graph_has_for_it_and_then_by_ours() -> None:
    model, x = Dense(), torch.randn(4, 8)
    assert "runs over the channels in Normalised.forward" in (verified(model, x, None)["fc2"].frozen or "")
    graph = built(model, x, customized_pruners={Normalised: PruneNormalised()})
    for source in (graph, None):  # once it is known, our own graph reads the layer as one too
        groups = verified(model, x, source)
        assert groups["fc2"].frozen is None
        assert {m.path for m in groups["fc2"].members} == {"fc2", "middle", "fc3"}
        slim = slim_copy(model, list(groups.values()), random_keep(list(groups.values())))
        assert slim.middle.width == slim.middle.scale.numel() == slim.fc2.out_features == slim.fc3.in_features < 16


@pytest.mark.usefixtures(unregistered.__name__)
def test_a_function_that_cuts_the_wrong_channels_is_found_out() -> None:
    class Wrong(PruneNormalised):
        def prune_out_channels(self, layer: Normalised, idxs: list[int]) -> nn.Module:
            return super().prune_out_channels(layer, [layer.width - 1 - i for i in idxs])

        prune_in_channels = prune_out_channels

    model, x = Dense(), torch.randn(4, 8)
    groups = verified(model, x, built(model, x, customized_pruners={Normalised: Wrong()}))
    assert "would change the output" in (groups["fc2"].frozen or "")
    assert groups["fc1"].frozen is None


def test_torchs_own_layers_keep_their_records() -> None:
    class Mine(tp.pruner.function.ConvPruner):
        pass

    model = Function(torch.relu)
    groups = verified(model, IMAGE, built(model, customized_pruners={nn.Conv2d: Mine()}))
    assert nn.Conv2d not in kinds()
    assert groups["a"].frozen is None


@pytest.mark.usefixtures(unregistered.__name__)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_channels_of_a_users_layer_lie_along_any_axis(axis: int) -> None:
    class Placed(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            x = x.movedim(axis, -1)
            return (x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-3) * self.scale).movedim(-1, axis)

    class Moved(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Placed(16)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.fc2(torch.relu(self.fc1(x))))
            return self.fc3(self.middle(x.view(len(x), 1, 1, -1).movedim(-1, axis)).flatten(1))

    model, x = Moved(), torch.randn(4, 8)
    groups = verified(model, x, built(model, x, customized_pruners={Placed: PruneNormalised()}))
    assert groups["fc2"].frozen is None
    assert {m.path for m in groups["fc2"].members} == {"fc2", "middle", "fc3"}
