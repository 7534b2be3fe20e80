"""Networks that sum their candidates: gates, cost, budget and removal of whole candidates."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from blocks import mbconv
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, measure, save_compressed
from dnal_nni.modules.cells import Cell
from dnal_nni.modules.choices import Choice, Depth, Inputs, Mixture
from dnal_nni.modules.gates import GateState, ScaledSigmoidGate
from dnal_nni.search.close import exact_cut
from dnal_nni.search.importance import importance
from dnal_nni.search.scores import Scores
from dnal_nni.surgery.verify import random_keep

ALL = [{"op_types": ["Conv2d", "Linear"]}]


def branches(label: str, kernels: tuple[int, ...] = (3, 5)) -> Mixture:
    return Mixture({f"k{k}e{e}": mbconv(6, 6, k, e) for k in kernels for e in (2, 3)}, label)


class Everything(nn.Module):
    """Every kind of choice, one inside of another, two that share a label, and a candidate that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.one = branches("shared")
        self.two = branches("shared")
        inner = Mixture({"wide": mbconv(6, 6, 3, 3), "pool": nn.AvgPool2d(3, 1, 1)}, "inner")
        two = nn.Sequential(mbconv(6, 6, 3, 2), inner)
        self.outer = Mixture({"two": two, "plain": nn.Conv2d(6, 6, 3, 1, 1), "skip": nn.Identity()}, "outer")
        self.depth = Depth([mbconv(6, 6, 3, 2) for _ in range(4)], [1, 2, 4], "depth")
        self.inputs = Inputs(3, "mean", "inputs")
        node = {"conv_from_0": mbconv(6, 6, 3, 2), "conv_from_1": mbconv(6, 6, 3, 2), "skip_from_0": nn.Identity()}
        nodes = [Mixture(node, "node", {"conv_from_0": 0, "conv_from_1": 1, "skip_from_0": 0})]
        self.cell = Cell(nodes, lambda inputs: inputs, lambda out, inputs: out)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = x + self.one(x)
        b = a + self.two(a)
        c = self.depth(self.outer(b))
        x = self.cell([self.inputs([a, b, c]), c])
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def everything() -> tuple[DNALPruner, Tensor]:
    torch.manual_seed(0)
    model = Everything()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that hide nothing
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(6, 1, 8, 8)
    return DNALPruner(model, ALL, dummy_input=x, budget=Budget(flops=0.3)), x


def weighted(choice: Choice, g: Tensor) -> Choice:
    """Soft gates of these values."""
    gate = ScaledSigmoidGate(len(g))
    gate.s.data, gate.state = torch.logit(g), GateState.SOFT
    choice.attach(gate)
    return choice


def test_a_choice_weighs_what_it_sums() -> None:
    x, g = torch.randn(2, 6, 5, 5), torch.tensor([0.2, 0.7, 0.4])
    convs = [nn.Conv2d(6, 6, 3, 1, 1) for _ in range(3)]
    a, b, c = (conv(x) for conv in convs)
    mixture = weighted(Mixture({"a": convs[0], "b": convs[1], "c": convs[2]}, "m"), g)
    torch.testing.assert_close(mixture(x), 0.2 * a + 0.7 * b + 0.4 * c)
    inputs = weighted(Inputs(3, "mean", "i"), g)
    torch.testing.assert_close(inputs([a, b, c]), (0.2 * a + 0.7 * b + 0.4 * c) / 1.3)
    # a chain that may end after 1, 2 or 3 blocks: the second runs with g0, the third with g0 g1
    depth = weighted(Depth(convs, [1, 2, 3], "d"), g[:2])
    ends = [convs[0](x), convs[1](convs[0](x)), convs[2](convs[1](convs[0](x)))]
    torch.testing.assert_close(depth(x), 0.8 * ends[0] + 0.2 * 0.3 * ends[1] + 0.2 * 0.7 * ends[2])


