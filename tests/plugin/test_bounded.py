"""BoundedStrategy around strategies of this package and of NNI, in trainings of Lightning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pytorch_lightning")
from nas_toys import QUIET, Plain, check, conv, evaluator
from nni.nas import strategy as nnis
from nni.nas.evaluator.pytorch import DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import Cell, InputChoice, LayerChoice, ModelSpace, Repeat
from nni.nas.space import RawFormatModelSpace, model_context

from dnal_nni import Budget, DNALError, DNALStrategy, PrimeStrategy, TopologyStrategy
from dnal_nni.plugin.restricted import Candidates
from dnal_nni.plugin.strategies.bounded import BoundedStrategy

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Direct export from RandomOneShot")]


class Layers(ModelSpace):
    """Two layers whose candidates differ in size, in one of them one inside of another, and named by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        wide = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        nested = nn.Sequential(conv(3), LayerChoice([conv(3), nn.Identity()], label="nested"))
        self.first = LayerChoice([conv(3), wide, conv(5), nn.Identity()], label="first")
        self.second = LayerChoice({"c5": conv(5), "nested": nested, "skip": nn.Identity()}, label="second")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


class Cells(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8))
        ops: Any = {
            "conv": lambda *place: conv(3),
            "deep": lambda *place: nn.Sequential(conv(3), nn.Conv2d(8, 8, 1)),
            "relu": lambda *place: nn.ReLU(),
            "pool": lambda *place: nn.AvgPool2d(3, 1, 1),
        }
        self.cell = Cell(ops, num_nodes=2, num_ops_per_node=2, num_predecessors=2, label="cell")
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.relu(self.cell([x, x.flip(1)])).mean((2, 3)))


def bounded(inner: Any, memory: float = 0.8, **settings: Any) -> BoundedStrategy:
    return BoundedStrategy(inner, memory=memory, **{"rounds": 2, "batches": 3, "paths": 8, **settings})


HALF = Budget(flops=0.5)
INNERS: dict[str, Callable[[], Any]] = {
    "dnal": lambda: DNALStrategy(HALF, single_path=True),
    "candidates alone": lambda: DNALStrategy(HALF, widths=False),
    "prime": lambda: PrimeStrategy(schedule=1),
    "bounded prime": lambda: PrimeStrategy(activation="bounded", schedule=2),
    "topology": lambda: TopologyStrategy(),
    "gates": lambda: TopologyStrategy(ops="gates", budget=HALF),
    "darts": nnis.DARTS,
    "gumbel": nnis.GumbelDARTS,
    "proxyless": nnis.Proxyless,
    "random": nnis.RandomOneShot,
}
FITTING = [(name, Layers) for name in INNERS if name not in ("topology", "gates")]
FITTING += [(name, Cells) for name in ("dnal", "prime", "topology", "gates", "darts", "random")]


@pytest.mark.parametrize("name, make", FITTING)
def test_any_search_fits_in_its_limit(name: str, make: type[ModelSpace]) -> None:
    torch.manual_seed(0)
    space, inner, given = make(), INNERS[name](), evaluator()
    untouched = {key: value.clone() for key, value in space.state_dict().items()}
    strategy = bounded(inner)
    strategy(space, given)
    assert all(torch.equal(value, untouched[key]) for key, value in space.state_dict().items())
    assert not given.trainer.callbacks and "training_step" not in vars(given.module)
    bound, whole = strategy.bound, Candidates(space)
    options = whole.layers | whole.cells
    assert 0 < bound.peak <= bound.limit == int(0.8 * bound.whole) and bound.predicted <= bound.limit
    # a subset, and a true one
    assert all(set(kept) <= set(map(str, options[label])) for label, kept in bound.kept.items())
    assert bound.dropped == sum(map(len, options.values())) - sum(map(len, bound.kept.values())) > 0
    if name != "proxyless" or make is Layers:
        (model,) = strategy.list_models()
        assert set(model.sample) == set(space.simplify())
        for label, value in model.sample.items():
            kept = bound.kept.get(label.split("/op_")[0])
            assert kept is None or label == "nested" or str(value) in kept
        with model_context(model.sample):
            assert make()(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    if hasattr(inner, "slim_model"):
        slim = check(inner)
        assert [p.shape for p in slim.parameters()] == [p.shape for p in strategy.slim_model().parameters()]
        assert any("candidates were dropped first" in note for note in strategy.report.notes)
    else:
        with pytest.raises(DNALError, match="finds an architecture and no network: list_models"):
            strategy.slim_model()


def test_equal_seeds_end_alike() -> None:
    def run(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        strategy = bounded(DNALStrategy(HALF))
        strategy(Layers(), evaluator())
        return strategy.bound.kept, [p.detach() for p in strategy.supernet.parameters()]

    (kept, first), (again, second), (_, other) = run(0), run(0), run(1)
    assert kept == again and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other))


