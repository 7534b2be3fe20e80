"""A search that is killed, and goes on in a new process from Lightning's checkpoint, ends as it would have."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_lightning")
import pytorch_lightning as pl
from nas_toys import QUIET, Plain, evaluator
from nni.nas.evaluator.pytorch import DataLoader
from torch import Tensor

from dnal_nni import Budget, DNALError, DNALStrategy, Informed, PrimeStrategy, Topology, TopologyStrategy
from dnal_nni.plugin.strategies.supernet import SupernetStrategy

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling"),
]
EPOCHS = 8  # of six steps

STRATEGIES: dict[str, Callable[[], SupernetStrategy]] = {
    "dnal": lambda: DNALStrategy(Budget(flops=0.5)),
    "paths": lambda: DNALStrategy(Budget(flops=0.5), widths=False, warmup=0.25),
    "prime": lambda: PrimeStrategy(schedule=Informed(2), arch_lr=5.0, regularizer="consensus", activation="bounded"),
    "static": lambda: PrimeStrategy(schedule=4, arch_lr=5.0),
    "topology": lambda: TopologyStrategy(),
    "edges": lambda: TopologyStrategy(Topology(distribution="edges")),
    "gates": lambda: TopologyStrategy(ops="gates", budget=Budget(flops=0.5), warmup=0.25),
}


class Killed(pl.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def given(path: Path, step: int | None, own: bool) -> Any:
    """An evaluator that shuffles (by a generator of its own, or torch's), and saves every epoch."""
    saved = pl.callbacks.ModelCheckpoint(path, save_last=True, save_on_train_epoch_end=True)
    made = evaluator(epochs=EPOCHS, callbacks=[Killed(step), saved], enable_checkpointing=True)
    shuffle = torch.Generator().manual_seed(3) if own else None
    for name in ("train_dataloaders", "val_dataloaders"):
        data = getattr(made, name).dataset
        setattr(made, name, DataLoader(data, batch_size=8, shuffle=True, generator=shuffle))
    return made


def from_last(path: Path) -> dict[str, Any]:
    # NNI's Classification has classes among its hyperparameters, which Lightning's file is not read with by default
    return {"ckpt_path": str(path / "last.ckpt"), "weights_only": False}


def searched(name: str, path: Path, kill: int | None = None, goes_on: bool = False, own: bool = True) -> Any:
    torch.manual_seed(99 if goes_on else 0)  # a new process starts anywhere
    space = Plain()
    strategy, training = STRATEGIES[name](), given(path, kill, own)
    if goes_on:
        training.fit_kwargs |= from_last(path)
    if kill is not None:
        with pytest.raises(RuntimeError, match="killed"):
            strategy(space, training)
        return None
    strategy(space, training)
    session = strategy.pruner.session
    return copy.deepcopy(strategy.pruner.bound_model.state_dict()), session.keep, session.state_dict()["search"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize("kill", [22, *(pytest.param(step, marks=pytest.mark.slow) for step in (8, 44))])
@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_and_continued_is_as_if_nothing_had_happened(name: str, kill: int, tmp_path: Path) -> None:
    own = name != "static"
    weights, keep, state = searched(name, tmp_path / "whole", own=own)
    searched(name, tmp_path / "parts", kill=kill, own=own)
    again, kept, went_on = searched(name, tmp_path / "parts", goes_on=True, own=own)
    assert same(keep, kept)
    assert same(weights, again)
    saved = {key: value for key, value in state.items() if key not in ("saved", "random")}
    assert same(saved, {key: went_on[key] for key in saved})


def test_a_finished_search_stays_finished(tmp_path: Path) -> None:
    """Of its last checkpoint, without a training: NNI's Classification does not go on behind the last epoch."""
    keep = searched("dnal", tmp_path)[1]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    (state,) = (state for name, state in saved["callbacks"].items() if name == "Searching")
    strategy, training = STRATEGIES["dnal"](), given(tmp_path, None, True)
    strategy.mutate_model(Plain())
    strategy.mutate_evaluator(training)
    callback = strategy.searching(training)
    callback.load_state_dict(state)
    assert callback.finished and same(keep, strategy.pruner.session.keep)
    assert strategy.slim_model() is not None


def test_another_search_is_told_apart(tmp_path: Path) -> None:
    searched("static", tmp_path, kill=14)
    strategy, training = PrimeStrategy(schedule=3, arch_lr=5.0), given(tmp_path, None, True)
    training.fit_kwargs |= from_last(tmp_path)
    with pytest.raises(DNALError, match="the search ran with schedule='4', here it is '3'"):
        strategy(Plain(), training)
    strategy, training = STRATEGIES["static"](), given(tmp_path, None, False)
    training.fit_kwargs |= from_last(tmp_path)
    with pytest.raises(DNALError, match="had 1 data loaders with a generator of their own, here there are 0"):
        strategy(Plain(), training)