def test_one_group_for_every_label(everything: tuple[DNALPruner, Tensor]) -> None:
    pruner, _ = everything
    choices = {g.name: (g.channels, g.least, [m.path for m in g.members]) for g in pruner.groups if g.choice}
    assert choices == {
        "one": (4, 1, ["one", "two"]),
        "outer": (3, 1, ["outer"]),
        "outer.two.1": (2, 1, ["outer.two.1"]),
        "depth": (2, 0, ["depth"]),
        "inputs": (3, 1, ["inputs"]),
        "cell.nodes.0": (3, 1, ["cell.nodes.0"]),
    }
    assert {g.site for g in pruner.groups if g.choice} == {"output"}
    frozen = [g.name for g in pruner.groups if g.frozen]
    assert frozen == ["fc"]


@pytest.mark.parametrize("seed", range(6))
def test_gated_is_sliced_and_costs_what_the_model_says(everything: tuple[DNALPruner, Tensor], seed: int) -> None:
    pruner, x = everything
    keep = random_keep(pruner.groups, None, seed)
    keep["depth"] = torch.tensor([seed % 2 == 0, seed % 3 == 0])
    keep["cell.nodes.0"][1] = True  # fvcore does not count what nothing reads
    pruner.harden(keep)
    slim = pruner.speedup()
    # gates of 0 and 1 that are multiplied, not skipped as hard ones are
    gated = copy.deepcopy(pruner.bound_model).double()
    for module in gated.modules():
        for gate in getattr(module, "gates", ()):
            gate.state, gate.delta = GateState.SOFT, torch.tensor(1e4)
            gate.s.data = gate.mask.double() * 2 - 1
    slim = slim.double()
    for mode in (False, True, False):
        with torch.no_grad():
            expected, got = gated.train(mode)(x.double()), slim.train(mode)(x.double())
        assert float((expected - got).abs().max()) < 1e-9 * float(expected.abs().max())
    g = torch.cat([pruner.session.keep[group.name].double() for group in pruner.plan.active])
    cost = measure(slim.float(), x)
    assert cost.flops == pytest.approx(float(pruner.plan.cost.flops(g)), rel=1e-9)
    assert cost.params == pytest.approx(float(pruner.plan.cost.params(g)), rel=1e-9)


def test_closed_candidates_leave_the_module_tree(everything: tuple[DNALPruner, Tensor], tmp_path: Path) -> None:
    pruner, x = everything
    pruner.harden({
        "one": torch.tensor([False, True, False, False]),
        "outer": torch.tensor([False, False, True]),
        "depth": torch.tensor([False, True]),  # the second part cannot run without the first
        "inputs": torch.tensor([True, False, True]),
    })  # fmt: skip
    slim = pruner.speedup()
    names = {name.split(".")[1] for name, _ in slim.named_parameters() if name.startswith(("one.", "two.", "outer."))}
    assert names == {"k3e3"}
    assert [name for name, _ in slim.outer.named_children()] == ["skip"]
    assert len(slim.depth.blocks) == 1
    kept = {group.name: group.kept for group in pruner.report.groups}
    assert kept["depth"] == 0 and kept["one.k5e2.0"] == 0 and kept["one.k3e3.0"] == 18

    save_compressed(slim, tmp_path / "slim.safetensors")
    loaded = load_compressed(Everything(), tmp_path / "slim.safetensors").eval()
    assert torch.equal(loaded(x), slim.eval()(x))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in slim.named_parameters()]


def data(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("flops", [0.6, 0.2])
def test_a_search_meets_the_budget_and_leaves_every_choice_a_candidate(flops: float) -> None:
    torch.manual_seed(0)
    model = Everything()
    pruner = DNALPruner(model, ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=flops))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with pruner.search(30, optimizer=optimizer, progress=False) as search:
        for i in range(30):
            images, labels = data()[i % 8]
            search.step(F.cross_entropy(model(images), labels))
    slim = pruner.speedup()
    assert pruner.report.after.flops / pruner.report.before.flops == pytest.approx(flops, rel=0.01)
    assert all(len(choice.units) >= choice.least for choice in slim.modules() if isinstance(choice, Choice))
    removed = sum(g.units - g.kept for g in pruner.report.groups if g.name in ("one", "outer", "depth", "cell.nodes.0"))
    assert removed > 0 or flops > 0.5


