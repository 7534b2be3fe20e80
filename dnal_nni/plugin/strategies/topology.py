"""TopologyStrategy: the inputs of nodes as decisions of their own (after TopoNAS, arXiv 2011.09300), for NNI 3.0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from nni.nas.evaluator.pytorch import Lightning
from nni.nas.nn.pytorch import ModelSpace
from torch import nn

from ...arguments import checked_but, shown
from ...budget import Budget
from ...errors import DNALError
from ...modules.cells import Topology
from ...modules.choices import Choice
from ...modules.layers import mixing
from ...plan import Method, Plan
from ...search.importance import importance
from ...search.topology import TopologyScores, topology_of, wires_of
from ...search.wired import WiredScores
from ..pruner import DNALPruner
from ..space import Space
from .dnal import WARMUP
from .searching import Searching
from .supernet import SupernetStrategy, check_budget, check_no_widths, check_number, check_warmup

Operations = Literal["softmax", "gates"]
USUAL = Topology()
REACH = 4.0  # of logits: a probability between two sets then goes from one half to 0.98


@dataclasses.dataclass(frozen=True)
class Wired(Method):
    """How inputs and operations learn; the attributes are TopologyStrategy's arguments."""

    topology: Topology = USUAL
    ops: Operations = "softmax"
    arch_lr: float | None = REACH

    def scores(self, model: nn.Module, plan: Plan, steps: int) -> TopologyScores | WiredScores:
        device, logits = next(model.parameters()).device, self.arch_lr or 0.0
        if plan.objective is not None:
            start = importance(model, plan.active).to(device)
            wires = wires_of(model, plan.active, self.topology)
            return WiredScores(
                plan.objective, start, steps, wires, self.topology, lambda units: plan.cost_of(units, model),
                logits=logits,
            )  # fmt: skip

        decisions = topology_of(model, plan.active, self.topology)
        return TopologyScores(*decisions, self.topology, steps, reach=logits, cost=plan.cost.share, device=device)

    def settings(self) -> dict[str, Any]:
        """Numbers and strings."""
        return super().settings() | {"topology": str(self.topology)}


class TopologyStrategy(SupernetStrategy):
    """Learns which inputs the nodes of cells read, as decisions of their own, together with operations and weights.

    DARTS ranks inputs by the strongest operation on each. Here a node has a probability for every set of inputs that
    may stay (or for every input), and the marginals weight what comes from each. TopoNAS's text and code are not
    public: this has the properties that its abstract states, and is no reproduction (docs/topology.md).

    Use it as any strategy of NNI, ``NasExperiment(space, evaluator, strategy)``, or by itself,
    ``strategy(space, evaluator)``; then :meth:`slim_model` is the network found. ``space`` is not changed.

    Args:
        topology: how many inputs a node has, and how their probabilities are formed and cooled. By default, as many
            as NNI's cell has operations in a node, and InputChoice its ``n_chosen``.
        ops: how operations are decided: by a "softmax" on each input, as in DARTS; or by DNAL's "gates", with widths,
            under a budget.
        budget: what the network found may cost, for "gates". A fraction is that of the whole supernet.
        warmup: share of the steps in which only weights learn, for "gates", as for :class:`~dnal_nni.DNALStrategy`; a
            softmax learns from the first step on.
        arch_lr: how far a steady gradient moves a logit over the whole search.
        dummy_input: what FLOPs are counted for; None: the first image of the evaluator's training data.
        sequential: keep the activations of one candidate at a time, as for :class:`~dnal_nni.DNALStrategy`.
        verify_seconds: time limit for comparing sliced with gated copies, as for :class:`~dnal_nni.DNALPruner`.

    Raises:
        DNALError: for a mutable that it cannot learn, by name, and for anything else that the caller can mend.
    """

    @checked_but("topology", "ops", "budget", "warmup", "arch_lr", "sequential")
    def __init__(
        self,
        topology: Topology = USUAL,
        *,
        ops: Operations = "softmax",
        budget: Budget | None = None,
        warmup: float = WARMUP,
        arch_lr: float = REACH,
        dummy_input: Any = None,
        sequential: bool = False,
        verify_seconds: float | None = None,
    ) -> None:
        super().__init__(dummy_input=dummy_input, sequential=sequential, verify_seconds=verify_seconds)
        if not isinstance(topology, Topology):
            raise DNALError(f"topology={shown(topology)}: give a Topology, for example Topology(inputs=2)")
        if ops not in get_args(Operations):
            raise DNALError(f"ops={ops!r}: choose 'softmax' or 'gates'")
        if ops == "gates":
            check_budget(budget)
            if isinstance(topology.inputs, tuple) and topology.inputs[0] != topology.inputs[1]:
                raise DNALError(f"ops='gates' needs one number of inputs, and is given {topology.inputs}")
        elif budget is not None:
            raise DNALError(f"budget={budget} goes with ops='gates': a softmax knows no cost")
        check_warmup(warmup)
        check_number("arch_lr", arch_lr)
        self.topology, self.ops, self.budget, self.warmup = topology, ops, budget, warmup
        self.method = Wired(topology=topology, ops=ops, arch_lr=arch_lr)

    def space_of(self, model: ModelSpace) -> Space:
        space = Space(model, single_path=True, topology=self.topology)
        if self.ops == "softmax":
            check_no_widths(space, "learn them too, ops='gates'")
        return space

    def pruner_of(self, evaluator: Lightning) -> DNALPruner:
        gated = self.ops == "gates"
        pruner = self.gated(evaluator, mixing if gated else lambda m: isinstance(m, Choice), budget=self.budget)
        wires = wires_of(pruner.bound_model, pruner.plan.active, self.topology)
        if not any(wires):
            raise DNALError(
                "no node of the model space has more inputs than may stay: there is no topology to learn; use "
                "DNALStrategy or PrimeStrategy, or Topology(inputs=) with fewer"
            )
        if not gated:
            topology_of(pruner.bound_model, pruner.plan.active, self.topology)  # an error ahead of the training
        pruner.session.method = self.method
        return pruner

    def searching(self, evaluator: Lightning) -> Searching:
        return Searching(self.pruner, evaluator, self.warmup if self.ops == "gates" else 0.0)

    def arguments(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return {"warmup": self.warmup}, {"warmup": WARMUP}
