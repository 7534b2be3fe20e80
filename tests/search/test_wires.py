"""Decisions about the inputs of a node: distributions over sets of them, and the step against invalid ones."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, Topology
from dnal_nni.modules.cells import Cell, Node
from dnal_nni.modules.choices import Mixture
from dnal_nni.plan import Plan
from dnal_nni.search.picks import Pick
from dnal_nni.search.topology import Edges, Subsets, TopologyScores, cooled, counts, held_off
from dnal_nni.session import Session


def random(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability(q: list[float], kept: tuple[int, ...]) -> float:
    return math.prod(p if i in kept else 1 - p for i, p in enumerate(q))


def sets(inputs: int) -> list[tuple[int, ...]]:
    return [s for size in range(inputs + 1) for s in itertools.combinations(range(inputs), size)]


@pytest.mark.parametrize("inputs, sizes", [(2, (1, 1)), (4, (2, 2)), (4, (1, 3)), (6, (2, 2))])
def test_marginals_are_sums_over_sets(inputs: int, sizes: tuple[int, int]) -> None:
    wires = Subsets("node", inputs, sizes)
    allowed = [s for s in sets(inputs) if sizes[0] <= len(s) <= sizes[1]]
    logits = random(len(allowed))
    assert len(wires.start()) == len(allowed)
    for temperature in (1.0, 0.1):
        powers = [math.exp(float(b) / temperature) for b in logits]
        expected = [sum(p for p, s in zip(powers, allowed) if i in s) / sum(powers) for i in range(inputs)]
        found = wires.marginals(logits, temperature)
        assert found.tolist() == pytest.approx(expected)
        if sizes[0] == sizes[1]:
            assert float(found.sum()) == pytest.approx(sizes[0])
    best = allowed[int(logits.argmax())]
    assert wires.chosen(logits).nonzero().flatten().tolist() == list(best)
    assert float(wires.invalid(logits, 1.0)) == 0.0


def test_the_best_set_is_not_that_of_the_best_inputs() -> None:
    """What a score for every input cannot say: two that are good together."""
    wires = Subsets("node", 4, (2, 2))
    logits = torch.tensor([math.log(p) for p in (0.2, 0.2, 0.2, 0.05, 0.05, 0.3)], dtype=torch.float64)
    assert wires.chosen(logits).tolist() == [False, False, True, True]
    assert int(wires.marginals(logits, 1.0).argmax()) == 0


@pytest.mark.parametrize("inputs", range(1, 7))
def test_how_many_independent_events_happen(inputs: int) -> None:
    q = torch.sigmoid(random(inputs, inputs)).tolist()
    expected = [0.0] * (inputs + 1)
    for kept in sets(inputs):
        expected[len(kept)] += probability(q, kept)
    assert counts(torch.tensor(q, dtype=torch.float64)).tolist() == pytest.approx(expected)


def test_the_most_probable_set_of_independent_inputs() -> None:
    wires = Edges("node", 4, (2, 2))
    for seed in range(5):
        logits = random(4, seed)
        q = torch.sigmoid(logits).tolist()
        best = max(sets(4)[1:], key=lambda kept: probability(q, kept))
        assert wires.chosen(logits).nonzero().flatten().tolist() == list(best)
    assert float(torch.sigmoid(wires.start()).sum()) == pytest.approx(2.0)
    assert wires.chosen(-1 - torch.arange(4.0)).tolist() == [True, False, False, False]


def test_the_step_is_passive_where_sets_are_valid_and_aggressive_where_not() -> None:
    wires = Edges("node", 4, (2, 2))
    valid = torch.tensor([5.0, -5.0, 5.0, -5.0], dtype=torch.float64)
    before = valid.clone()
    held_off(wires, valid, 1.0, 0.05)
    assert torch.equal(valid, before)
    # PA-II: the point nearest to the last one that, in a linear model, satisfies the margin up to a squared slack
    logits = torch.tensor([2.0, 1.0, 0.5, -3.0], dtype=torch.float64)
    own = logits.clone().requires_grad_()
    over = wires.invalid(own, 1.0) - 0.05
    (gradient,) = torch.autograd.grad(over, own)
    over = over.detach()
    moved = logits.clone()
    held_off(wires, moved, 1.0, 0.05)
    at = moved - logits
    assert torch.allclose(at, -gradient * at.norm() / gradient.norm())
    assert float((over + gradient @ at) / over) == pytest.approx(0.5 / (float(gradient.square().sum()) + 0.5))
    for _ in range(200):
        held_off(wires, logits, 1.0, 0.05)
    assert float(wires.invalid(logits, 1.0)) < 0.12 and int(wires.chosen(logits).sum()) == 2


def learned(distribution: Any, held: bool, worth: Tensor, steps: int = 300) -> TopologyScores:
    """One node of four inputs, one operation of two; the loss is linear in the weights, with noise."""
    topology = Topology(2, distribution)
    kind = {"subsets": Subsets, "edges": Edges}[distribution]
    made = TopologyScores(
        [None, Pick("op", 2, 1, (0, 0))], [kind("node", 4, (2, 2)), None], topology, steps, reach=4.0,
        cost=lambda g: g.mean(), held=held,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    for step in range(steps):
        grad = worth + 0.3 * torch.randn(6, generator=noise, dtype=torch.float64)
        made.update(grad, made.weights(step), step)
    return made


def test_what_is_learned_is_the_best_pair() -> None:
    worth = torch.tensor([0.4, -0.4, 0.1, -0.2, -0.5, 0.5], dtype=torch.float64)
    made = learned("subsets", True, worth)
    assert made.chosen().tolist() == [False, True, False, True, True, False]
    assert float(made.weights(150)[:4].sum().detach()) == pytest.approx(2.0)
    assert torch.allclose(made.weights(299).detach()[:4], made.chosen()[:4].double(), atol=1e-3)


@pytest.mark.parametrize("worth", [[-0.4, -0.3, -0.2, -0.3], [0.4, 0.3, 0.2, 0.1], [-0.4, 0.3, 0.2, 0.1]])
def test_independent_inputs_end_valid_with_the_term_and_not_without(worth: list[float]) -> None:
    """What every input gives (or takes) by itself would keep all (or one) of them."""
    all_worth = torch.tensor([*worth, -0.5, 0.5], dtype=torch.float64)
    assert learned("edges", False, all_worth).invalid() == ["node"]
    made = learned("edges", True, all_worth)
    assert made.invalid() == []
    assert made.chosen()[:4].nonzero().flatten().tolist() == sorted(all_worth[:4].argsort()[:2].tolist())


def test_cooling() -> None:
    assert [cooled(t, 101, 1.0, 0.01) for t in (0, 50)] == [1.0, 1.0]
    assert cooled(75, 101, 1.0, 0.01) == pytest.approx(0.1) and cooled(100, 101, 1.0, 0.01) == pytest.approx(0.01)


# -- cells ------------------------------------------------------------------------------------------------------------


def cell(topology: Topology | None) -> nn.Module:
    torch.manual_seed(0)

    def node(inputs: int) -> Mixture:
        ops = {f"conv_{j}": nn.Conv2d(4, 4, 3, 1, 1) for j in range(inputs)} | {
            f"skip_{j}": nn.Identity() for j in range(inputs)
        }
        return Mixture(ops, f"node{inputs}", {name: int(name[-1]) for name in ops})

    made = Cell([node(2), node(3)], lambda x: [x[0], x[0].flip(1)], lambda x, given: x, topology=topology)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(1, 4, 3), made, *head)


def test_a_cell_computes_the_same_with_a_topology() -> None:
    x = torch.randn(2, 1, 8, 8)
    plain, wired = cell(None), cell(Topology(2))
    assert torch.allclose(plain(x), wired(x), atol=1e-6)
    node = wired[1].nodes[1]
    assert isinstance(node, Node) and node.units == ["from_0", "from_1", "from_2"] and (node.least, node.most) == (2, 2)
    assert node.edges[2].units == ["conv_2", "skip_2"]
    node.drop(torch.tensor([True, False, True]))
    assert node.units == ["from_0", "from_2"] and not hasattr(node, "from_1")


def test_the_pruner_cuts_it_exactly() -> None:
    """DNAL's own gates know how many inputs stay too."""
    model = cell(Topology(2)).train()
    pruner = DNALPruner(
        model, [{"op_types": ["Conv2d", "Linear"]}], dummy_input=torch.randn(1, 1, 8, 8), budget=Budget(flops=0.5)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pruner.search(12, optimizer=optimizer, progress=False) as search:
        for _ in range(12):
            search.step(model(torch.randn(4, 1, 8, 8)).square().mean())
    slim = pruner.speedup()
    assert len(slim[1].nodes[1].kept) == 2
    assert all(len(edge.units) == 1 for node in slim[1].nodes for edge in node.edges.values())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert float((slim.double()(x) - model.double()(x)).abs().max()) < 1e-9


def test_the_session_needs_no_nni() -> None:
    model = cell(Topology(2))
    plan = Plan.of(model, torch.randn(1, 1, 8, 8), budget=Budget(flops=0.6))
    session = Session(model, plan)
    names = {model.get_submodule(g.name).label for g in plan.active if g.choice}
    assert names == {"node3", "node2/0", "node2/1", "node3/0", "node3/1", "node3/2"}
    with session.search(4, progress=False) as search:
        for _ in range(4):
            search.step(model(torch.randn(4, 1, 8, 8)).square().mean())
    assert session.speedup() is not None


def test_errors() -> None:
    for wrong, message in (
        ({"inputs": 0}, r"Topology\(inputs=0\): give a number >= 1, or \(least, most\)"),
        ({"inputs": (3, 1)}, r"Topology\(inputs=.*\): give a number >= 1"),
        ({"distribution": "pairs"}, "distribution='pairs'.: choose 'subsets' or 'edges'"),
        ({"temperature": (1.0, 0.0)}, "give two numbers above 0"),
        ({"slack": 0.0}, "must be a probability above 0"),
    ):
        with pytest.raises(DNALError, match=message):
            Topology(**wrong)
    with pytest.raises(DNALError, match=r"node has 184756 sets of 10 to 10 of its 20 inputs, too many"):
        Subsets("node", 20, (10, 10))
    with pytest.raises(DNALError, match=r"say how many inputs a node has, Topology\(inputs=2\)"):
        cell(Topology())
