"""Strategies in trainings whose module steps its optimizers itself, one or several."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytorch_lightning")
from nas_toys import QUIET, Plain, evaluator
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from torch import Tensor

from dnal_nni import BoundedStrategy, Budget, DNALError, DNALStrategy, PrimeStrategy, TopologyStrategy
from dnal_nni.plugin.strategies.supernet import SupernetStrategy

pytestmark = QUIET


class Automatic(LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def sgd(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.requires_grad], self.lr, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return self.sgd(self.parameters())


class Several(Automatic):
    """The classifier has an optimizer of its own, and so has the rest."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head = list(self.model.fc.parameters())
        own = {id(p) for p in head}
        return self.sgd(p for p in self.parameters() if id(p) not in own), self.sgd(head)


class TwoLosses(Several):
    """Each optimizer steps behind a backward pass of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(0.5 * self.loss(batch))
            optimizer.step()


def given(module: LightningModule, **kwargs: Any) -> Lightning:
    usual = evaluator()
    trainer = Trainer(**{
        "max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, **kwargs,
    })  # fmt: skip
    return Lightning(module, trainer, usual.train_dataloaders, usual.val_dataloaders)


def searched(module: LightningModule, strategy: SupernetStrategy) -> SupernetStrategy:
    torch.manual_seed(0)
    strategy(Plain(), given(module))
    return strategy


STRATEGIES: dict[str, Callable[[], SupernetStrategy]] = {
    "gates": lambda: DNALStrategy(Budget(flops=0.5), warmup=0.25),
    "topology": lambda: TopologyStrategy(),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_optimizers_end_as_one_with_the_same_rule(name: str) -> None:
    one, two = (searched(module, STRATEGIES[name]()) for module in (Automatic(), Several()))
    assert [entry["gates"] for entry in one.pruner.session.last.history]  # of every step
    assert one.pruner.session.last.history == two.pruner.session.last.history
    a, b = one.pruner.bound_model.state_dict(), two.pruner.bound_model.state_dict()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_the_gates_learn_from_every_backward_pass_of_a_batch() -> None:
    """Of weights that stand still, the two halves of a loss tell what the whole does."""
    whole, halves = (
        searched(module, DNALStrategy(Budget(flops=0.5), warmup=0.0)).pruner.session.last
        for module in (Several(lr=0.0), TwoLosses(lr=0.0))
    )
    torch.testing.assert_close(whole.score, halves.score, rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole.score, torch.ones_like(whole.score))


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (lambda: DNALStrategy(Budget(flops=0.5), widths=False), "runs training_step several times for each step"),
        (lambda: PrimeStrategy(), "runs training_step several times for each step of the weights; return the loss"),
        (lambda: BoundedStrategy(DNALStrategy(Budget(flops=0.5)), memory=0.9), "steps its 2 optimizers itself"),
    ],
)
def test_what_runs_a_step_several_times_lets_lightning_step(strategy: Callable[[], Any], told: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(DNALError, match=told):
        strategy()(Plain(), given(Several()))


def test_a_length_in_steps_of_every_optimizer() -> None:
    with pytest.raises(DNALError, match=r"max_steps=8 counts the steps of every optimizer.*give max_epochs"):
        DNALStrategy(Budget(flops=0.5))(Plain(), given(Several(), max_epochs=None, max_steps=8))
