"""The results of `zoo.py` and `zoo_criteria.py` as a page of the documentation: docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo_models import MODELS

Record = dict[str, Any]
Records = Mapping[str, Record]  # by model

SHRUNK = 0.8
"""Largest share of the FLOPs that a network which lost a useful part has left after the 30 % cut."""
NEAR = 1.05
"""Largest share of the FLOPs that another graph's groups leave, relative to ours at the same cut, that is as good."""
HALF = (0.495, 0.505)
"""What counts as half of the FLOPs."""


def summary(records: Sequence[Record]) -> str:
    """Counts over all records."""
    status = Counter(record["status"] for record in records)
    shrunk = sum(record["status"] == "exact" and record["flops"]["left"] <= SHRUNK for record in records)
    late = sum("not verified in time" in record.get("reasons", {}) for record in records)
    rounded = sum(record["status"] == "exact" and bool(record.get("rounding")) for record in records)
    return (
        f"{len(records)} models: {', '.join(f'{n} {name}' for name, n in status.most_common())} "
        f"({sum(map(left_whole, records))} of the exact because left whole); {shrunk} exact with at most {SHRUNK:.0%} "
        f"of the FLOPs left; {late} with groups not verified in time; {rounded} of the exact differ by more than "
        "1e-9, but not by more than ten times what four units of rounding at the input do"
    )


def left_whole(record: Record) -> bool:
    """Whether nothing of a network was cut."""
    return record["status"] == "exact" and record["groups"]["gated"] == 0


def right(record: Record) -> bool:
    """Whether something was cut, exactly."""
    return record["status"] == "exact" and not left_whole(record)


def graph_summary(records: Records, by_graph: Records) -> str:
    """In how many networks torch-pruning's graph is right, beside ours."""
    both = [(records[name], by_graph[name]) for name in MODELS if name in records and name in by_graph]
    near = sum(right(b) and b["flops"]["left"] <= NEAR * a["flops"]["left"] for a, b in both if a["status"] == "exact")
    count = Counter("left whole" if left_whole(b) else b["status"] for _, b in both)
    other = [f"{n} {name}" for name, n in count.most_common() if name != "exact"]
    return (
        f'With `graph="torch-pruning"`, of {len(both)} networks: {count["exact"]} are cut and exact, {near} of them '
        f"with at most {NEAR - 1:.0%} more FLOPs left than with our graph, which cuts {sum(right(a) for a, _ in both)}"
        f"{'; ' if other else ''}{', '.join(other)}"
    )


def bar_summary(records: Records, by_graph: Records, criteria: Records) -> str:
    """On how many of the networks that torch-pruning reads right its graph is as good here, and what of the others."""
    names = [name for name in MODELS if name in records and name in by_graph and name in criteria]
    rows = [(records[n], by_graph[n], status(criteria[n].get("torch_pruning", {})) == "exact") for n in names]
    read = [(a, b) for a, b, well in rows if well]
    rest = Counter(b["status"] for _, b, well in rows if not well)
    far = [b["model"] for a, b in read if not (right(b) and b["flops"]["left"] <= NEAR * a["flops"]["left"])]
    beyond = f" (the others: {', '.join(far)})" if far else ""
    return (
        f"torch-pruning reads {len(read)} of {len(rows)} networks right: its own pruner cuts them exactly. On "
        f'{len(read) - len(far)} of these `graph="torch-pruning"` is exact with at most {NEAR - 1:.0%} more FLOPs left '
        f"than our graph leaves at the same random cut{beyond}. Of the networks that it does not read right, "
        f"{', '.join(f'{n} are {name}' for name, n in rest.most_common()) or 'none was run'}"
    )


def criteria_summary(criteria: Records) -> str:
    """In how many networks `choose` and torch-pruning's own pruner are right."""
    rows = [criteria[name] for name in MODELS if name in criteria]
    ours = [row.get("choose", {}) for row in rows]
    theirs = [row.get("torch_pruning", {}) for row in rows]
    half = sum(HALF[0] <= way["half"] <= HALF[1] for way in ours if "half" in way)
    count = Counter(status(way) for way in theirs)
    ran = [f"{n} {name}" for name, n in count.most_common() if name != "exact"]
    return (
        f"Group L2 norms, 30 % of the channels, of {len(rows)} networks: `choose` cuts "
        f"{sum(way.get('status') == 'exact' for way in ours)} exactly, and {half} to half of the FLOPs within 1 %; "
        f"torch-pruning's own pruner {count['exact']} exactly{'; ' if ran else ''}{', '.join(ran)}"
    )


def budget_summary(budgets: Records) -> str:
    """How many classifiers a search of ten steps brings to its budgets, and what is left of the others."""
    missed = [row for row in budgets.values() if row["status"] != "hit"]
    others = "; ".join(f"{row['model']}: {', '.join(map(str, row['left'].values()))}" for row in missed)
    return (
        f"`Budget(flops=0.5)` and `Budget(flops=0.3)`, after searches of ten steps, on {len(budgets)} classifiers of "
        f"torchvision and timm: both are met within 1 % of the dense FLOPs on {len(budgets) - len(missed)}"
        f"{f' ({others})' if others else ''}; `benchmarks/budgets.py`, commit {commits(budgets.values())}"
    )


