"""PrimeStrategy on model spaces of NNI, in trainings of Lightning."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pytorch_lightning")
from nas_toys import QUIET, Plain, Toy, check, conv, evaluator
from nni.nas.evaluator.pytorch import DataLoader
from nni.nas.nn.pytorch import Cell, InputChoice, LayerChoice, ModelSpace
from nni.nas.space import model_context

from dnal_nni import DNALError, Informed, PrimeStrategy
from dnal_nni.modules.choices import Mixture
from dnal_nni.search.prime import PrimeScores

pytestmark = QUIET


class Cells(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        ops: Any = {"conv": conv(3), "pool": nn.AvgPool2d(3, 1, 1)}
        self.cells = nn.ModuleList([Cell(ops, num_nodes=2, num_ops_per_node=2, label="cell") for _ in range(2)])
        self.mix = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cells[1](self.mix(self.cells[0](self.stem(x)))).mean((2, 3)))


def scores_of(strategy: PrimeStrategy) -> PrimeScores:
    last = strategy.pruner.session.last
    assert last is not None and isinstance(last.scores, PrimeScores)
    return last.scores


@pytest.mark.parametrize("make", [Plain, Cells])
@pytest.mark.parametrize("activation, regularizer", [("softmax", "proximity"), ("bounded", "consensus")])
def test_a_space_to_a_network_that_has_a_name(make: type[ModelSpace], activation: Any, regularizer: Any) -> None:
    torch.manual_seed(0)
    space = make()
    untouched = {name: value.clone() for name, value in space.state_dict().items()}
    strategy = PrimeStrategy(activation=activation, regularizer=regularizer, schedule=Informed(2), arch_lr=5.0)
    given = evaluator(epochs=4)
    strategy(space, given)
    slim = check(strategy)
    assert all(torch.equal(value, untouched[name]) for name, value in space.state_dict().items())
    assert "training_step" not in vars(given.module) and not given.trainer.callbacks
    (model,) = strategy.list_models()
    with model_context(model.sample):
        built = make()
    assert built(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    # what stays is what had the largest weights
    if make is Plain:
        part = scores_of(strategy).value[:3]
        kept = next(m for m in slim.modules() if isinstance(m, Mixture))
        assert kept.units == [["c3", "c5", "skip"][int(part.argmax())]] == [model.sample["layer"]]
    made = strategy.report.interventions
    assert made is not None and made.changed["arch_lr"] == 5.0 and "rho" not in made.changed
    assert any("the architecture learned in" in note for note in strategy.report.notes)
    assert not any("no size was asked for" in note for note in strategy.report.notes)


def test_each_learns_from_its_own_data() -> None:
    """Weights from the training batches in every step, the architecture from the others where it is due."""
    torch.manual_seed(0)
    given = evaluator(epochs=2, batches=6)
    given.val_dataloaders = DataLoader([(10 + x, y) for x, y in given.val_dataloaders.dataset], batch_size=8)
    step, seen = given.module.training_step, []

    def watched(batch: Any, batch_idx: int) -> Any:
        seen.append("held out" if float(batch[0].mean()) > 5 else "training")
        return step(batch, batch_idx)

    given.module.training_step = watched
    strategy = PrimeStrategy(schedule=3)
    strategy(Plain(), given)
    assert seen == (["training"] * 2 + ["held out", "training"]) * 4
    search = strategy.pruner.session.last
    assert search is not None and search.taken == 4
    assert given.module.training_step is watched


def test_held_out_batches_move_no_weight_and_no_random_number() -> None:
    def weights(schedule: int, arch_lr: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        strategy = PrimeStrategy(schedule=schedule, arch_lr=arch_lr, regularizer=None)
        strategy(Plain(), evaluator())
        return dict(strategy.pruner.bound_model.named_parameters())

    never, often = weights(1000, 1.0), weights(1, 0.0)
    assert all(torch.equal(value, often[name]) for name, value in never.items())


def test_accumulated_batches_are_one_step() -> None:
    torch.manual_seed(0)
    strategy = PrimeStrategy(schedule=1)
    strategy(Plain(), evaluator(batches=8, accumulate_grad_batches=2))
    search = strategy.pruner.session.last
    assert search is not None and (search.taken, search.done) == (8, 8)
    check(strategy)


def test_candidates_at_zero_do_not_run() -> None:
    torch.manual_seed(0)
    strategy = PrimeStrategy(activation="bounded", schedule=1, arch_lr=20.0, regularizer=None)
    given = evaluator(epochs=6)
    step, ran = given.module.training_step, []

    def watched(batch: Any, batch_idx: int) -> Any:
        before = len(ran)
        out = step(batch, batch_idx)
        resting = len(strategy.space.supernet.layer.resting)
        assert len(ran) - before == 3 - resting
        return out

    given.module.training_step = watched
    mutated = strategy.mutate_model

    def mutate(model: ModelSpace) -> nn.Module:
        supernet = mutated(model)
        for name in supernet.layer.names:
            getattr(supernet.layer, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        return supernet

    strategy.mutate_model = mutate
    strategy(Plain(), given)
    assert strategy.space.supernet.layer.resting
    for name in strategy.space.supernet.layer.names:
        getattr(strategy.space.supernet.layer, name)._forward_hooks.clear()
    check(strategy)


class AnyInputs(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.layer = LayerChoice({"c3": conv(3), "skip": nn.Identity()}, label="layer")
        self.inputs = InputChoice(2, None, label="any")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.inputs([x, self.layer(x)]).mean((2, 3)))


def test_errors() -> None:
    with pytest.raises(DNALError, match="choices of a width: 'hidden'; fix their values, or use DNALStrategy"):
        PrimeStrategy()(Toy(), evaluator())
    with pytest.raises(DNALError, match="any: the rule by which .* give InputChoice an n_chosen"):
        PrimeStrategy()(AnyInputs(), evaluator())
    given = evaluator()
    given.val_dataloaders = None
    with pytest.raises(DNALError, match="no validation data: the architecture of PrimeStrategy learns from them"):
        PrimeStrategy()(Plain(), given)
    given.val_dataloaders = []
    with pytest.raises(DNALError, match="no validation data"):
        PrimeStrategy()(Plain(), given)
    given = evaluator()
    given.module.training_step = lambda batch, batch_idx: None
    with pytest.raises(DNALError, match="training_step returns no loss: a search of the architecture learns from it"):
        PrimeStrategy(schedule=1)(Plain(), given)
    for wrong, message in (
        ({"activation": "relu"}, "activation='relu': choose 'softmax' or 'bounded'"),
        ({"regularizer": "prox"}, "regularizer='prox': choose 'proximity', 'consensus' or None"),
        ({"rho": -1.0}, "rho=-1.0: must be a number >= 0"),
        ({"schedule": 0}, r"schedule=0: give Informed\(10\), or a whole number"),
        ({"schedule": True}, r"schedule=True: give Informed\(10\)"),
    ):
        with pytest.raises(DNALError, match=message):
            PrimeStrategy(**wrong)
