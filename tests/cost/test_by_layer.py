"""FLOPs layer by layer, against products written by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni.cost.by_layer import layer_flops
from dnal_nni.cost.count import measure


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
    found = layer_flops(wide, narrow, x)
    conv = {"body.0": (16 * 3 * 8, 16 * 3 * 6), "body.2": (16 * 8 * 8, 16 * 6 * 6)}
    assert {path: found[path] for path in conv} == conv
    assert found["last"] == (8 * 5, 0)
    assert found[""][0] >= 8 * 8 and "body" not in found
    for i, model in enumerate((wide, narrow)):
        assert sum(pair[i] for pair in found.values()) == measure(model, x).flops
