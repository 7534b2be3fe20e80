"""What a search and its cut have to report."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from .arguments import checked_but, shown
from .budget import Complexity
from .cost.sizes import layer_flops, tensor_bytes
from .errors import DNALError
from .modules.choices import Depth, Mixture, choices_of
from .modules.layers import mixing
from .plan import Method, Plan
from .report.interventions import Interventions
from .report.record import GroupReport, Report, versions
from .search.learner import Decides
from .search.loop import Search
from .search.ranks import from_first
from .search.settings import NOT_SELECTED, VALUES
from .surgery.slim import Keep

_reports: WeakKeyDictionary[nn.Module, Report] = WeakKeyDictionary()  # no attribute: a cut network knows nothing of us


def file_report(network: nn.Module, report: Report) -> None:
    """Let :func:`report_of` know it, as long as the network lives."""
    _reports[network] = report


@checked_but("network")
def report_of(network: nn.Module) -> Report:
    """The report of a network that ``speedup()`` or :func:`~dnal_nni.compression.compress` returned in this process.

    Raises:
        DNALError: of this very object there is none: a copy, one from a file, or one that was not cut here.
    """
    report = _reports.get(network) if isinstance(network, nn.Module) else None
    if report is None:
        raise DNALError(
            f"report_of({shown(network)}): no network that was cut in this process; a file of save_compressed keeps "
            "its report: dnal_nni.storage.reports.read_report(path)"
        )
    return report


def reported(
    plan: Plan,
    model: nn.Module,
    slim: nn.Module,
    keep: Keep,
    search: Search | None,
    seconds: Mapping[str, float],
    differences: tuple[float, float],
    method: Method,
) -> Report:
    """The report of a cut.

    Args:
        plan: of ``model``.
        model: the uncut network, gated or not.
        slim: the cut one.
        keep: what was left.
        search: the one that decided about it, or None.
        seconds: what took how long, by name.
        differences: of gated and cut network, as :func:`~dnal_nni.surgery.compare.check_equal` has them.
        method: how gates learn.
    """
    groups = []
    left = {path for path, _ in slim.named_modules()}
    for g in plan.groups:
        kept = int(keep[g.name].sum()) if g.name in keep else g.channels
        if not any(member.module in left for member in g.members):
            kept = 0  # in a candidate that is gone
        groups.append(GroupReport(g.name, g.channels, kept, g.site, len(g.members), g.frozen))
    before, searched = plan.cost.dense, search if search is not None and search.done > 0 else None
    after, counts = from_first(lambda: plan.counted(slim, model))
    report = Report(
        before=before,
        after=after,
        groups=groups,
        targets=plan.budget.fractions(before) if plan.budget is not None else {},
        decided=searched.decided() if searched is not None else None,
        max_abs_diff=differences[0],
        relative_diff=differences[1],
        seconds=dict(seconds),
        history=list(search.history) if search is not None else [],
        latency_ms=(before.latency, after.latency) if before.latency and after.latency else None,
        versions=versions(),
        file_bytes=(tensor_bytes(model), tensor_bytes(slim)),
        layer_flops=layer_flops(plan.cost.flops_of, counts),
        notes=[
            *(searched.notes() if searched is not None else []),
            *_missed(plan, after),
            *_multiples(plan),
            *sizeless(plan, searched),
        ],
        interventions=interventions(plan, model, searched, "choose" in seconds, method),
    )
    file_report(slim, report)
    return report


def interventions(plan: Plan, model: nn.Module, search: Search | None, chosen: bool, method: Method) -> Interventions:
    """The decisions behind a cut, counted from the network and from what was asked.

    Args:
        plan: of ``model``.
        model: the uncut network, gated or not.
        search: the one that decided, or None.
        chosen: whether a criterion did.
        method: how gates learn.
    """
    choices = {choice.label: choice for choice in choices_of(model).values()}
    inside = {id(part) for m in model.modules() if isinstance(m, Mixture) for part in m.modules()}
    searched = {
        "operations": sum(isinstance(choice, Mixture) for choice in choices.values()),
        "depths": sum(isinstance(choice, Depth) for choice in choices.values()),
    }
    searched["inputs"] = len(choices) - sum(searched.values())
    searched["widths"] = sum(not group.choice for group in plan.active)
    fixed = {
        "operations": sum(mixing(module) and id(module) not in inside for module in model.modules()),
        "widths": sum((group.frozen or "").startswith(NOT_SELECTED) for group in plan.groups),
    }
    if search is None and not chosen:  # harden(keep): somebody else decided
        fixed = {kind: searched.get(kind, 0) + fixed.get(kind, 0) for kind in searched}
        searched = {}
    limits = {} if plan.budget is None else plan.budget.limits
    asked = {key: {getattr(setting, key) for setting in plan.settings} - {None} for key in VALUES}
    asked["channel_multiple of layers"] = asked.pop("channel_multiple")
    given = {**limits, **{key: sorted(values, key=str) for key, values in asked.items()}, **method.settings()}
    made = Interventions(_some(searched), _some(fixed), steps=0 if search is None else search.done)
    if len(plan.tried) == 1:  # else nobody asked for it
        given["channel_multiple"] = plan.channel_multiple
    return made.with_arguments(
        given, {**dict.fromkeys(asked, []), **type(method)().settings(), "channel_multiple": 1}
    )


def _some(counts: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


def sizeless(plan: Plan, search: Search | None) -> list[str]:
    """A sentence where a search decides about the size, since nobody else does."""
    asked = plan.objective is not None or any(setting.sparse_threshold is not None for setting in plan.settings)
    if asked or search is None or isinstance(search.scores, Decides):
        return []
    return [
        f"no size was asked for, neither by a budget nor by a sparse_ratio: lambda_={search.scores.lambda_:g} alone "
        "rules how much is left; for a size of your own give budget=, for example Budget(flops=0.5)"
    ]


def _missed(plan: Plan, after: Complexity) -> list[str]:
    """A sentence where the budget was not met."""
    if plan.budget is None or plan.objective is None:
        return []
    cost = plan.objective.measured(after)
    if abs(cost / float(plan.objective.targets[0]) - 1) <= 0.01:
        whole = after.params == plan.cost.dense.params
        return ["nothing was cut: uncut, the network costs what was asked, within 1 %"] if whole else []
    return [f"the cut costs {plan.distance(cost)}: no structure was found nearer"]


def _multiples(plan: Plan) -> list[str]:
    """A sentence where nobody asked for the multiple in which channels were kept."""
    if plan.channel_multiple == 1 or len(plan.tried) == 1:
        return []
    return [
        f"channels were kept in multiples of {plan.channel_multiple}, which suit latency, GPUs and ONNX: "
        "channel_multiple=1 lets widths be what they learn to be"
    ]
