"""Idioms of other people's code: cut whole, exactly; or left with a reason that is true."""

import copy
from typing import Any

import pytest
import torch
from idioms import IDIOMS
from torch import Tensor, nn

from dnal_nni import measure
from dnal_nni.channels.groups import find_groups
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import hard_gated_copy, random_keep, verify_and_freeze

RETURNED = ("the model returns these channels", "it has a single channel")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in tensors(part)]


def outputs(net: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    net.train(training)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(net(*(x.double() if x.is_floating_point() else x for x in given)))


def compare(gated: nn.Module, slim: nn.Module, inputs: Any, draws: bool) -> None:
    """In float64, in eval mode, in train mode unless random numbers are drawn there, and in eval mode again."""
    for training in (False,) if draws else (False, True, False):
        for a, b in zip(outputs(gated, inputs, training), outputs(slim, inputs, training), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 1e-8 * max(1.0, float(a.abs().max())), "the cut network differs"


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(name: str) -> None:
    idiom = IDIOMS[name]
    torch.manual_seed(0)
    net = idiom.make()
    groups = find_groups(net, idiom.inputs)
    verify_and_freeze(net, groups, idiom.inputs, 60)
    left = {g.name: g.frozen for g in groups if g.frozen is not None and not g.frozen.startswith(RETURNED)}
    if idiom.left is None:
        assert not left
    else:
        assert left and all(idiom.left in reason for reason in left.values()), left
    double = copy.deepcopy(net).double()
    draws = any(word in name for word in ("VAE", "Auxiliary", "Literal"))  # which dropout as a function does
    for seed in (1, 2):
        keep = random_keep(groups, 0.3, seed)
        compare(hard_gated_copy(double, groups, keep), slim_copy(double, groups, keep), idiom.inputs, draws)
    before, after = (measure(m, idiom.inputs).flops for m in (net, slim_copy(net, groups, keep)))
    assert after <= idiom.share * before, f"{after / before:.2f} of the FLOPs are left"


def test_they_are_many_and_mostly_whole() -> None:
    assert len(IDIOMS) >= 60 and sum(idiom.left is None for idiom in IDIOMS.values()) >= 52
