"""torch-pruning's graph as a source of groups: the same where it is right, left whole where not, and never a hang."""

import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from tp_graphs import GRAPH, IMAGE, Function, built, described, verified

from dnal_nni import DNALError
from dnal_nni.channels import dependency
from dnal_nni.channels.groups import groups_of
from dnal_nni.surgery.slim import slim_copy


class Branches(nn.Module):
    """A concat of two convolutions, a stream that is added to, depthwise and grouped convolutions, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(12)
        self.point, self.deep = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.norm, self.grouped = nn.GroupNorm(6, 12), nn.Conv2d(12, 16, 1, groups=4)
        self.fc = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        x = torch.relu(self.norm(x + self.deep(torch.relu(self.point(x)))))
        return self.fc(torch.relu(self.grouped(x)).flatten(1))


@pytest.mark.parametrize(
    "name", ["branches", "resnet18", "densenet121", "mobilenet_v2", "googlenet", "regnet_x_400mf", "squeezenet1_1"]
)
def test_groups_are_ours_where_both_graphs_are_right(name: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}  # its heads of train mode are in the graph too
    model = Branches() if name == "branches" else torchvision.models.get_model(name, weights=None, **options)
    x = IMAGE if name == "branches" else torch.randn(2, 3, 64, 64)
    ours, theirs = groups_of(model, x), groups_of(model, x, GRAPH)
    # what is counted, but holds no tensors, is an operation to torch-pruning; of stored sizes it knows nothing
    counted = {n for n, m in model.named_modules() if isinstance(m, nn.modules.pooling._AdaptiveAvgPoolNd)}
    for group in ours:
        group.members = tuple(m for m in group.members if m.path not in counted and m.side != "size")
    assert described(ours) == described(theirs)
    if name == "branches":
        assert described(theirs) == described(groups_of(model, x, built(model)))


def test_a_split_is_read_and_cut() -> None:
    """GLU: channel i of one half stands and falls with channel i of the other."""
    model = Function(lambda x: F.glu(x, 1) if x.shape[1] % 2 == 0 else x)
    group = verified(model, IMAGE)["b"]
    assert group.frozen is None

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x).chunk(2, 1)
            return self.b(one * other).mean((2, 3))

    net = Halves().double()
    group = verified(net, IMAGE.double())["a"]
    assert group.frozen is None and group.channels == 4
    member = next(m for m in group.members if m.path == "a")
    assert member.units.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    keep = torch.tensor([True, False, True, False])
    slim = slim_copy(net, [group], {"a": keep})
    with torch.no_grad():  # a product with a channel that is zero is zero
        net.b.weight[:, ~keep] = 0
    torch.testing.assert_close(slim(IMAGE.double()), net(IMAGE.double()), rtol=0, atol=1e-12)


class Queries(nn.Module):
    """Grouped queries: two heads of queries share one of keys and values, as in Hugging Face's attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.into, self.q, self.last = nn.Linear(6, 12), nn.Linear(12, 8 * size), nn.Linear(8 * size, 3)
        self.k, self.v = nn.Linear(12, 4 * size), nn.Linear(12, 4 * size)

    def heads(self, x: Tensor, times: int) -> Tensor:
        x = x.view(*x.shape[:2], -1, self.size).transpose(1, 2)
        return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(len(x), -1, *x.shape[2:]) if times > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.into(x))
        q, k, v = self.heads(self.q(x), 1), self.heads(self.k(x), 2), self.heads(self.v(x), 2)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.last(y.transpose(1, 2).flatten(2)).mean(1)


