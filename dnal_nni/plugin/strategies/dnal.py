"""DNALStrategy: DNAL as a one-shot NAS strategy of NNI 3.0."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import pytorch_lightning as pl
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from torch import Tensor, nn

from ...budget import Budget
from ...errors import DNALError
from ...modules.choices import Choice, Mixture
from ...modules.layers import mixing
from ...report.record import Report
from ...search.loop import Search
from ...search.paths import PathSearch
from ..pruner import DNALPruner
from ..space import Space
from ..steps import same_random_numbers

_logger = logging.getLogger(__name__)
T = TypeVar("T")

WARMUP = 0.5


class DNALStrategy(OneShotStrategy):
    """Learns which candidates of a model space stay, and how wide, by the gates of DNAL, in one training.

    The space becomes a network that sums its candidates (:mod:`dnal_nni.plugin.space` says what becomes of which
    mutable). In the first steps only weights learn, then weights and gates together, held to the budget: one price
    decides about channels and about whole candidates. What is closed at the end is removed from the network.

    Use it as any strategy of NNI, ``NasExperiment(space, evaluator, strategy)``, or by itself,
    ``strategy(space, evaluator)``; then :meth:`slim_model` is the network found. ``space`` is not changed.

    Args:
        budget: what the network found may cost. A fraction is that of the whole supernet: give an absolute count, such
            as ``Budget(flops=20e6)``, to compare with other networks.
        dummy_input: what FLOPs are counted for, as for :class:`~dnal_nni.DNALPruner`; None: the first image of the
            evaluator's training data.
        warmup: share of the steps in which only weights learn, at least 0 and below 1.
        arch_lr: how fast the gates learn, as for :class:`~dnal_nni.DNALPruner`.
        single_path: keep as many candidates as an architecture of NNI's has: one of a LayerChoice, ``n_chosen`` of an
            InputChoice. :meth:`list_models` can then name it. By default any number stays, as in the paper, unless
            ``widths=False``.
        widths: learn how wide the candidates are too. Without it candidates alone are searched, by another rule: every
            step runs whole paths, which are compared with each other (:mod:`dnal_nni.search.paths`).
        sequential: keep the activations of one candidate at a time, and run the others again in the backward pass: the
            memory of a step then hardly grows with the number of candidates; a step takes one forward pass more.
        verify_seconds: time limit for comparing sliced with gated copies, as for :class:`~dnal_nni.DNALPruner`.

    Raises:
        DNALError: for a mutable that it cannot learn, by name, and for anything else that the caller can mend.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        dummy_input: Any = None,
        warmup: float = WARMUP,
        arch_lr: float | None = None,
        single_path: bool | None = None,
        widths: bool = True,
        sequential: bool = False,
        verify_seconds: float = 60.0,
    ) -> None:
        super().__init__()
        if not isinstance(budget, Budget):
            raise DNALError(f"budget={budget!r}: pass a Budget, for example Budget(flops=20e6)")
        if not (isinstance(warmup, (int, float)) and 0 <= warmup < 1):
            raise DNALError(f"warmup={warmup!r}: must be a number in [0, 1), a share of the steps")
        self.budget, self.dummy_input, self.warmup, self.arch_lr = budget, dummy_input, warmup, arch_lr
        for name, value in (("single_path", single_path), ("widths", widths), ("sequential", sequential)):
            if not isinstance(value, bool) and (name, value) != ("single_path", None):
                raise DNALError(f"{name}={value!r}: must be True or False")
        self.single_path = not widths if single_path is None else single_path
        self.widths, self.sequential, self.verify_seconds = widths, sequential, verify_seconds
        self._space: Space | None = None
        self._pruner: DNALPruner | None = None
        self._epochs: int | None = None

    def __call__(self, model_space: Any, engine: Any) -> None:
        """Search ``model_space``, a :class:`ModelSpace`, with ``engine``, an evaluator (or NNI's forms of both)."""
        if isinstance(model_space, ModelSpace):
            model_space = RawFormatModelSpace.from_model(model_space, engine)
            engine = SequentialExecutionEngine()
        super().__call__(model_space, engine)

    # -- NNI's contract -----------------------------------------------------------------------------------------------

    def mutate_model(self, model: ModelSpace) -> nn.Module:
        """The supernet; unlike NNI's own strategies, this one leaves ``model`` as it is."""
        self._space = Space(model, self.single_path)
        if self.space.widest and not self.widths:
            raise DNALError(
                f"widths=False, and the model space has choices of a width: {', '.join(map(repr, self.space.widest))}; "
                "fix their values, or search widths too"
            )
        for module in self.space.supernet.modules():
            if isinstance(module, Mixture):
                module.sequential = self.sequential
        return self.space.supernet

    def mutate_evaluator(self, evaluator: Any) -> Any:
        """Find the gates; the evaluator stays as it is, and its trainer gets a callback while the search runs."""
        if not isinstance(evaluator, Lightning):
            raise DNALError(
                f"the evaluator is a {type(evaluator).__name__}: a search needs nni.nas.evaluator.pytorch.Lightning, "
                "or one derived from it (Classification, Regression)"
            )
        model = self.space.supernet
        searched = mixing if self.widths else lambda m: isinstance(m, Choice)
        kinds = sorted({type(m).__name__ for m in model.modules() if searched(m)})
        self._pruner = DNALPruner(
            model,
            [{"op_types": kinds}],
            dummy_input=self.dummy_input if self.dummy_input is not None else _first_image(evaluator),
            budget=self.budget,
            arch_lr=self.arch_lr,
            verify_seconds=self.verify_seconds,
        )
        if not self.widths:
            session = self.pruner.session
            session.method = dataclasses.replace(session.method, paths=float(self.warmup))
        return evaluator

    def _run(self) -> None:
        assert self._mutated_model_space is not None
        evaluator = self._mutated_model_space.evaluator
        assert isinstance(evaluator, Lightning)
        trainer = evaluator.trainer
        callback = Searching(self.pruner, self.warmup if self.widths else 0.0)
        self._epochs = trainer.max_epochs if trainer.max_epochs != -1 else None
        trainer.callbacks.append(callback)
        try:
            with contextlib.nullcontext() if self.widths else callback.on_paths(evaluator.module):
                super()._run()
        finally:
            trainer.callbacks.remove(callback)
        if not callback.finished:
            raise _within_warmup(self.warmup)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[ExecutableModelSpace]:
        """The network found as an architecture of the space: one at most, whatever ``limit``.

        It says which candidates stay, and the depths. Channels that were removed from layers without a choice of width
        are no part of NNI's spaces: :meth:`slim_model` has them too, and the weights.

        Raises:
            DNALError: if the space has no word for it, such as for two candidates of one LayerChoice; says what.
        """
        yield self.model_space.freeze(self.space.architecture(self.slim_model()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: gates are not in the checkpoints of Lightning."""
        if state_dict:
            raise DNALError("DNALStrategy cannot resume a search that was cut off: run it again from the start")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a search is not resumed."""
        return {}

    # -- the result ---------------------------------------------------------------------------------------------------

    @property
    def space(self) -> Space:
        """The model space beside its supernet."""
        return self._made(self._space)

    @property
    def pruner(self) -> DNALPruner:
        """The pruner of the supernet: groups, gates, and what can be done with them."""
        return self._made(self._pruner)

    def _made(self, part: T | None) -> T:
        if part is None:
            raise DNALError("there is no supernet yet: run the strategy first")
        return part

    def slim_model(self) -> nn.Module:
        """The network found, with the weights of the search: a new module without gates and closed candidates.

        It is compared with the supernet at its final gates, in eval and train mode; a difference is an error.
        """
        slim, report = self.pruner.speedup(), self.report
        if report.interventions is not None:
            own = {"warmup": self.warmup, "single_path": self.single_path, "widths": self.widths}
            usual = {"warmup": WARMUP, "single_path": not self.widths, "widths": True}
            made = report.interventions.with_arguments(own, usual)
            changed = {name: value for name, value in made.changed.items() if name != "paths"}  # that is widths=False
            report.interventions = dataclasses.replace(made, epochs=self._epochs, changed=changed)
        return slim

    @property
    def report(self) -> Report:
        """What the last :meth:`slim_model` left of the supernet."""
        return self.pruner.report


class Searching(pl.Callback):
    """Lets a training of Lightning be a search: everything else of it (clipping, schedulers, precision) stays.

    Attributes:
        finished: whether gates were learned, and are fixed.
    """

    def __init__(self, pruner: DNALPruner, warmup: float) -> None:
        self.pruner, self.warmup = pruner, warmup
        self.search: Search | None = None
        self.finished = False
        self._seen = 0

    @contextlib.contextmanager
    def on_paths(self, module: pl.LightningModule) -> Iterator[None]:
        """Let every training step of ``module`` run its batch through all paths of a step of the search."""
        own, step = vars(module).get("training_step"), module.training_step

        @functools.wraps(step)
        def every_path(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(self.search, PathSearch) or self.search.done >= self.search.steps:
                return step(*args, **kwargs)
            outputs = [step(*args, **kwargs) for _ in self.search.paths()]
            results = [out.get("loss") if isinstance(out, dict) else out for out in outputs]
            losses = [loss for loss in results if isinstance(loss, Tensor)]
            if len(losses) < len(results):
                raise DNALError(
                    "training_step returns no loss: a search of candidates alone (widths=False) compares the losses of "
                    "paths; return it, and leave the optimizer to Lightning"
                )
            loss = self.search.of_step(losses)
            return outputs[-1] | {"loss": loss} if isinstance(outputs[-1], dict) else loss

        module.training_step = every_path
        try:
            yield
        finally:
            if own is None:
                del module.training_step
            else:
                module.training_step = own

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise DNALError(
                "the search has no known length: give the trainer max_epochs or max_steps, and data a length"
            )
        if trainer.world_size != 1:
            raise DNALError(f"the trainer uses {trainer.world_size} devices: a search needs one, devices=1")
        if len(trainer.optimizers) != 1:
            raise DNALError(f"the evaluator has {len(trainer.optimizers)} optimizers: a search needs one")
        self._first = int(self.warmup * steps)
        self._steps = int(steps) - self._first
        self._seen = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.search is None and not self.finished and trainer.global_step >= self._first:
            self.search = self.pruner.session.search(self._steps, weights_learn=True, progress=False)
            self.search.start()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.search is not None:
            self.search.penalised(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.search is not None:
            self.search.before_optimizer_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        if self.search is None or not stepped:  # gradients are accumulated
            return
        self.search.after_optimizer_step()
        if self.search.done == self.search.scores.moving:  # the structure stands: closed candidates can rest
            for group in self.pruner.groups:
                if group.choice:
                    gate = self.pruner.gates[group.name]
                    gate.harden(gate.s > 0)
        if self.search.history:
            pl_module.log("cost", self.search.history[-1]["cost"], prog_bar=True)
        if self.search.done == self._steps:
            self._finish()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.search, PathSearch) and self.search.done <= self.search.compared.warmup:
            raise _within_warmup(self.search.compared.warmup / self._steps)
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

    def _finish(self) -> None:
        assert self.search is not None
        self.search.stop()
        self.search, self.finished = None, True
        self.pruner.harden()


def _within_warmup(share: float) -> DNALError:
    return DNALError(
        f"the training ended within the warmup of {share:.0%} of its steps: nothing was searched; give "
        "DNALStrategy a smaller warmup, or train longer"
    )


def _first_image(evaluator: Lightning) -> Tensor:
    """The first input of the training data, as a batch of one."""
    with same_random_numbers():
        data = evaluator.train_dataloaders
        if evaluator.datamodule is not None:
            evaluator.datamodule.prepare_data()
            evaluator.datamodule.setup("fit")
            data = evaluator.datamodule.train_dataloader()
        batch = None if data is None else next(iter(data))
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(first, Tensor):
        raise DNALError(
            f"the training data start with a {type(first).__name__}: pass DNALStrategy(dummy_input=x), what the model "
            "takes"
        )
    return first[:1]
