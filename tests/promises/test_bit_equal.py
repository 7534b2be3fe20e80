"""Searches find what they found: the structure of three networks, as it was when this test was written.

The seed decides; no rewriting of the package may. A change of the *method* changes these numbers: say so in CHANGELOG.
Two are the same on every processor, and are held by checksum. Of ResNet-18, sixteen steps make what processors
round differently into other structures, a few units apart: its widths are held, and that two runs are one, bit for bit.
"""

import zlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dnal_nni import Budget, DNALPruner

KINDS = [{"op_types": ["Conv2d", "Linear"]}]


def mixed() -> nn.Module:
    """Group norm, a grouped and a depthwise convolution, a concat."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.SiLU())
            grouped = nn.Conv2d(16, 24, 3, 1, 1, groups=4, bias=False)
            self.grouped = nn.Sequential(grouped, nn.BatchNorm2d(24), nn.ReLU())
            self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
            self.last = nn.Conv2d(40, 32, 1)
            self.fc = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = torch.cat([self.grouped(x), self.depthwise(x)], 1)
            return self.fc(torch.relu(self.last(x)).mean((2, 3)))

    return Mixed()


WIDTHS = [50, 43, 47, 79, 86, 82, 153, 178, 178, 322, 357, 366]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, object], int | list[int]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), {"budget": Budget(flops=0.5)}, WIDTHS),
    "mixed": (mixed, {"budget": Budget(flops=0.45, params=0.6)}, 494571068),
    "paper": (mixed, {"preset": "paper", "lambda_": 0.02, "arch_lr": 1.0}, 1997572403),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def searched(name: str) -> tuple[DNALPruner, nn.Module]:
    """The pruner after 16 steps, and the cut network."""
    build, settings, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    x, y = torch.randn(8, 3, 32, 32).double(), torch.randint(0, 10, (8,))
    pruner = DNALPruner(model, KINDS, dummy_input=x[:2], **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.01) if name != "paper" else None
    with pruner.search(16, optimizer=optimizer, progress=False) as search:
        for _ in range(16):
            search.step(F.cross_entropy(model(x), y))
    return pruner, pruner.speedup()


def structure(slim: nn.Module) -> int:
    """Of the shapes of all tensors."""
    return zlib.crc32(repr([(name, tuple(t.shape)) for name, t in slim.state_dict().items()]).encode())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_search_finds_what_it_found(name: str) -> None:
    pruner, slim = searched(name)
    keep = [gate.mask for gate in pruner.gates.values()]
    units = torch.cat(keep)
    assert 0 < int(units.sum()) < len(units)
    pinned = NETWORKS[name][2]
    if isinstance(pinned, list):
        assert [int(mask.sum()) for mask in keep] == pytest.approx(pinned, rel=0.05, abs=3)
        again, twin = searched(name)
        assert torch.equal(units, torch.cat([gate.mask for gate in again.gates.values()]))
        assert all(map(torch.equal, slim.state_dict().values(), twin.state_dict().values()))
    else:
        found = zlib.crc32(units.numpy().tobytes()) ^ structure(slim)
        assert found == pinned, f"{name}: {found}"
