"""Files that version 0.1 wrote (commit 22de565), whose checksum is a sum of 64-bit words: they still load."""

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, save_compressed
from dnal_nni.modules.choices import Mixture
from dnal_nni.storage.state import load_state

DATA = Path(__file__).with_name("data")
NETWORK = DATA / "network-0.1.safetensors"  # Tiny, cut by harden({"a[0:]": 10, "a[2:]": 1100, "mix": 01})
CHECKPOINT = DATA / "checkpoint-0.1.safetensors"  # of searched(), after 2 of 4 steps
X = torch.linspace(-1, 1, 2 * 16).view(2, 1, 4, 4)


class Tiny(nn.Module):
    """What a file says beside shapes: a choice, a computed weight, stored widths, an unsaved buffer, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(1, 6, 3, padding=1))
        self.mix = Mixture({"wide": nn.Conv2d(6, 6, 3, padding=1), "narrow": nn.Conv2d(6, 6, 1)}, "mix")
        self.c = nn.Linear(6, 4)
        self.d = nn.Linear(4, 4)
        self.e = nn.Linear(4, 4)
        self.e.weight = self.d.weight
        self.widths = [2, 4]
        self.register_buffer("scale", torch.linspace(1, 2, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) * self.scale.view(-1, 1, 1)
        y = torch.relu(self.mix(y)) + y
        first, second = y.split(self.widths, 1)
        y = torch.cat([first, second.square()], 1).mean((2, 3))
        return self.e(torch.tanh(self.d(torch.tanh(self.c(y)))))


def searched() -> tuple[nn.Module, torch.optim.Optimizer, DNALPruner]:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=X, budget=Budget(flops=0.5))
    return model, optimizer, pruner


def header(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    parts: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return parts


def test_a_network(tmp_path: Path) -> None:
    loaded = load_compressed(Tiny(), NETWORK)
    computed = torch.tensor([[-0.3273, -0.3690, 0.5983, 0.1448], [-0.3199, -0.3616, 0.5876, 0.1665]])  # by version 0.1
    torch.testing.assert_close(loaded(X), computed, rtol=0, atol=1e-4)
    assert loaded.widths == [1, 2] and loaded.mix.units == ["narrow"] and loaded.e.weight is loaded.d.weight
    save_compressed(loaded, tmp_path / "again")
    assert torch.equal(load_compressed(Tiny(), tmp_path / "again")(X), loaded(X))
    old, new = header(NETWORK), header(tmp_path / "again")
    for part in ("format", "sizes", "aliases", "changes"):
        assert new[part] == old[part]
    assert len(old["sum"]) == 20 and new["sum"].startswith("blake2b:")


def test_a_checkpoint() -> None:
    model, optimizer, pruner = searched()
    pruner.load_checkpoint(CHECKPOINT, optimizer)
    state = load_state(CHECKPOINT)
    assert torch.equal(model[0].weight, state["model"]["0.weight"])
    momentum = state["optimizer"]["state"][3]["momentum_buffer"]
    assert torch.equal(optimizer.state[model[2].bias]["momentum_buffer"], momentum)
    with pruner.search(4, optimizer=optimizer, progress=False) as search:
        assert search.done == 2
        for _ in range(2):
            search.step(model(X).square().sum())
    pruner.harden()
    assert pruner.gates["0"].mask.tolist() == [False, False, True, True]  # as version 0.1 went on


@pytest.mark.parametrize("path", [NETWORK, CHECKPOINT], ids=lambda path: path.stem)
def test_their_sum_is_checked_as_before(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in (len(data) - 1, len(data) // 2, 8 + data[8:].index(b"F32")):
        changed = data.copy()
        changed[place] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(DNALError):
            load_compressed(Tiny(), tmp_path / "changed") if path is NETWORK else load_state(tmp_path / "changed")
