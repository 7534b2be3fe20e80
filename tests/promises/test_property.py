"""Any network: sliced equals hard-gated for masks that nobody has tried before, or the group says why it stays whole.

The comparison here shares no code with ``dnal_nni.surgery``. A network that fails is printed as Python: put it into
``REGRESSIONS``.
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
from random_nets import Network, Program, kinds, op, programs, run, runs
from random_nets.heads import REPEATS
from random_nets.modules import Dropping
from random_nets.sizes import Insisting
from random_nets.spatial import FORMS
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dnal_nni import DNALError, measure
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.cost.model import CostModel
from dnal_nni.surgery.slim import slim_copy
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


REGRESSIONS = [
    # of a larger input, positions that its table does not have
    Program((op("conv"), op("read", width=8), op("positions"))),
    # a norm written by hand keeps the memory format: what it runs as has to
    Program((op("conv"), op("own_norm"), op("flatten", form="view"))),
    # rows and columns of one parameter are groups of their own
    Program((op("conv"), op("conv", norm="response"), op("codebook"))),
    # a norm of three channels that is called once more, on one
    Program((op("own_norm"), op("conv", width=1), op("again", which=1)), head="conv"),
    # a mask that fits the heads by luck was verified, others do not run
    Program((op("attention"),)),
    # two channels in ascending order: right for one of the two masks
    Program((op("conv", width=2, norm="batch", act="relu"), op("move", how="sort"))),
    # one channel left has no halves
    Program((op("conv"), op("pool"), op("glu", form="halves"), op("residual", at=2))),
    # an IndexError of torch-pruning
    Program((op("norm"), op("norm"), op("glu", form="halves"), op("concat", other=4)), inputs=(4,)),
    # cannot be copied once it has run with gradients
    Program((op("conv", weight="old_weight_norm"),)),
    # nothing in it has parameters
    Program((op("act"),), head="none"),
    # half of seven channels, or half of what were eight
    Program((op("conv"), op("slice")), head="conv"),
    Program((op("conv", width=5), op("conv", width=5), op("slice", form="constant"))),
    Program(
        (
            op("conv", width=12, norm="group"),
            op("slice", form="pick"),
            op("known", at=1),
            op("functional", form="einsum"),
        )
    ),
    Program((op("conv", width=6), op("concat"), op("concat"), op("slice", form="strided"))),
    Program(
        (op("conv", width=5), op("slice"), op("squeeze", at=3), op("conv", at=1, padding="reflect")), inputs=(4, 4)
    ),
    # parts that are fewer, or of other sizes, once channels are gone
    Program((op("conv", width=5), op("split"))),
    Program((op("conv"), op("split", parts=3))),
    Program((op("conv"), op("split", parts=3), op("conv"))),
    Program((op("conv"), op("shuffle", groups=4), op("act", at=1))),
    # statistics of a single open channel, and what batch statistics make of their rounding
    Program((op("conv", width=5), op("norm", kind="layer", affine=False), op("conv", norm="batch"))),
    # a module called once more, on channels of another layer
    Program(
        (op("norm", kind="group_one", affine=False), op("transposed"), op("squeeze"), op("conv"), op("again", which=3))
    ),
    # training moves what its weight is divided by
    Program((op("conv", kernel=1, weight="spectral_norm"),)),
    Program((op("conv", norm="batch", weight="spectral_norm"),), training=False),
]


@pytest.mark.parametrize("program", REGRESSIONS, ids=repr)
def test_networks_that_once_failed(program: Program) -> None:
    check(program)


# -- what must be prunable: freezing everything would pass all of the above -------------------------------------------

C = op("conv", norm="batch", act="relu")
LAST = op("conv", width=6)
FIRST = ["conv0.conv"]
PRUNABLE: dict[str, tuple[Program, list[str]]] = {
    "chain": (Program((C, C, LAST)), ["conv0.conv", "conv1.conv", "conv2.conv"]),
    "chain without norms": (Program((op("conv", act="relu"), LAST)), ["conv0.conv", "conv1.conv"]),
    "1d": (Program((C, C), dims=1), ["conv0.conv", "conv1.conv"]),
    "3d": (Program((C, C), dims=3, size=4), ["conv0.conv", "conv1.conv"]),
    "two inputs, dict in, dataclass out": (
        Program((C, op("conv", at=2), op("concat"), LAST), inputs=(3, 4), keywords=True, returns="dataclass"),
        ["conv0.conv", "conv1.conv", "conv3.conv"],
    ),
    "all parameters frozen": (Program((C, C, LAST), frozen="all"), ["conv0.conv", "conv1.conv", "conv2.conv"]),
    "first layers frozen": (Program((C, C, LAST), frozen="first half"), ["conv0.conv", "conv1.conv"]),
    "in eval mode, channels last": (Program((C, LAST), training=False, channels_last=True), FIRST),
    "an intermediate feature is returned": (Program((C, C, LAST), also=(1,), returns="tuple"), ["conv0.conv"]),
    "a batch of one": (Program((C, C, op("pool", kind="mean"), op("linear")), batch=1), ["conv0.conv", "conv1.conv"]),
    "transposed": (Program((C, op("transposed", norm="batch"), LAST)), ["conv0.conv", "transposed1.conv"]),
    "attention that takes its width from the input": (
        Program((C, op("tokens"), op("takes_width", heads=4))),
        ["conv0.conv", "takes_width2.qkv"],
    ),
    "attention that keeps its width": (
        Program((C, op("tokens"), op("takes_width", stored=True))),
        ["conv0.conv", "takes_width2.qkv"],
    ),
    **{
        f"sizes as ints, {form}": (Program((C, op("insisting", form=form), LAST)), ["conv0.conv", "insisting1.layer"])
        for form in Insisting.FORMS
    },
    **{
        f"a recurrent convolution, {'new' if new else 'made'}": (
            Program((C, op("cell", new=new), LAST)),
            ["conv0.conv", "cell1.gates"],
        )
        for new in (False, True)
    },
    "distances to a table": (Program((C, op("codebook"), LAST)), FIRST),
    "tokens that are gathered": (Program((C, op("tokens"), op("chosen"), op("linear"))), FIRST),
    "equalised convolutions": (
        Program((op("equalised"), op("act"), op("equalised", width=6), LAST)),
        ["equalised0.weight", "equalised2.weight", "conv3.conv"],
    ),
    "what cannot be copied": (Program((C, op("locked"), LAST)), ["conv0.conv", "locked1.conv", "conv2.conv"]),
    "a compiled activation": (Program((C, op("compiled", pointwise=True), LAST)), ["conv0.conv", "conv2.conv"]),
    "beside a compiled part": (Program((C, op("compiled"), op("conv"), LAST)), ["conv2.conv", "conv3.conv"]),
    "depthwise": (Program((C, op("conv", groups="depthwise", norm="batch"), LAST)), FIRST),
    "depthwise with a multiplier": (Program((C, op("conv", groups="multiplier"), LAST)), FIRST),
    "grouped": (Program((C, op("conv", groups="some", width=16), LAST)), ["conv0.conv", "conv1.conv"]),
    "grouped by the outputs": (Program((C, op("conv", groups="outputs"), LAST)), FIRST),
    "transposed and grouped": (Program((C, op("transposed", groups="some"), LAST)), ["conv0.conv", "transposed1.conv"]),
    "circular padding": (Program((C, op("conv", padding="circular"), LAST)), ["conv0.conv", "conv1.conv"]),
    "residual": (
        Program((C, op("residual", width=6), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2", "conv2.conv"],
    ),
    "residual with projection": (
        Program((C, op("residual", width=6, project=True), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2", "residual1.shortcut"],
    ),
    "residual in place": (Program((C, op("residual", inplace=True), LAST)), ["conv0.conv", "residual1.body.conv2"]),
    "stochastic depth": (Program((C, op("residual", drop=0.5), LAST)), ["conv0.conv", "residual1.body.conv1"]),
    **{
        f"random numbers, {form}": (Program((C, op("dropout", kind=form), LAST)), FIRST) for form in Dropping.FORMS
    },
    "dropout": (Program((C, op("dropout"), C, op("dropout", kind="channel"), LAST)), ["conv0.conv", "conv2.conv"]),
    "concat": (Program((C, C, op("concat"), LAST)), ["conv0.conv", "conv1.conv", "conv3.conv"]),
    "concat with itself": (Program((C, op("concat_self", order="xrx"), LAST)), FIRST),
    "concat into groups": (
        Program((C, C, op("concat"), op("conv", groups="some"), LAST)),
        ["conv0.conv", "conv1.conv"],
    ),
    "densenet": (Program((C, op("known", kind="dense"), LAST)), ["conv0.conv", "known1.convs.0", "known1.convs.1"]),
    "product": (Program((C, C, op("meet", how="mul"), LAST)), ["conv0.conv", "conv1.conv"]),
    "sigmoid gate": (Program((C, C, op("meet", how="gate"), LAST)), ["conv0.conv", "conv1.conv"]),
    "glu": (Program((C, op("glu"), LAST)), FIRST),
    "glu by halves": (Program((C, op("glu", form="halves"), LAST)), FIRST),
    "chunk": (
        Program((C, op("split"), op("conv"), op("conv", at=2), op("meet"))),
        ["conv0.conv", "conv2.conv", "conv3.conv"],
    ),
    **{
        f"equal parts, {form}": (
            Program((C, op("split", form=form), op("conv"), op("conv", at=2), op("meet"))),
            ["conv0.conv", "conv2.conv", "conv3.conv"],
        )
        for form in ("tuple", "slices", "tensor_split", "numbered")
    },
    "split by constants": (Program((C, op("split", form="equal"), op("meet"), LAST)), ["conv3.conv"]),
    "split by stored widths": (
        Program((C, op("split", form="stored"), op("conv"), op("conv", at=2), op("concat"), LAST)),
        ["conv0.conv", "conv2.conv", "conv3.conv"],
    ),
    "res2net": (
        Program((C, op("known", kind="res2net"), LAST)),
        ["conv0.conv", "known1.expand", "known1.convs.0", "known1.convs.1", "known1.contract"],
    ),
    "cross-stage partial": (
        Program((C, op("known", kind="csp"), LAST)),
        ["conv0.conv", "known1.expand", "known1.block.0", "known1.mix"],
    ),
    "ghost": (Program((C, op("known", kind="ghost"), LAST)), ["conv0.conv", "known1.primary"]),
    "channel shuffle": (Program((C, op("shuffle"), LAST)), FIRST),
    "channel shuffle behind groups": (
        Program((op("conv", width=24), op("conv", groups="some", width=24), op("shuffle", groups=4), LAST)),
        ["conv0.conv", "conv1.conv"],
    ),
    "channel shuffle by stored numbers": (Program((C, op("shuffle", form="stored"), LAST)), FIRST),
    "shufflenet": (Program((C, op("known", kind="shuffle"), LAST)), ["known1.a"]),
    "view by stored numbers": (Program((C, op("shuffle", form="view"), LAST)), FIRST),
    "pixel shuffle": (Program((op("conv", width=16), op("pixel"), LAST)), FIRST),
    "pixel unshuffle": (Program((op("conv", width=6), op("pixel", up=False), LAST)), FIRST),
    "flatten": (Program((C, op("flatten"), op("linear", act="relu")), size=4), ["conv0.conv", "linear2.linear"]),
    "flatten by view": (Program((C, op("flatten", form="view"), op("linear")), size=4), ["conv0.conv"]),
    "pooling": (
        Program((C, op("pool"), C, op("pool", kind="avg"), C, op("pool", kind="adaptive"), LAST)),
        ["conv0.conv", "conv2.conv", "conv4.conv"],
    ),
    "upsampling": (Program((C, op("upsample"), C, op("upsample", mode="linear"), LAST), size=2), ["conv0.conv"]),
    "squeeze and excite": (
        Program((C, op("squeeze"), LAST)),
        ["conv0.conv", "squeeze1.reduce", "squeeze1.expand"],
    ),
    "squeeze and excite by linear layers": (
        Program((C, op("squeeze", form="shape"), LAST)),
        ["conv0.conv", "squeeze1.reduce", "squeeze1.expand"],
    ),
    "squeeze and excite by a stored width": (Program((C, op("squeeze", form="stored"), LAST)), ["squeeze1.reduce"]),
    "inverted residual": (
        Program((C, op("known", kind="inverted"), LAST)),
        ["conv0.conv", "known1.body.expand.0", "known1.body.contract.0"],
    ),
    "group norm": (Program((op("conv", norm="group", act="relu"), LAST)), FIRST),
    "group norm of one group": (Program((op("conv", norm="group_one", act="relu"), LAST)), FIRST),
    "group norm behind a residual": (
        Program((C, op("residual", norm="group"), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2"],
    ),
    "layer norm over channels": (Program((op("conv", norm="layer", act="gelu"), LAST)), FIRST),
    **(
        {"rms norm over channels": (Program((op("conv", norm="rms"), LAST)), FIRST)}
        if hasattr(nn, "RMSNorm")  # torch 2.4
        else {}
    ),
    "instance norm": (Program((op("conv", norm="instance"), op("norm", kind="instance", tracked=False), LAST)), FIRST),
    "batch norm without affine": (Program((op("conv"), op("norm", affine=False), LAST)), FIRST),
    "transformer MLP": (Program((C, op("tokens", cls=True), op("mlp"))), ["mlp2.expand"]),
    "transformer MLP, its stream": (
        Program((C, op("tokens", cls=True), op("mlp"), op("mlp", scale=True), op("norm", kind="layer"))),
        ["conv0.conv", "mlp2.contract", "mlp3.contract"],
    ),
    "gated MLP": (Program((C, op("tokens"), op("mlp", gated=True))), ["mlp2.expand"]),
    "convnext": (Program((C, op("mlp", scale=True), LAST)), ["conv0.conv", "mlp1.body.expand", "mlp1.body.contract"]),
    "linear layers": (
        Program((op("flatten"), op("linear", norm="batch", act="relu"), op("linear")), size=4),
        ["linear1.linear", "linear2.linear"],
    ),
    "shortcut of option A": (
        Program(
            (C, op("conv", width=12, norm="batch", stride=2), op("pad_channels", at=1, strided=True), op("meet"), LAST)
        ),
        ["conv0.conv", "conv1.conv"],
    ),
    "sigmoid": (Program((op("conv", norm="batch", act="sigmoid"), LAST)), FIRST),
    "plus one": (Program((op("conv", norm="batch", act="plus_one"), LAST)), FIRST),
    "prelu per channel": (Program((op("conv", act="prelu"), LAST)), FIRST),
    "padding with a constant": (Program((C, op("pad"), LAST)), FIRST),
    "layer scale": (Program((C, op("bare", shape="scale"), LAST)), FIRST),
    "parameter (C, 1, 1)": (Program((C, op("bare", shape="C11"), LAST)), FIRST),
    "parameter (1, C, 1, 1)": (Program((C, op("bare", shape="1C11", how="add"), LAST)), FIRST),
    "parameter (1, C, H, W)": (Program((C, op("bare", shape="1CHW", how="add"), LAST)), FIRST),
    "buffer (1, C, 1, 1)": (Program((C, op("bare", shape="1C11", buffer=True), LAST)), FIRST),
    "buffer (C, 1, 1)": (Program((C, op("bare", shape="C11", buffer=True), LAST)), FIRST),
    "scalar parameter": (Program((C, op("bare", shape="scalar"), LAST)), FIRST),
    "coordinates": (Program((C, op("mix", how="coordinates"), LAST)), FIRST),
    "weight norm": (Program((C, op("conv", weight="weight_norm"), LAST)), ["conv0.conv", "conv1.conv"]),
    "old weight norm": (Program((C, op("conv", weight="old_weight_norm"), LAST)), ["conv0.conv", "conv1.conv"]),
    "a standardised weight": (Program((C, op("conv", weight="standardised"), LAST)), ["conv0.conv", "conv1.conv"]),
    **{f"along space, {form}": (Program((C, op("spatial", form=form), LAST)), FIRST) for form in FORMS},
    "functional convolution": (Program((C, op("functional"), LAST)), FIRST),
    "called on its own output": (Program((C, C, op("again"), LAST)), ["conv0.conv", "conv1.conv", "conv3.conv"]),
    "called on two inputs": (
        Program((C, op("conv", at=1), C, op("again", at=2), op("meet"), LAST)),
        ["conv0.conv", "conv1.conv", "conv2.conv"],
    ),
    "checkpointed": (Program((C, op("cut"), LAST)), ["conv0.conv", "cut1.body.0", "cut1.body.2"]),
    "a table of positions": (Program((C, op("positions"), LAST)), ["conv0.conv", "positions1.table"]),
    "a table of positions, tokens": (
        Program((C, op("tokens"), op("positions"), op("mlp"))),
        ["conv0.conv", "positions2.table"],
    ),
    "a module under two names": (Program((C, op("two_names"), LAST)), ["conv0.conv", "two_names1.conv"]),
    "a layer norm by hand": (Program((C, op("own_norm"), LAST)), FIRST),
    **{
        f"{form} over channels": (Program((C, op("added_up", how=form), LAST)), FIRST)
        for form in kinds.ADDED
        if form != "counted"
    },
    "a sum over channels without a norm ahead": (Program((op("conv"), op("added_up"), LAST)), FIRST),
    "queries and keys": (Program((C, op("similar"), LAST)), ["conv0.conv", "similar1.q", "similar1.k"]),
    "normalised queries and keys": (
        Program((C, op("tokens"), op("similar", norm=True), op("linear"))),
        ["similar2.q", "similar2.k"],
    ),
    "a mean that nobody uses": (Program((C, op("unused"), LAST)), FIRST),
    "an LSTM reads it": (Program((C, op("read"), op("linear"))), FIRST),
    "a bidirectional GRU reads it": (Program((C, op("read", form=nn.GRU, both=True), op("linear"))), FIRST),
    "deformable": (Program((C, op("deformable"), op("norm"), LAST)), ["conv0.conv", "deformable1.conv"]),
    "deformable, as a function": (Program((C, op("deformable", function=True), op("norm"), LAST)), FIRST),
    "a layer norm of three axes": (Program((C, op("context"), LAST)), ["conv0.conv", "context1.reduce"]),
    "a convolution over positions": (Program((C, op("tokens"), op("positioned"), op("linear"))), FIRST),
    **{
        f"a kernel for every sample, {'demodulated' if demodulate else 'as it is'}": (
            Program((C, op("modulated", demodulate=demodulate), LAST)),
            ["conv0.conv", "modulated1.weight", "conv2.conv"],
        )
        for demodulate in (True, False)
    },
    "a norm without parameters": (Program((op("conv"), op("pixel_norm"), LAST)), FIRST),
    "learned tokens": (Program((C, op("tokens"), op("prompts"), op("prompts", between=True), op("linear"))), FIRST),
    **{
        f"rotary heads, {table}, {repeat}": (
            Program((C, op("tokens"), op("rotary", table=table, repeat=repeat))),
            ["conv0.conv", "rotary2.q"],
        )
        for table in ("buffer", "made", "neighbours", "complex")
        for repeat in REPEATS
    },
    "an unused module": (Program((C, op("side", form="unused"), LAST)), ["conv2.conv"]),
}


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
