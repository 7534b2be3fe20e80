"""FLOPs layer by layer, against products written by hand; bytes, against files."""

from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import CONV
from safetensors.torch import load_file
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner, save_compressed
from dnal_nni.cost.count import flops_by_module, measure
from dnal_nni.cost.sizes import layer_flops, tensor_bytes


class Mixed(nn.Module):
    """Layers at two depths, and a product of its own."""

    def __init__(self, width: int, last: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.last = nn.Linear(width, 5) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        return self.last(F.linear(x, torch.eye(x.shape[1])))


def test_each_layer_has_its_own_and_together_they_are_all() -> None:
    x = torch.randn(1, 3, 4, 4)
    wide, narrow = Mixed(8), Mixed(6, last=False)
    found = layer_flops(*(flops_by_module(model, x) for model in (wide, narrow)))
    conv = {"body.0": (16 * 3 * 8, 16 * 3 * 6), "body.2": (16 * 8 * 8, 16 * 6 * 6)}
    assert {path: found[path] for path in conv} == conv
    assert found["last"] == (8 * 5, 0)
    assert found[""][0] >= 8 * 8 and "body" not in found
    for i, model in enumerate((wide, narrow)):
        assert sum(pair[i] for pair in found.values()) == measure(model, x).flops


def test_bytes_are_those_of_a_file_with_gates_or_without(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    small.tied = small.stem  # type: ignore[assignment]
    small.register_buffer("constants", torch.ones(3, dtype=torch.float16))
    plain = tensor_bytes(small)
    save_compressed(small, tmp_path / "dense")
    assert plain == sum(t.nbytes for t in load_file(tmp_path / "dense").values())
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    assert tensor_bytes(small) == plain
    pruner.harden({"conv1": torch.arange(8) < 5})
    slim = pruner.speedup()
    save_compressed(slim, tmp_path / "slim")
    assert tensor_bytes(slim) == sum(t.nbytes for t in load_file(tmp_path / "slim").values()) < plain
    report = pruner.report
    assert report.file_bytes == (plain, tensor_bytes(slim))
    before, after = (sum(pair[i] for pair in report.layer_flops.values()) for i in (0, 1))
    assert (before, after) == (report.before.flops, report.after.flops)
    assert report.layer_flops["conv1"] == (4 * 12 * 8 * 9 * 64, 4 * 12 * 5 * 9 * 64)  # a batch of 4
