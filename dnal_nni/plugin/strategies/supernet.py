"""What the strategies of this package share: NNI's model space as a supernet, and the network that is left of it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytorch_lightning as pl
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from torch import Tensor, nn

from ...arguments import fits, shown
from ...budget import Budget
from ...errors import DNALError
from ...modules.choices import Mixture
from ...report.record import Report
from ..pruner import DNALPruner
from ..space import Space
from ..steps import same_random_numbers
from .holdout import Randomness
from .searching import Searching, around, check_launched

T = TypeVar("T")


class SpaceStrategy(OneShotStrategy):
    """What searches a model space of NNI, in an experiment of NNI or by itself."""

    def __call__(self, model_space: Any, engine: Any) -> None:
        """Search ``model_space``, a :class:`ModelSpace`, with ``engine``, an evaluator (or NNI's forms of both)."""
        if isinstance(model_space, ModelSpace):
            model_space = RawFormatModelSpace.from_model(model_space, engine)
            engine = SequentialExecutionEngine()
        elif isinstance(model_space, nn.Module):
            raise DNALError(
                f"the model space is {shown(model_space)}, without choices: give a ModelSpace of nni.nas; DNALPruner "
                "searches the widths of a network"
            )
        super().__call__(model_space, engine)


class SupernetStrategy(SpaceStrategy, abc.ABC):
    """Searches a supernet whose candidates are summed, in a training of Lightning; closed candidates are then removed.

    The evaluator stays as it is: its trainer gets a callback while the search runs. So clipping, schedules, precision
    and accumulation of gradients are the user's own, and NNI needs no patch.

    Args:
        dummy_input: what FLOPs are counted for, as for :class:`~dnal_nni.DNALPruner`; None: the first image of the
            evaluator's training data.
        sequential: keep the activations of one candidate at a time.
        verify_seconds: time limit for comparing sliced with gated copies, as for :class:`~dnal_nni.DNALPruner`.

    Attributes:
        by_paths: whether a step runs several paths, instead of the sum of all candidates.
    """

    by_paths = False

    def __init__(
        self, *, dummy_input: Any = None, sequential: bool = False, verify_seconds: float | None = None
    ) -> None:
        super().__init__()
        check_flag("sequential", sequential)
        self.dummy_input, self.sequential, self.verify_seconds = dummy_input, sequential, verify_seconds
        self._space: Space | None = None
        self._pruner: DNALPruner | None = None
        self._epochs: int | None = None

    # -- what a strategy is -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def space_of(self, model: ModelSpace) -> Space:
        """The space beside its supernet; an error for what the strategy cannot learn."""

    @abc.abstractmethod
    def searching(self, evaluator: Lightning) -> Searching:
        """The callback that makes a training a search."""

    def arguments(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """For the report: the strategy's arguments by name, as they are and as they are by default."""
        return {}, {}

    # -- NNI's contract -----------------------------------------------------------------------------------------------

    def mutate_model(self, model: ModelSpace) -> nn.Module:
        """The supernet; unlike NNI's own strategies, this one leaves ``model`` as it is."""
        self._space = self.space_of(model)
        for module in self.space.supernet.modules():
            if isinstance(module, Mixture):
                module.sequential = self.sequential
        return self.space.supernet

    def mutate_evaluator(self, evaluator: Any) -> Any:
        """Find the gates; the evaluator stays as it is, and its trainer gets a callback while the search runs."""
        self._pruner = self.pruner_of(checked_evaluator(evaluator))
        return evaluator

    def as_searched(self, model: ModelSpace, evaluator: Lightning) -> nn.Module:
        """A supernet of ``model`` as a step of the search runs it, to measure one; the strategy is of no use then."""
        self.mutate_model(model)
        self.mutate_evaluator(evaluator)
        search = self.pruner.session.search(100, weights_learn=True, progress=False)
        search.start()
        for leaf in search.leaves.tensors:
            leaf.requires_grad_(True)
        return self.pruner.bound_model

    @abc.abstractmethod
    def pruner_of(self, evaluator: Lightning) -> DNALPruner:
        """The pruner of the supernet, whose search is the strategy's."""

    def gated(self, evaluator: Lightning, searched: Callable[[nn.Module], bool], **settings: Any) -> DNALPruner:
        """A pruner of the supernet.

        Args:
            evaluator: whose data have the dummy input, where none was given.
            searched: which modules may be cut.
            settings: more arguments of the pruner.
        """
        model = self.space.supernet
        return DNALPruner(
            model,
            [{"op_types": sorted({type(m).__name__ for m in model.modules() if searched(m)})}],
            dummy_input=self.dummy_input if self.dummy_input is not None else first_image(evaluator),
            verify_seconds=self.verify_seconds,
            **settings,
        )

    def _run(self) -> None:
        assert self._mutated_model_space is not None
        evaluator = self._mutated_model_space.evaluator
        assert isinstance(evaluator, Lightning)
        trainer = evaluator.trainer
        check_launched(trainer)
        callback = self.searching(evaluator)
        self._epochs = trainer.max_epochs if trainer.max_epochs != -1 else None
        # ahead of those that save checkpoints, and behind the user's
        places = [i for i, other in enumerate(trainer.callbacks) if isinstance(other, pl.callbacks.Checkpoint)]
        trainer.callbacks.insert(min(places, default=len(trainer.callbacks)), callback)
        try:
            with around(evaluator.module, callback.stepped):
                super()._run()
        finally:
            trainer.callbacks.remove(callback)
        if not callback.finished:
            raise callback.nothing_searched()

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[ExecutableModelSpace]:
        """The network found as an architecture of the space: one at most, whatever ``limit``.

        It says which candidates stay, and the depths. Channels that were removed from layers without a choice of width
        are no part of NNI's spaces: :meth:`slim_model` has them too, and the weights.

        Raises:
            DNALError: if the space has no word for it, such as for two candidates of one LayerChoice; says what.
        """
        yield self.model_space.freeze(self.space.architecture(self.slim_model()))

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
            made = report.interventions.with_arguments(*self.arguments())
            changed = {name: value for name, value in made.changed.items() if name != "paths"}  # that is widths=False
            report.interventions = dataclasses.replace(made, epochs=self._epochs, changed=changed)
        return slim

    @property
    def report(self) -> Report:
        """What the last :meth:`slim_model` left of the supernet."""
        return self.pruner.report


def checked_evaluator(evaluator: Any) -> Lightning:
    """``evaluator``, which must be one of Lightning's."""
    if not isinstance(evaluator, Lightning):
        raise DNALError(
            f"the evaluator is a {type(evaluator).__name__}: a search needs nni.nas.evaluator.pytorch.Lightning, "
            "or one derived from it (Classification, Regression)"
        )
    return evaluator


def check_flag(name: str, value: Any) -> None:
    """Raise for what is neither True nor False."""
    if not isinstance(value, bool):
        raise DNALError(f"{name}={shown(value)}: must be True or False")


def check_number(name: str, value: Any) -> None:
    """Raise for what is no finite number >= 0."""
    if not fits(value, float) or not 0 <= value < float("inf"):
        raise DNALError(f"{name}={shown(value)}: must be a number >= 0")


def check_whole(name: str, value: Any, least: int, what: str) -> None:
    """Raise for what is no whole number of at least ``least``; ``what`` it counts."""
    if not fits(value, int) or value < least:
        raise DNALError(f"{name}={shown(value)}: must be a whole number >= {least}, {what}")


def check_warmup(warmup: Any) -> None:
    """Raise for what is no share of the steps that leaves some."""
    if not fits(warmup, float) or not 0 <= warmup < 1:
        raise DNALError(f"warmup={shown(warmup)}: must be a number in [0, 1), a share of the steps")


def check_budget(budget: Any) -> None:
    """Raise for what is no budget."""
    if not isinstance(budget, Budget):
        raise DNALError(f"budget={budget!r}: pass a Budget, for example Budget(flops=20e6)")


def check_no_widths(space: Space, remedy: str) -> None:
    """Raise where widths are a choice of the space, which weights of candidates cannot make.

    Args:
        space: of the strategy.
        remedy: what to do beside fixing the values of these choices.
    """
    if space.widest:
        labels = ", ".join(map(repr, space.widest))
        raise DNALError(f"the model space has choices of a width: {labels}; fix their values, or {remedy}")


def first_image(evaluator: Lightning) -> Tensor:
    """The first input of the training data, as a batch of one."""
    with same_random_numbers():
        data = evaluator.train_dataloaders
        if evaluator.datamodule is not None:
            evaluator.datamodule.prepare_data()
            evaluator.datamodule.setup("fit")
            data = evaluator.datamodule.train_dataloader()
        order = Randomness(data)
        state = order.state_dict()
        batch = None if data is None else next(iter(data))
        order.load_state_dict(state)
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(first, Tensor):
        raise DNALError(
            f"the training data start with a {type(first).__name__}: pass dummy_input=x to the strategy, what the "
            "model takes"
        )
    return first[:1]
