"""What cuts did, kept with the network: in any process, after any number of cuts, and in the form of older versions."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONV
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from dnal_nni import DNALError, DNALPruner, load_compressed, save_compressed
from dnal_nni.modules.choices import Depth, Mixture
from dnal_nni.surgery.changes import Changes, changes_of, newly_baked, set_changes

PARTS: dict[str, Any] = {"choices": {"mix": [0, 1]}, "baked": ["a"], "stored": {"n": 3, "m": [1, 2]}, "unsaved": ["b"]}


class Both(nn.Module):
    """A computed weight, a buffer that no state dict holds, and candidates: each is cut twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.register_buffer("scale", torch.linspace(1, 2, 6), persistent=False)
        with pytest.warns((FutureWarning, UserWarning)):
            self.a = weight_norm(nn.Conv2d(6, 6, 3, padding=1))
        self.mix = Mixture({name: nn.Conv2d(6, 6, 1) for name in ("one", "two", "three")}, "mix")
        self.depth = Depth([nn.Conv2d(6, 6, 1) for _ in range(3)], [1, 2, 3], "depth")
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.depth(self.mix(self.a(self.stem(x).relu() * self.scale.view(-1, 1, 1)).relu())))


def cut(model: nn.Module, x: Tensor, **keep: list[int]) -> tuple[DNALPruner, nn.Module]:
    pruner = DNALPruner(model, CONV, dummy_input=x)
    pruner.harden({name: torch.tensor(units) == 1 for name, units in keep.items()})
    return pruner, pruner.speedup()


def test_json_and_back() -> None:
    changes = Changes.from_json(json.loads(json.dumps(PARTS)), "file")
    assert changes == Changes({"mix": [0, 1]}, ["a"], {"n": 3, "m": [1, 2]}, ["b"]) and changes.to_json() == PARTS
    assert list(changes.to_json()) == ["choices", "baked", "stored", "unsaved"]
    assert Changes.from_json({"baked": ["a"], "stored": {}}, "file") == Changes(baked=["a"])  # of the first files


@pytest.mark.parametrize(
    "name, value",
    [("choices", value) for value in ([], {"a": 1}, {"a": [2]}, {"a": [True]}, {"a": ["1"]}, {"a": [1.0]}, None)]
    + [("baked", value) for value in ({}, "a", [1], [None], [["a"]], None)]
    + [("stored", value) for value in ([], {"a": "1"}, {"a": True}, {"a": [1.5]}, {"a": {"b": 1}}, {"a": None})]
    + [("unsaved", value) for value in (1, {"a": 1}, [["a"]])],
)
def test_a_wrong_form_is_refused(name: str, value: Any) -> None:
    with pytest.raises(DNALError, match=f"file is damaged: '{name}' in its header is not of the right form"):
        Changes.from_json(PARTS | {name: value}, "file")


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(DNALError, match=r"file has changes that this version does not know \('folded'\): update"):
        Changes.from_json(PARTS | {"folded": []}, "file")
    for nothing in (None, [], "baked", 3):
        with pytest.raises(DNALError, match="file is damaged: its header has no 'changes'"):
            Changes.from_json(nothing, "file")


def test_a_network_without_a_cut_has_none() -> None:
    model = nn.Linear(2, 2)
    assert changes_of(model) == Changes() and newly_baked(model, model) == []
    set_changes(model, Changes(baked=["a"]))
    changes_of(model).baked.append("b")  # of a copy
    assert changes_of(model) == Changes(baked=["a"]) and newly_baked(nn.Linear(2, 2), model) == ["a"]


def test_a_pickled_network_needs_nothing_of_this_package(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    _, slim = cut(model, x, **{"0": [1] * 5 + [0] * 3})
    data = pickle.dumps(slim)
    assert b"dnal_nni" not in data and b"_dnal_changes" in data
    assert changes_of(pickle.loads(data)) == changes_of(slim)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_dict_of_older_versions(through: Any, tmp_path: Path, x: Tensor) -> None:
    torch.manual_seed(0)
    _, slim = cut(Both(), x, **{"stem": [1, 0, 1, 1, 1, 1], "mix": [1, 0, 1]})
    old = {"choices": {"mix": [1, 0, 1]}, "baked": ["a"], "stored": {}, "unsaved": ["scale"]}
    assert changes_of(slim).to_json() == old
    slim._dnal_changes = old | {"stored": {"last.kernel_size": (1, 1)}}  # tuples stayed tuples
    slim = through(slim)
    save_compressed(slim, tmp_path / "slim")
    torch.manual_seed(1)
    assert torch.equal(load_compressed(Both(), tmp_path / "slim")(x), slim(x))
    plain = nn.Linear(2, 2)
    plain._dnal_changes = {"baked": [], "stored": {}}  # of the first versions
    assert changes_of(plain) == Changes()


def test_cut_twice(x: Tensor, tmp_path: Path) -> None:
    """What the second cut does comes on top of the first one's, in the network and in its file."""
    torch.manual_seed(0)
    model = Both()
    _, once = cut(model, x, stem=[1, 1, 1, 1, 1, 0], mix=[1, 0, 1], depth=[1, 0])
    optimizer = torch.optim.Adam(once.parameters(), 0.01)
    once(x).square().mean().backward()
    optimizer.step()
    pruner, twice = cut(once, x, stem=[1, 0, 1, 1, 1], mix=[0, 1], depth=[0])
    assert changes_of(twice) == Changes({"mix": [0, 0, 1], "depth": [0, 0]}, ["a"], {}, ["scale"])
    assert newly_baked(model, twice) == ["a"] and newly_baked(once, twice) == []
    assert twice.mix.units == ["three"] and twice.depth.depths == [1] and twice.scale.shape == (4,)
    save_compressed(twice, tmp_path / "twice")
    torch.manual_seed(1)
    loaded = load_compressed(Both(), tmp_path / "twice")
    assert torch.equal(loaded(x), twice(x)) and changes_of(loaded) == changes_of(twice)
    # the weight is plain since the first cut: its averages are kept, where the first cut's optimizer lost them
    carried = pruner.carry_optimizer(optimizer, twice)
    assert carried.state[twice.a.weight]["exp_avg"].shape == twice.a.weight.shape


def test_later_choices_are_of_the_units_that_were_left() -> None:
    first = Changes({"a": [1, 0, 1, 1], "b": [0, 1]}, ["u"], {"n": 8, "m": 2}, ["x"])
    second = Changes({"a": [0, 1, 1], "c": [1, 0]}, ["v"], {"n": 4}, ["y", "x"])
    both = {"a": [0, 0, 1, 1], "b": [0, 1], "c": [1, 0]}
    assert first.then(second) == Changes(both, ["u", "v"], {"n": 4, "m": 2}, ["x", "y"])
    # a chain that has ended has no units behind its end
    assert Changes({"depth": [1, 0, 1]}).then(Changes({"depth": [0]})).choices == {"depth": [0, 0, 1]}
