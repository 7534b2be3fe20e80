"""What every method of `peers.py` cuts: from a trained network's tensors to the units that stay.

These run in other processes, on the CPU: each takes a job and the network's tensors, and returns the units to keep
(bool [units], all groups), in the method's own order of removal, to the channel of the budget.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import MODELS, init_weights
from engine import Weights

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.search.close import exact_cut
from dnal_nni.search.importance import importance

Sample = tuple[Tensor, Tensor]  # images float [n, 3, 32, 32], labels int64 [n]
CONV = [{"op_types": ["Conv2d"]}]


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of runs.jsonl; budget 1.0 and method "dense" is the trained network itself."""

    dataset: str
    model: str
    width: float
    budget: float
    method: str
    seed: int

    @property
    def weights(self) -> str:
        return f"{self.dataset}-{self.model}-{self.width:g}-{self.seed}.pt"


def image() -> Tensor:
    return torch.zeros(1, 3, 32, 32)


def network(job: Job, state: Weights | None = None) -> nn.Module:
    torch.manual_seed(job.seed)
    model = MODELS[job.model](10, job.width)
    if state is not None:
        model.load_state_dict(state)
    return model


def gated(model: nn.Module, budget: float, **kwargs: Any) -> DNALPruner:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return DNALPruner(model, CONV, dummy_input=image(), budget=Budget(flops=budget), **kwargs)


def best(pruner: DNALPruner, score: Tensor, floor: list[int] | None = None) -> Tensor:
    """The units with the best scores (float [units]) that the budget allows."""
    objective = pruner.plan.objective
    assert objective is not None
    return exact_cut(objective, score, floor or [1] * len(objective.sizes))


def cut_by_score(job: Job, score: Tensor, floor: list[int]) -> Tensor:
    return best(gated(network(job), job.budget), score, floor)


def start_scores(job: Job, state: Weights) -> Tensor:
    model = network(job, state)
    pruner = gated(copy.deepcopy(model), job.budget)
    return importance(model, pruner.plan.active)


def cut_random(job: Job, state: Weights) -> Tensor:
    """Random channels, over all groups."""
    pruner = gated(network(job), job.budget)
    return best(pruner, torch.rand(sum(pruner.plan.sizes), generator=torch.Generator().manual_seed(job.seed)))


def uniform_ranks(order: Tensor, sizes: list[int]) -> Tensor:
    """Scores that take the same share of every group, in the group's order of ``order`` (float [units])."""
    parts = []
    for part in order.split(sizes):
        ranks = part.argsort(descending=True).argsort().double()
        parts.append(1 - (ranks + 0.5) / len(part))
    return torch.cat(parts)


def cut_uniform_random(job: Job, state: Weights) -> Tensor:
    """The same share of every group, random channels."""
    pruner = gated(network(job), job.budget)
    order = torch.rand(sum(pruner.plan.sizes), generator=torch.Generator().manual_seed(job.seed))
    return best(pruner, uniform_ranks(order, pruner.plan.sizes))


def cut_uniform_l2(job: Job, state: Weights) -> Tensor:
    """The same share of every group, by the L2 norm of each channel over all layers of the group."""
    model = network(job, state)
    pruner = gated(copy.deepcopy(model), job.budget)
    return best(pruner, uniform_ranks(importance(model, pruner.plan.active), pruner.plan.sizes))


def removal_order(pruner: tp.BasePruner, ours: DNALPruner, budget: float) -> Tensor:
    """Float [units]: when torch-pruning's progressive pruning (its documented procedure) removes each of our units."""
    objective = ours.plan.objective
    assert objective is not None
    unit_of: dict[str, tuple[int, Tensor]] = {}
    for offset, group in zip(np.cumsum([0, *objective.sizes]).tolist(), ours.plan.active):
        for member in group.members:
            if member.side == "out" and member.dim is None:
                unit_of[member.path] = (offset, member.units[member.channels.argsort()])
    alive = {path: list(range(len(units))) for path, (_, units) in unit_of.items()}
    when = torch.full((sum(objective.sizes),), math.inf, dtype=torch.float64)
    seen = 0
    while float(objective.relative((when == math.inf).double())[0]) > 0.95 * budget:
        pruner.step()
        history = pruner.pruning_history()
        for number, (path, _, removed) in enumerate(history[seen:], start=seen):
            offset, units = unit_of[path]
            gone = [alive[path][i] for i in removed]
            alive[path] = [channel for channel in alive[path] if channel not in set(gone)]
            when[offset + units[gone]] = number
        seen = len(history)
        if pruner.current_step == pruner.iterative_steps:
            break
    return when


def torch_pruner(
    model: nn.Module, kind: type[tp.BasePruner], rank: tp.importance.Importance, **kwargs: Any
) -> tp.BasePruner:
    """As in torch-pruning's own CIFAR script: global, 400 small steps up to the wanted speed-up."""
    return kind(
        model,
        image(),
        importance=rank,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        # its defaults are shared between pruners and written to
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **kwargs,
    )


def by_torch_pruning(model: nn.Module, x: Tensor, head: nn.Module, budget: float) -> nn.Module:
    """Its own magnitude pruner and groups, global: as many of 200 steps as bring the FLOPs down to the budget."""
    pruner = tp.pruner.MagnitudePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=200,
        ignored_layers=[head],
        in_channel_groups={},  # its defaults are shared between pruners and written to
        out_channel_groups={},
        num_heads={},
    )
    aim = budget * measure(model, x).flops
    while measure(model, x).flops > aim:
        pruner.step()
    return model


RANKS: dict[str, Callable[[], tp.importance.Importance]] = {
    "tp_magnitude": lambda: tp.importance.MagnitudeImportance(p=2),
    "tp_bn_scale": tp.importance.BNScaleImportance,
    "tp_group_norm": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
    "tp_taylor": tp.importance.TaylorImportance,
}


def cut_torch_pruning(job: Job, state: Weights, sample: Sample | None = None) -> Tensor:
    """torch-pruning's ranking; an importance that needs gradients takes those of the loss on ``sample``."""
    model = network(job, state)
    ours = gated(copy.deepcopy(model), job.budget)
    pruner = torch_pruner(model, tp.pruner.MagnitudePruner, RANKS[job.method]())
    if sample is not None:
        model.eval()
        for images, labels in zip(sample[0].split(128), sample[1].split(128)):
            F.cross_entropy(model(images), labels).backward()
    return best(ours, removal_order(pruner, ours, job.budget))


def new_weights(job: Job, keep: Tensor) -> Weights:
    """Newly initialised tensors in the full shape, the kept channels as a network of the small shape starts."""
    model = network(dataclasses.replace(job, seed=job.seed + 1000))
    pruner = gated(copy.deepcopy(model), job.budget)
    init_weights(model)
    for group, part in zip(pruner.plan.active, keep.split(pruner.plan.sizes)):
        for member in group.members:
            module = model.get_submodule(member.path)
            if member.side == "out" and isinstance(module, nn.Conv2d):
                # the initialisation divides by the square root of the output channels
                module.weight.data *= math.sqrt(len(member.units) / int(part[member.units].sum()))
    return dict(model.state_dict())


def physical(job: Job, state: Weights, keep: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The smaller network, checked against the gated one, and its size."""
    pruner = gated(network(job, state), job.budget)
    pruner.harden(dict(zip(pruner.gates, keep.split(pruner.plan.sizes))))
    small = pruner.speedup()
    size = measure(small, image())
    widths = {name: m.out_channels for name, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    differs = pruner.report.relative_diff
    return small, {"flops": size.flops, "params": size.params, "relative_diff": differs, "widths": widths}
