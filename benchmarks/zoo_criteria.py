"""`choose()` beside torch-pruning's own pruner on the models of `zoo_models.py`: one criterion, one ratio of channels.

    python benchmarks/zoo_criteria.py                  # what benchmarks/results/zoo_criteria.jsonl lacks
    python benchmarks/zoo_criteria.py --only resnet18,timm_dla34 --again

Group L2 norms, 30 % of the channels of every layer; torch-pruning is told which layers to leave alone (those whose
outputs the model returns). `choose` is asked for half of the FLOPs as well. Either cut network is compared in float64,
in eval and in train mode, with the uncut one in which the same channels arrive as zeros at the layers that read them,
and layer norms run over the others. A process a model, as in `zoo.py`; one JSON line each.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from zoo import CRITERIA_RESULTS, WALL_SECONDS, run_isolated, run_many, worker
from zoo_models import MODELS, Entry
from zoo_one import EXACT, VERIFY_SECONDS, Record, count_flops, forward, plain, randomise, relative_gap, set_mode

from dnal_nni import Budget
from dnal_nni.plan import Plan
from dnal_nni.search.objective import Objective
from dnal_nni.search.settings import Setting
from dnal_nni.session import Session
from dnal_nni.surgery.verify import hard_gated_copy

RATIO, FLOPS = 0.3, 0.5
Dropped = dict[str, set[int]]  # by path: input channels of a convolution or linear layer, channels of a norm


def run_model(entry: Entry, seconds: float, report: Callable[[Record], None]) -> Record:
    """Both ways on one model, in this process."""
    record: Record = {"model": entry.name, "task": entry.task, "status": "unfinished", "phase": "build"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = entry.build()
        randomise(model, entry.inputs(2, torch.float32))
        model.to(entry.dtype)
        modes = ("eval",) if entry.task == "detection" else ("eval", "train")
        whole: list[str] = []
        for name, way in (("choose", ours), ("torch_pruning", theirs)):
            record["phase"], start = name, time.perf_counter()
            record[name] = {"status": "unfinished"}
            report(record)
            try:
                record[name] = way(copy.deepcopy(model), entry, seconds, modes, whole)
            except Exception as error:  # what it raises is the result
                record[name] = {"status": "crash", "error": plain(f"{type(error).__name__}: {error}")}
            record[name]["seconds"] = round(time.perf_counter() - start, 2)
    return record | {"status": "done", "phase": "done"}


def ours(model: nn.Module, entry: Entry, seconds: float, modes: Sequence[str], whole: list[str]) -> Record:
    """The ratio and the FLOPs by `choose`; ``whole`` gets the layers that must keep their outputs."""
    x, criterion = entry.inputs(3, entry.dtype), tp.importance.MagnitudeImportance()
    settings = dict.fromkeys((name for name, _ in model.named_modules()), Setting(sparse_ratio=RATIO))
    plan = Plan.of(model, x, selected=settings, verify_seconds=seconds)
    modules = dict(model.named_modules())
    returned = [g for g in plan.groups if "the model returns" in (g.frozen or "")]
    whole += sorted({path for group in returned for path in group.producers if path in modules})
    dense, counter = count_flops(model, x)

    def left(plan: Plan) -> tuple[float, nn.Module, nn.Module]:
        session = Session(model, plan)
        keep = session.choose(criterion)
        session.detach()
        slim = plan.slim(model, keep)
        return count_flops(slim, x)[0] / dense, slim, hard_gated_copy(model, plan.groups, keep)

    flops, slim, gated = left(plan)
    record = compared(gated, slim, entry, x, modes) | {"flops_left": round(flops, 4), "counter": counter}
    try:
        budget = Budget(flops=FLOPS)
        objective = Objective(plan.cost, budget, plan.limits)
        objective.check_reachable()
        record["half"] = round(left(dataclasses.replace(plan, budget=budget, objective=objective))[0], 4)
    except Exception as error:
        record["half_error"] = plain(str(error))
    return record


def theirs(model: nn.Module, entry: Entry, seconds: float, modes: Sequence[str], whole: list[str]) -> Record:
    """torch-pruning's pruner: a copy is cut in place, step by step; what goes is noted in original channels."""
    x = entry.inputs(3, entry.dtype)
    dense, counter = count_flops(model, x)
    slim = copy.deepcopy(model)
    paths = {module: path for path, module in slim.named_modules()}
    pruner = tp.pruner.MagnitudePruner(
        slim,
        x if len(x) > 1 else x[0],
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=RATIO,
        ignored_layers=[slim.get_submodule(path) for path in whole],
        in_channel_groups={},  # else every pruner shares one dict
        out_channel_groups={},
        forward_fn=lambda model, inputs: model(*inputs) if isinstance(inputs, tuple) else model(inputs),
    )
    left: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            module = dep.target.module
            norm = isinstance(module, nn.LayerNorm)
            reads = dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            if module in paths and (norm or reads):
                width = module.normalized_shape[-1] if norm else pruner.DG.get_in_channels(module)
                have = left.setdefault(paths[module], list(range(width)))
                gone = set(idxs)
                left[paths[module]] = [channel for i, channel in enumerate(have) if i not in gone]
        group.prune()
    slim.train(model.training)
    masked = copy.deepcopy(model)
    for path, kept in left.items():
        mask(masked.get_submodule(path), kept)
    flops = count_flops(slim, x)[0] / dense
    return compared(masked, slim, entry, x, modes) | {"flops_left": round(flops, 4), "counter": counter}


