"""Networks that the tests share."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dnal_nni.report.record import GroupReport, Report

# their modules are not part of the package
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "benchmarks")]

CONV = [{"op_types": ["Conv2d"]}]


class Small(nn.Module):
    """A residual block between two convolutions, on 8x8 images; 12 + 8 + 16 channels that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(12, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Odd(nn.Module):
    """A computed weight, tied layers, and a buffer of one entry a channel that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.d.weight = self.c.weight
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x)) * self.scale.view(-1, 1, 1)))
        return self.d(torch.tanh(self.c(y.mean((2, 3)))))


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """No test, and no module that tests import, leaves torch other than it was for the next one."""
    yield
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def made() -> tuple[Tensor, Tensor]:
        return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)

    return [made() for _ in range(8)]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the modules `mynets` and `mydata`."""
    from cli_tools import DATA, NETS

    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "mydata.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("mynets", "mydata"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def report() -> Report:
    """Of a search, with everything that a report can have."""
    from dnal_nni import Budget, DNALPruner

    torch.manual_seed(0)
    model, images, labels = Small(), torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    pruner = DNALPruner(model, CONV, dummy_input=images, budget=Budget(flops=0.5))
    with pruner.search(250, progress=False) as search:
        for _ in range(250):
            search.step(F.cross_entropy(model(images), labels))
    pruner.speedup()
    report = pruner.report
    report.accuracy, report.accuracy_cut, report.latency_ms = (90.0, 89.5), 71.25, (2.0, 1.0)
    report.file_bytes, report.notes = (15200, 7700), ["Something & more."]
    report.after = dataclasses.replace(report.after, uncounted=("fft_rfft", "Odd"))
    report.layer_flops = {"stem": (55296, 27648), "fc <b>": (1280, 640)}
    report.command = "dnal compress <script>alert(1)</script>"
    report.groups.append(GroupReport("odd & <b>", 3, 3, "input", 1, "because a < b"))
    return report
