"""Layers whose weight is computed: cut as what they amount to, or left whole with the reason."""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm

from dnal_nni import DNALPruner, load_compressed, save_compressed
from dnal_nni.channels.groups import find_groups

CONV = [{"op_types": ["Conv2d"]}]


def plain() -> nn.Sequential:
    first = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 1))


def test_masks_of_torch_prune_become_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = plain(), torch.randn(2, 3, 12, 12)
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(net[3], "weight", 0.4)
    prune.random_unstructured(net[3], "weight", 0.2)  # a container of two methods
    reference = copy.deepcopy(plain())
    zeros = (net[3].weight == 0).sum()
    pruner = DNALPruner(net, CONV, dummy_input=x)
    assert list(pruner.gates) == ["0", "3"]
    pruner.harden({name: torch.arange(gate.s.numel()) % 3 > 0 for name, gate in pruner.gates.items()})
    slim = pruner.speedup()
    assert isinstance(slim[3].weight, nn.Parameter)
    assert 0 < (slim[3].weight == 0).sum() < zeros
    save_compressed(slim, tmp_path / "slim.safetensors")
    again = load_compressed(reference, tmp_path / "slim.safetensors")  # a network without masks
    assert torch.equal(again.eval()(x), slim.eval()(x))


def test_spectral_norm_in_the_form_of_a_hook_is_left_whole_with_its_reason() -> None:
    net = nn.Sequential(spectral_norm(nn.Conv2d(3, 16, 3)), nn.LeakyReLU(0.2), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 3))
    reasons = {group.name: group.frozen for group in find_groups(net, torch.randn(2, 3, 12, 12))}
    assert reasons["0"] == "every forward in train mode changes how the weight of 0 is computed (spectral norm)"
    assert reasons["2"] is None
