"""One model and one dummy input: which channels go together, what they cost, what may go. No NNI here."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .arguments import checked_but, fits, nearest, shown
from .budget import Budget, Complexity
from .channels.dependency import Graph
from .channels.groups import ChannelGroup, Site, groups_of
from .cost.count import complexity, count
from .cost.latency import latencies
from .cost.model import CostModel
from .errors import DNALError
from .modules.given import check_model
from .modules.running import clone
from .progress import logger, phase
from .search.close import exact_cut
from .search.criteria import Criterion, check_criterion, criterion_scores, relative
from .search.importance import importance
from .search.learner import ArchOptimizer
from .search.multiples import Held, first_that_fits, multiples
from .search.objective import Limits, Objective
from .search.paper import PAPER_LR, PaperScores
from .search.paths import PathScores
from .search.ranks import check_same, from_first, is_first, world_size
from .search.scores import REACH, Scores
from .search.settings import Setting, limits, pools, select
from .surgery.inject import check_ungated
from .surgery.slim import Keep, slim_copy
from .surgery.verify import verify_and_freeze


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The channel groups of a model, what limits each of them, what they cost, and what a search is held to.

    Made by :meth:`of`, for a model without gates. A plan holds no model: it is as good for a copy, and for the model
    with gates on. Units are those of all active groups, one group after the other.

    Attributes:
        groups: every channel group; those that stay whole say why.
        settings: what was asked of each active group.
        cost: what the model costs as a function of the gates.
        budget: what the cut network may cost, or None.
        tried: the multiples of channels to try for a budget.
        limits: how many units of each active group may stay.
        objective: what a search is held to: the budget, or ratios; None: nothing but a penalty on open gates.
        channel_multiple: channels that layers keep come in multiples of this number.
        nearest: where no structure within 1 % of the budget was found, what the nearest costs of the dense one.
        dummy_input: what the costs are counted for.
        seconds: what making it took.
    """

    groups: list[ChannelGroup]
    settings: Sequence[Setting]
    cost: CostModel
    budget: Budget | None
    tried: Sequence[int]
    limits: Limits
    objective: Objective | None
    channel_multiple: int
    nearest: float | None
    dummy_input: Any
    seconds: float = 0.0

    @classmethod
    @checked_but("model", "budget", "channel_multiple", "graph")
    def of(
        cls,
        model: nn.Module,
        dummy_input: Any,
        *,
        budget: Budget | None = None,
        selected: Mapping[str, Setting] | None = None,
        channel_multiple: int | Sequence[int] | None = None,
        verify_seconds: float | None = None,
        graph: Graph = None,
    ) -> Plan:
        """Find, select and verify the groups of ``model``, and count what they cost; the model is not changed.

        In several processes, all go by what rank 0 finds.

        Args:
            model: without gates.
            dummy_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            budget: what the cut network may cost.
            selected: what may lose channels, by layer name; None: every layer.
            channel_multiple: channels are kept in multiples of this number, or whole; of several, of the first that has
                a structure of the budget. None: 1; for a budget on a GPU, and one of latency, (8, 4, 2, 1).
            verify_seconds: time limit for comparing sliced with gated copies; groups not compared by then stay whole.
                None: 60, or what 40 forward passes of both take.
            graph: where the groups come from: see :func:`~dnal_nni.channels.groups.find_groups`.

        Raises:
            DNALError: for a model, an input or limits that do not go together, or where nothing can be cut.
        """
        start = time.perf_counter()
        check_limits(budget, channel_multiple, verify_seconds)
        check_model(model)
        check_ungated(model)
        if selected is None:
            selected = dict.fromkeys((name for name, _ in model.named_modules()), Setting())
        mine = clone(model)  # a forward may write to parameters, as an embedding with max_norm does
        with phase("reading which channels go together"):
            groups = groups_of(mine if graph is None or isinstance(graph, str) else model, dummy_input, graph)
        asked = select(groups, selected, model)
        with phase("proving what can be cut"):
            _verify(mine, groups, dummy_input, verify_seconds)
        active = [group for group in groups if group.frozen is None]
        if not active:
            reasons = "; ".join(f"{g.name or type(model).__name__}: {g.frozen}" for g in groups[:5])
            reasons = reasons or "it has no convolution or linear layer"
            raise DNALError(f"nothing in the model can be pruned ({reasons})")
        timed = budget is not None and budget.latency is not None
        with phase("timing every layer" if timed else "counting every layer"):
            cost = CostModel(mine, groups, dummy_input, timed and is_first())
        if timed:
            cost.load_latency_state(from_first(cost.latency_state))
        settings = [asked[group.name] for group in active]
        tried = multiples(channel_multiple, budget, next(model.parameters()).device)
        held = _held(cost, budget, settings, tried)
        plan = cls(groups, settings, cost, budget, tried, *held, dummy_input=dummy_input)
        if plan.nearest is not None:
            logger.warning("%s lies between structures: the nearest costs %s", budget, plan.distance(plan.nearest))
        if timed:
            cost.load_latency_state(from_first(lambda: _calibrated(plan, model)))
        return dataclasses.replace(plan, seconds=time.perf_counter() - start)

    def __repr__(self) -> str:
        size = self.budget or ("ratios" if self.objective is not None else "no size asked for")
        return f"<Plan: {len(self.active)} of {len(self.groups)} channel groups can be cut; {size}>"

    @property
    def active(self) -> list[ChannelGroup]:
        """The groups that have a gate: those that are not left whole."""
        return self.cost.active

    @property
    def sizes(self) -> list[int]:
        """The number of units of each active group."""
        return self.cost.sizes

    def by_group(self, units: Tensor) -> dict[str, Tensor]:
        """``units`` (``[units]``) in parts, by the name of the group."""
        return dict(zip([group.name for group in self.active], units.split(self.sizes)))

    def slim(self, model: nn.Module, keep: Tensor | Keep) -> nn.Module:
        """A copy of ``model`` (gated or not) without the other units: a new module without gates.

        Args:
            model: the one that this plan was made of, or a copy.
            keep: bool ``[units]``; or by group name, where groups not named stay whole.
        """
        return slim_copy(model, self.groups, self.by_group(keep) if isinstance(keep, Tensor) else keep)

    def measured(self, slim: nn.Module, model: nn.Module) -> Complexity:
        """:meth:`counted`, without the count of each module."""
        return self.counted(slim, model)[0]

    def counted(self, slim: nn.Module, model: nn.Module) -> tuple[Complexity, dict[str, int]]:
        """What a cut network costs, and fvcore's count by dotted path of a module; latency where the budget limits it.

        Latencies are such that the uncut network takes what it took when it was measured first.

        Args:
            slim: the network.
            model: the uncut one, which is timed beside it.
        """
        counts = count(clone(slim), self.dummy_input)
        size = complexity(slim, counts)
        if self.cost.dense.latency is None:
            return size, counts.flops
        now, then = latencies([slim, model], self.dummy_input)
        return dataclasses.replace(size, latency=self.cost.dense.latency * now / then), counts.flops

    def cost_of(self, units: Tensor, model: nn.Module) -> Complexity:
        """What the network costs that keeps these units (bool ``[units]``) of ``model``."""
        return self.measured(self.slim(model, units), model)

    def with_budget(self, budget: Budget) -> Plan:
        """The same groups, held to another budget: nothing is read or proved again.

        Raises:
            DNALError: for what is no budget, one that cannot be met, or a latency where none was measured.
        """
        check_budget(budget)
        held = _held(self.cost, budget, self.settings, self.tried)
        return dataclasses.replace(self, budget=budget, **held._asdict())

    def distance(self, cost: float) -> str:
        """How far from the budget a cost (of the dense one) lies, and why no structure lies nearer."""
        assert self.objective is not None
        times = f"{cost / float(self.objective.targets[0]):.3g} times the budget"
        if (multiple := self.limits.asked) > 1:
            return f"{times}, since channels go by multiples of {multiple} (channel_multiple=1 comes nearer)"
        if all(group.choice for group in self.active):
            return f"{times}, since candidates alone are coarse (with widths it is met)"
        return f"{times}, since the layers that may be cut have so few channels"

    def resumed(self, latencies: Mapping[str, Any] | None, multiple: int) -> Plan:
        """The same plan with what another process measured (``cost.latency_state()``), and the multiple it took."""
        cost = copy.copy(self.cost)
        if latencies is not None:
            cost.load_latency_state(latencies)
        within = limits(self.settings, cost.active, multiple)
        objective = _objective(cost, self.budget, self.settings, within)  # in reach there, whatever is measured here
        return dataclasses.replace(self, cost=cost, limits=within, objective=objective, channel_multiple=multiple)


