"""DNALStrategy: DNAL as a one-shot NAS strategy of NNI 3.0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nni.nas.evaluator.pytorch import Lightning
from nni.nas.nn.pytorch import ModelSpace

from ...arguments import checked_but
from ...budget import Budget
from ...modules.choices import Choice
from ...modules.layers import mixing
from ..pruner import DNALPruner
from ..space import Space
from .searching import PathSearching, Searching
from .supernet import SupernetStrategy, check_budget, check_flag, check_no_widths, check_warmup

WARMUP = 0.5


class DNALStrategy(SupernetStrategy):
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

    @checked_but("budget", "warmup", "single_path", "widths", "sequential")
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
        verify_seconds: float | None = None,
    ) -> None:
        super().__init__(dummy_input=dummy_input, sequential=sequential, verify_seconds=verify_seconds)
        check_budget(budget)
        check_warmup(warmup)
        self.budget, self.warmup, self.arch_lr = budget, warmup, arch_lr
        if single_path is not None:
            check_flag("single_path", single_path)
        check_flag("widths", widths)
        self.single_path = not widths if single_path is None else single_path
        self.widths, self.by_paths = widths, not widths

    def space_of(self, model: ModelSpace) -> Space:
        space = Space(model, self.single_path)
        if not self.widths:
            check_no_widths(space, "search widths too, widths=True")
        return space

    def pruner_of(self, evaluator: Lightning) -> DNALPruner:
        searched = mixing if self.widths else lambda m: isinstance(m, Choice)
        pruner = self.gated(evaluator, searched, budget=self.budget, arch_lr=self.arch_lr)
        if not self.widths:
            session = pruner.session
            session.method = dataclasses.replace(session.method, paths=float(self.warmup))
        return pruner

    def searching(self, evaluator: Lightning) -> Searching:
        if not self.widths:
            return PathSearching(self.pruner, evaluator)
        return Searching(self.pruner, evaluator, self.warmup)

    def arguments(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        own = {"warmup": self.warmup, "single_path": self.single_path, "widths": self.widths}
        return own, {"warmup": WARMUP, "single_path": not self.widths, "widths": True}
