"""The methods of `peers.py`.

Each is a generator that yields while the device works, and returns the units to keep and what happened ("epochs" spent
ahead of the cut, and whatever else is worth recording); it may train the weights in place.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from cuts import (
    RANKS,
    Job,
    Sample,
    cut_by_score,
    cut_random,
    cut_torch_pruning,
    cut_uniform_l2,
    cut_uniform_random,
    network,
    start_scores,
    torch_pruner,
)
from engine import Training, Weights, batches, offload
from nni_cuts import cut_nni, train_slim
from torch import Tensor

from dnal_nni.search.objective import Objective
from dnal_nni.search.paper import PaperScores
from dnal_nni.search.scores import Scores

if TYPE_CHECKING:
    from peers import Bench

PAPER_LAMBDA = 1e-4
TEACHER = "+teacher"

Outcome = tuple[Tensor, dict[str, Any]]


class Run:
    """What a method gets: the trained network's tensors on the device, the data, a pool for what is not for a GPU."""

    def __init__(self, bench: Bench, job: Job) -> None:
        self.bench, self.job, self.args, self.net = bench, job, bench.args, bench.nets[job.model]
        self.train, self.test = bench.data[job.dataset]
        self.per_epoch = len(self.train.labels) // self.args.batch_size
        self.weights: Weights = {}
        self.teacher: Weights | None = None

    def load(self, state: Weights) -> None:
        device = self.net.device
        self.weights = {n: t.to(device, copy=True) for n, t in state.items()}
        for name, tensor in self.weights.items():
            if tensor.dim() == 4:
                self.weights[name] = tensor.contiguous(memory_format=torch.channels_last)

    def state(self) -> Weights:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}

    def training(self, g: Tensor, lr: list[float], phase: int, **kwargs: Any) -> Training:
        seed = self.job.seed * 10 + phase
        return Training(
            self.net, self.weights, g, self.train, self.args.batch_size, seed, lr, teacher=self.teacher, **kwargs
        )

    def elsewhere(self, function: Callable[..., Any], *args: Any) -> Generator[None, None, Any]:
        return offload(self.bench.pool, function, self.job, *args)

    def cosine(self, lr: float, epochs: int) -> list[float]:
        """A learning rate per step: 5 % linear warm-up, then a half cosine down to 0."""
        steps = epochs * self.per_epoch
        warm_up = max(1, round(0.05 * steps))
        rest = [0.5 * (1 + math.cos(math.pi * i / (steps - warm_up))) for i in range(steps - warm_up)]
        return [lr * factor for factor in [(i + 1) / warm_up for i in range(warm_up)] + rest]

    def ones(self) -> Tensor:
        return torch.ones(self.net.units, device=self.net.device)


Method = Callable[[Run], Generator[None, None, Outcome]]


def one_shot(cut: Callable[[Job, Weights], Tensor]) -> Method:
    def method(run: Run) -> Generator[None, None, Outcome]:
        return (yield from run.elsewhere(cut, run.state())), {}

    return method


def gradients(cut: Callable[[Job, Weights, Sample], Tensor]) -> Method:
    """A ranking by gradients of the loss on 10 batches."""

    def method(run: Run) -> Generator[None, None, Outcome]:
        parts = list(batches(run.net, run.train, 128, run.job.seed, 10))
        images, labels = (torch.cat(column).cpu() for column in zip(*parts))
        return (yield from run.elsewhere(cut, run.state(), (images.float(), labels))), {}

    return method


def sparse(regulariser: Callable[[Run], Callable[[Weights], None]]) -> Method:
    """Sparse learning, then the cut. torch-pruning's script gives it as many epochs as the fine-tuning, lr 0.01 with
    two steps of 0.1, and no weight decay."""

    def method(run: Run) -> Generator[None, None, Outcome]:
        epochs = run.args.epochs // 2
        steps = epochs * run.per_epoch
        lr = [0.01 if i < 0.6 * steps else 0.001 if i < 0.8 * steps else 0.0001 for i in range(steps)]
        yield from run.training(run.ones(), lr, 1, weight_decay=0.0, regularise=regulariser(run)).steps()
        accuracy = yield from run.net.accuracy(run.weights, run.ones(), run.test)
        keep = yield from run.elsewhere(cut_torch_pruning, run.state())
        return keep, {"epochs": epochs, "accuracy_search": accuracy}

    return method


