"""What fvcore counts, beside the formula by hand, and what it cannot count."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from dnal_nni import DNALError, measure
from dnal_nni.cost.count import count


def flops(model: nn.Module, *inputs: Any) -> int:
    return measure(model, inputs).flops


def test_what_fvcore_counts_by_itself_is_its_number() -> None:
    model, x = torchvision.models.mobilenet_v3_small(num_classes=4).eval(), torch.randn(2, 3, 64, 64)
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    found = count(model, x)
    assert found.flops == {path: n for path, n in analysis.by_module().items()}
    assert found.uncounted == ()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(64, 32, batch_first=True), 10 * 4 * 32 * (64 + 32)),
        (nn.LSTM(64, 32, 2, bidirectional=True, batch_first=True), 10 * 8 * 32 * (64 + 32 + 64 + 32)),
        (nn.GRU(64, 32, bias=False, batch_first=True), 10 * 3 * 32 * (64 + 32)),
        (nn.RNN(64, 32, batch_first=True), 10 * 32 * (64 + 32)),
    ],
)
def test_recurrent_layers(layer: nn.Module, expected: int) -> None:
    assert flops(layer, torch.randn(2, 5, 64)) == expected


@pytest.mark.parametrize(
    ("cell", "gates"), [(nn.LSTMCell(6, 4), 4), (nn.GRUCell(6, 4, bias=False), 3), (nn.RNNCell(6, 4), 1)]
)
def test_cells(cell: nn.Module, gates: int) -> None:
    assert flops(cell, torch.randn(3, 6)) == 3 * gates * 4 * (6 + 4)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_fused_attention() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    assert flops(Attention(), q, k, v) == 2 * 3 * 5 * 7 * (8 + 4)


def test_deformable_convolutions_and_bilinear_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torchvision.ops.DeformConv2d(16, 24, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, x.new_zeros(2, 18, 12, 12))

    assert flops(Net(), torch.randn(2, 16, 12, 12)) == 2 * 16 * 24 * 9 * 144
    assert flops(nn.Bilinear(3, 4, 5), torch.randn(2, 3), torch.randn(2, 4)) == 2 * 3 * 4 * 5


def test_attention_is_counted_whether_or_not_it_may_take_its_fast_path() -> None:
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 9, 16)
    by_hand = 2 * 9 * (16 * 48 + 16 * 16) + 2 * 2 * 9 * 9 * 16
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        assert flops(layer, x, x, x) == by_hand
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).requires_grad_(False)
    assert flops(encoder, x) == by_hand + 2 * 9 * 2 * 16 * 32 + 2 * 5 * 2 * 9 * 16


@dataclasses.dataclass
class Out:
    logits: Tensor
    name: str = "x"


class Picky(nn.Module):
    """Takes what torch's tracer does not, and returns what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, images: list[Tensor], scale: float = 1.0, mode: str = "eval", mask: Tensor | None = None) -> Any:
        assert mode == "train"
        outs = [scale * self.conv(x) for x in images]
        return {"outs": outs, "out": Out(outs[0]), "number": 3, "none": None, "masked": (outs[0] * mask, "text")}


def test_inputs_and_outputs_of_any_form() -> None:
    x = torch.randn(1, 3, 4, 4)
    inputs = {"mode": "train", "mask": torch.ones(1, 1, 4, 4), "images": [x, x], "scale": 2.0}
    assert measure(Picky(), inputs).flops == 2 * 16 * 3 * 8


class Unpool(nn.Module):
    def __init__(self, module: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.unpool = nn.MaxUnpool2d(2) if module else None

    def forward(self, x: Tensor) -> Tensor:
        y, where = F.max_pool2d(self.first(x), 2, return_indices=True)
        return self.last(self.unpool(y, where) if self.unpool is not None else F.max_unpool2d(y, where, 2))


@pytest.mark.parametrize("module", [True, False])
def test_unpooling(module: bool) -> None:
    check = torch._check_with
    assert flops(Unpool(module), torch.randn(2, 3, 8, 8)) == 2 * 64 * (3 * 8 + 8 * 4)
    assert torch._check_with is check


class Stubborn(nn.Module):
    """No tracer passes it."""

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.jit.is_tracing()
        return x * 2


class Between(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.stubborn, self.last = nn.Conv2d(3, width, 1), Stubborn(), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stubborn(self.first(x)) + self.stubborn(x[:, :1]))


def test_a_module_without_parameters_that_cannot_be_traced_is_passed_over_and_named() -> None:
    size = measure(Between(8), torch.randn(2, 3, 8, 8))
    assert size.flops == 2 * 64 * (3 * 8 + 8 * 4)
    assert size.uncounted == ("stubborn",)


class StubbornConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert not torch.jit.is_tracing()
        return super().forward(x)


def test_a_layer_that_cannot_be_traced_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), StubbornConv(8, 4, 1))
    with pytest.raises(DNALError, match=r"the FLOPs of 1 \(StubbornConv\) cannot be counted: torch's tracer"):
        measure(model, torch.randn(2, 3, 8, 8))


class ByInts(nn.Conv2d):
    """Sizes are tested, and looked up."""

    def forward(self, x: Tensor) -> Tensor:
        assert all(isinstance(n, int) for n in (*x.shape, x.size(1), x.numel()))
        places = {(8, 8): 1.0}
        return super().forward(x) * places[tuple(x.shape[2:])]


class ByTensors(nn.Conv2d):
    """A tracer is expected, in whose runs sizes are tensors (transformers' MobileViT)."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[2] / 2
        return super().forward(x) * float(torch.ceil(half) if torch.jit.is_tracing() else math.ceil(half))


@pytest.mark.parametrize("kind", [ByInts, ByTensors])
def test_sizes_are_what_a_forward_takes_while_it_is_counted(kind: type[nn.Conv2d]) -> None:
    assert flops(kind(3, 4, 1), torch.randn(2, 3, 8, 8)) == 2 * 64 * 3 * 4


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_costs_and_is_not_counted_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(Custom.apply(self.conv(x).relu())))

    size = measure(Net(), torch.randn(1, 3, 4, 4))
    assert size.flops == 16 * 12
    assert size.uncounted == ("Custom", "fft_irfft2", "fft_rfft2")
