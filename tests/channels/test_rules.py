"""Rules for operations: those of users, and what PyTorch's samples found in ours (see test_op_db.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import DNALError, DNALPruner, register_rule
from dnal_nni.channels.flow import Flow, Operation
from dnal_nni.channels.graph import CouplingGraph
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.channels.rules.dispatch import run
from dnal_nni.channels.rules.elementwise import pointwise
from dnal_nni.channels.rules.windows import windowed
from dnal_nni.surgery.verify import verify_and_freeze

LIBRARY = torch.library.Library("dnal_test", "DEF")
LIBRARY.define("blur(Tensor x) -> Tensor")
LIBRARY.define("swish_(Tensor(a!) x) -> Tensor(a!)")
LIBRARY.define("centre(Tensor x) -> Tensor")
LIBRARY.impl("blur", lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1), "CPU")
LIBRARY.impl("swish_", lambda x: x.mul_(x.sigmoid()), "CPU")
LIBRARY.impl("centre", lambda x: x - x.mean(1, keepdim=True), "CPU")


def keeps_channels(flow: Flow, op: Operation) -> None:
    x = op.labels[0]
    if x is not None:
        flow.put(op.out, flow.mix(x, [2, 3], "blur runs over the channels"), x.site)


def does_not_run(flow: Flow, op: Operation) -> None:
    raise ValueError("no such form")


class Net(nn.Module):
    def __init__(self, operation: str) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(getattr(torch.ops.dnal_test, self.operation)(self.bn(self.a(x))))


def first_group(operation: str) -> ChannelGroup:
    torch.manual_seed(0)
    net, x = Net(operation), torch.randn(2, 3, 8, 8)
    groups = find_groups(net, x)
    verify_and_freeze(net, groups, x, seconds=60)
    return groups[0]


def test_an_operation_of_a_user_is_followed_while_its_rule_is_registered() -> None:
    assert first_group("blur").frozen == "there is no rule for dnal_test::blur in Net.forward"
    with register_rule("dnal_test::blur", keeps_channels):
        group = first_group("blur")
        assert group.frozen is None and group.site == "norm"  # which says that it maps 0 to 0
        pruner = DNALPruner(Net("blur"), [{"op_types": ["Conv2d"]}], dummy_input=torch.randn(2, 3, 8, 8))
        pruner.harden({"a": torch.arange(8) < 3})
        assert pruner.speedup().b.in_channels == 3
    assert first_group("blur").frozen is not None


def test_rules_of_the_package_serve_operations_of_users() -> None:
    with register_rule("dnal_test::blur", windowed(2)):
        assert first_group("blur").frozen is None
    registered = register_rule("dnal_test::swish_", pointwise)
    assert first_group("swish_").frozen is None  # in place
    registered.close()
    assert first_group("swish_").frozen is not None


def test_a_rule_that_is_wrong_leaves_its_layers_whole() -> None:
    with register_rule("dnal_test::centre", pointwise):
        assert (first_group("centre").frozen or "").startswith("removing channels would change the output by")
    with register_rule("dnal_test::centre", does_not_run):
        assert first_group("centre").frozen == "centre cannot be followed (ValueError) in Net.forward"


def test_a_later_rule_counts_until_it_is_closed() -> None:
    with register_rule("dnal_test::blur", keeps_channels):
        with register_rule("dnal_test::blur", does_not_run):
            assert first_group("blur").frozen is not None
        assert first_group("blur").frozen is None


@pytest.mark.parametrize("name", ["blur", "dnal_test::sharpen", "nowhere::blur", "dnal_test::", ""])
def test_an_operation_that_torch_does_not_know(name: str) -> None:
    with pytest.raises(DNALError, match=f"register_rule: torch knows no operation {name!r}: give its name as"):
        register_rule(name, keeps_channels)


def test_a_rule_is_a_function() -> None:
    with pytest.raises(DNALError, match="rule for dnal_test::blur must be a function of"):
        register_rule("dnal_test::blur", "pointwise")  # type: ignore[arg-type]


# -- those that were wrong --------------------------------------------------------------------------------------------


def labelled(flow: Flow, tensor: Tensor, axis: int, name: str) -> tuple[Tensor, Tensor]:
    """The tensor with channels along an axis, all of which a norm zeroes, and their ids."""
    ids = flow.graph.vertex(name, "out", tensor.shape[axis]).ids
    flow.put(tensor, [ids.view([-1 if i == axis else 1 for i in range(tensor.dim())])], frozenset({name}))
    return tensor, ids


@pytest.fixture
def flow() -> Flow:
    return Flow(CouplingGraph(), lambda tensor: None, lambda: ("", "Test"))


ZEROES: dict[str, tuple[Any, bool]] = {
    "mul": (torch.ops.aten.mul.Tensor, True),
    "add": (torch.ops.aten.add.Tensor, False),  # a closed row is not 0: each column adds its own
    "div": (torch.ops.aten.div.Tensor, False),
}


@pytest.mark.parametrize("name", ZEROES)
def test_rows_meet_columns(flow: Flow, name: str) -> None:
    function, zeroed = ZEROES[name]
    a, _ = labelled(flow, torch.randn(4, 1), 0, "a")
    b, _ = labelled(flow, torch.randn(1, 5), 1, "b")
    labels = flow.of(run(flow, function, (a, b), {}))
    assert labels is not None and len(labels.arrays) == 2
    assert labels.site == (frozenset({"a", "b"}) if zeroed else None)


def test_what_is_zero_in_two_places_at_once(flow: Flow) -> None:
    x, _ = labelled(flow, torch.randn(2, 4), 1, "x")
    labels = flow.of(run(flow, torch.ops.aten.eq.Tensor, (x, x), {}))  # 0 equals 0, and no random number
    assert labels is not None and labels.site is None
    for threshold in (torch.tensor(-1.0), torch.tensor(1.0)):  # a number of either sign
        labels = flow.of(run(flow, torch.ops.aten.minimum.default, (x, threshold), {}))
        assert labels is not None and labels.site is None


def test_indices_of_a_maximum_are_not_zero(flow: Flow) -> None:
    x, _ = labelled(flow, torch.randn(2, 4, 6, 6), 1, "x")
    values, indices = (flow.of(t) for t in run(flow, torch.ops.aten.max_pool2d_with_indices.default, (x, [2, 2]), {}))
    assert values is not None and values.site and indices is not None and indices.site is None


def frozen(flow: Flow, ids: Tensor) -> bool:
    units = flow.graph.units()
    return set(units[ids].tolist()) <= flow.graph.frozen_units(units).keys()


def test_a_depthwise_convolution_sums_over_its_kernel(flow: Flow) -> None:
    x, channels = labelled(flow, torch.randn(2, 4, 8), 1, "x")
    kernel, positions = labelled(flow, torch.randn(4, 1, 3), 2, "kernel")
    arguments = ([1], [0], [1], False, [0])
    run(flow, torch.ops.aten.convolution.default, (x, kernel, None, *arguments, 4), {})
    assert frozen(flow, positions)
    bias, offsets = labelled(flow, torch.randn(4), 0, "bias")
    run(flow, torch.ops.aten.convolution.default, (torch.randn(2, 4, 8), torch.randn(4, 1, 3), bias, *arguments, 4), {})
    assert frozen(flow, offsets)


def test_rows_written_between_labelled_rows(flow: Flow) -> None:
    x, rows = labelled(flow, torch.randn(5, 3), 0, "x")
    values, _ = labelled(flow, torch.randn(1, 3), 1, "values")
    run(flow, torch.ops.aten.index_put.default, (x, [torch.tensor([4])], values), {})
    assert frozen(flow, rows)


class Prefix(nn.Module):
    """Tokens that are kept from an operation, of which there may be none (RoPE without a class token)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.cat([x[..., : self.first], x[..., self.first :].relu()], 2))


def test_a_slice_of_no_length_is_no_partner() -> None:
    groups = find_groups(Prefix(), torch.randn(2, 3, 6))
    assert [group.frozen for group in groups] == [None, "the model returns these channels"]


def test_norms_called_as_functions_say_what_to_write_instead() -> None:
    class Norms(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.a, self.b, self.kind = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), kind

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.kind == "group":
                return self.b(nn.functional.group_norm(x, 4))
            if self.kind == "layer":
                return self.b(nn.functional.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1))
            if self.kind == "space":
                return self.b(nn.functional.layer_norm(x, x.shape[2:]))
            return self.b(nn.functional.instance_norm(x))

    def left(kind: str) -> str | None:
        net, x = Norms(kind), torch.randn(2, 3, 6, 6)
        groups = find_groups(net, x)
        verify_and_freeze(net, groups, x, seconds=60)
        return groups[0].frozen

    assert left("group") == (
        "F.group_norm runs over the channels, where a module nn.GroupNorm could lose some, in Norms.forward"
    )
    assert (left("layer") or "").startswith("F.layer_norm runs over the channels, where a module nn.LayerNorm could")
    assert left("space") is None and left("instance") is None