def test_grouped_queries_share_the_units_of_their_keys() -> None:
    """Where a head is one channel; of larger ones torch-pruning would remove single columns, which is found out."""
    x = torch.randn(2, 5, 6)
    model = Queries(1)
    for graph in (GRAPH, built(model, x)):
        group = verified(model, x, graph)["q"]
        assert group.frozen is None and group.channels == 4
        units = {(m.path, m.side): m.units.tolist() for m in group.members}
        assert units["q", "out"] == units["last", "in"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert units["k", "out"] == units["v", "out"] == [0, 1, 2, 3]
    groups = verified(Queries(3), x)
    assert (groups["q"].frozen or "").endswith("(by torch-pruning's graph)") and groups["into"].frozen is None


class Mixer(nn.Module):
    """Linear layers along channels and along places, in turns: torch-pruning sees no transpose."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.stem, self.norm, self.across = nn.Conv2d(3, 12, 1), nn.LayerNorm(12), nn.Linear(places, 10)
        self.back, self.up, self.down = nn.Linear(10, places), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.back(torch.relu(self.across(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def test_fewer_positions_than_channels_are_no_channels() -> None:
    model = Mixer(4)
    groups = verified(model, IMAGE[..., :2, :2])
    assert {name for name, group in groups.items() if group.frozen is None} == {"stem", "across", "up"}
    assert {m.path for m in groups["stem"].members} == {"stem", "norm", "up", "down", "head"}
    assert (groups["back"].frozen or "").startswith("no layer reads its output")
    more = verified(Mixer(16), IMAGE)  # more of them: nothing says which of the two are channels
    assert {"across", "up"} <= {name for name, group in more.items() if group.frozen is None}


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "static view": lambda x: x.reshape(len(x), 8, *x.shape[2:]),
    "slice": lambda x: x[:, :5],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_its_maps_get_wrong_is_left_whole_and_the_reason_names_it(name: str) -> None:
    torch.manual_seed(0)
    groups = verified(Function(WRONG[name]), IMAGE)
    frozen = [g.frozen for g in groups.values() if any(m.path == "a" and m.side == "out" for m in g.members)]
    assert frozen and all(reason and reason.endswith("(by torch-pruning's graph)") for reason in frozen)
    assert groups["b"].frozen is None


class NonLocal(nn.Module):
    """Attention between places: torch-pruning walks round its products without an end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k, self.v = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
        self.b, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        y = v @ (q.transpose(1, 2) @ k).softmax(-1)
        return self.last(x + self.b(y.view(*y.shape[:2], *x.shape[2:]))).mean((2, 3))


def test_a_walk_that_would_not_end_ends_and_nothing_wrong_is_cut() -> None:
    start = time.monotonic()
    groups = list(verified(NonLocal(), IMAGE).values())
    assert time.monotonic() - start < 30
    assert all(g.frozen is None or "torch-pruning" in g.frozen for g in groups)


def test_indices_that_grow_round_a_cycle_stop_at_the_widest_layer() -> None:
    """Two maps of a cycle that multiply: torch-pruning's own walk would go on for ever."""
    model = Function(lambda x: x)
    graph = built(model)
    node = graph.module2node[model.b]
    for edge in node.dependencies:
        if edge.trigger == tp.prune_conv_in_channels:
            edge.index_mapping[0] = tp.dependency.index_mapping._FlattenIndexMapping(stride=3)
    groups = groups_of(model, IMAGE, graph)
    frozen = next(g.frozen for g in groups if g.name == "a")
    assert frozen and "channels that it does not have (by torch-pruning's graph)" in frozen


def test_a_graph_that_cannot_be_built_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None)
    message = r"cannot build its graph of ShuffleNetV2 \(ZeroDivisionError: .*\): leave graph= out"
    with pytest.raises(DNALError, match=message):
        groups_of(model, torch.randn(1, 3, 64, 64), GRAPH)
    monkeypatch.setattr(dependency, "SECONDS", 0.0)
    with pytest.raises(DNALError, match=r"graph of Function is not built within 0 seconds: leave graph= out"):
        groups_of(Function(torch.sigmoid), IMAGE, GRAPH)
    model = Function(torch.sigmoid)
    with pytest.raises(DNALError, match="graph is not read within 0 seconds"):
        groups_of(model, IMAGE, built(model))


@pytest.mark.parametrize("how", ["never ends", "sleeps", "fails"])
def test_whatever_torch_pruning_does_ends_in_an_error(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def build(graph: "tp.DependencyGraph", model: nn.Module, *args: object, **kwargs: object) -> None:
        model.eval().a = nn.Identity()
        if how == "fails":
            raise OSError("no space")
        while True:
            time.sleep(60 if how == "sleeps" else 0)

    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", build)
    monkeypatch.setattr(dependency, "SECONDS", 1.0)
    model, threads, start = Function(torch.relu), set(threading.enumerate()), time.monotonic()
    layers = list(model.modules())
    message = r"\(OSError: no space\): leave" if how == "fails" else "not built within 1 seconds: leave graph= out"
    with pytest.raises(DNALError, match=message):
        groups_of(model, IMAGE, GRAPH)
    assert time.monotonic() - start < 20
    left = set(threading.enumerate()) - threads
    for thread in left if how == "never ends" else ():
        thread.join(20)
    assert sum(thread.is_alive() for thread in left) == (how == "sleeps")
    assert model.training and list(model.modules()) == layers


def test_a_map_that_fails_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, idxs: list[object]) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr("torch_pruning.dependency.index_mapping._ConcatIndexMapping.__call__", fails)
    model = Branches()
    with pytest.raises(DNALError, match=r"a map that fails \(ZeroDivisionError: integer .*\): leave graph= out"):
        groups_of(model, IMAGE, GRAPH)


