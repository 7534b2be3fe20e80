"""NNI's own pruners among the methods of `peers.py`: their masks, cut by the vote of `dnal_nni.speedup`.

As in NNI's examples, every layer is asked for the same share; coupled layers vote, in place of the dependency groups
that NNI's helper finds (it hangs on some networks). Masks know no MACs: the sparse ratio is bisected, and what two
neighbouring ratios disagree about goes by weight, to the channel of the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from cuts import Job, Sample, best, gated, network
from engine import Weights
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.plugin.masks import closed_channels, decide, votes_on
from dnal_nni.search.importance import importance

LAYERS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
Batches = Iterable[tuple[Tensor, Tensor]]


def evaluator(model: nn.Module, batches: Batches, lr: float, device: str = "cpu", precision: str = "fp32") -> Any:
    """An evaluator of NNI that trains with SGD on the batches as they come."""
    import nni
    from nni.compression import TorchEvaluator

    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        model.train()
        for _, batch in zip(range(max_steps), batches):
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()

    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4 if lr else 0
    )
    return TorchEvaluator(training, optimizer, step)


def cut_nni(job: Job, state: Weights, sample: Sample | None = None) -> Tensor:
    """L1Norm, FPGM, or Taylor on ``sample``."""
    from nni.compression.pruning import FPGMPruner, L1NormPruner, TaylorPruner

    model = network(job, state)
    if sample is None:
        pruner = (L1NormPruner if job.method == "nni_l1" else FPGMPruner)(model, LAYERS)
    else:
        parts = list(zip(sample[0].split(128), sample[1].split(128)))
        pruner = TaylorPruner(model, LAYERS, evaluator(model, parts, lr=0.0), training_steps=len(parts))
    return cut_masks(job, network(job, state), pruner, compressed(pruner))


def train_slim(
    job: Job, state: Weights, batches: Batches, device: str, precision: str, steps: int
) -> tuple[Tensor, Weights]:
    """SlimPruner: the units to keep, and the trained tensors with the scaling factors in the weights."""
    from nni.compression.pruning import SlimPruner

    model = network(job, state).to(device, memory_format=torch.channels_last)
    trained = evaluator(model, batches, 0.01, device, precision)
    pruner = SlimPruner(model, LAYERS, trained, training_steps=steps)
    metrics = compressed(pruner)
    factors = {name: targets["weight"].detach() for name, targets in pruner.scaling_factors.items()}
    keep = cut_masks(job, network(job, state), pruner, metrics)
    pruner.unwrap_model()
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_submodule(name).weight.mul_(factor)
    return keep, {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def compressed(pruner: Any) -> Any:
    """Run a pruner; what it knew when it made its masks."""
    seen = []
    generate = pruner._generate_sparsity

    def remember(metrics: Any) -> Any:
        seen.append(metrics)
        return generate(metrics)

    pruner._generate_sparsity = remember
    pruner.compress()
    return seen[-1]


def cut_masks(job: Job, dense: nn.Module, pruner: Any, metrics: Any) -> Tensor:
    """The units that the masks of ``pruner`` (compressed, still wrapped) leave at the budget."""
    ours = gated(copy.deepcopy(dense), job.budget)
    assert ours.plan.objective is not None

    def kept(ratio: float) -> Tensor:
        for spaces in pruner._target_spaces.values():
            for space in spaces.values():
                if space.sparse_ratio is not None:
                    space.sparse_ratio = ratio
        pruner.update_masks(pruner._generate_sparsity(metrics))
        masks = {
            name: {target: mask.cpu() for target, mask in targets.items() if mask is not None}
            for name, targets in pruner.get_masks().items()
        }
        closed = closed_channels(dense, masks)
        return torch.cat([decide(dense, g, votes_on(g, closed), "vote") for g in ours.plan.active])

    few, many = bisect(ours, kept)
    score = 2 * few.double() + many.double()  # 3: stays in both, 1: goes between the two, 0: gone
    weight = importance(dense, ours.plan.active)
    return best(ours, score + 0.5 * weight / weight.max())


def bisect(ours: DNALPruner, kept: Callable[[float], Tensor]) -> tuple[Tensor, Tensor]:
    """The units left at two neighbouring sparse ratios: one within the budget, one above it."""
    objective = ours.plan.objective
    assert objective is not None
    low, high = 0.0, 0.98
    many, few = kept(low + 1e-6), kept(high)
    for _ in range(8):
        ratio = (low + high) / 2
        units = kept(ratio)
        if float(objective.relative(units.double())[0]) > float(objective.targets[0]):
            low, many = ratio, units
        else:
            high, few = ratio, units
    return few, many
