"""Copies in float64 give what PyTorch's own give: tap by tap, and with weights that are widened as they are used."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dnal_nni.modules.layers import layer_of
from dnal_nni.surgery import precise
from dnal_nni.surgery.precise import in_dtype

KINDS: dict[str, Any] = {
    "3-D": (nn.Conv3d, 4, 6, {}),
    "3-D grouped": (nn.Conv3d, 4, 6, {"groups": 2}),
    "3-D depthwise": (nn.Conv3d, 4, 4, {"groups": 4}),
    "depthwise": (nn.Conv2d, 6, 6, {"groups": 6}),
    "depthwise, two for each": (nn.Conv2d, 6, 12, {"groups": 6}),
    "depthwise 1-D": (nn.Conv1d, 6, 6, {"groups": 6}),
}
FORMS: list[dict[str, Any]] = [
    dict(zip(("kernel_size", "stride", "padding", "dilation", "bias", "padding_mode"), form))
    for form in itertools.product((1, 3), (1, 2), (0, 1, "same"), (1, 2), (True, False), ("zeros", "circular"))
    if not (form[2] == "same" and form[1] > 1) and not (form[0] == 1 and form[2] == 1 and form[5] == "circular")
]


@pytest.mark.parametrize("kind", [*KINDS, "3-D, two planes at a time"])
def test_the_same_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind not in KINDS:
        monkeypatch.setattr(precise, "_COPIED", 2 * 4 * 8 * 9)
    build, into, out, more = KINDS[kind.partition(",")[0] if kind not in KINDS else kind]
    torch.manual_seed(0)
    for form in FORMS:
        conv = build(into, out, **form, **more).double()
        fast = in_dtype(conv, torch.float64)
        assert type(fast) is not build
        for batch in ((2,), ()):
            x = torch.randn(*batch, into, *(7, 8, 9)[: len(conv.kernel_size)], dtype=torch.float64)
            torch.testing.assert_close(fast(x), conv(x), rtol=0, atol=1e-12)


def test_a_copy_runs_on_its_own_tensors() -> None:
    conv = in_dtype(nn.Conv3d(2, 2, 3, bias=False), torch.float64)
    again = copy.deepcopy(conv)
    nn.init.zeros_(again.weight)
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    assert not again(x).any() and conv(x).any()


def test_others_stay_as_they_are() -> None:
    class Own(nn.Conv3d):
        pass

    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), Own(1, 1, 3), nn.ConvTranspose3d(1, 1, 3))
    plain = in_dtype(nn.Conv3d(1, 1, 3), torch.float32)
    kinds = [type(module) for module in [*in_dtype(net, torch.float64), plain]]
    assert kinds == [nn.Conv2d, nn.Conv2d, Own, nn.ConvTranspose3d, nn.Conv3d]


@pytest.mark.parametrize("form", FORMS)
def test_all_samples_in_one_product(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few positions; a large weight is what it takes."""
    products: list[int] = []  # rows of each
    linear = torch.nn.functional.linear

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        products.append(x.shape[0] * x.shape[1])
        return linear(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 264, **form)
    fast, plain = in_dtype(conv, torch.float64), copy.deepcopy(conv).double()
    for shape in ((3, 256, 6, 5), (2, 256, 5, 7), (256, 5, 5), (2, 256, 12, 11)):
        products.clear()
        x = torch.randn(shape, dtype=torch.float64)
        expected = plain(x)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-11)
        positions = expected[0, 0].numel()
        assert products == ([shape[0] * positions] if len(shape) == 4 and positions <= 25 else [])


LARGE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(700, 800), (3, 5, 700)),
    "linear without bias": (lambda: nn.Linear(70_000, 5, bias=False), (3, 70_000)),
    "convolution": (lambda: nn.Conv2d(100, 200, 3, groups=2), (2, 100, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(100, 80, 3), (2, 100, 5, 5)),
    "tap by tap": (lambda: nn.Conv3d(64, 64, 3), (2, 64, 5, 5, 5)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_weights_are_shared_and_widened_as_they_are_used(name: str) -> None:
    build, shape = LARGE[name]
    torch.manual_seed(0)
    layer = build()
    copied = in_dtype(layer, torch.float64)
    assert next(copied.parameters()).data_ptr() == layer.weight.data_ptr() and copied.weight.dtype is torch.float64
    x = torch.randn(shape, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()
    torch.testing.assert_close(copied(x), expected(x), rtol=1e-12, atol=1e-12)
    keep = torch.arange(len(layer.weight)) % 4 > 0  # a cut keeps it so, and leaves the layer alone
    side = "in" if name == "transposed" else "out"
    for one in (copied, expected):
        layer_of(one).cut(one, {side: keep})  # type: ignore[union-attr]
    assert next(copied.parameters()).dtype is torch.float32 and len(layer.weight) == len(keep)
    x = x[:, keep] if side == "in" else x
    torch.testing.assert_close(copied(x), expected(x), rtol=1e-12, atol=1e-12)
