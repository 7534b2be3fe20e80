"""A supernet made small enough: what candidates hold, which are likely, which are dropped."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni.cost.memory import kept_storages
from dnal_nni.errors import DNALError
from dnal_nni.modules.choices import Depth, Mixture
from dnal_nni.modules.gates import GateState, ScaledSigmoidGate
from dnal_nni.search.bounded import SLACK, Shrinking
from dnal_nni.search.controller import Controller
from dnal_nni.search.subspace import Holdings, Subspace


def conv(kernel: int, width: int = 4, hidden: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, hidden, kernel, 1, kernel // 2), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, width, 1)
    )


class Net(nn.Module):
    """Two decisions, one of them in two places, one inside of a candidate of the other; and a depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(conv(3), Mixture({"wide": conv(3, 4, 32), "skip": nn.Identity()}, "inner"))
        self.a = Mixture({"k3": conv(3), "nested": inner, "skip": nn.Identity()}, "outer")
        self.b = Mixture({"k3": conv(3, 4, 8), "nested": conv(5), "skip": nn.Identity()}, "outer")
        self.depth = Depth([conv(3), conv(3)], [1, 2], "depth")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.b(self.a(x))).mean((2, 3)))


X = torch.randn(6, 4, 8, 8)


def soft(model: nn.Module) -> int:
    """Bytes that autograd keeps where all candidates run, each behind a weight that learns."""
    for module in model.modules():
        if isinstance(module, (Mixture, Depth)):
            gate = ScaledSigmoidGate(len(module.units))
            gate.state = GateState.SOFT
            gate.s.requires_grad_(True)
            module.attach(gate)
    return kept(model)


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps."""
    found: list[int] = []
    kept_storages(model, lambda: model(X).sum(), lambda address, size: found.append(size))
    return sum(found)


def weights(model: nn.Module) -> int:
    buffers = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if "gate" not in name)
    return 4 * 2 * sum(p.numel() for p in model.parameters()) + buffers


def test_what_is_left_holds_what_was_told_from_single_paths() -> None:
    net = Net()
    subspace = Subspace(net, lambda m: (m.label, {name: name for name in m.names}))
    assert subspace.options == {"outer": ["k3", "nested", "skip"], "inner": ["wide", "skip"]}
    holdings = subspace.measure(lambda: net(X).sum())
    plain = Net()
    gates = sum(8 * len(m.units) for m in plain.modules() if isinstance(m, (Mixture, Depth)))  # their index
    assert holdings.whole(subspace.options) == soft(plain) + weights(plain) + gates
    gone = subspace.drop("inner", "wide")
    assert {p.shape[0] for p in gone} == {4, 32} and subspace.options["inner"] == ["skip"]
    left = Net()
    left.a.nested[1].drop(torch.tensor([False, True]))
    inside, spared = holdings.whole(subspace.options), soft(left) + weights(left) + gates
    assert spared - 100 <= inside <= spared + 6200  # what comes into the sum, which is told of by both
    subspace.drop("outer", "nested")
    assert [place.path for place in subspace.places] == ["a", "b"]
    assert net.a.names == net.b.names == ["k3", "skip"] and holdings.whole(subspace.options) < inside


class Marking(nn.Module):
    """Leaves a mark in the graph that lives as long as that does."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[weakref.ref[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        marks = self.marks

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.mark = nn.Identity()
                marks.append(weakref.ref(ctx.mark))
                return x.clone()

        return Marked.apply(x.requires_grad_())


def test_measuring_keeps_no_graph() -> None:
    net, mark = Net(), Marking()
    subspace = Subspace(net)
    subspace.measure(lambda: net(mark(X.clone())).sum())
    assert len(mark.marks) >= 3 and not any(one() is not None for one in mark.marks)


def test_a_path_is_the_largest_one_and_runs_alone() -> None:
    net = Net()
    subspace = Subspace(net)
    holdings = subspace.measure(lambda: net(X).sum())
    ran: list[str] = []
    for path, module in net.named_modules():
        if path in ("a.k3", "a.nested", "a.skip", "b.k3", "b.nested", "b.skip", "a.nested.1.wide"):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    sizes = []
    for outer in ("k3", "nested", "skip"):
        subspace.run({"outer": outer, "inner": "wide"})
        ran.clear()
        sizes.append(kept(net))
        assert ran == (["a.nested.1.wide"] if outer == "nested" else []) + [f"a.{outer}", f"b.{outer}"]
    activations = holdings.path(subspace.options) - holdings.path({"outer": [], "inner": []})
    assert max(sizes) <= holdings.path(subspace.options) < holdings.whole(subspace.options)
    assert activations > 0


