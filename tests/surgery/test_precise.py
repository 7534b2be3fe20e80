"""Convolutions tap by tap give what PyTorch's own give."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dnal_nni.surgery.precise import speed_up_convolutions

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers(kind: str) -> None:
    build, into, out, more = KINDS[kind]
    torch.manual_seed(0)
    for form in FORMS:
        conv = build(into, out, **form, **more).double()
        fast = copy.deepcopy(conv)
        speed_up_convolutions(fast)
        assert type(fast) is not build
        for batch in ((2,), ()):
            x = torch.randn(*batch, into, *(7, 8, 9)[: len(conv.kernel_size)], dtype=torch.float64)
            torch.testing.assert_close(fast(x), conv(x), rtol=0, atol=1e-12)


def test_a_copy_runs_on_its_own_tensors() -> None:
    conv = nn.Conv3d(2, 2, 3, bias=False).double()
    speed_up_convolutions(conv)
    again = copy.deepcopy(conv)
    nn.init.zeros_(again.weight)
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    assert not again(x).any() and conv(x).any()


def test_others_stay_as_they_are() -> None:
    class Own(nn.Conv3d):
        pass

    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), Own(1, 1, 3), nn.ConvTranspose3d(1, 1, 3))
    speed_up_convolutions(net.double())
    speed_up_convolutions(plain := nn.Conv3d(1, 1, 3))
    assert [type(module) for module in [*net, plain]] == [nn.Conv2d, nn.Conv2d, Own, nn.ConvTranspose3d, nn.Conv3d]
