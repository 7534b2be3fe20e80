"""What goes: as a search learned it, or by what the weights are worth as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DNALError
from .modules.gates import ScaledSigmoidGate
from .plan import Plan
from .search.close import cut, threshold_cut
from .search.criteria import Criterion, Loss, criterion_scores
from .search.learner import Decides
from .search.loop import Search
from .search.paper import PAPER_THRESHOLD
from .search.surgeon import removal_losses, worth


def learned(plan: Plan, model: nn.Module, gates: Sequence[ScaledSigmoidGate], search: Search) -> dict[str, Tensor]:
    """What a search decided, cut to the budget; fvcore has the last word on what that costs.

    Returns:
        by group name, bool ``[channels]``: what stays.
    """
    scores = search.scores
    if isinstance(scores, Decides):
        return plan.by_group(scores.chosen())
    s = torch.cat([gate.s.detach() for gate in gates]).double().cpu()
    if plan.objective is None:
        asked = [setting.sparse_threshold for setting in plan.settings]
        thresholds = [PAPER_THRESHOLD if threshold is None else threshold for threshold in asked]
        return plan.by_group(threshold_cut(s, float(gates[0].delta), thresholds, plan.limits, plan.sizes))
    rank = scores.rank(s).cpu()
    return plan.by_group(cut(plan.objective, rank, scores.floor, lambda units: plan.cost_of(units, model)))


def chosen(
    plan: Plan,
    model: nn.Module,
    gates: Sequence[ScaledSigmoidGate],
    importance: Criterion | None,
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> dict[str, Tensor]:
    """What stays without a search: see :meth:`Session.choose`; by group name, bool ``[channels]``."""
    objective = plan.objective
    if objective is None:
        raise DNALError("choose() needs a budget, or a sparse_ratio in the config_list, to cut to")
    if importance is not None:
        scores, floor = criterion_scores(model, plan.active, importance, batches, loss), objective.floor()
    else:
        if batches is None:
            raise DNALError("choose(): give batches=[inputs], some hundred examples, or a criterion of torch-pruning")
        if any(group.choice for group in plan.active):
            raise DNALError("choose(): the model is a supernet, and only a search compares candidates: call search()")
        losses = removal_losses(model, plan.active, gates, batches, loss)
        scores, floor = worth(losses, objective.whole, plan.sizes), list(objective.limits.least)
    return plan.by_group(cut(objective, scores, floor, lambda units: plan.cost_of(units, model)))