def test_the_smallest_limit_that_is_told_will_do() -> None:
    torch.manual_seed(0)
    with pytest.raises(DNALError, match="memory=0.1, .* give at least memory=") as told:
        bounded(nnis.RandomOneShot(), memory=0.1)(Layers(), evaluator())
    least = int(str(told.value).partition("at least memory=")[2].partition(",")[0])
    with pytest.raises(DNALError, match=f"memory={least - 1}: the largest single path needs {least} bytes"):
        bounded(DNALStrategy(HALF), memory=least - 1)(Layers(), evaluator())
    strategy = bounded(DNALStrategy(HALF), memory=least)
    strategy(Layers(), evaluator())
    assert strategy.bound.peak <= strategy.bound.limit == least


def test_what_fits_is_searched_as_it_is() -> None:
    torch.manual_seed(0)
    strategy = bounded(PrimeStrategy(schedule=1), memory=2**30)
    strategy(Plain(), evaluator())
    assert strategy.bound.dropped == 0 and strategy.bound.kept == {"layer": ["c3", "c5", "skip"]}
    assert strategy.bound.whole == strategy.bound.predicted
    check(strategy.inner)


@pytest.mark.parametrize("keep", [True, False])
def test_weights_are_kept_or_not(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Tensor]] = []

    class Watched(DNALStrategy):
        def mutate_model(self, model: ModelSpace) -> nn.Module:
            started.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return super().mutate_model(model)

    torch.manual_seed(0)
    space = Layers()
    bounded(Watched(HALF), keep_weights=keep)(space, evaluator())
    given = dict(space.named_parameters())
    moved = [not torch.equal(value, given[name]) for name, value in started[-1].items()]
    assert all(moved[:2]) and sum(moved) > len(moved) // 2 if keep else not any(moved)


def test_a_search_that_needs_more_is_ended() -> None:
    """Held-out batches that are larger than those that were measured."""
    torch.manual_seed(0)
    given = evaluator()
    given.val_dataloaders = DataLoader(given.val_dataloaders.dataset, batch_size=24)
    strategy = bounded(PrimeStrategy(schedule=1))
    with pytest.raises(DNALError, match="more than memory=.* or smaller batches"):
        strategy(Layers(), given)
    assert not given.trainer.callbacks


def test_in_nni_s_own_form() -> None:
    torch.manual_seed(0)
    strategy = bounded(DNALStrategy(HALF, single_path=True))
    strategy(RawFormatModelSpace.from_model(Layers(), evaluator()), SequentialExecutionEngine())
    assert strategy.bound.dropped and len(list(strategy.list_models())) == 1


# -- errors -----------------------------------------------------------------------------------------------------------


class Without(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = InputChoice(2, 1, label="inputs")
        self.blocks = Repeat(lambda i: conv(3, 1), (1, 2), label="depth")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.inputs([x, x])).mean((2, 3)).expand(-1, 10)


class Loose(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell([nn.Identity(), nn.ReLU()], 2, merge_op="loose_end", label="cell")

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


def test_errors() -> None:
    for settings, message in (
        ({"inner": HALF}, "inner=a Budget: give the one-shot strategy that searches what fits"),
        ({"inner": bounded(nnis.DARTS())}, "inner=a BoundedStrategy: give the one-shot"),
        ({"memory": 0}, "memory=0: must be bytes, or a fraction in"),
        ({"memory": True}, "memory=True: must be bytes"),
        ({"rounds": 0}, "rounds=0: must be a whole number >= 1"),
        ({"batches": 1}, "batches=1: must be a whole number >= 2, training steps"),
        ({"paths": 7}, "paths=7: must be a whole number >= 8, that the controller learns from"),
        ({"keep_weights": 1}, "keep_weights=1: must be True or False"),
    ):
        with pytest.raises(DNALError, match=message):
            BoundedStrategy(**{"inner": nnis.DARTS(), "memory": 0.5, **settings})
    with pytest.raises(DNALError, match="run the strategy first"):
        _ = bounded(nnis.DARTS()).bound
    with pytest.raises(DNALError, match="could be dropped.* it has 'inputs' .*, 'depth' "):
        bounded(nnis.DARTS())(Without(), evaluator())
    with pytest.raises(DNALError, match="merge_op='loose_end'"):
        bounded(nnis.DARTS())(Loose(), evaluator())
    given = evaluator()
    given.val_dataloaders = None
    with pytest.raises(DNALError, match="the architecture of BoundedStrategy learns from them"):
        bounded(nnis.DARTS())(Layers(), given)
    given = evaluator(limit_train_batches=0)
    given.module.on_fit_end = lambda: None  # NNI's reports what was trained
    with pytest.raises(DNALError, match="ended after .* of 6 steps, .*: let no limit of the trainer end it"):
        bounded(nnis.DARTS())(Layers(), given)
