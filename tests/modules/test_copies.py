"""Models that hold what cannot be copied, and parts that torch.jit has compiled."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import DNALError, DNALPruner, measure
from dnal_nni.modules.running import clone, twin

X = torch.randn(2, 3, 12, 12)
CONV = [{"op_types": ["Conv2d"]}]


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.held = nn.Conv2d(16, 16, 3), {"lock": threading.Lock(), "numbers": [n for n in range(3)]}

    def forward(self, x: Tensor) -> Tensor:
        with self.held["lock"]:
            return self.conv(x)


class NoCopies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("one of a kind")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def around(part: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), part, nn.Conv2d(16, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1)
    )


def whole(net: nn.Module) -> dict[str, str | None]:
    pruner = DNALPruner(net, CONV, dummy_input=X)
    pruner.harden({name: torch.arange(gate.s.numel()) % 3 > 0 for name, gate in pruner.gates.items()})
    pruner.speedup()
    assert pruner.report.relative_diff < 1e-9
    return {group.name: group.frozen for group in pruner.groups}


@pytest.mark.parametrize("part", [Locked, NoCopies])
def test_what_cannot_be_copied_is_cut(part: type[nn.Module]) -> None:
    assert whole(around(part())) == {
        "0": None, "3.conv": None, "4": None, "6": "the model returns these channels"
    }  # fmt: skip


@pytest.mark.parametrize("copies", [clone, twin])
def test_a_copy_waits_for_the_same_lock_and_has_its_own_tensors(copies: Any) -> None:
    net = nn.Sequential(Locked(), NoCopies())
    copied = copies(net)
    assert copied[0].held["lock"] is net[0].held["lock"] and copied[0].held["numbers"] is not net[0].held["numbers"]
    assert type(copied[1]) is NoCopies and copied[1] is not net[1] and copied[1].conv is not net[1].conv
    copied.double()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    shared = {p.untyped_storage().data_ptr() for p in clone(net).parameters()}
    assert not shared & {p.untyped_storage().data_ptr() for p in net.parameters()}


def test_a_part_that_is_compiled_is_left_whole_not_the_model() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 1)))
    net = around(part)
    reasons = whole(net)
    assert reasons["4"] is None and reasons["0"] == "torch.jit has compiled 3.0: nothing can be removed from it"
    assert "3" in measure(net, X).uncounted
    part = torch.jit.trace(nn.Conv2d(16, 16, 3), torch.randn(2, 16, 8, 8))
    assert whole(around(part))["4"] is None


def test_parameters_that_are_compiled_stay_leaves() -> None:
    net = around(torch.jit.script(nn.Conv2d(16, 16, 3)))
    net[3].bias.requires_grad_(False)
    copied = clone(net)
    assert all(p.is_leaf for p in copied.parameters())
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in net.parameters()]


def test_channels_pass_a_compiled_activation() -> None:
    assert whole(around(torch.jit.script(nn.SiLU())))["0"] is None


def test_a_model_that_is_compiled_as_a_whole_is_told() -> None:
    with pytest.raises(DNALError, match="pass the module that it was made of"):
        DNALPruner(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3))), CONV, dummy_input=X)