def mask(module: Any, kept: Sequence[int]) -> None:
    """Let a layer read zeros for all other channels; let a layer norm take its statistics over the kept ones."""
    if isinstance(module, nn.LayerNorm):
        module.forward = functools.partial(_normalised, module, torch.tensor(kept))
        return
    width = module.in_channels if hasattr(module, "in_channels") else module.in_features
    factor = torch.zeros(width)
    factor[list(kept)] = 1
    dims = len(module.kernel_size) if hasattr(module, "kernel_size") else 0
    module.register_forward_pre_hook(lambda _, args: (args[0] * factor.to(args[0]).view(-1, *[1] * dims),))


def _normalised(norm: nn.LayerNorm, kept: Tensor, x: Tensor) -> Tensor:
    axis = -1 if x.shape[-1] == norm.normalized_shape[-1] else 1
    y = x.movedim(axis, -1)
    part = y[..., kept]
    y = (y - part.mean(-1, keepdim=True)) / (part.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        y = y * norm.weight + (0 if norm.bias is None else norm.bias)
    return y.movedim(-1, axis)


def compared(gated: nn.Module, slim: nn.Module, entry: Entry, x: tuple[Any, ...], modes: Sequence[str]) -> Record:
    """Whether the cut network computes what the masked one does."""
    gaps = {}
    for mode in modes:
        a, b = copy.deepcopy(gated), copy.deepcopy(slim)
        set_mode(a, mode)
        set_mode(b, mode)
        gaps[mode] = relative_gap(forward(a, x, entry.heads), forward(b, x, entry.heads))
    exact = max(gaps.values()) < EXACT[entry.dtype]
    return {"status": "exact" if exact else "inexact", "relative": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also what is there for this commit")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=VERIFY_SECONDS, help="limit of the verification")
    parser.add_argument("--wall", type=float, default=2 * WALL_SECONDS, help="limit of each model")
    parser.add_argument("--out", type=Path, default=CRITERIA_RESULTS)
    parser.add_argument("--worker", metavar="NAME", help="one model in this process (used by the script itself)")
    args = parser.parse_args()
    if args.worker:
        worker(lambda report: run_model(MODELS[args.worker], args.seconds, report))
        return
    names = [name for name in args.only.split(",") if name] or list(MODELS)
    run = functools.partial(run_isolated, seconds=args.seconds, wall=args.wall, script=__file__)
    run_many((MODELS[name] for name in names), args.out, run, args.jobs, args.again)


if __name__ == "__main__":
    main()
