"""How verification goes about it: what it runs, what it leaves, when it stops. That it is right: tests/promises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.search.settings import Setting, limits
from dnal_nni.surgery import verify
from dnal_nni.surgery.compare import Comparison, outputs
from dnal_nni.surgery.precise import in_dtype
from dnal_nni.surgery.slim import slim_copy, slim_twin
from dnal_nni.surgery.verify import hard_gated_copy, random_keep, verify_and_freeze

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALL = [{"op_types": ["Conv2d"]}]

passes: Counter[str] = Counter()  # forward passes of a Stack, by mode
shapes: set[tuple[int, ...]] = set()  # of what it was given


@pytest.fixture(autouse=True)
def count_anew() -> Iterator[None]:
    passes.clear()
    shapes.clear()
    yield


class Stack(nn.Module):
    """Convolutions one behind the other. ``bad`` ones are multiplied by the number of channels, which no trace sees."""

    def __init__(
        self, layers: int, bad: Sequence[int] = (), width: int = 8, pause: Callable[[], Any] = int,
        conv: Any = nn.Conv2d,
    ) -> None:  # fmt: skip
        super().__init__()
        self.convs = nn.ModuleList(conv(3 if i == 0 else width, width, 3, padding=1) for i in range(layers))
        self.head = conv(width, 2, 1)
        self.bad, self.pause = bad, pause
        for conv in self.convs:  # or little arrives behind many of them
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        passes["train" if self.training else "eval"] += 1
        shapes.add(tuple(x.shape))
        for i, conv in enumerate(self.convs):
            self.pause()
            x = torch.relu(conv(x))
            if i in self.bad:
                x = x * float(x.shape[1])
        return self.head(x)


def verified(net: nn.Module, x: Any = X, seconds: float = 60.0) -> tuple[list[ChannelGroup], int]:
    groups = find_groups(net, x)
    passes.clear()
    shapes.clear()
    return groups, verify_and_freeze(net, groups, x, seconds)


def whole(groups: Sequence[ChannelGroup]) -> dict[str, str]:
    return {g.name: g.frozen for g in groups if g.frozen is not None and "returns" not in g.frozen}


# -- how often it runs the model --------------------------------------------------------------------------------------


def test_one_trial_when_all_is_well() -> None:
    groups, trials = verified(Stack(6))
    assert not whole(groups) and trials == 1
    # two networks: random masks in both modes and sizes, and twice in eval mode with one unit left of every other group
    assert passes == {"eval": 2 * (2 + 2), "train": 2 * 2}


def test_a_bad_group_costs_two_passes_for_every_halving() -> None:
    groups, trials = verified(Stack(32, bad=[20]))
    assert list(whole(groups)) == ["convs.20"]
    halvings = math.ceil(math.log2(32))
    first, last, again = 1, 1, 1
    assert trials <= first + again + 2 * halvings + last
    # every probe is of the failed mode, on the failed input, with the failed masks
    assert passes["train"] <= 4 and passes["eval"] <= 2 + 2 * (again + 2 * halvings) + 8


def test_bad_groups_are_left_and_no_others() -> None:
    bad = [1, 5, 6, 17]
    groups, _ = verified(Stack(20, bad=bad))
    assert list(whole(groups)) == [f"convs.{i}" for i in bad]
    assert all("would change the output" in reason for reason in whole(groups).values())


@pytest.mark.parametrize("seed", [79, 213])
def test_channels_that_die_under_the_first_masks_prove_nothing(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Stack(32, bad=[20])
    assert list(whole(verified(net)[0])) == ["convs.20"]


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that only pass where somebody adds to them."""
    now = [0.0]
    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    return now


def test_the_limit_holds_inside_of_a_forward(clock: list[float]) -> None:
    def second() -> None:
        clock[0] += 1.0

    net = Stack(50, pause=second)
    groups = find_groups(net, X)
    clock[0] = 0.0
    verify_and_freeze(net, groups, X, 7.0)
    assert clock[0] == 8.0  # not the 50 of a pass
    assert set(whole(groups).values()) == {"not verified within verify_seconds=7"}
    net(X)  # nothing of the clock is left behind
    assert clock[0] == 58.0