def bn_scale(run: Run) -> Callable[[Weights], None]:
    """BNScalePruner.regularize with its documented strength, 1e-5: L1 on the weight of every norm."""

    def regularise(weights: Weights) -> None:
        for name in run.net.norms:
            weight = weights[f"{name}.weight"]
            assert weight.grad is not None
            weight.grad.add_(weight.sign(), alpha=1e-5)

    return regularise


def group_norm(run: Run) -> Callable[[Weights], None]:
    """GroupNormPruner.regularize with its documented strength, 5e-4, in a form without host syncs.

    Every weight of a group's channel is drawn to 0 by ``reg * 16 ** ((max - i) / (max - min))`` times itself, where i
    is the root of the channel's importance.
    """
    model = network(run.job)
    pruner = torch_pruner(model, tp.pruner.GroupNormPruner, RANKS["tp_group_norm"](), reg=5e-4)
    names = {module: name for name, module in model.named_modules()}
    groups: list[list[tuple[str, int]]] = []
    for group in pruner._groups:
        members = []
        for item in group:
            layer, function = item.dep.target.module, item.dep.handler
            if not hasattr(layer, "weight"):
                continue
            inputs = function in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            channels = layer.weight.shape[1 if inputs else 0]
            assert list(item.idxs) == list(item.root_idxs) == list(range(channels)), "channels in another order"
            members.append((f"{names[layer]}.weight", int(inputs)))
        groups.append(members)

    def regularise(weights: Weights) -> None:
        for members in groups:
            squares = []
            for name, dim in members:
                weight = weights[name]
                squares.append(weight.square().transpose(0, dim).reshape(weight.shape[dim], -1).sum(1))
            importance = torch.stack(squares).mean(0)
            root = (importance / importance.max()).sqrt()
            gamma = 16 ** ((root.max() - root) / (root.max() - root.min()))
            for name, dim in members:
                weight = weights[name]
                assert weight.grad is not None
                shape = [-1 if d == dim else 1 for d in range(weight.dim())]
                weight.grad.add_(weight * gamma.view(shape), alpha=5e-4)

    return regularise


def gate_steps(scores: Scores, steps: int) -> tuple[Tensor, Callable[[Tensor, Tensor], None], Callable[[], None]]:
    """The gates of a search ``[units]``, their step behind a backward pass, and what fixes the structure."""
    s, delta = scores.gates(0)
    g = torch.sigmoid(delta * s).float()

    def architecture(g: Tensor, step: Tensor) -> None:
        assert g.grad is not None
        scores.update(g.grad, g, step - 1)
        s, delta = scores.gates(step.clamp(max=steps - 1))
        g.copy_(torch.sigmoid(delta * s))

    @torch.no_grad()
    def settle() -> None:
        scores.settle()
        s, delta = scores.gates(scores.moving)
        g.copy_(torch.sigmoid(delta * s))

    return g, architecture, settle


def searched(
    run: Run, epochs: int, make: Callable[[Objective, Tensor, int], Scores] = Scores, frozen: bool = False
) -> Generator[None, None, Outcome]:
    """A search of some epochs; the weights learn in the same steps, in the learning-rate cycle of the fine-tuning."""
    steps = epochs * run.per_epoch
    start = yield from run.elsewhere(start_scores, run.state())
    objective = copy.deepcopy(run.bench.objectives[run.job.model, run.job.budget])
    scores = make(objective, start.to(run.net.device), steps)
    g, architecture, settle = gate_steps(scores, steps)
    lr = run.cosine(run.args.lr, run.args.epochs)[:steps]
    between = (scores.moving, settle)
    yield from run.training(g, lr, 1, architecture=architecture, frozen=frozen, between=between).steps()
    accuracy = yield from run.net.accuracy(run.weights, g, run.test)
    decided = float(((g < 0.05) | (g > 0.95)).float().mean())
    keep = yield from run.elsewhere(cut_by_score, scores.value.cpu(), scores.floor)
    return keep, {"epochs": epochs, "accuracy_search": accuracy, "decided": decided, "one_cycle": True}


