"""PrimeStrategy: DARTS-PRIME (arXiv 2106.11655) as a one-shot NAS strategy of NNI 3.0."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from nni.nas.evaluator.pytorch import Lightning
from nni.nas.nn.pytorch import ModelSpace
from torch import nn

from ...arguments import checked_but, fits, shown
from ...errors import DNALError
from ...modules.choices import Choice
from ...plan import Method, Plan
from ...search.informed import Informed
from ...search.picks import picks_of
from ...search.prime import Activation, PrimeScores, Regularizer
from ..pruner import DNALPruner
from ..space import Space
from .holdout import Holdout
from .searching import HeldOutSearching
from .supernet import SupernetStrategy, check_no_widths, check_number

INFORMED = Informed(10)


@dataclasses.dataclass(frozen=True)
class Prime(Method):
    """How the weights of candidates learn; the attributes are PrimeStrategy's arguments."""

    activation: Activation = "softmax"
    regularizer: Regularizer | None = "proximity"
    rho: float = 0.1
    schedule: Informed | int = INFORMED
    arch_lr: float | None = 1.0

    def scores(self, model: nn.Module, plan: Plan, steps: int) -> PrimeScores:
        every = 1 if isinstance(self.schedule, Informed) else self.schedule
        share = self.schedule.share if isinstance(self.schedule, Informed) else 1 / every

        return PrimeScores(
            picks_of(model, plan.active), steps, activation=self.activation, regularizer=self.regularizer, rho=self.rho,
            reach=self.arch_lr or 0.0, every=every, share=share, cost=plan.cost.share,
            device=next(model.parameters()).device,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Numbers and strings."""
        return super().settings() | {"schedule": str(self.schedule)}


class PrimeStrategy(SupernetStrategy):
    """DARTS with informed steps, and with weights that are pulled to where a network can be cut (DARTS-PRIME).

    Every candidate is weighted by its share in a softmax, or by a number between 0 and 1. The architecture learns from
    the evaluator's validation data, as that of NNI's DARTS does, in the steps that ``schedule`` says; the weights learn
    from its training data in every step. What is derived is DARTS's: the candidate of the largest weight, of a cell's
    node the inputs with the largest. The paper's code was read; its figures were not reproduced. What differs from it:
    docs/prime.md.

    Use it as any strategy of NNI, ``NasExperiment(space, evaluator, strategy)``, or by itself,
    ``strategy(space, evaluator)``; then :meth:`slim_model` is the network found. ``space`` is not changed. There is no
    budget: it finds what is best, whatever that costs.

    Args:
        activation: "softmax", or "bounded", where candidates do not compete: ``a = clamp(alpha, 0, 1)``; those that
            fall to 0 stay there, and do not run any more.
        regularizer: "proximity" to the network that would be derived now, growing over the search; "consensus" with it
            (ADMM); or None.
        rho: weight of the regulariser.
        schedule: ``Informed(10)``, when the weights are near rest, once in 11 steps on average; or a number: after so
            many steps (1: DARTS).
        arch_lr: how far a steady gradient moves an alpha over the whole search. 1 is about what the paper's 3e-4 comes
            to in its 50 epochs; a small number of steps then takes larger ones.
        dummy_input: what FLOPs are counted for; None: the first image of the evaluator's training data.
        sequential: keep the activations of one candidate at a time, as for :class:`~dnal_nni.DNALStrategy`.
        verify_seconds: time limit for comparing sliced with gated copies, as for :class:`~dnal_nni.DNALPruner`.

    Raises:
        DNALError: for a mutable that it cannot learn, by name, and for anything else that the caller can mend.
    """

    @checked_but("activation", "regularizer", "rho", "schedule", "arch_lr", "sequential")
    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        regularizer: Regularizer | None = "proximity",
        rho: float = 0.1,
        schedule: Informed | int = INFORMED,
        arch_lr: float = 1.0,
        dummy_input: Any = None,
        sequential: bool = False,
        verify_seconds: float | None = None,
    ) -> None:
        super().__init__(dummy_input=dummy_input, sequential=sequential, verify_seconds=verify_seconds)
        if activation not in get_args(Activation):
            raise DNALError(f"activation={activation!r}: choose 'softmax' or 'bounded'")
        if regularizer is not None and regularizer not in get_args(Regularizer):
            raise DNALError(f"regularizer={regularizer!r}: choose 'proximity', 'consensus' or None")
        check_number("rho", rho)
        check_number("arch_lr", arch_lr)
        if not isinstance(schedule, Informed) and not (fits(schedule, int) and schedule >= 1):
            raise DNALError(f"schedule={shown(schedule)}: give Informed(10), or a whole number >= 1 of steps")
        self.method = Prime(
            activation=activation, regularizer=regularizer, rho=rho, schedule=schedule, arch_lr=arch_lr
        )

    def space_of(self, model: ModelSpace) -> Space:
        space = Space(model, single_path=True)
        check_no_widths(space, "use DNALStrategy, which learns widths")
        return space

    def pruner_of(self, evaluator: Lightning) -> DNALPruner:
        pruner = self.gated(evaluator, lambda module: isinstance(module, Choice))
        picks_of(pruner.bound_model, pruner.plan.active)  # an error ahead of the training
        pruner.session.method = self.method
        return pruner

    def searching(self, evaluator: Lightning) -> HeldOutSearching:
        schedule = self.method.schedule
        when = schedule if isinstance(schedule, Informed) else None
        return HeldOutSearching(self.pruner, evaluator, Holdout(evaluator, type(self).__name__), when)
