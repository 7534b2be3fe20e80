"""What the tests of evaluators share: loops, snapshots, searches in a training and beside it."""

import random
from collections.abc import Callable
from typing import Any

import nni
import numpy as np
import torch
import torch.nn.functional as F
from conftest import CONV
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dnal_nni import Budget, DNALPruner
from dnal_nni.plugin.evaluators import TorchEvaluator, check_evaluator, patch_steps, ready

Batches = list[tuple[Tensor, Tensor]]


def plain_loop(
    model: Any, optimizer: Any, step: Any, scheduler: Any, max_steps: Any, max_epochs: Any, data: Any
) -> None:
    done = 0
    for _ in range(max_epochs or 1000):
        for batch in data:
            if max_steps is not None and done >= max_steps:
                return
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            done += 1


def loss_of(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module, **kwargs: Any) -> Any:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, **kwargs)


def torch_evaluator(model: nn.Module, batches: Any, optimizer: Any = None, scheduler: Any = None) -> TorchEvaluator:
    def training(*args: Any) -> None:
        plain_loop(*args, batches)

    return TorchEvaluator(training, optimizer or sgd(model), loss_of, scheduler)


def initialised(evaluator: Any, model: nn.Module) -> Any:
    check_evaluator(evaluator, model)
    evaluator._init_optimizer_helpers(model)
    check_evaluator(evaluator, model)  # as another compressor would hand it over
    return evaluator


class Snapshot:
    """Everything that must not change, in a form that compares bit for bit."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.objects = [id(t) for t in (*model.parameters(), *model.buffers())]
        self.grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
        self.flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
        self.random = random.getstate(), [str(x) for x in np.random.get_state()], torch.get_rng_state()

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert self.tensors.keys() == now.tensors.keys() and self.objects == now.objects and self.flags == now.flags
        assert all(torch.equal(t, now.tensors[n]) for n, t in self.tensors.items())
        for a, b in zip(self.grads, now.grads):
            assert (a is None) == (b is None)
            assert a is None or b is None or (a[0] == b[0] and torch.equal(a[1], b[1]))
        assert self.random[:2] == now.random[:2] and torch.equal(self.random[2], now.random[2])


class Recorder:
    """A search that checks what it sees: fresh gradients and old weights ahead of a step, new weights behind it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.old, self.expected = weight, weight.detach().clone(), torch.zeros(())
        self.steps: list[str] = []

    def expect(self, loss: Tensor, batch: Any) -> Tensor:
        (self.expected,) = torch.autograd.grad(loss, self.weight, retain_graph=True)
        return loss

    def before(self) -> None:
        assert self.weight.grad is not None and torch.allclose(self.weight.grad, self.expected, atol=1e-6)
        assert torch.equal(self.weight, self.old)
        self.steps.append("before")

    def after(self) -> None:
        assert not torch.equal(self.weight, self.old)
        self.old = self.weight.detach().clone()
        self.steps.append("after")


def other() -> nn.Module:
    return nn.Conv2d(1, 2, 3)


