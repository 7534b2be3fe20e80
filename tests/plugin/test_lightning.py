"""LightningEvaluator on the installed pytorch_lightning, which is optional."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nni
import nni.compression as nnic
import pytest
import torch
from conftest import CONV
from evaluator_tools import (
    Batches,
    Recorder,
    Snapshot,
    assert_same_gates,
    initialised,
    loss_of,
    other,
    own_loop,
    searched,
    sgd,
    torch_evaluator,
)
from nni.compression.pruning import TaylorPruner
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.plugin.evaluators import check_evaluator, example_input, patch_steps, ready
from dnal_nni.plugin.steps import steps_per_epoch

pytestmark = [
    # pytorch_lightning 2.6 with torch 2.14, and what it says of a tiny CPU run
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


QUIET = dict(
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
    log_every_n_steps=1,
)


@pytest.fixture
def lightning() -> SimpleNamespace:
    pl = pytest.importorskip("pytorch_lightning")

    class Data(pl.LightningDataModule):
        def __init__(self, batches: Any, **loader: Any) -> None:
            super().__init__()
            self.batches, self.loader = batches, loader

        def setup(self, stage: str) -> None:
            assert stage == "fit"
            self.set = [(image, label) for images, labels in self.batches for image, label in zip(images, labels)]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.set, **{"batch_size": 8, **self.loader})

    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module, configure: Callable[[nn.Module], Any] = sgd) -> None:
            super().__init__()
            self.net, self.configure = net, configure

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_of(batch, self)

        def configure_optimizers(self) -> Any:
            return self.configure(self)

    def make(module: nn.Module, batches: Any, dummy: Any = None, loader: Any = (), **trainer: Any) -> Any:
        data = nni.trace(Data)(batches, **dict(loader))
        return nnic.LightningEvaluator(nni.trace(pl.Trainer)(**{"max_epochs": 1, **QUIET, **trainer}), data, dummy)

    return SimpleNamespace(pl=pl, Data=Data, Module=Module, evaluator=make)


def in_dict(model: nn.Module) -> Any:
    optimizer = sgd(model)
    scheduler = nni.trace(lr_scheduler.StepLR)(optimizer, 2, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def in_lists(model: nn.Module) -> Any:
    optimizer = sgd(model)
    return [optimizer], [nni.trace(lr_scheduler.ExponentialLR)(optimizer, 0.9)]


@pytest.mark.parametrize("configure", [sgd, in_dict, in_lists])
def test_lightning_trains_and_a_search_sees_fresh_gradients(
    configure: Any, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(copy.deepcopy(small), configure)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    evaluator.bind_model(module, {})
    recorder = Recorder(module.net.fc.weight)
    evaluator.patch_loss(recorder.expect)
    patch_steps(evaluator, recorder.before, recorder.after)
    with ready(evaluator):
        evaluator.train(max_steps=13)  # further than the Trainer's own max_epochs
    evaluator.unbind_model()
    assert recorder.steps == ["before", "after"] * 13
    # an independent loop
    made = configure(small)
    optimizer, scheduler = (
        (made["optimizer"], made["lr_scheduler"]["scheduler"]) if configure is in_dict else (made, None)
    )
    optimizer, scheduler = (made[0][0], made[1][0]) if configure is in_lists else (optimizer, scheduler)
    for step in range(13):
        optimizer.zero_grad()
        loss_of(batches[step % 8], small).backward()
        optimizer.step()
        if configure is in_dict or (configure is in_lists and step % 8 == 7):
            scheduler.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), small.parameters()))


def test_nnis_own_patch_sees_stale_gradients_in_lightning(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    """The reason for patch_steps: when NNI is mended, this fails and the shim can go."""
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    evaluator.bind_model(module, {})
    seen: list[bool] = []
    evaluator.patch_optimizer_step([lambda: seen.append(small.fc.weight.grad is not None)], [])
    evaluator.train(max_epochs=1)
    assert seen[0] is False


def test_lightning_shims_act_inside_of_ready_only(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches, max_steps=3, max_epochs=None), module)
    evaluator.bind_model(module, {})
    loop, kwargs = type(evaluator.trainer.fit_loop), dict(evaluator.trainer.trace_kwargs)
    original = dict(vars(loop))
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    if original["max_steps"].fset is None:
        with pytest.raises(AttributeError, match="has no setter"):  # pytorch_lightning >= 2.0
            evaluator.train(max_steps=2)
    with pytest.raises(RuntimeError, match="of the user"):
        with ready(evaluator):
            raise RuntimeError("of the user")
    assert original == dict(vars(loop)) and kwargs == evaluator.trainer.trace_kwargs
    with ready(evaluator), ready(evaluator):  # of two compressors
        evaluator.train(max_epochs=2)
        assert len(steps) == 2 * len(batches)  # not the 3 of the Trainer
        evaluator.train(max_steps=5)
    assert len(steps) == 2 * len(batches) + 5
    assert original == dict(vars(loop)) and kwargs == evaluator.trainer.trace_kwargs


@pytest.mark.parametrize(
    ("trainer", "loader", "expected"),
    [
        ({}, {}, 8),
        ({"max_steps": 3}, {}, 8),
        ({"limit_train_batches": 5}, {}, 5),
        ({"limit_train_batches": 0.5}, {}, 4),
        ({"accumulate_grad_batches": 3}, {}, 3),
        ({"accumulate_grad_batches": 3, "limit_train_batches": 7}, {"shuffle": True}, 3),
        ({"overfit_batches": 2}, {}, 2),
        ({}, {"batch_size": 7}, 10),
        ({}, {"batch_size": 7, "drop_last": True}, 9),
    ],
)
def test_lightning_counts_as_it_trains(
    trainer: Any, loader: Any, expected: int, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches, loader=loader, **trainer), module)
    before = Snapshot(module)
    assert steps_per_epoch(evaluator, module, {}) == expected
    before.assert_same(module)
    assert evaluator.data_module.trainer is None
    evaluator.bind_model(module, {})
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    with ready(evaluator):
        evaluator.train(max_epochs=2)
    assert len(steps) == 2 * expected


def test_lightning_without_a_length_asks_for_max_steps(lightning: SimpleNamespace, small: nn.Module) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.randn(1, 8, 8), 3

    class Data(lightning.Data):
        def setup(self, stage: str) -> None:
            self.set = Endless()

    module = lightning.Module(small)
    trainer = lightning.evaluator(module, []).trainer
    evaluator = initialised(nnic.LightningEvaluator(trainer, nni.trace(Data)(None)), module)
    with pytest.raises(DNALError, match="has no length: pass max_steps instead of max_epochs"):
        steps_per_epoch(evaluator, module, {})
    schedule = lightning.pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 4})
    evaluator = initialised(lightning.evaluator(module, [], callbacks=[schedule]), module)
    with pytest.raises(DNALError, match="epochs of different lengths: pass max_steps instead"):
        steps_per_epoch(evaluator, module, {})


def test_lightnings_example_input(lightning: SimpleNamespace, small: nn.Module, x: Tensor, batches: Batches) -> None:
    module = lightning.Module(small)
    assert example_input(lightning.evaluator(module, batches, x)) is x
    evaluator = lightning.evaluator(module, batches, loader={"shuffle": True})
    before = Snapshot(module)
    found = example_input(evaluator)
    before.assert_same(module)
    assert found.shape == (8, 1, 8, 8) and module(found).shape == (8, 10)
    with pytest.raises(TypeError, match="positional arguments"):
        module(*evaluator.get_dummy_input())  # NNI's: images and labels

    class Dicts(lightning.Data):
        def setup(self, stage: str) -> None:
            self.set = [{"image": x[0], "label": 0}] * 8

    assert example_input(nnic.LightningEvaluator(evaluator.trainer, nni.trace(Dicts)(None))) is None


def test_a_search_in_lightning_is_a_search_in_a_loop(
    lightning: SimpleNamespace, small: nn.Module, x: Tensor, batches: Batches
) -> None:
    twin = lightning.Module(copy.deepcopy(small))
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    found = searched(evaluator, module, x, 11, max_steps=11)
    assert_same_gates(found, own_loop(twin, x, lambda batch: loss_of(batch, twin), (batches * 2)[:11]))


@pytest.mark.parametrize("duration", [{"max_epochs": 2}, {"max_steps": 19}])
def test_the_pruner_compresses_in_lightning_as_in_a_loop(
    duration: Any, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    twin, module = lightning.Module(copy.deepcopy(small)), lightning.Module(small)
    pruner = DNALPruner(module, CONV, lightning.evaluator(module, batches), budget=Budget(flops=0.5))
    model, masks = pruner.compress(**duration)
    assert model is module and masks.keys() == {"net.stem", "net.conv1", "net.conv2", "net.last"}
    own = DNALPruner(twin, CONV, dummy_input=batches[0][0], budget=Budget(flops=0.5))
    steps = duration.get("max_steps", 16)
    with own.search(steps, optimizer=sgd(twin), progress=False) as search:
        for step in range(steps):
            search.step(loss_of(batches[step % 8], twin))
    assert_same_gates(*([gate.s for gate in each.gates.values()] for each in (pruner, own)))
    assert torch.equal(module.net.fc.weight, twin.net.fc.weight)
    assert pruner.speedup()(batches[0][0]).shape == (8, 10)


def test_nnis_taylor_pruner_runs_in_lightning(lightning: SimpleNamespace, small: nn.Module, batches: Batches) -> None:
    masks = []
    for evaluate in (False, True):
        model = copy.deepcopy(small)
        module = lightning.Module(model) if evaluate else model
        evaluator = lightning.evaluator(module, batches) if evaluate else torch_evaluator(model, batches)
        check_evaluator(evaluator, module)
        pruner = TaylorPruner(module, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, training_steps=10)
        with ready(evaluator):
            masks.append(pruner.compress()[1])
    for name, mask in masks[0].items():
        assert torch.equal(mask["weight"], masks[1][f"net.{name}"]["weight"])


def test_lightning_modules_that_nni_cannot_train(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    def refused(message: str, configure: Any = sgd, **members: Any) -> None:
        module = type("Changed", (lightning.Module,), members)(small, configure)
        with pytest.raises(DNALError, match=message):
            check_evaluator(lightning.evaluator(module, batches), module)

    refused("optimizes manually.*search in your own loop", automatic_optimization=False)
    refused(r"calls training_step\(batch, batch_idx\)", training_step=lambda self, batch: loss_of(batch, self))
    refused(r"configure_optimizers\(\) returns None: NNI needs an optimizer", lambda m: None)
    refused(r"configure_optimizers\(\) returns 'sgd'", lambda m: "sgd")
    refused(r"untraced SGD.*nni.trace\(torch.optim.SGD\)", lambda m: torch.optim.SGD(m.parameters(), 0.1))
    refused("untraced StepLR", lambda m: ([o := sgd(m)], [lr_scheduler.StepLR(o, 1)]))
    refused(r"lr_schedulers\[0\] is a dict", lambda m: ([o := sgd(m)], [{"scheduler": lr_scheduler.StepLR(o, 1)}]))
    refused('"lr_scheduler": {"scheduler": ', lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": o})
    refused(r"optimizers\[0\] is a NoneType", lambda m: {"optimiser": sgd(m)})
    refused("holds no parameter of the model", lambda m: sgd(other()))
    refused(
        r"configure_optimizers\(\) fails, which NNI calls ahead of any Trainer: .*not attached",
        lambda m: sgd(m, weight_decay=m.trainer.estimated_stepping_batches),
    )
    with pytest.raises(DNALError, match=r"uses several devices.*one device.*Trainer\(devices=1\)"):
        module = lightning.Module(small)
        check_evaluator(lightning.evaluator(module, batches, devices=2, strategy="ddp_spawn"), module)
    with pytest.raises(DNALError, match="a LightningEvaluator needs a LightningModule: the model is a Small"):
        check_evaluator(lightning.evaluator(small, batches), small)