@pytest.mark.parametrize("bad", [(), (3,)])
def test_by_default_there_is_time_for_a_slow_model(clock: list[float], bad: Sequence[int]) -> None:
    def tick() -> None:
        clock[0] += 1.0  # a pass takes 16 seconds

    net = Stack(16, bad=bad, pause=tick)
    groups = find_groups(net, X)
    clock[0] = 0.0
    verify_and_freeze(net, groups, X)
    assert 60.0 < clock[0] < 40 * 32
    assert list(whole(groups)) == [f"convs.{i}" for i in bad]


def test_a_trial_that_fails_ahead_of_its_first_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = slim_twin, iter(range(100))

    def once(*args: Any) -> nn.Module:
        if next(calls) == 0:
            raise RuntimeError("cannot be cut yet")
        return made(*args)

    monkeypatch.setattr(verify, "slim_twin", once)
    net = Stack(4)
    groups = find_groups(net, X)
    verify_and_freeze(net, groups, X)
    assert set(whole(groups).values()) == {"the model does not run without some of its channels (cannot be cut yet)"}


def test_what_passed_together_is_kept_when_time_is_up(clock: list[float]) -> None:
    def tick() -> None:
        clock[0] += 1 / 16  # a pass takes a second

    net = Stack(16, bad=[3, 13], pause=tick)
    groups = find_groups(net, X)
    clock[0] = 0.0
    verify_and_freeze(net, groups, X, 45.0)
    assert clock[0] <= 45.0
    assert 0 < len(whole(groups)) < 8
    assert {"convs.3", "convs.13"} <= whole(groups).keys()
    active = [g for g in groups if g.frozen is None]
    keep = random_keep(active, 0.5)
    net.pause = int
    gated, slim = hard_gated_copy(net, groups, keep), slim_copy(net, groups, keep)
    assert torch.allclose(gated(X), slim(X), atol=1e-5)


# -- widths that a network does not take ------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor], channels: int = 16) -> None:
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(3, channels, 3), nn.Linear(channels, 4), form

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.form(F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1)))


def test_two_units_stay_where_one_alone_fails() -> None:
    net = Pooled(torch.squeeze)
    (conv, _), _ = verified(net)
    assert conv.frozen is None and conv.least == 2
    (plain, _), _ = verified(Pooled(lambda x: x.flatten(1)))
    assert plain.least == 1
    assert all(int(mask.sum()) == 2 for mask in random_keep([conv], 1.0).values())
    assert limits([Setting()], [conv], 1).least == [2]
    assert limits([Setting(max_sparse_ratio=0.99)], [conv], 1).least == [2]


@pytest.mark.parametrize("of", [2, 3, 4])
def test_multiples_are_not_two_units(of: int) -> None:
    def whole_rows(x: Tensor) -> Tensor:
        if x.shape[1] % of:
            raise ValueError(f"{x.shape[1]} channels are no multiple of {of}")
        return x.flatten(1)

    groups, _ = verified(Pooled(whole_rows, 12))
    assert "does not run without some of its channels" in whole(groups)["conv"]


# -- precision --------------------------------------------------------------------------------------------------------


