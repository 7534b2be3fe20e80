"""What one run of a model says of its layers."""

import torch
from torch import Tensor, nn

from dnal_nni.channels.groups import find_groups

X = torch.randn(2, 3, 12, 12)


class TwoNames(nn.Module):
    """As DynUNet registers its blocks: by name, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3)
        self.features = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, nn.ReLU())
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def reasons(net: nn.Module) -> dict[str, str | None]:
    return {group.name: group.frozen for group in find_groups(net, X)}


def test_a_module_under_two_names_is_no_tie() -> None:
    assert reasons(TwoNames()) == {"conv1": None, "conv2": None, "fc": "the model returns these channels"}


def test_a_module_twice_in_a_container_is_one_layer() -> None:
    shared = nn.Conv2d(16, 16, 3)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Conv2d(16, 4, 1))
    (first,) = (group for group in find_groups(net, X) if group.frozen is None)
    assert {member.path for member in first.members} == {"0", "2", "6"}


def test_a_weight_of_two_modules_is_a_tie() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    net[2].weight = net[1].weight
    assert reasons(net)["1"] == "the weights of 1 are tied to another layer"


def test_a_single_channel_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 1))
    assert reasons(net) == {"0": None, "2": "it has a single channel"}
