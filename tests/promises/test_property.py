"""Any network: sliced equals hard-gated for masks that nobody has tried before, or the group says why it stays whole.

The comparison here shares no code with ``dnal_nni.surgery``. A network that fails is printed as Python: put it into
``random_nets/regressions.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from random_nets import Network, Program, programs, run, runs
from random_nets.prunable import PRUNABLE
from random_nets.regressions import REGRESSIONS
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dnal_nni import DNALError, measure
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.cost.model import CostModel
from dnal_nni.modules.layers import masked_statistics, whole_groups
from dnal_nni.surgery.slim import groups_left, slim_copy
from dnal_nni.surgery.verify import hard_gated_copy, verify_and_freeze

TOLERANCE = 1e-9
LIMIT = 60.0  # seconds for one network, of which verify_and_freeze may take VERIFY
VERIFY = 20.0

# a reentrant checkpoint of a frozen network warns
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- comparing --------------------------------------------------------------------------------------------------------


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if dataclasses.is_dataclass(out):
        out = list(vars(out).values())
    elif isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (list, tuple)):
        return [t for part in out for t in tensors(part)]
    return []


def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


# what draws one number for every channel
WITHOUT_CHANCE: dict[str, Any] = {
    **{f"torch.nn.functional.{name}": identity for name in ("dropout", "dropout2d", "alpha_dropout")},
    "torch.nn.functional.feature_alpha_dropout": identity,
    "torch.nn.functional.rrelu": lambda x, **_: torch.where(x < 0, x * 11 / 48, x),
    "torch.randn_like": torch.zeros_like,
    "torch.randn": torch.zeros,
    "torch.Tensor.bernoulli_": lambda x, *_: x.fill_(0.7),
    "torch.Tensor.uniform_": lambda x, *_: x.zero_(),
}


def outputs(net: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """What it returns, without dropout and noise, and with the same random depth."""
    net.train(training)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.ExitStack() as stack:
        for name, function in WITHOUT_CHANCE.items():
            stack.enter_context(mock.patch(name, function))
        torch.manual_seed(7)
        return [t.clone() for t in tensors(run(net, inputs))]


def gap(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value, the worst of all outputs."""
    assert [a.shape for a in one] == [b.shape for b in two], "the shapes of the outputs differ"
    worst = 0.0
    for a, b in zip(one, two):
        assert a.isfinite().all() and b.isfinite().all()
        worst = max(worst, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-6))
    return worst


def assert_equal(one: nn.Module, two: nn.Module, examples: Sequence[Any], what: str) -> None:
    """In eval mode, in train mode, and in eval mode again with the norm statistics that training left."""
    for mode, training in (("eval", False), ("train", True), ("eval after training", False)):
        for number, inputs in enumerate(examples):
            difference = gap(outputs(one, inputs, training), outputs(two, inputs, training))
            assert difference < TOLERANCE, f"{what}: {difference:.1e} in {mode} mode on input {number}"


# -- the property -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(net: nn.Module) -> list[Any]:
    """Everything that must not change, but for the values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        *((name, type(m), m.training, [len(getattr(m, h)) for h in hooks]) for name, m in net.named_modules()),
        *((name, id(p), p.requires_grad, p.grad, p.stride()) for name, p in net.named_parameters()),
    ]


def masks(groups: Sequence[ChannelGroup], how: str, start: int) -> dict[str, Tensor]:
    """What every group keeps: a random part of it, a single unit, or all but one."""
    generator = torch.Generator().manual_seed(start)
    keep = {}
    for group in groups:
        if group.frozen is None:
            few, most = max(1, group.least), max(1, group.least, group.channels - 1)
            number = int(torch.randint(few, most + 1, (), generator=generator))
            number = {"single": few, "all but one": most}.get(how, number)
            order = torch.randperm(group.channels, generator=generator)
            keep[group.name] = torch.zeros(group.channels, dtype=torch.bool)
            keep[group.name][order[:number]] = True
    return keep


def verified(program: Program) -> tuple[Network, Any, list[ChannelGroup]] | None:
    """The network, its dummy input and its groups, or None where the package refuses it; never anything else."""
    net, inputs = program.build()
    before, values = snapshot(net), copy.deepcopy(net.state_dict())
    given = [t.clone() for t in tensors(inputs if not isinstance(inputs, dict) else list(inputs.values()))]
    start = time.monotonic()
    groups: list[ChannelGroup] | None = None
    with contextlib.suppress(DNALError):
        groups = find_groups(net, inputs)
        verify_and_freeze(net, groups, inputs, seconds=VERIFY)
    assert time.monotonic() - start < VERIFY + 10
    assert snapshot(net) == before, "the user's model is changed"
    after = net.state_dict()
    assert list(after) == list(values) and all(torch.equal(after[k], values[k]) for k in values), "its values changed"
    left = tensors(inputs if not isinstance(inputs, dict) else list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(given, left)), "the user's input is changed"
    if groups is None:
        return None
    assert len({group.name for group in groups}) == len(groups), "two groups have one name"
    for group in groups:
        assert group.frozen is None or (isinstance(group.frozen, str) and group.frozen.strip()), group.name
    return net, inputs, groups


def closed_at_the_readers(net: nn.Module, groups: Sequence[ChannelGroup], keep: dict[str, Tensor]) -> nn.Module:
    """The reference, without any of the package's gates: 0/1 times the input of every layer that reads a group."""
    net = copy.deepcopy(net)
    for group in groups:
        for member in group.members:
            if group.frozen is None and member.side == "in":
                layer = net.get_submodule(member.path)
                mask = torch.ones(member.width, dtype=torch.float64)
                mask[member.channels] = keep[group.name][member.units].double()
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
                else:
                    mask = mask.view(-1, *[1] * len(layer.kernel_size))
                    layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    return net