def dnal(run: Run) -> Generator[None, None, Outcome]:
    """The default search."""
    return (yield from searched(run, run.args.search_epochs))


def paper_steps(scores: PaperScores) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
    """As :func:`gate_steps`, where scores learn from dL/ds."""
    g = torch.sigmoid(torch.zeros_like(scores.value)).float()

    def architecture(g: Tensor, step: Tensor) -> None:
        assert g.grad is not None
        value, delta = scores.gates(step - 1)
        s = value.clone().requires_grad_()
        with torch.enable_grad():
            loss = scores.penalised((g.grad * torch.sigmoid(delta * s)).sum(), [s])
        scores.update(*torch.autograd.grad(loss, s), g, step - 1)
        s, delta = scores.gates(step.clamp(max=scores.steps - 1))
        g.copy_(torch.sigmoid(delta * s))

    return g, architecture


def paper_search(run: Run, epochs: int, lambda_: float) -> Generator[None, None, tuple[Tensor, dict[str, Any]]]:
    """The paper's architecture phase: frozen weights, SGD on s from 0; s (float64 [units]), and what happened."""
    steps = epochs * run.per_epoch
    scores = PaperScores(run.net.units, steps, lambda_, device=run.net.device)
    g, architecture = paper_steps(scores)
    yield from run.training(g, [0.0] * steps, 1, architecture=architecture, frozen=True).steps()
    accuracy = yield from run.net.accuracy(run.weights, g, run.test)
    decided = float(((g < 0.05) | (g > 0.95)).float().mean())
    return scores.value.cpu(), {"epochs": epochs, "accuracy_search": accuracy, "decided": decided}


def dnal_paper(run: Run) -> Generator[None, None, Outcome]:
    """The paper's share of architecture epochs (10 of 80); cut to the budget by the order of s."""
    s, found = yield from paper_search(run, max(1, round(run.args.epochs / 8)), PAPER_LAMBDA)
    keep = yield from run.elsewhere(cut_by_score, s, [])
    return keep, found


def distilled(method: Method) -> Method:
    """The same, taught by the uncut network in every epoch after it, search included."""

    def with_teacher(run: Run) -> Generator[None, None, Outcome]:
        run.job = dataclasses.replace(run.job, method=run.job.method.removesuffix(TEACHER))
        run.teacher = {name: tensor.clone() for name, tensor in run.weights.items()}
        return (yield from method(run))

    return with_teacher


def nni_slim(run: Run) -> Generator[None, None, Outcome]:
    """NNI's SlimPruner for half of the epochs, with its default penalty; the scaling factors stay in the weights."""
    epochs = run.args.epochs // 2
    data = itertools.chain.from_iterable(
        batches(run.net, run.train, run.args.batch_size, 1000 * run.job.seed + epoch, run.per_epoch)
        for epoch in range(epochs)
    )
    keep, state = train_slim(run.job, run.state(), data, run.net.device, run.args.precision, epochs * run.per_epoch)
    run.load(state)
    accuracy = yield from run.net.accuracy(run.weights, run.ones(), run.test)
    return keep, {"epochs": epochs, "accuracy_search": accuracy}


METHODS: dict[str, Method] = {
    "dnal": dnal,
    "dnal_paper": dnal_paper,
    "nni_l1": one_shot(cut_nni),
    "nni_fpgm": one_shot(cut_nni),
    "nni_slim": nni_slim,
    "nni_taylor": gradients(cut_nni),
    "tp_magnitude": one_shot(cut_torch_pruning),
    "tp_bn_scale": sparse(bn_scale),
    "tp_group_norm": sparse(group_norm),
    "tp_taylor": gradients(cut_torch_pruning),
    "random": one_shot(cut_random),
    "uniform_random": one_shot(cut_uniform_random),
    "uniform_l2": one_shot(cut_uniform_l2),
    "uniform_scratch": one_shot(cut_uniform_random),  # new weights, and the epochs of the training too
}
METHODS |= {name + TEACHER: distilled(METHODS[name]) for name in ("dnal", "tp_magnitude", "tp_taylor")}