class Magnifies(nn.Module):
    """Rounding comes out ten million times as large."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.wrong = nn.Conv2d(3, 99, 3), nn.Conv2d(99, 4, 3), wrong

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        if self.wrong:
            x = x * (1 + x.shape[1] * 1e-3)
        # a sum goes in an order of its own for every number of channels; a product may not
        return torch.sin(1e4 * torch.sin(1e3 * (self.head(x) + x.sum(1, keepdim=True)[..., 1:-1, 1:-1])))


def test_rounding_that_a_network_magnifies_is_no_difference() -> None:
    net = Magnifies()
    groups, _ = verified(net)
    assert not whole(groups)
    pruner = DNALPruner(net, ALL, dummy_input=X)
    pruner.harden({"conv": torch.arange(99) % 5 > 1})
    pruner.speedup()
    assert 1e-9 < pruner.report.relative_diff < 1e-6


def test_a_wrong_cut_is_seen_all_the_same() -> None:
    groups, _ = verified(Magnifies(wrong=True))
    assert "would change the output" in whole(groups)["conv"]


class Float32(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_model_that_insists_on_float32_is_compared_in_it() -> None:
    groups, _ = verified(Float32(3, bad=[1]))
    assert list(whole(groups)) == ["convs.1"]


def test_a_model_that_takes_one_size_only() -> None:
    net = nn.Sequential(Stack(3), nn.Flatten(), nn.Linear(2 * 16 * 16, 3))
    groups, trials = verified(net)
    assert not whole(groups) and trials == 2  # the first one was of an input that the model does not take


VOLUME = torch.randn(1, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def test_of_volumes_one_is_compared_at_full_size_and_several_at_another() -> None:
    groups, trials = verified(Stack(3, conv=nn.Conv3d), VOLUME)
    assert not whole(groups) and trials == 1
    assert shapes == {(1, 3, 8, 8, 8), (2, 3, 4, 4, 4)}


def test_a_volume_beside_a_vector_has_as_many_of_both() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.facts = Stack(2, conv=nn.Conv3d), nn.Linear(5, 2)

        def forward(self, x: Tensor, facts: Tensor) -> Tensor:
            assert x.dtype is torch.float64 or not tracing
            return self.stack(x).mean((2, 3, 4)) + self.facts(facts)

    net, tracing = Scan(), False
    groups = find_groups(net, (VOLUME, torch.randn(1, 5)))
    tracing = True  # in float64 from here on
    verify_and_freeze(net, groups, (VOLUME, torch.randn(1, 5)), 60.0)
    assert not whole(groups)


@pytest.mark.parametrize("seed", [0, 1])
def test_volumes_that_die_under_the_first_masks_prove_nothing(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Stack(24, bad=[16], width=4, conv=nn.Conv3d)
    assert list(whole(verified(net, VOLUME)[0])) == ["convs.16"]


@pytest.mark.parametrize("batch", [2, 3])
def test_batch_norms_get_values_enough(batch: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 7), nn.BatchNorm2d(4))
    seen: list[int] = []
    gated = in_dtype(net, torch.float64)
    gated[3].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    comparison = Comparison(gated, torch.float64)
    for mode in ("eval", "train"):
        assert comparison.gap(in_dtype(net, torch.float64), X[:1].expand(batch, -1, -1, -1).double(), mode).equal
    assert seen == [batch, 8 if batch == 2 else 9]  # of one value each


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_twin_shares_what_loses_nothing_and_a_copy_shares_nothing() -> None:
    net = Stack(3)
    groups = find_groups(net, X)
    keep = {"convs.1": torch.arange(8) < 4}
    pointers = {p.data_ptr() for p in net.parameters()}
    twin = {name: p.data_ptr() in pointers for name, p in slim_twin(net, groups, keep).named_parameters()}
    own = {"convs.1.weight", "convs.1.bias", "convs.2.weight"}
    assert twin == {name: name not in own for name, _ in net.named_parameters()}
    slim = slim_copy(net, groups, keep)
    assert not any(p.data_ptr() in pointers for p in slim.parameters())
    assert torch.equal(slim.head.weight, net.head.weight)


def test_what_a_forward_draws_is_found_out_as_it_is_drawn() -> None:
    """Not at the end of a pass that has then to be run again."""
    dropped = nn.Sequential(nn.Conv2d(3, 8, 1), DropPath(), Counted(), nn.BatchNorm2d(8), Counted()).double()
    once = outputs(dropped, X.double(), (), "train")
    assert passes["counted"] == 2
    assert dropped[3].num_batches_tracked == 1  # not of the pass that was broken off
    torch.testing.assert_close(once[0][0], F.batch_norm(dropped[0](X.double()), None, None, training=True))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5, dtype=x.dtype)) if self.training else x


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        passes["counted"] += 1
        return x
