"""What goes: as a search learned it, or by what the weights are worth as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .channels.groups import ChannelGroup
from .errors import DNALError
from .modules.gates import ScaledSigmoidGate
from .modules.running import call, seeded
from .plan import Plan
from .search.bypass import sole_ways
from .search.close import cut, exact_cut, threshold_cut
from .search.criteria import Criterion, Loss, as_it_was, criterion_scores
from .search.learner import Decides
from .search.loop import Search
from .search.objective import Objective
from .search.paper import PAPER_THRESHOLD
from .search.samples import as_one, examples_of
from .search.surgeon import removal_losses, worth
from .surgery.inject import attach
from .surgery.repair import kept_outputs, repair
from .surgery.slim import groups_left

HALF = 0.5  # of the cost; budgets below it are cut to in two steps
EXAMPLES = 256  # that the repair between them is of


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
        return plan.by_group(cut(objective, scores, floor, lambda units: plan.cost_of(units, model)))
    if batches is None:
        raise DNALError("choose(): give batches=[inputs], some hundred examples, or a criterion of torch-pruning")
    if any(group.choice for group in plan.active):
        raise DNALError("choose(): the model is a supernet, and only a search compares candidates: call search()")
    with as_it_was(model):  # also where a loss runs it in place of the model that it is given
        return _weighed(plan, objective, model, gates, list(batches), loss)


def _weighed(
    plan: Plan,
    objective: Objective,
    model: nn.Module,
    gates: Sequence[ScaledSigmoidGate],
    batches: Sequence[Any],
    loss: Loss | None,
) -> dict[str, Tensor]:
    """By what removals cost; to less than HALF, that is weighed anew halfway, of the network cut that far and repaired.

    By name of a group, bool ``[channels]``: what stays.
    """
    run: Callable[[nn.Module, Any], Any] = call if loss is None else loss
    floor = list(objective.to("cpu").limits.least)

    def scores_of(network: nn.Module, groups: Sequence[ChannelGroup], gates: Sequence[Any], costs: Tensor) -> Tensor:
        losses, sizes = removal_losses(network, groups, gates, batches, loss), [group.channels for group in groups]
        return worth(losses, costs, sizes, sole_ways(network, groups, gates, batches, run))

    scores = scores_of(model, plan.active, gates, objective.whole)
    if float(objective.targets.min()) < HALF:
        halfway = copy.copy(objective)
        halfway.targets = objective.targets**0.5
        units = exact_cut(halfway, scores, floor)
        network, groups = plan.slim(model, units), groups_left(plan.groups, plan.by_group(units))
        _repaired(plan, model, network, units, batches, run)
        gates = [ScaledSigmoidGate(group.channels).to(gates[0].s.device) for group in groups]
        attach(network, groups, {group.name: gate for group, gate in zip(groups, gates)})
        scores.fill_(-1.0)  # of what has gone
        scores[units] = scores_of(network, groups, gates, objective.unit_costs(units)[units])
    return plan.by_group(cut(objective, scores, floor, lambda units: plan.cost_of(units, model)))


def _repaired(
    plan: Plan, model: nn.Module, network: nn.Module, units: Tensor, batches: Sequence[Any], run: Callable[..., Any]
) -> None:
    """Repair ``network``, cut to these units, by some of the batches, if they are of more than one example."""
    with seeded(model), torch.no_grad():
        examples = as_one(batches, EXAMPLES, lambda batch: run(model, batch))
    if examples_of(examples) > 1:
        repair(plan.slim(model, {}), network, kept_outputs(plan.groups, plan.by_group(units)), examples, run)