def test_whole_candidates_go_ahead_of_channels() -> None:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    model = nn.Sequential(nn.Conv2d(1, 12, 3, 1, 1), *(Mixture(_six(), str(i)) for i in range(3)), *head)
    for mixture in model[1:4]:
        for candidate in mixture.children():  # norms nearly equal around the candidates, far apart inside of them
            candidate[0].weight.data *= torch.logspace(-2, 0, 24).view(-1, 1, 1, 1)
            candidate[1].weight.data /= candidate[1].weight.data.square().sum((1, 2, 3), keepdim=True).sqrt()
    pruner = DNALPruner(model, ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=0.1), verify_seconds=5)
    objective, active = pruner.plan.objective, pruner.plan.active
    assert objective is not None
    scores = Scores(objective, importance(pruner.bound_model, active), steps=10)
    keep = dict(zip(pruner.gates, exact_cut(objective, scores.value, scores.floor).split(pruner.plan.sizes)))
    assert float(objective.relative(torch.cat([*keep.values()]).double())[0]) == pytest.approx(0.1, rel=0.01)
    assert all(int(keep[group.name].sum()) == 1 for group in active if group.choice)
    around = [int(keep[group.name].sum()) for group in active if group.channels == 12]
    assert len(around) == 4 and max(around) - min(around) <= 1 and min(around) >= 8, around


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("flops", [0.12, 0.2, 0.28])
def test_a_cut_meets_the_budget_whatever_the_scores(flops: float, most: int | None) -> None:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    model = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), *(branches(str(i), (3, 5, 7)) for i in range(4)), *head)
    for mixture in model[1:5]:
        mixture.most = most
    pruner = DNALPruner(model, ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=flops), verify_seconds=5)
    objective = pruner.plan.objective
    assert objective is not None
    scores = Scores(objective, importance(pruner.bound_model, pruner.plan.active), steps=10)
    for _ in range(5):
        score = scores.value + 0.3 * torch.randn(len(scores.value), dtype=torch.float64)
        keep = exact_cut(objective, score, scores.floor)
        assert float(objective.relative(keep.double())[0]) == pytest.approx(flops, rel=0.01)
        kept = [int(k.sum()) for k, g in zip(keep.split(pruner.plan.sizes), pruner.plan.active) if g.choice]
        assert len(kept) == 4 and min(kept) >= 1 and max(kept) <= (most or 6)


def _six() -> dict[str, nn.Module]:
    return {
        f"c{i}": nn.Sequential(nn.Conv2d(12, 24, 3, 1, 1, bias=False), nn.Conv2d(24, 12, 3, 1, 1, bias=False))
        for i in range(6)
    }


def test_what_must_stay_of_a_choice_depends_on_the_price() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, 1, 1)
            self.layer = Mixture({"big": nn.Conv2d(8, 8, 7, 1, 3), "small": nn.Conv2d(8, 8, 3, 1, 1)}, "layer")
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(torch.relu(self.stem(x))).mean((2, 3)))

    pruner = DNALPruner(Net(), ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=0.5))
    objective, sizes = pruner.plan.objective, pruner.plan.sizes
    assert objective is not None
    first = sum(sizes[: sizes.index(2)])
    score = torch.ones(sum(sizes), dtype=torch.float64)
    score[first], score[first + 1] = 1.3, 1.1  # per cost, the dear one is worth more: 49 against 9
    for price, expected in ((1.31, [True, False]), (1.4, [False, True])):  # 49 x 0.01 < 9 x 0.21, 49 x 0.1 > 9 x 0.3
        must, _ = objective.candidates(score, torch.tensor(price, dtype=torch.float64))
        assert must[first : first + 2].tolist() == expected, price
    keep = exact_cut(objective, score, [6] * len(sizes), 0.15)  # six channels of the dear one are more than that
    assert keep[first : first + 2].tolist() == [False, True]
    assert float(objective.relative(keep.double())[0]) <= 0.15 * 1.009


