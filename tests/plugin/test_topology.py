"""TopologyStrategy on model spaces of NNI, in trainings of Lightning."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pytorch_lightning")
import nni
from nas_toys import QUIET, Plain, Toy, check, conv, evaluator
from nni.nas.nn.pytorch import Cell, InputChoice, LayerChoice, ModelSpace, MutableConv2d
from nni.nas.space import model_context

from dnal_nni import Budget, DNALError, Topology, TopologyStrategy
from dnal_nni.modules.cells import Node
from dnal_nni.search.topology import TopologyScores
from dnal_nni.search.wired import WiredScores

pytestmark = QUIET


class Cells(ModelSpace):
    """Two cells of one label: nodes of two and three inputs that read two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        ops: Any = {
            "conv": lambda i, k, j: nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)),
            "pool": lambda i, k, j: nn.AvgPool2d(3, 1, 1),
        }
        self.cells = nn.ModuleList(
            [Cell(ops, num_nodes=3, num_ops_per_node=2, num_predecessors=1, label="cell") for _ in range(2)]
        )
        self.mix = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cells[0](self.stem(x))
        return self.fc(self.cells[1](self.mix(x)).mean((2, 3)))


def last_scores(strategy: TopologyStrategy) -> Any:
    last = strategy.pruner.session.last
    assert last is not None
    return last.scores


def nodes_of(model: nn.Module) -> list[Node]:
    return [module for module in model.modules() if isinstance(module, Node)]


SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "gates": {"ops": "gates", "budget": Budget(flops=0.3)},
    "edges": {"topology": Topology(distribution="edges")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_space_of_cells_to_a_network_that_has_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sums = []
    strategy = TopologyStrategy(**SETTINGS[name])
    given = evaluator(epochs=4)
    step = given.module.training_step

    def watched(batch: Any, batch_idx: int) -> Any:
        for node in nodes_of(strategy.space.supernet):
            if len(node.kept) > node.most:
                sums.append(sum(float(torch.as_tensor(w).detach()) for w in node.weights()))
        return step(batch, batch_idx)

    given.module.training_step = watched
    space = Cells()
    strategy(space, given)
    slim = check(strategy, budget=0.3 if name == "gates" else None)
    for node in nodes_of(slim):
        assert len(node.kept) == min(2, int(node.label[-1]))
    (model,) = strategy.list_models()
    for index in (1, 2, 3):
        inputs = [model.sample[f"cell/input_{index}_{k}"][0] for k in range(2)]
        assert inputs == ([0, 0] if index == 1 else sorted(set(inputs)))
    with model_context(model.sample):
        built = Cells()
    assert built(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    if name != "edges":  # the inputs' weights add up to as many as stay, at every step of the search
        searched = sums[len(sums) // 2 :] if name == "gates" else sums  # ahead of it all are 1
        assert len(searched) >= 24 and searched == pytest.approx([2.0] * len(searched), abs=1e-5)
    made = strategy.report.interventions
    assert made is not None and made.searched["inputs"] == 1
    assert isinstance(last_scores(strategy), WiredScores if name == "gates" else TopologyScores)


def test_gates_hold_the_widths_to_the_budget_too() -> None:
    torch.manual_seed(0)
    strategy = TopologyStrategy(ops="gates", budget=Budget(flops=0.2))
    strategy(Cells(), evaluator(epochs=4))
    slim = check(strategy, budget=0.2)
    widths = {m.out_channels for m in slim.modules() if isinstance(m, nn.Conv2d)}
    assert min(widths) < 8
    scores = last_scores(strategy)
    kept = strategy.pruner.session.keep
    assert kept is not None
    both = [kept[g.name] for g in strategy.pruner.groups if g.choice and g.name.count("from") == 0]
    assert torch.equal(torch.cat(both), scores.inputs())


class Chosen(ModelSpace):
    """Inputs outside of a cell, of which two of three stay, and a depth."""

    def __init__(self, chosen: int | None = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.a = LayerChoice({"c3": conv(3), "c5": conv(5)}, label="a")
        self.b = conv(3)
        self.inputs = InputChoice(3, chosen, label="inputs")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = self.a(x)
        return self.fc(self.inputs([x, a, self.b(a)]).mean((2, 3)))


def test_inputs_outside_of_cells() -> None:
    torch.manual_seed(0)
    strategy = TopologyStrategy()
    strategy(Chosen(), evaluator())
    slim = check(strategy)
    (model,) = strategy.list_models()
    assert model.sample["inputs"] == slim.inputs.kept and len(slim.inputs.kept) == 2
    strategy = TopologyStrategy(Topology(inputs=(1, 2)))
    strategy(Chosen(None), evaluator())
    assert len(check(strategy).inputs.kept) in (1, 2)


class Wide(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        width = nni.choice("width", [4, 8])
        self.stem = MutableConv2d(1, width, 3)
        self.inputs = InputChoice(3, 1, label="inputs")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inputs([self.stem(x)] * 3).mean((2, 3)))


def test_errors() -> None:
    for wrong, message in (
        ({"topology": 2}, r"topology=2: give a Topology, for example Topology\(inputs=2\)"),
        ({"ops": "hard"}, "ops='hard': choose 'softmax' or 'gates'"),
        ({"ops": "gates"}, "budget=None: pass a Budget"),
        ({"budget": Budget(flops=0.5)}, "goes with ops='gates': a softmax knows no cost"),
        ({"warmup": 1.0}, r"warmup=1.0: must be a number in \[0, 1\)"),
        ({"arch_lr": -1.0}, "arch_lr=-1.0: must be a number >= 0"),
    ):
        with pytest.raises(DNALError, match=message):
            TopologyStrategy(**wrong)
    with pytest.raises(DNALError, match=r"ops='gates' needs one number of inputs, and is given \(1, 2\)"):
        TopologyStrategy(Topology(inputs=(1, 2)), ops="gates", budget=Budget(flops=0.5))
    with pytest.raises(DNALError, match="choices of a width: 'width'; fix their values, or learn them too"):
        TopologyStrategy()(Wide(), evaluator())
    with pytest.raises(DNALError, match="say how many inputs a node has"):
        TopologyStrategy()(Chosen(None), evaluator())
    with pytest.raises(DNALError, match="the network found is not in NNI's space"):
        strategy = TopologyStrategy(Topology(inputs=1))
        strategy(Cells(), evaluator())
        next(strategy.list_models())


def test_a_space_without_a_topology() -> None:
    class Layers(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = InputChoice(2, 2, label="inputs")

    with pytest.raises(DNALError, match="no node of the model space has more inputs than may stay"):
        TopologyStrategy()(Layers(), evaluator())
    with pytest.raises(DNALError, match="choices of a width: 'hidden'"):
        TopologyStrategy()(Toy(), evaluator())