KEPT = ("random", "single", "all but one")


def check(program: Program, reference: bool = False, kept: Sequence[str] = KEPT) -> list[ChannelGroup] | None:
    """The promise, for one mask for each word of ``kept``. Returns the groups."""
    with time_limit(LIMIT):
        found = verified(program)
        if found is None:
            return None
        net, inputs, groups = found
        examples = [inputs, program.example(5, seed=1), program.example(2, seed=2)]
        if program.batch == 1:  # batch statistics of one example are ill-conditioned, or do not exist
            examples.pop(0)
        if program.dims < 3 and runs(net, larger := program.example(2, seed=3, size=program.size + 2)):
            examples.append(larger)
        for number, how in enumerate(kept):
            keep = masks(groups, how, 100 + number)
            gated, slim = hard_gated_copy(net, groups, keep), slim_copy(net, groups, keep)
            if keep:
                assert_in_steps(net, groups, keep, slim)
                size = [sum(p.numel() for p in m.parameters()) for m in (net, slim)]
                assert size[1] < size[0], "nothing was removed"
            if reference:
                closed = closed_at_the_readers(net, groups, keep)
                assert_equal(closed, copy.deepcopy(gated), examples, f"gated and closed ({how} kept)")
            assert_equal(gated, slim, examples, f"gated and sliced ({how} kept)")
            if number == 0 and keep:
                assert_priced(net, groups, inputs, keep, slim)
        return groups


def assert_priced(
    net: nn.Module, groups: Sequence[ChannelGroup], inputs: Any, keep: dict[str, Tensor], slim: nn.Module
) -> None:
    """The cost model says of the cut network what fvcore counts."""
    try:
        model, size = CostModel(net, groups, inputs), measure(slim, inputs)
    except DNALError as error:
        assert "cannot be counted: torch's tracer" in str(error)  # a reentrant checkpoint
        return
    g = torch.cat([keep[group.name] for group in model.active]).double()
    if not any(hasattr(module, "weight_g") or is_parametrized(module) for module in net.modules()):
        assert float(model.params(g)) == pytest.approx(size.params, rel=1e-6)  # computed weights become plain
    assert float(model.flops(g)) == pytest.approx(size.flops, rel=0.01, abs=1), (size, model.dense)


def grouped_otherwise(before: nn.Module, after: nn.Module) -> bool:
    if isinstance(before, nn.GroupNorm):
        return masked_statistics(before) != masked_statistics(after)
    return isinstance(before, nn.modules.conv._ConvNd) and whole_groups(before) != whole_groups(after)


def assert_in_steps(net: nn.Module, groups: Sequence[ChannelGroup], keep: dict[str, Tensor], slim: nn.Module) -> None:
    """Cut to some more first, and then what is left by its own groups: the same network."""
    generator = torch.Generator().manual_seed(5)
    more = {name: mask | (torch.rand(len(mask), generator=generator) < 0.5) for name, mask in keep.items()}
    first, left = slim_copy(net, groups, more), groups_left(groups, more)
    modules = dict(net.named_modules())
    if any(grouped_otherwise(modules[name], module) for name, module in first.named_modules() if name in modules):
        return  # cut by itself, it would lose whole groups
    assert {group.name: group.channels for group in left} == {name: int(mask.sum()) for name, mask in more.items()}
    then = slim_copy(first, left, {name: mask[more[name]] for name, mask in keep.items()})
    wanted, found = slim.state_dict(), then.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted), "in two steps it is another network"


def hunt(number: int, plain: bool, kept: Sequence[str] = KEPT) -> Counter[str]:
    """Check ``number`` different random networks; count what became of their groups.

    Ten at a time, because hypothesis repeats itself with small variations in longer runs.
    """
    tally: Counter[str] = Counter()
    seen: set[str] = set()
    for start in itertools.count():
        if len(seen) >= number:
            return tally

        @seed(start)
        @settings(
            max_examples=10,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        )
        @given(programs(plain))
        def search(program: Program) -> None:
            if repr(program) in seen:
                return
            note(f"to be pasted: {program}")
            groups = check(program, plain, kept)
            seen.add(repr(program))
            tally["networks"] += 1
            tally["refused"] += groups is None
            tally["cut"] += sum(group.frozen is None for group in groups or [])

        search()
    raise AssertionError


def test_random_networks_are_exact_or_left_whole() -> None:
    tally = hunt(50, plain=False)
    assert tally["refused"] <= 2 and tally["cut"] >= tally["networks"], tally


def test_random_plain_networks_compute_what_closed_channels_mean() -> None:
    tally = hunt(15, plain=True)
    assert not tally["refused"] and tally["cut"] >= 1.3 * tally["networks"], tally


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_thousand_random_networks(plain: bool) -> None:
    tally = hunt(200 if plain else 1000, plain, kept=(*KEPT, "random", "random"))
    assert tally["refused"] <= 0.02 * tally["networks"] and tally["cut"] >= tally["networks"], tally


@pytest.mark.parametrize("program", REGRESSIONS, ids=repr)
def test_networks_that_once_failed(program: Program) -> None:
    check(program)


@pytest.mark.parametrize("name", PRUNABLE)
def test_must_be_prunable(name: str) -> None:
    program, layers = PRUNABLE[name]
    groups = check(program)
    assert groups is not None
    reason: dict[str, str | None] = {}
    for group in groups:
        for member in group.members:
            if (member.side == "out" or member.bare) and reason.get(member.path, "") is not None:
                reason[member.path] = group.frozen
    left = {layer: reason.get(layer, "no group names it") for layer in layers if reason.get(layer, "") is not None}
    assert not left, f"left whole: {left}"