def test_a_candidate_with_layers_that_stay_whole_can_go_whole() -> None:
    class Rolled(nn.Module):
        """Names its channels by number: they stay whole."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 12, 3, 1, 1), nn.Conv2d(12, 6, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).roll(1, 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 6, 3, 1, 1)
            self.layer = Mixture({"rolled": Rolled(), "conv": mbconv(6, 6, 3, 2)}, "layer")
            self.fc = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(torch.relu(self.stem(x))).mean((2, 3)))

    pruner = DNALPruner(Net(), ALL, dummy_input=torch.randn(2, 1, 8, 8), budget=Budget(flops=0.5))
    frozen = {group.name for group in pruner.groups if group.frozen}
    assert "layer.rolled.a" in frozen and not {"layer", "stem", "layer.conv.0"} & frozen
    pruner.harden({"layer": torch.tensor([False, True])})
    slim = pruner.speedup()
    assert slim.layer.units == ["conv"]
    g = torch.cat([pruner.session.keep[group.name].double() for group in pruner.plan.active])
    assert measure(slim, torch.randn(2, 1, 8, 8)).flops == pytest.approx(float(pruner.plan.cost.flops(g)), rel=1e-9)


def test_a_candidate_that_costs_nothing_does_not_slow_down_the_others(everything: tuple[DNALPruner, Tensor]) -> None:
    pruner, _ = everything
    objective = pruner.plan.objective
    assert objective is not None
    units = sum(objective.sizes)
    free = objective.whole < 1e-9
    assert 0 < int(free.sum()) < units  # identities, inputs
    moved = []
    for strength in (1.0, 1e6):
        scores = Scores(objective, torch.ones(units, dtype=torch.float64), 20)
        grad = torch.randn(units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grad[free] *= strength
        scores.update(grad, torch.ones(units), 0)
        moved.append(scores.value[torch.tensor(objective.choices)[objective.group_of].logical_not()])
    assert torch.equal(*moved)  # what channels are worth is measured among channels


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_choice() -> None:
    x = torch.randn(1, 4, 8, 8)
    shapes = Mixture({"a": nn.Conv2d(4, 4, 3, 1, 1), "b": nn.Conv2d(4, 8, 3, 1, 1)}, "layer3")
    with pytest.raises(DNALError, match=r"layer3: candidate b returns the shape \(1, 8, 8, 8\), those before"):
        shapes(x)
    pair = Mixture({"a": nn.MaxPool2d(2, return_indices=True), "b": nn.Identity()}, "layer4")
    with pytest.raises(DNALError, match="layer4: candidate a returns a tuple"):
        pair(x)
    with pytest.raises(DNALError, match="layer5: a candidate cannot be called 'forward'"):
        Mixture({"forward": nn.Identity()}, "layer5")
    chain = Depth([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)], [1, 2], "depth6")
    with pytest.raises(DNALError, match=r"depth6: what the blocks return differs in shape between the depths \[1, 2\]"):
        chain(x)


def test_one_label_needs_the_same_candidates() -> None:
    first, second = Mixture({"a": nn.Conv2d(1, 4, 1), "b": nn.Conv2d(1, 4, 1)}, "same"), branches("same")
    model = nn.Sequential(first, nn.Conv2d(4, 6, 1), second, nn.Flatten(), nn.Linear(6 * 64, 10))
    with pytest.raises(DNALError, match="2 and 0 have the label 'same', but 4 and 2 candidates"):
        DNALPruner(model, ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=0.5))


def test_a_budget_below_the_cheapest_candidates_cannot_be_reached(everything: tuple[DNALPruner, Tensor]) -> None:
    with pytest.raises(DNALError, match="cannot be reached"):
        DNALPruner(Everything(), ALL, dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=1e-4))