@dataclasses.dataclass(frozen=True)
class Method:
    """How gates learn.

    Args:
        preset: "default", or "paper" for the equations and the schedule of arXiv 2103.02126; with a budget, the
            paper's search is cut to that budget.
        lambda_: weight of the paper's regulariser ``sum sigmoid(s)``.
        arch_lr: how fast the gates learn. In the default search, how far a steady gradient of average size moves a
            score over the whole search (scores start at 1 on average); None is 0.3. In the paper's, the learning rate
            of SGD on ``s``; None is 0.01.
        importance: a criterion of torch-pruning that the scores of the default search start from, in place of the norms
            of the weights. One that needs gradients takes those that the model's parameters have.
        paths: search by whole paths, of a network of which candidates alone are searched, and let nothing but weights
            learn for this share of the steps; None: by gates.

    Raises:
        DNALError: for values that are none of these.
    """

    preset: Literal["default", "paper"] = "default"
    lambda_: float = 1e-4
    arch_lr: float | None = None
    importance: Criterion | None = None
    paths: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in ("default", "paper"):
            near = nearest(str(self.preset), ["default", "paper"])
            raise DNALError(f"preset={self.preset!r}: choose 'default' or 'paper'{near}")
        if not fits(self.lambda_, float) or not 0 <= self.lambda_ < float("inf"):
            raise DNALError(f"lambda_={self.lambda_!r}: must be a number >= 0")
        if self.arch_lr is not None and not (fits(self.arch_lr, float) and 0 <= self.arch_lr < float("inf")):
            raise DNALError(f"arch_lr={self.arch_lr!r}: must be a number >= 0, or None for the preset's own")
        if self.importance is not None:
            check_criterion(self.importance)
        if self.importance is not None and self.preset == "paper":
            raise DNALError("importance= goes with preset='default': the paper's search starts with all gates alike")

    def scores(self, model: nn.Module, plan: Plan, steps: int) -> ArchOptimizer:
        """What the gates are at each of ``steps`` steps: the paper's search, or the one held to the objective."""
        device = next(model.parameters()).device
        if self.paths is not None and plan.objective is not None:
            warmup = int(self.paths * steps)
            return PathScores(plan.objective, steps, warmup, lambda units: plan.cost_of(units, model), device)
        if self.preset == "paper" or plan.objective is None:
            if self.importance is not None:
                raise DNALError("importance= needs a budget, or a sparse_ratio in the config_list, to search for")
            lr = PAPER_LR if self.arch_lr is None else self.arch_lr
            return PaperScores(sum(plan.sizes), steps, self.lambda_, lr, plan.limits.least, device)
        reach = REACH if self.arch_lr is None else self.arch_lr
        if self.importance is None:
            start = importance(model, plan.active)
        else:
            start = relative(criterion_scores(model, plan.active, self.importance), plan.sizes)
        return Scores(plan.objective, start.to(device), steps, reach)

    def settings(self) -> dict[str, Any]:
        """Numbers and strings."""
        return vars(self) | {"importance": None if self.importance is None else type(self.importance).__name__}


