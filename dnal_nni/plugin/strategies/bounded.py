"""BoundedStrategy: a search within a limit of memory (after RADARS, arXiv 2109.05691), for NNI 3.0."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

from nni.nas.evaluator.pytorch import Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from pytorch_lightning.trainer.states import TrainerStatus
from torch import nn

from ...arguments import checked_but, fits, shown
from ...cost.memory import Meter
from ...errors import DNALError
from ...report.record import Report
from ...search.bounded import Bound
from ...search.subspace import Live, Subspace
from ..restricted import Candidates
from ..space import Space
from .bounding import TOGETHER, Metering, Restricting
from .holdout import Holdout
from .searching import around
from .supernet import SpaceStrategy, SupernetStrategy, check_flag, check_whole, checked_evaluator


class BoundedStrategy(SpaceStrategy):
    """Any one-shot strategy within a limit of memory: candidates are dropped ahead of it until the supernet fits.

    A controller learns by REINFORCE which candidates make good networks, on single paths whose weights are shared. In
    rounds, what is least likely for its size is dropped. ``inner`` then searches the space that is left. The memory of
    a step is measured, candidate by candidate, and the limit is enforced: a training that would hold more is ended.
    RADARS's text and code are not public: this has the properties that its abstract states, and is no reproduction
    (docs/bounded.md).

    Use it as any strategy of NNI, ``NasExperiment(space, evaluator, strategy)``, or by itself,
    ``strategy(space, evaluator)``. ``space`` is not changed. The controller learns from the evaluator's validation
    data; ``inner`` gets the evaluator as it is.

    Args:
        inner: the search of what is left: a strategy of this package, or a one-shot strategy of NNI.
        memory: the limit, in bytes; up to 1, a fraction of what a step of the whole supernet needs. It counts what
            autograd keeps, parameters, their gradients and optimizer states.
        rounds: after each of which an equal part of what is too much is dropped.
        batches: training steps of the shared weights in a round.
        paths: that the controller learns from in a round, 8 on a batch.
        keep_weights: let the search go on with the shared weights.

    Attributes:
        bound: what was dropped, and what was held; a :class:`~dnal_nni.search.bounded.Bound`, once it has run.

    Raises:
        DNALError: for a limit below what the largest single path needs, which is named; where there is nothing that
            could be dropped; and for anything else that the caller can mend.
    """

    @checked_but("inner", "memory", "rounds", "batches", "paths", "keep_weights")
    def __init__(
        self,
        inner: OneShotStrategy,
        *,
        memory: float,
        rounds: int = 5,
        batches: int = 50,
        paths: int = 64,
        keep_weights: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(inner, OneShotStrategy) or isinstance(inner, BoundedStrategy):
            raise DNALError(
                f"inner={shown(inner)}: give the one-shot strategy that searches what fits, for example "
                "DNALStrategy(Budget(flops=20e6))"
            )
        if not fits(memory, float) or not 0 < memory < float("inf"):
            raise DNALError(f"memory={shown(memory)}: must be bytes, or a fraction in (0, 1] of the supernet's")
        check_whole("rounds", rounds, 1, "after each of which candidates are dropped")
        check_whole("batches", batches, 2, "training steps of a round")
        check_whole("paths", paths, TOGETHER, "that the controller learns from in a round")
        check_flag("keep_weights", keep_weights)
        self.inner, self.memory, self.keep_weights = inner, memory, keep_weights
        self.rounds, self.batches, self.paths = rounds, batches, paths
        self._bound: Bound | None = None
        self._candidates: Candidates | None = None
        self._restricting: Restricting | None = None

    def _initialize(self, model_space: Any, engine: Any) -> Any:
        evaluator = checked_evaluator(model_space.evaluator)
        if (devices := evaluator.trainer.world_size) != 1:
            raise DNALError(f"the trainer uses {devices} devices: a limit of memory is held on one, devices=1")
        self._candidates = Candidates(model_space.model_space)
        ours = self.inner if isinstance(self.inner, SupernetStrategy) else None
        space: Any = model_space.model_space
        made = Space(space, single_path=True) if ours is None else ours.space_of(space)
        by_paths = ours is not None and ours.by_paths
        self._restricting = Restricting(
            Subspace(made.supernet, self._candidates.named), Meter(), Holdout(evaluator, type(self).__name__),
            self.memory, None if by_paths else self._as_searched, rounds=self.rounds, batches=self.batches,
            paths=self.paths,
        )  # fmt: skip
        return model_space

    def _as_searched(self, options: Live) -> nn.Module:
        assert self._candidates is not None
        inner, space = copy.deepcopy(self.inner), self._candidates.restricted(options)
        if isinstance(inner, SupernetStrategy):
            return inner.as_searched(space, self.model_space.evaluator)
        supernet, sampled = inner.mutate_model(space), dict[str, Any]()
        for module in supernet.modules():
            if isinstance(module, BaseSuperNetModule):
                sampled |= module.resample(sampled)  # where it runs paths, there is none yet
        return supernet

    def _run(self) -> None:
        evaluator = self.model_space.evaluator
        assert isinstance(evaluator, Lightning) and self._candidates is not None and self._restricting is not None
        start = time.perf_counter()
        self._restrict(evaluator, self._restricting)
        shrinking, subspace = self._restricting.shrinking, self._restricting.subspace
        assert shrinking is not None
        seconds = time.perf_counter() - start
        kept = {label: list(names) for label, names in subspace.options.items()}
        space = self._candidates.restricted(kept)
        if self.keep_weights and shrinking.done:
            _take_weights(space, subspace.model)
        whole, predicted, meter = shrinking.whole, shrinking.size, self._restricting.meter
        self._restricting = None  # and with it the supernet
        del subspace

        own = Metering(Meter(shrinking.limit))
        evaluator.trainer.callbacks.insert(0, own)
        try:
            with own.meter.watching():
                self.inner(RawFormatModelSpace.from_model(space, evaluator), SequentialExecutionEngine())
        finally:
            evaluator.trainer.callbacks.remove(own)
            peak = max(meter.peak, own.meter.peak)
            dropped = shrinking.dropped
            self._bound = Bound(shrinking.limit, whole, predicted, peak, kept, dropped, seconds)

    def _restrict(self, evaluator: Lightning, restricting: Restricting) -> None:
        """Train the shared weights on paths, and drop candidates, in a trainer like the evaluator's."""
        own: dict[str, Any] = {
            "max_epochs": -1, "min_epochs": None, "max_steps": restricting.steps, "min_steps": None,
            "callbacks": [restricting], "logger": False, "enable_checkpointing": False, "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }  # fmt: skip
        trainer = Trainer(**{**evaluator.trainer.trace_kwargs, **own})
        evaluator.module.set_model(restricting.subspace.model)
        names = ("train_dataloaders", "val_dataloaders") if evaluator.datamodule is None else ("datamodule",)
        data = {name: getattr(evaluator, name) for name in names}
        with around(evaluator.module, restricting.stepped), restricting.meter.watching():
            trainer.fit(evaluator.module, **data)
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt("the training was interrupted")
        if not restricting.finished:
            raise DNALError(
                f"the training ended after {trainer.global_step} of {restricting.steps} steps, ahead of the last "
                "candidates to be dropped: let no limit of the trainer end it, or ask for fewer rounds= or batches="
            )

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[ExecutableModelSpace]:
        """What ``inner`` found, as architectures of the whole space."""
        assert self._candidates is not None
        for model in self.inner.list_models(sort, limit):
            yield self.model_space.freeze(self._candidates.sample(model.sample))

    # -- the result ---------------------------------------------------------------------------------------------------

    @property
    def bound(self) -> Bound:
        """What was dropped, and what was held."""
        if self._bound is None:
            raise DNALError("nothing was searched yet: run the strategy first")
        return self._bound

    @property
    def supernet(self) -> nn.Module:
        """That of ``inner``."""
        return self.inner.supernet

    def slim_model(self) -> nn.Module:
        """The network found, where ``inner`` is a strategy of this package: see there."""
        slim = self._own_inner().slim_model()
        self.report.notes.append(self.bound.note())
        return slim

    @property
    def report(self) -> Report:
        """What the last :meth:`slim_model` left of the space that was searched."""
        return self._own_inner().report

    def _own_inner(self) -> SupernetStrategy:
        if not isinstance(self.inner, SupernetStrategy):
            raise DNALError(
                f"{type(self.inner).__name__} finds an architecture and no network: list_models() gives it, "
                "to be trained"
            )
        return self.inner


def _take_weights(space: ModelSpace, supernet: nn.Module) -> None:
    """Start from the weights of ``supernet`` where ``space`` has the same by that name; a cell makes its own anew."""
    own, shared = space.state_dict(), supernet.state_dict()
    same = {name: value for name, value in shared.items() if name in own and own[name].shape == value.shape}
    space.load_state_dict(same, strict=False)