def test_a_map_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a routing layer whose output is flattened to millions of weights (CondConv), it takes hours."""

    def runs(self: object, idxs: list[object]) -> None:
        while True:
            time.sleep(0)

    model = Branches()
    graph = built(model)
    monkeypatch.setattr("torch_pruning.dependency.index_mapping._ConcatIndexMapping.__call__", runs)
    monkeypatch.setattr(dependency, "SECONDS", 1.0)
    with pytest.raises(DNALError, match="graph is not read within 1 seconds: leave graph= out"):
        groups_of(model, IMAGE, graph)


def test_the_model_stays_as_it_was_and_frozen_weights_are_no_obstacle() -> None:
    model = Function(torch.sigmoid).requires_grad_(False).train()
    model.b.eval()
    state = copy.deepcopy(model.state_dict())
    groups = groups_of(model, IMAGE, GRAPH)
    assert [g.name for g in groups if g.frozen is None] == ["a", "b"]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.training and model.a.training and not model.b.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Scaled(nn.Module):
    """Channels scaled by a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Conv2d(3, 8, 1), nn.Parameter(torch.rand(8, 1, 1)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale).mean((2, 3))


def test_bare_parameters_are_cut_unless_they_are_ignored() -> None:
    model = Scaled()
    dims = [tp._helpers.UnwrappedParameters(model.scale, 0)]
    group = verified(model, IMAGE, built(model, unwrapped_parameters=dims))["a"]
    assert group.frozen is None
    assert ("scale", "both", 0) in [(m.path, m.side, m.dim) for m in group.members]
    ignored = verified(model, IMAGE, built(model, unwrapped_parameters=dims, ignored_params=[model.scale]))["a"]
    assert "scale" not in [m.path for m in ignored.members]
    assert ignored.frozen and "does not run" in ignored.frozen


@pytest.mark.parametrize("how", ["ignored", "frozen", "detached"])
def test_layers_that_the_graph_does_not_have_are_told(how: str) -> None:
    model = Function((lambda x: x.detach() * 1) if how == "detached" else torch.relu)
    model.requires_grad_(how != "frozen")
    groups = verified(model, IMAGE, built(model, ignored_layers=[model.a] if how == "ignored" else None))
    assert "graph has no node for a: it was told to ignore it, or autograd" in (groups["a"].frozen or "")
    assert (groups["b"].frozen is None) == (how != "frozen")


def test_tied_weights_are_left_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(n, 6, 1) for n in (3, 6, 6, 6))
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))).mean((2, 3))

    groups = verified(Tied(), IMAGE)
    assert "tied to another layer (by torch-pruning's graph)" in (groups["a"].frozen or "")
    assert "tied to another layer (by torch-pruning's graph)" in (groups["b"].frozen or "")


# -- graphs that do not fit -------------------------------------------------------------------------------------------


def test_a_graph_of_something_else_is_refused() -> None:
    model, other = Function(torch.relu), Function(torch.relu)
    with pytest.raises(DNALError, match=r"graph= is the graph of another model \(Function\): build it again"):
        groups_of(model, IMAGE, built(other))
    with pytest.raises(DNALError, match=r"graph='torch': pass None, 'torch-pruning', or a torch_pruning.Depend"):
        groups_of(model, IMAGE, "torch")  # type: ignore[arg-type]
    with pytest.raises(DNALError, match="behind its build_dependency"):
        groups_of(model, IMAGE, tp.DependencyGraph())


@pytest.mark.parametrize("history", [True, False])
def test_a_graph_of_a_model_already_cut_is_refused(history: bool) -> None:
    model = Function(torch.relu)
    graph = built(model)
    graph.get_pruning_group(model.a, tp.prune_conv_out_channels, [0, 3]).prune(record_history=history)
    with pytest.raises(DNALError, match=r"built ahead of a cut of the model: build it again"):
        groups_of(model, IMAGE, graph)
    assert groups_of(model, IMAGE, built(model))[0].channels == 6


def test_a_graph_of_a_layer_that_was_replaced_is_refused() -> None:
    model = Function(torch.relu)
    graph = built(model)
    model.a = nn.Conv2d(3, 8, 3, 1, 1)
    with pytest.raises(DNALError, match="built ahead of a cut"):
        groups_of(model, IMAGE, graph)


def test_a_graph_of_another_input_is_refused_but_the_batch_may_differ() -> None:
    class Pooled(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.adaptive_avg_pool2d(self.first(x), 4))

    model = Pooled()
    graph = built(model, torch.randn(2, 3, 16, 16))
    assert groups_of(model, torch.randn(5, 3, 16, 16), graph)
    message = r"built for another input: first g\w+ \[2, 3, 16, 16\] there, and \[5, 3, 12, 12\] for the dummy_input"
    with pytest.raises(DNALError, match=message):
        groups_of(model, torch.randn(5, 3, 12, 12), graph)
