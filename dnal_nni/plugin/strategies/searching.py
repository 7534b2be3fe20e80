"""Callbacks of Lightning that make a training of it a search; everything else of the training stays."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
from nni.nas.evaluator.pytorch import Lightning
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from ...errors import DNALError
from ...search.informed import Informed
from ...search.loop import Search
from ...search.mixed import MixedSearch
from ...search.paths import PathSearch
from ...search.ranks import check_same
from ..pruner import DNALPruner
from .holdout import Holdout, Randomness

_logger = logging.getLogger(__name__)


class Searching(pl.Callback):
    """Weights and gates learn from the same batches.

    Lightning's checkpoints hold its state. From one at the end of an epoch, a search goes on bit for bit.

    Args:
        pruner: of the supernet.
        evaluator: of the search; the order of its training data goes on too.
        warmup: share of the steps in which only weights learn.
        when: the steps in which gates learn too.

    Where the module steps its optimizers itself (``automatic_optimization = False``), a batch is a step of the search.

    Attributes:
        finished: whether gates were learned, and are fixed.
        steps_itself: whether the training steps may step the optimizers themselves.
    """

    steps_itself = True

    def __init__(
        self, pruner: DNALPruner, evaluator: Lightning, warmup: float = 0.0, when: Informed | None = None
    ) -> None:
        self.pruner, self.warmup, self.when = pruner, warmup, when
        self.random = Randomness(evaluator.train_dataloaders)
        self.search: Search | None = None
        self.finished = False
        self._seen = 0
        self._went_on: dict[str, Any] | None = None  # random state that it goes on from

    def stepped(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a training step does, and what else is due with it."""
        return step(*args, **kwargs)

    def nothing_searched(self) -> DNALError:
        """The training ended ahead of the search."""
        return DNALError(
            f"the training ended within the warmup of {self.warmup:.0%} of its steps: nothing was searched; give "
            "the strategy a smaller warmup, or train longer"
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise DNALError(
                "the search has no known length: give the trainer max_epochs or max_steps, and data a length"
            )
        check_optimizers(trainer, pl_module, self.steps_itself)
        check_devices(trainer)
        groups = [(group.name, group.site, group.frozen) for group in self.pruner.groups]
        check_same("the supernet's groups", groups, "make the same model space on every rank")
        self._first = int(self.warmup * steps)
        self._steps = int(steps) - self._first
        self._seen = trainer.global_step

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._went_on is not None:  # validation may have drawn from the generator of the training data
            self.random.load_state_dict(self._went_on)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, self._went_on = self._went_on, None
        loop = trainer.fit_loop
        goes_on_within = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)
        if state is not None and not goes_on_within and trainer.current_epoch > 0:
            self.random.load_state_dict(state)  # Lightning is going to draw the order of the batches a second time

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        made = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx
        if self.search is None and not self.finished and made >= self._first:
            session = self.pruner.session
            self.search = session.search(self._steps, weights_learn=True, progress=False, when=self.when)
            self.search.start()
            if self.search.done >= self.search.scores.moving:  # it goes on behind that
                self._rest()

    def _rest(self) -> None:
        """The structure stands: what is closed need not run."""
        assert self.search is not None
        if self.search.scores.moving < self._steps:
            for group in self.pruner.groups:
                if group.choice:
                    gate = self.pruner.gates[group.name]
                    gate.harden(gate.s > 0)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.search is not None:
            self.search.penalised(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.search is not None and pl_module.automatic_optimization:
            self.search.before_optimizer_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        by_itself = not pl_module.automatic_optimization
        if self.search is None or not (stepped or by_itself):  # gradients are accumulated
            return
        if by_itself:
            self.search.before_optimizer_step()  # behind the last backward pass, whichever optimizer it was for
        self.search.after_optimizer_step()
        if self.search.done == self.search.scores.moving:
            self._rest()
        if self.search.history:
            pl_module.log("cost", self.search.history[-1]["cost"], prog_bar=True)
        if self.search.done == self._steps:
            self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.search is not None and self.search.done:
            _logger.warning(
                "the training ended after %d of the %d steps that the search was planned for",
                self.search.done, self._steps,
            )  # fmt: skip
            self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.search is not None:
            self.search.stop(exception)
            self.search = None

    def state_dict(self) -> dict[str, Any]:
        session = self.pruner.session.state_dict() if self.search is not None or self.finished else None
        if session is not None and session["search"] is not None:
            session["search"].pop("random")  # of the whole training, below
        return {"session": session, "finished": self.finished, "random": self.random.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["session"] is not None:
            self.pruner.session.load_state_dict(state_dict["session"])
        self.finished = state_dict["finished"]
        self._went_on = state_dict["random"]
        self.random.load_state_dict(state_dict["random"])

    def _finish(self) -> None:
        assert self.search is not None
        self.search.stop()
        self.search, self.finished = None, True
        self.pruner.harden()


class PathSearching(Searching):
    """Every training step runs its batch through all paths of a step of the search; its own warmup is the search's."""

    steps_itself = False

    def stepped(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.search, PathSearch) or self.search.done >= self.search.steps:
            return step(*args, **kwargs)
        outputs = [step(*args, **kwargs) for _ in self.search.paths()]
        losses = [loss_in(out, "candidates alone (widths=False) compares the losses of paths") for out in outputs]
        loss = self.search.of_step(losses)
        return outputs[-1] | {"loss": loss} if isinstance(outputs[-1], dict) else loss

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.search, PathSearch) and self.search.done <= self.search.compared.warmup:
            self.warmup = self.search.compared.warmup / self._steps
            raise self.nothing_searched()
        super().on_train_end(trainer, pl_module)


class HeldOutSearching(Searching):
    """The architecture learns from batches of its own, ahead of the steps of the weights in which it is due.

    Args:
        pruner: of the supernet.
        evaluator: of the search.
        holdout: the data that the architecture learns from.
        when: the steps in which it does; None: as the scores count them.
    """

    steps_itself = False

    def __init__(self, pruner: DNALPruner, evaluator: Lightning, holdout: Holdout, when: Informed | None) -> None:
        super().__init__(pruner, evaluator, when=when)
        self.holdout = holdout
        self._learned = -1  # the last step that began, so that accumulated batches are one
        self._trainer: pl.Trainer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "holdout": self.holdout.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.holdout.load_state_dict(state_dict["holdout"])
        super().load_state_dict(state_dict)

    def stepped(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        search = self.search
        if isinstance(search, MixedSearch) and search.done != self._learned:
            self._learned = search.done
            if search.due:
                assert self._trainer is not None
                batch = self._trainer.strategy.batch_to_device(self.holdout.batch())
                search.learn(lambda: loss_in(step(batch, *args[1:], **kwargs), "the architecture learns from it"))
        return step(*args, **kwargs)


@contextlib.contextmanager
def around(module: pl.LightningModule, stepped: Callable[..., Any]) -> Iterator[None]:
    """Let the training steps of ``module`` be ``stepped``, which gets the own one ahead of its arguments."""
    own, step = vars(module).get("training_step"), module.training_step
    module.training_step = functools.wraps(step)(functools.partial(stepped, step))
    try:
        yield
    finally:
        if own is None:
            del module.training_step
        else:
            module.training_step = own


def check_optimizers(trainer: pl.Trainer, module: pl.LightningModule, steps_itself: bool) -> None:
    """Raise for optimizers that the search cannot go with.

    Args:
        trainer: that has them.
        module: that is trained.
        steps_itself: whether it may step them itself, which it does where there are several.
    """
    if module.automatic_optimization:
        if len(trainer.optimizers) != 1:
            raise DNALError(f"the evaluator has {len(trainer.optimizers)} optimizers: a search needs one")
        return
    if not steps_itself:
        raise DNALError(
            f"{type(module).__name__} steps its {len(trainer.optimizers)} optimizers itself "
            "(automatic_optimization=False): this search runs training_step several times for each step of the "
            "weights; return the loss and let Lightning step one optimizer, whose parameter groups may have settings "
            "of their own"
        )
    if trainer.max_steps != -1:
        raise DNALError(
            f"max_steps={trainer.max_steps} counts the steps of every optimizer, where {type(module).__name__} steps "
            "them itself (automatic_optimization=False), and a search is as long as its batches: give max_epochs"
        )


def check_devices(trainer: pl.Trainer) -> None:
    """Raise for several devices that do not each hold the whole supernet, or would wait for closed candidates."""
    if trainer.world_size == 1:
        return
    if not isinstance(trainer.strategy, pl.strategies.DDPStrategy):
        raise DNALError(
            f"the trainer shares the work by {type(trainer.strategy).__name__}: a search needs the whole supernet on "
            'every device, strategy="ddp_find_unused_parameters_true"'
        )
    if not getattr(trainer.strategy.model, "find_unused_parameters", True):
        raise DNALError(
            "closed candidates do not run, and DistributedDataParallel waits for their gradients: give the trainer "
            'strategy="ddp_find_unused_parameters_true"'
        )


def check_launched(trainer: pl.Trainer) -> None:
    """Raise where the trainer trains in processes of its own, and what is found would end with them."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise DNALError(
            "the trainer spawns or forks the processes that it trains in, and what they find ends with them: start the "
            'script once for each device, with torchrun, and give strategy="ddp_find_unused_parameters_true"'
        )


def loss_in(output: Any, why: str) -> Tensor:
    """The loss that a training step returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise DNALError(
            f"training_step returns no loss: a search of {why}; return it, and leave the optimizer to Lightning"
        )
    return loss