class Loops:
    """Training functions as users write them, over a DataLoader whose last batch is smaller."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        images, labels = torch.randn(30, 1, 8, 8, generator=generator), torch.randint(0, 10, (30,), generator=generator)
        data = torch.utils.data.TensorDataset(images, labels)
        self.loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)  # 8 batches, the last one of 2

    def plain(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        model.train()
        plain_loop(model, optimizer, step, scheduler, steps, epochs, self.loader)

    def scaler(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(epochs):
            for batch in self.loader:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step(batch, model)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()

    def closure(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        for _ in range(epochs):
            for batch in self.loader:

                def closure(batch: Any = batch) -> Tensor:
                    optimizer.zero_grad()
                    loss: Tensor = step(batch, model)
                    loss.backward()
                    return loss

                assert optimizer.step(closure).isfinite()

    def accumulate(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        for _ in range(epochs):
            for index, batch in enumerate(self.loader):
                (step(batch, model) / 3).backward()
                for parameter in model.parameters():
                    parameter.grad.clamp_(-1, 1)  # a loop that takes it for granted that there are gradients
                if index % 3 == 2 or index == len(self.loader) - 1:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)

    def evaluate(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        for _ in range(epochs):
            self.plain(model, optimizer, step, None, steps, 1)
            model.eval()
            with torch.no_grad():
                loss = sum(F.cross_entropy(model(images), labels) for images, labels in self.loader)
            scheduler.step(loss)

    def careless(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        """Forward passes in train mode, noise from all three generators, and weights that are averaged by hand."""
        for _ in range(epochs):
            for images, labels in self.loader:
                noise = random.random() + np.random.rand() + torch.rand(())
                optimizer.zero_grad()
                step((images + noise, labels), model).backward()
                optimizer.step()
                model(images)
                with torch.no_grad():
                    model.fc.weight.mul_(0.999)
            model.fc.requires_grad_(False)
            model.eval()

    def two(self, model: Any, optimizers: Any, step: Any, schedulers: Any, steps: Any, epochs: Any) -> None:
        for _ in range(epochs):
            for index, batch in enumerate(self.loader):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                step(batch, model).backward()
                optimizers[1].step()
                schedulers[0].step()
                if index % 2 == 0:
                    optimizers[0].step()
            schedulers[1].step()

    def outputs(self, model: Any, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        for _ in range(epochs):
            for images, labels in self.loader:
                out = step({"images": images, "labels": labels}, model)
                loss, logits = (out["loss"], out["logits"]) if isinstance(out, dict) else out
                assert (logits.argmax(1) == labels).sum() >= 0 and loss > 0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def outputs_of(batch: Any, model: nn.Module) -> Any:
    logits = model(batch.pop("images"))
    return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits}


def pair_of(batch: Any, model: nn.Module) -> Any:
    return tuple(outputs_of(batch, model).values())


CASES: dict[str, tuple[str, Callable[[nn.Module], Any], Callable[[Any], Any], Any, int]] = {
    "plain": ("plain", sgd, lambda o: None, loss_of, 8),
    "scheduler": ("plain", sgd, lambda o: nni.trace(lr_scheduler.OneCycleLR)(o, 0.1, total_steps=99), loss_of, 8),
    "scaler": ("scaler", sgd, lambda o: None, loss_of, 8),
    "closure": ("closure", sgd, lambda o: None, loss_of, 8),
    "lbfgs": (
        "closure",
        lambda m: nni.trace(torch.optim.LBFGS)(m.fc.parameters(), lr=0.01, max_iter=3),
        lambda o: None,
        loss_of,
        8,
    ),
    "accumulate": ("accumulate", sgd, lambda o: None, loss_of, 3),
    "evaluate": ("evaluate", sgd, lambda o: nni.trace(lr_scheduler.ReduceLROnPlateau)(o), loss_of, 8),
    "careless": ("careless", sgd, lambda o: None, loss_of, 8),
    "two": (
        "two",
        lambda m: [nni.trace(torch.optim.Adam)(m.fc.parameters()), sgd(m.stem)],
        lambda o: [nni.trace(lr_scheduler.StepLR)(o[1], 3), nni.trace(lr_scheduler.ExponentialLR)(o[0], 0.9)],
        loss_of,
        4,
    ),
    "dict": ("outputs", sgd, lambda o: None, outputs_of, 8),
    "pair": ("outputs", sgd, lambda o: None, pair_of, 8),
}


def own_loop(model: nn.Module, x: Any, loss: Callable[[Any], Tensor], batches: Any) -> list[Tensor]:
    """What a search with frozen weights finds in a loop of its own: ``s`` of every gate."""
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    with pruner.search(len(batches), progress=False) as search:
        for batch in batches:
            search.step(loss(batch))
    return [gate.s.detach().clone() for gate in pruner.gates.values()]


def searched(evaluator: Any, model: nn.Module, x: Any, steps: int, **train: int) -> list[Tensor]:
    """The same inside of the evaluator's training, whose optimizer must not move a weight."""
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    names = pruner._get_param_names_map()
    weights = [p.detach().clone() for p in model.parameters()]
    evaluator.bind_model(model, names)
    gates = {id(gate.s) for gate in pruner.gates.values()}
    try:
        with ready(evaluator), pruner.search(steps, progress=False) as search:
            evaluator.patch_loss(lambda loss, batch: search.penalised(loss))
            patch_steps(evaluator, search.before_optimizer_step, search.after_optimizer_step)
            evaluator.train(**train)
            assert search.done == steps
    finally:
        evaluator.unbind_model()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights) if id(p) not in gates)
    return [gate.s.detach().clone() for gate in pruner.gates.values()]


def assert_same_gates(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