def check_limits(budget: Any, channel_multiple: Any, verify_seconds: Any) -> None:
    """Raise for what is no budget, no multiple, or no time."""
    asked = channel_multiple if isinstance(channel_multiple, (list, tuple)) else [channel_multiple]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in asked)
    if channel_multiple is not None and not (asked and whole):
        raise DNALError(f"channel_multiple={shown(channel_multiple)}: must be a whole number >= 1, or several to try")
    check_budget(budget)
    number = isinstance(verify_seconds, (int, float)) and not isinstance(verify_seconds, bool)
    if verify_seconds is not None and not (number and verify_seconds > 0):
        raise DNALError(f"verify_seconds={shown(verify_seconds)}: give a number above 0")


def check_budget(budget: Any) -> None:
    """Raise for what is neither a budget nor None."""
    if budget is not None and not isinstance(budget, Budget):
        raise DNALError(f"budget={shown(budget)}: pass a Budget, for example Budget(flops=0.5)")


def _verify(model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float | None) -> None:
    """Freeze what cannot be cut exactly; all ranks go by what rank 0 finds."""
    if world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise DNALError(
            "the model has SyncBatchNorm layers, which wait for each other wherever the model runs: convert the "
            "cut network instead (nn.SyncBatchNorm.convert_sync_batchnorm(slim))"
        )
    found = [(group.name, group.channels, group.frozen) for group in groups]
    check_same("the model's channel groups", found, "make the same model on every rank")

    def compare() -> list[tuple[Site, int, str | None]]:
        verify_and_freeze(model, groups, dummy_input, seconds)
        return [(group.site, group.least, group.frozen) for group in groups]

    for group, (site, least, frozen) in zip(groups, from_first(compare)):
        group.site, group.least, group.frozen = site, least, frozen


def _held(cost: CostModel, budget: Budget | None, settings: Sequence[Setting], tried: Sequence[int]) -> Held:
    """The first multiple of channels that has a structure of this budget, and what goes with it."""

    def objective_of(multiple: int) -> tuple[Limits, Objective | None]:
        within = limits(settings, cost.active, multiple)
        objective = _objective(cost, budget, settings, within)
        if objective is not None:
            objective.check_reachable()
        return within, objective

    return first_that_fits(tried, objective_of)


def _objective(cost: CostModel, budget: Budget | None, settings: Sequence[Setting], within: Limits) -> Objective | None:
    """What a search is held to: the budget, or the settings' ratios, or nothing."""
    thresholds = any(setting.sparse_threshold is not None for setting in settings)
    ratios = any(setting.sparse_ratio is not None for setting in settings)
    if thresholds and (ratios or budget is not None):
        raise DNALError("sparse_threshold goes with neither a budget nor a sparse_ratio: a threshold sets no size")
    if budget is not None:
        if ratios:
            logger.warning("the budget rules: the sparse_ratio of config_list is not used")
        return Objective(cost, budget, within)
    if ratios:
        return Objective(cost, None, within, *pools(settings, cost.sizes, within))
    return None


def _calibrated(plan: Plan, model: nn.Module) -> dict[str, Any]:
    """Hold the latency that the layers add up to against that of a network cut to the budget."""
    assert plan.objective is not None
    units = exact_cut(plan.objective, importance(model, plan.active), plan.objective.floor())
    latency = plan.measured(plan.slim(model, units), model).latency
    assert latency is not None
    plan.cost.calibrate(units.double(), latency)
    return plan.cost.latency_state()