def test_a_search_by_paths_runs_each_candidate_as_often_as_any_other() -> None:
    place = Subspace(nn.Sequential(Mixture({"a": nn.Linear(2, 2), "b": nn.Identity(), "c": nn.Identity()}, "m"))).places
    own = {None: 100, ("0", "a"): 10, ("0", "b"): 1}
    holdings = Holdings(place, own, {}, {}, by_paths=True)
    assert holdings.whole({"m": ["a", "b", "c"]}) == 3 * 100 + 11
    assert holdings.whole({"m": ["a"]}) == 2 * 100 + 2 * 10
    assert dataclasses.replace(holdings, by_paths=False).whole({"m": ["a", "b", "c"]}) == 111


# -- the controller ---------------------------------------------------------------------------------------------------


def test_it_finds_what_is_rewarded_and_equal_seeds_agree() -> None:
    def learned(seed: int) -> Controller:
        controller = Controller({"x": ["a", "b", "c"], "y": ["d", "e"]}, 60, seed)
        for _ in range(60):
            paths = [controller.sample() for _ in range(8)]
            rewards = torch.tensor([(path["x"] == "b") + 0.5 * (path["y"] == "d") for path in paths])
            controller.learn(paths, rewards)
        return controller

    first, again = learned(0), learned(0)
    assert first.probabilities("x")["b"] > 0.8 and first.probabilities("y")["d"] > 0.7
    assert first.probabilities("x") == again.probabilities("x") != learned(1).probabilities("x")
    first.drop("x", "b")
    assert set(first.probabilities("x")) == {"a", "c"} and sum(first.probabilities("x").values()) == pytest.approx(1)
    assert {first.sample()["x"] for _ in range(50)} == {"a", "c"}
    counts = [sum(first.sample(uniform=True)["y"] == "d" for _ in range(200)) for _ in range(2)]
    assert all(60 < count < 140 for count in counts)


def test_equal_rewards_teach_nothing() -> None:
    controller = Controller({"x": ["a", "b"]}, 1, 0)
    controller.learn([{"x": "a"}, {"x": "b"}], torch.tensor([1.0, 1.0]))
    assert controller.probabilities("x") == pytest.approx({"a": 0.5, "b": 0.5})


# -- what is dropped --------------------------------------------------------------------------------------------------


def shrinking(limit: float, rounds: int = 2) -> Shrinking:
    candidates = {name: nn.Identity() for name in ("small", "middle", "large")}
    net = nn.Sequential(Mixture(candidates, "m"), Mixture(dict(candidates), "n"))
    subspace = Subspace(net)
    sizes = {"small": 100, "middle": 200, "large": 400}
    holdings = Holdings(subspace.places, {(path, n): size for path in "01" for n, size in sizes.items()}, {}, {})
    return Shrinking(subspace, Controller(subspace.options, 10, 0), holdings, limit, rounds)


def test_rounds_take_equal_parts_of_the_excess_and_the_largest_of_equally_likely_ones() -> None:
    one = shrinking(900)
    assert one.whole == 1400 and not one.fits
    one.shrink()
    assert one.subspace.options["m"] == ["small", "middle"] and one.size == 1000
    one.shrink()
    assert one.fits and one.size == 600 <= (1 - SLACK) * 900 and one.dropped == 2
    assert one.controller.live == one.subspace.options


def test_a_likely_candidate_stays_although_it_is_large() -> None:
    one = shrinking(900, rounds=1)
    for _ in range(100):
        paths = [one.controller.sample() for _ in range(8)]
        one.controller.learn(paths, torch.tensor([float(path["m"] == "large") for path in paths]))
    one.shrink()
    assert "large" in one.subspace.options["m"] and "large" not in one.subspace.options["n"]


def test_every_decision_keeps_one() -> None:
    one = shrinking(850, rounds=1)
    one.limit = 210
    one.shrink()
    assert one.subspace.options == {"m": ["small"], "n": ["small"]}


def test_a_limit_below_the_largest_path() -> None:
    with pytest.raises(DNALError, match=r"memory=799: the largest single path needs 800 bytes .* at least memory=800"):
        shrinking(799)
    shrinking(800)
    with pytest.raises(DNALError, match=r"memory=0.5, 700 of the 1400 bytes that the whole supernet needs: "):
        shrinking(0.5)
