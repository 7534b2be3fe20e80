"""Callbacks of Lightning that hold a training to a limit of memory, and make a supernet small enough for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ...cost.memory import Meter, OverLimit, size_of, state_bytes
from ...search.bounded import SLACK, Shrinking
from ...search.controller import Controller
from ...search.subspace import Holdings, Live, Subspace
from ..steps import same_random_numbers
from .holdout import Holdout
from .searching import check_optimizers, loss_in

TOGETHER = 8  # paths that are compared on one batch


class Metering(pl.Callback):
    """Tells a meter of the parameters and optimizer states of a training."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.meter.weigh(pl_module, [])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.meter.weigh(pl_module, trainer.optimizers)  # gates come and go


class Restricting(Metering):
    """Trains shared weights on single paths; in rounds, a controller learns from their losses, and candidates go.

    Args:
        subspace: of the supernet that is trained.
        meter: of this training; it gets the limit once that can be told.
        holdout: the data that the controller learns from.
        memory: the limit in bytes, or up to 1 a fraction of what the whole supernet holds.
        as_searched: makes the supernet of some options as it is going to be searched, which tells what that holds;
            None: the search runs paths of which each holds what it does here.
        rounds: after each of which candidates are dropped.
        batches: steps of the weights in a round.
        paths: that the controller learns from in a round.

    Attributes:
        shrinking: what was dropped, and why; None before the first step.
        finished: whether what is left fits.
        trainer: of the training under way.
    """

    def __init__(
        self,
        subspace: Subspace,
        meter: Meter,
        holdout: Holdout,
        memory: float,
        as_searched: Callable[[Live], nn.Module] | None,
        *,
        rounds: int,
        batches: int,
        paths: int,
    ) -> None:
        super().__init__(meter)
        self.subspace, self.holdout, self.memory, self.as_searched = subspace, holdout, memory, as_searched
        self.rounds, self.batches, self.updates = rounds, batches, paths // TOGETHER
        self.controller = Controller(subspace.options, rounds * self.updates, torch.initial_seed() % 2**31)
        self.shrinking: Shrinking | None = None
        self.finished = False
        self._holdings: Holdings | None = None
        self._module: Any = None
        self.trainer: Any = None

    @property
    def steps(self) -> int:
        """Of the weights, at most."""
        return self.rounds * self.batches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_optimizers(trainer, pl_module, steps_itself=False)
        self.trainer, self._module = trainer, pl_module
        super().on_train_start(trainer, pl_module)

    def stepped(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A training step on a path."""
        if self._holdings is None:
            with same_random_numbers():
                by_paths = self.as_searched is None
                self._holdings = self.subspace.measure(lambda: step(batch, *args, **kwargs), by_paths)
        done = self.trainer.global_step
        if self.shrinking is not None and not self.finished:
            due = (done + 1) // self.batches > self.shrinking.done
            gone: list[nn.Parameter] = []
            if due:
                self.learn(lambda given: step(given, *args, **kwargs))
                gone = self.shrinking.shrink()
            if due or done == 1:
                while self.shrinking.fits and not self._fits(lambda: step(batch, *args, **kwargs)):
                    gone += self.shrinking.drop()
                self.finished = self.shrinking.fits
            self._let_go_of(set(gone))
        self.subspace.run(self.controller.sample(uniform=done < self.batches))
        return step(batch, *args, **kwargs)

    def learn(self, step: Callable[[Any], Any]) -> None:
        """A round of the controller; ``step`` is a training step on a batch."""
        for _ in range(self.updates):
            batch = self.trainer.strategy.batch_to_device(self.holdout.batch())
            drawn = [self.controller.sample() for _ in range(TOGETHER)]
            rewards = []
            with torch.no_grad():
                for path in drawn:
                    self.subspace.run(path)
                    rewards.append(-loss_in(step(batch), "paths compares them"))
            self.controller.learn(drawn, torch.stack(rewards))

    def _fits(self, forward: Callable[[], Any]) -> bool:
        """Whether what is left can be searched within the limit, by a step of it."""
        if self.as_searched is None:
            return True
        assert self.shrinking is not None
        with same_random_numbers():
            model = self.as_searched(self.subspace.options).to(self._module.device).train()
            trained = size_of(parameter for parameter in model.parameters() if parameter.requires_grad)
            states = self.shrinking.holdings.states * trained
            meter = Meter(int((1 - SLACK) * self.shrinking.limit - states))
            own = self._module.model
            self._module.set_model(model)
            try:
                with meter.watching():
                    meter.weigh(model, [])
                    forward()
            except OverLimit:
                return False
            finally:
                self._module.set_model(own)
        return True

    def _let_go_of(self, gone: set[nn.Parameter]) -> None:
        for optimizer in self.trainer.optimizers if gone else ():
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
            for parameter in gone:
                optimizer.state.pop(parameter, None)
        self.meter.weigh(self._module, self.trainer.optimizers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step and self.shrinking is None:
            assert self._holdings is not None
            states, of = state_bytes(trainer.optimizers)  # an optimizer makes them in its first step
            holdings = dataclasses.replace(self._holdings, states=states / max(1, of))
            self.shrinking = Shrinking(self.subspace, self.controller, holdings, self.memory, self.rounds)
            self.meter.limit = self.shrinking.limit
        trainer.should_stop = trainer.should_stop or self.finished