def write_table(
    records: Records, by_graph: Records, criteria: Records, path: Path, budgets: Records | None = None
) -> None:
    """The results as a page of the documentation.

    Args:
        records: of our graph.
        by_graph: of torch-pruning's.
        criteria: of `choose` and torch-pruning's own pruner.
        path: of the page.
        budgets: of `budgets.py`.
    """
    rows = [records[name] for name in MODELS if name in records]
    lines = [
        "# Models",
        "",
        "Written by `python benchmarks/zoo.py --table` from `benchmarks/results/zoo.jsonl`, `zoo_graph.jsonl`, "
        "`zoo_criteria.jsonl` and `budgets.jsonl`; do not edit.",
        "",
        f"{summary(rows)}.",
        *(["", f"{graph_summary(records, by_graph)}."] if by_graph else []),
        *(["", f"{criteria_summary(criteria)}."] if criteria else []),
        *(["", f"{bar_summary(records, by_graph, criteria)}."] if by_graph and criteria else []),
        *(["", f"{budget_summary(budgets)}."] if budgets else []),
        "",
        "Random weights, norms and scales moved away from their initial values. Groups: gated / all (the classifier is "
        "always left whole). FLOPs left: at a random 30 % cut of every gated group. Difference: the largest "
        "max|gated - sliced| / max|gated| over all outputs, in float64, the worse of eval and train mode (detectors: "
        "eval, the raw outputs of their heads included; RAFT: float32). Seconds: finding, verifying, planning, gating "
        "and slicing, one thread. Cost model: how far it is from fvcore's count of the cut network, at the random cut "
        "or with one unit left of every group, whichever is worse; -: fvcore cannot count the network.",
        "",
        "torch-pruning's graph: the same with the groups of that graph; FLOPs left and seconds. `choose`, and "
        "torch-pruning's own pruner: 30 % of the channels of every layer go, those with the smallest group L2 norm; "
        "the FLOPs left, of what is exact. -: not run.",
        "",
        f"Package commit {commits(rows)}; "
        + ", ".join(f"{name} {number}" for name, number in rows[0]["versions"].items())
        + "."
        + (f" torch-pruning's graph: {commits(by_graph.values())}." if by_graph else "")
        + (f" `choose`: {commits(criteria.values())}." if criteria else ""),
    ]
    for task in dict.fromkeys(entry.task for entry in MODELS.values()):
        chosen = [record for record in rows if record["task"] == task]
        if not chosen:
            continue
        lines += [
            "",
            f"## {task.capitalize()}",
            "",
            "| model | input | groups | FLOPs left | difference | cost model | seconds | torch-pruning's graph "
            "| `choose` | torch-pruning's pruner | left whole |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for record in chosen:
            name = record["model"]
            ways = criteria.get(name, {})
            others = (graph_cell(by_graph.get(name)), way_cell(ways.get("choose")), way_cell(ways.get("torch_pruning")))
            lines.append(table_row(record, others))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def commits(records: Iterable[Record]) -> str:
    return ", ".join(sorted({record["commit"][:12] for record in records}))


def table_row(record: Record, others: Iterable[str]) -> str:
    """A line of the table; ``others``: the cells of the other ways."""
    shape, cells = "x".join(map(str, record.get("input", [])[1:])), " | ".join(others)
    if "relative" not in record:
        ended = f"{record['status']} in {record['phase']}"
        return f"| {record['model']} | {shape} | - | - | - | - | - | {cells} | {ended} |"
    groups = record["groups"]
    reasons = ", ".join(f"{name} {number}" for name, number in record["reasons"].items())
    return (
        f"| {record['model']} | {shape} | {groups['gated']}/{groups['all']} | {record['flops']['left']:.0%} "
        f"| {max(record['relative'].values()):.0e} | {cost_cell(record)} | {record['seconds']['total']:.1f} | {cells} "
        f"| {reasons} |"
    )


def cost_cell(record: Record) -> str:
    """How far the cost model is from fvcore's count, the worse of both cuts."""
    errors = record.get("cost_error")
    return "-" if errors is None else f"{max(errors.values()):.2%}"


def graph_cell(record: Record | None) -> str:
    """The outcome with torch-pruning's graph: FLOPs left and seconds, or what else became of it."""
    if record is None:
        return "-"
    if left_whole(record):
        return "left whole"
    if record["status"] != "exact":
        return str(record["status"])
    return f"{record['flops']['left']:.0%}, {record['seconds']['total']:.1f} s"


def way_cell(way: Record | None) -> str:
    """The FLOPs that a way of choosing has left, or what else became of it."""
    if way is None:
        return "-"
    return f"{way['flops_left']:.0%}" if way["status"] == "exact" else status(way)


def status(way: Record) -> str:
    """What became of one way; it was stopped where it is unfinished."""
    found = way.get("status", "unfinished")
    return "timeout" if found == "unfinished" else str(found)
