"""NNI's evaluators on the installed torch, pytorch_lightning and transformers; the latter two are optional."""

import copy
import inspect
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nni
import nni.compression as nnic
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import TaylorPruner
from nni.compression.quantization import QATQuantizer
from nni.compression.utils import Evaluator, ForwardHook, TensorHook
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dnal_nni import Budget, DNALError, DNALPruner, measure
from dnal_nni.evaluators import (
    TorchEvaluator,
    TransformersEvaluator,
    check_evaluator,
    example_input,
    patch_steps,
    ready,
)
from dnal_nni.steps import steps_per_epoch

Batches = list[tuple[Tensor, Tensor]]

pytestmark = [
    # pytorch_lightning 2.6 with torch 2.14, and what it says of a tiny CPU run
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


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


# -- importing --------------------------------------------------------------------------------------------------------


def test_importing_changes_no_class_of_anyone() -> None:
    code = """
import importlib, sys
def state():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("nni", "pytorch_lightning", "transformers", "accelerate"):
            for cls in list(vars(module).values()):
                if isinstance(cls, type) and cls.__module__ == name:
                    found[name, cls.__qualname__] = {k: id(v) for k, v in vars(cls).items()}
            found[name, ""] = {k: id(v) for k, v in vars(module).items() if k != "__warningregistry__"}
    return found
def load(*names):
    for name in names:
        try: importlib.import_module(name)
        except ImportError: assert not name.startswith("dnal_nni")
load("numpy", "torch", "nni", "nni.compression", "nni.compression.base.compressor", "pytorch_lightning.loops",
     "transformers.trainer", "tqdm.auto", "schema")
before = state()
assert "dnal_nni" not in sys.modules
load("dnal_nni", "dnal_nni.shims", "dnal_nni.evaluators")
after = state()
assert before.keys() <= after.keys()
assert not [key for key in before if before[key] != {k: after[key].get(k) for k in before[key]}]
assert not [key for key in before if key[1] and before[key] != after[key]]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- NNI's TorchEvaluator, with reasons --------------------------------------------------------------------------------

BAD_ARGUMENTS: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "untraced optimizer": (
        lambda m: dict(optimizers=torch.optim.SGD(m.parameters(), 0.1)),
        r"optimizers\[0\] is an untraced SGD.*nni.trace\(torch.optim.SGD\)\(model.parameters\(\), ...\)",
    ),
    "second one untraced": (
        lambda m: dict(optimizers=[sgd(m), torch.optim.Adam(m.parameters())]),
        r"optimizers\[1\] is an untraced Adam.*nni.trace\(torch.optim.Adam\)",
    ),
    "untraced scheduler": (
        lambda m: dict(optimizers=(o := sgd(m)), lr_schedulers=lr_scheduler.StepLR(o, 1)),
        r"lr_schedulers\[0\] is an untraced StepLR.*nni.trace\(torch.optim.lr_scheduler.StepLR\)\(optimizer, ...\)",
    ),
    "parameters": (lambda m: dict(optimizers=m.parameters()), r"optimizers\[0\] is a generator: pass a Optimizer"),
    "no scheduler": (lambda m: dict(optimizers=sgd(m), lr_schedulers=0.1), r"lr_schedulers\[0\] is a float"),
    "none": (lambda m: dict(optimizers=None), r"optimizers=None: pass an optimizer"),
    "empty": (lambda m: dict(optimizers=[]), r"optimizers=\[\]: pass an optimizer"),
    "training_func": (lambda m: dict(optimizers=sgd(m), training_func=None), "training_func is a NoneType"),
    "training_step": (lambda m: dict(optimizers=sgd(m), training_step=F), "training_step is a module: pass a function"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_of_the_torch_evaluator(name: str, small: nn.Module) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(DNALError, match=message):
        TorchEvaluator(**{"training_func": plain_loop, "training_step": loss_of, **arguments(small)})


def test_the_torch_evaluator_is_nnis(small: nn.Module, x: Tensor) -> None:
    evaluator = TorchEvaluator(plain_loop, optimizers=sgd(small), training_step=loss_of, dummy_input=x)
    assert isinstance(evaluator, nnic.TorchEvaluator) and isinstance(evaluator, Evaluator)
    assert (
        inspect.signature(TorchEvaluator).parameters.keys() == inspect.signature(nnic.TorchEvaluator).parameters.keys()
    )
    assert example_input(evaluator) is x
    assert example_input(torch_evaluator(small, [])) is None


# -- what NNI accepts and should not -----------------------------------------------------------------------------------


def other() -> nn.Module:
    return nn.Conv2d(1, 2, 3)


def _group(model: nn.Module) -> Any:
    return [{"params": list(model.parameters())}]


def _used(model: nn.Module) -> Any:
    optimizer = nni.trace(torch.optim.SGD)(_group(model), lr=0.1)
    nnic.TorchEvaluator(plain_loop, optimizer, loss_of)._init_optimizer_helpers(model)
    return optimizer


BAD_OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str, bool]] = {  # whether NNI would train nothing
    "of another model": (lambda m: sgd(other()), r"optimizers\[0\] holds no parameter of the model", True),
    "second of another": (lambda m: [sgd(m), sgd(other())], r"optimizers\[1\] holds no parameter of the model", False),
    "of a stale copy": (lambda m: sgd(copy.deepcopy(m)), "holds no parameter of the model", True),
    "with names": (
        lambda m: nni.trace(torch.optim.SGD)(m.named_parameters(), lr=0.1),
        r"has named_parameters\(\), which NNI cannot rebuild: pass parameters\(\)",
        True,
    ),
    "of a loss too": (
        lambda m: nni.trace(torch.optim.SGD)([*m.parameters(), nn.Parameter(torch.ones(1))], lr=0.1),
        "holds 1 parameters that are not the model's.*NNI would not train them",
        False,
    ),
    "used before": (_used, "belongs to another evaluator already: make a new one", True),
}


@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_optimizers_that_nni_takes_silently(name: str, small: nn.Module) -> None:
    make, message, nothing = BAD_OPTIMIZERS[name]
    evaluator = nnic.TorchEvaluator(plain_loop, make(small), loss_of)
    with pytest.raises(DNALError, match=message):
        check_evaluator(evaluator, small)
    evaluator._init_optimizer_helpers(small)  # NNI has no objection
    evaluator.bind_model(small)
    assert nothing == (not any(g["params"] for o in evaluator._optimizers for g in o.param_groups))
    if nothing:  # and so when another compressor has initialised it
        with pytest.raises(DNALError, match="was not made for this model: make a new evaluator"):
            check_evaluator(evaluator, small)


def test_an_evaluator_of_another_model_is_refused_and_one_of_a_twin_taken(small: nn.Module, batches: Batches) -> None:
    evaluator = initialised(torch_evaluator(small, batches), small)
    check_evaluator(evaluator, copy.deepcopy(small))
    with pytest.raises(DNALError, match=r"its optimizers\[0\] was not made for this model: make a new evaluator"):
        check_evaluator(evaluator, other())


def _chained(optimizer: Any) -> Any:
    return nni.trace(lr_scheduler.ChainedScheduler)([lr_scheduler.StepLR(optimizer, 1)])


def _sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return nni.trace(lr_scheduler.SequentialLR)(optimizer, schedulers=parts, milestones=[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_chained, r"lr_schedulers\[0\] is a ChainedScheduler of other schedulers, which NNI cannot rebuild"),
        (_sequential, r"lr_schedulers\[0\] is a SequentialLR of other schedulers, which NNI cannot rebuild"),
        (lambda _: nni.trace(lr_scheduler.StepLR)(sgd(other()), 1), "schedules an optimizer that is not one of"),
    ],
)
def test_schedulers_that_nni_cannot_rebuild(make: Any, message: str, small: nn.Module) -> None:
    optimizer = sgd(small)
    evaluator = TorchEvaluator(plain_loop, optimizer, loss_of, make(optimizer))
    with pytest.raises(DNALError, match=message):
        check_evaluator(evaluator, small)
    with pytest.raises((KeyError, AttributeError, IndexError)):  # what NNI says: nothing that would help
        evaluator._init_optimizer_helpers(small)
        evaluator.bind_model(small)


def test_no_evaluator_and_unknown_ones(small: nn.Module) -> None:
    for thing in (3, "trainer", plain_loop, sgd(small)):
        with pytest.raises(DNALError, match=f"evaluator is a {type(thing).__name__}: pass one of NNI's"):
            check_evaluator(thing, small)
    deepspeed = object.__new__(nnic.DeepspeedTorchEvaluator)  # its package is not there
    with pytest.raises(
        DNALError, match="evaluator is a DeepspeedTorchEvaluator: DNALPruner works with NNI's TorchEval"
    ):
        check_evaluator(deepspeed, small)
    broken = nnic.TorchEvaluator(None, sgd(small), loss_of)
    with pytest.raises(DNALError, match="the evaluator's training_func is a NoneType"):
        check_evaluator(broken, small)
    with pytest.raises(DNALError, match="the evaluator has no optimizer"):
        check_evaluator(nnic.TorchEvaluator(plain_loop, [], loss_of), small)


GOOD: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {
    "positional": lambda m: (sgd(m), None),
    "keyword": lambda m: (nni.trace(torch.optim.Adam)(params=m.parameters()), None),
    "groups": lambda m: (nni.trace(torch.optim.SGD)([{"params": [p], "lr": 0.1} for p in m.parameters()]), None),
    "names in groups": lambda m: (nni.trace(torch.optim.SGD)([{"params": list(m.named_parameters())}], lr=0.1), None),
    "iterator in a group": lambda m: (nni.trace(torch.optim.SGD)([{"params": m.parameters()}], lr=0.1), None),
    "a tensor as group": lambda m: (nni.trace(torch.optim.SGD)([{"params": m.fc.weight}], lr=0.1), None),
    "one layer": lambda m: (nni.trace(torch.optim.SGD)(m.fc.parameters(), lr=0.1), None),
    "two": lambda m: ([sgd(m.fc), nni.trace(torch.optim.Adam)(m.stem.parameters())], None),
    "step": lambda m: (o := sgd(m), nni.trace(lr_scheduler.StepLR)(o, 2)),
    "lambda": lambda m: (o := sgd(m), nni.trace(lr_scheduler.LambdaLR)(optimizer=o, lr_lambda=lambda n: 0.9**n)),
    "one cycle": lambda m: (o := sgd(m), nni.trace(lr_scheduler.OneCycleLR)(o, 0.1, total_steps=50)),
    "two of both": lambda m: (
        o := [sgd(m.fc), sgd(m.stem)],
        [nni.trace(lr_scheduler.ExponentialLR)(o[1], 0.9), nni.trace(lr_scheduler.StepLR)(o[0], 1)],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_accepted_is_rebuilt_for_the_same_parameters(name: str, small: nn.Module, batches: Batches) -> None:
    optimizer, scheduler = GOOD[name](small)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    held = [{id(p) for g in o.param_groups for p in g["params"]} for o in optimizers]
    evaluator = initialised(torch_evaluator(small, batches, optimizer, scheduler), small)
    evaluator.bind_model(small)
    assert held == [{id(p) for g in o.param_groups for p in g["params"]} for o in evaluator._optimizers]


# -- counting steps ----------------------------------------------------------------------------------------------------


def test_counting_evaluators_of_one_loop(small: nn.Module, batches: Batches) -> None:
    assert steps_per_epoch(initialised(torch_evaluator(small, batches), small), small, {}) == len(batches)


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


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")  # NNI's own patch, ours does not
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_counting_changes_nothing_and_agrees_with_training(name: str, bound: bool, small: nn.Module) -> None:
    loop, make, schedule, step, expected = CASES[name]
    optimizer = make(small)
    evaluator = TorchEvaluator(getattr(Loops(), loop), optimizer, step, schedule(optimizer))
    initialised(evaluator, small)
    trained: list[int] = []
    if bound:
        evaluator.bind_model(small, {})
        evaluator.patch_loss(lambda loss, batch: trained.append(0) or loss * 1.0)
        evaluator.patch_optimizer_step([], [lambda: trained.append(1)])
        hooks = [
            ForwardHook(small.fc, "fc", lambda kept: lambda *_: kept.append(1)),
            TensorHook(small.fc.bias, "bias", lambda kept: lambda grad: kept.append(1)),
        ]
        evaluator.register_hooks(hooks)
    small.bn1.eval()  # flags that differ from module to module
    small.stem.weight.grad = torch.ones_like(small.stem.weight)
    torch.manual_seed(5)
    before, held = Snapshot(small), dict(vars(evaluator))
    assert steps_per_epoch(evaluator, small, {}) == expected
    before.assert_same(small)
    assert held.keys() == vars(evaluator).keys() and all(held[k] is vars(evaluator)[k] for k in held)
    assert not trained
    if bound:
        assert not any(o.state for o in evaluator._optimizers) and not any(hook.buffer for hook in hooks)
        evaluator.train(None, 1)
        assert trained.count(1) == expected and trained.count(0) >= expected and all(hook.buffer for hook in hooks)


def test_counting_leaves_batches_that_are_kept_in_memory(small: nn.Module, batches: Batches) -> None:
    def step(batch: Any, model: nn.Module) -> Any:
        batch["images"].add_(1)
        return outputs_of(batch, model)

    def training(model: Any, optimizer: Any, training_step: Any, *_: Any) -> None:
        for batch in kept:
            training_step(batch, model)["loss"].backward()
            optimizer.step()

    kept = [{"images": images.clone(), "labels": labels} for images, labels in batches]
    assert steps_per_epoch(initialised(TorchEvaluator(training, sgd(small), step), small), small, {}) == len(batches)
    assert all(torch.equal(batch["images"], images) for batch, (images, _) in zip(kept, batches))


def test_counting_stops_with_a_reason_and_puts_back_after_errors(small: nn.Module, batches: Batches) -> None:
    with pytest.raises(DNALError, match="made no optimizer step in one epoch: check its data"):
        steps_per_epoch(initialised(torch_evaluator(small, []), small), small, {})

    def fails(model: Any, optimizer: Any, step: Any, *_: Any) -> None:
        model.eval()
        step(batches[0], model)
        model.fc.weight.data.zero_()
        raise RuntimeError("of the user")

    evaluator = initialised(TorchEvaluator(fails, sgd(small), loss_of), small)
    before = Snapshot(small)
    with pytest.raises(RuntimeError, match="of the user"):
        steps_per_epoch(evaluator, small, {})
    before.assert_same(small)
    evaluator = torch_evaluator(small, batches)
    evaluator._ori_training_step = lambda batch, model: 0.5
    with pytest.raises(DNALError, match="training_step returns a float: NNI takes a loss, a tuple"):
        steps_per_epoch(initialised(evaluator, small), small, {})


def fused(model: nn.Module, batches: Batches) -> tuple[Any, Any]:
    """Three compressors of NNI that learn in one training: all of its ways to step in."""
    teacher = copy.deepcopy(model)
    distiller = DynamicLayerwiseDistiller(
        model,
        [{"op_names": ["fc"], "target_names": ["_output_"], "lambda": 0.1, "apply_method": "mse"}],
        torch_evaluator(model, batches),
        teacher,
        lambda batch, teacher: teacher(batch[0]),
    )
    config = [{"op_names": ["conv2"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]
    quantizer = QATQuantizer.from_compressor(distiller, config, quant_start_step=2)
    pruner = TaylorPruner.from_compressor(quantizer, [{"op_names": ["stem"], "sparse_ratio": 0.5}], training_steps=6)
    return pruner, pruner.evaluator


def test_counting_beside_compressors_of_nni_is_as_if_it_had_not_been(small: nn.Module, batches: Batches) -> None:
    results = []
    for count in (0, 1):
        torch.manual_seed(0)
        model = copy.deepcopy(small)
        pruner, evaluator = fused(model, batches)
        names = pruner._get_param_names_map()
        evaluator.bind_model(model, names)
        for compressor in pruner.fused_compressors:
            compressor._fuse_preprocess(evaluator)
        for _ in range(2):  # fresh, and with a half-trained model under wrappers that have run
            for _ in range(count):
                before = Snapshot(model)
                assert steps_per_epoch(evaluator, model, names) == len(batches)
                before.assert_same(model)
            evaluator.train(None, 1)
        for compressor in pruner.fused_compressors:
            compressor._fuse_postprocess(evaluator)
        results.append((pruner.get_masks()["stem"]["weight"], {n: t.clone() for n, t in model.state_dict().items()}))
    (mask, tensors), (counted_mask, counted) = results
    assert 0 < mask.mean() < 1 and torch.equal(mask, counted_mask)
    assert "conv2._nni_wrapper._input_0_scale" in tensors and tensors.keys() == counted.keys()
    assert all(torch.equal(t, counted[n]) for n, t in tensors.items())


# -- order of the steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "scheduler", "scaler", "closure", "two"])
def test_a_search_steps_between_backward_and_optimizer(name: str, small: nn.Module) -> None:
    loop, make, schedule, step, expected = CASES[name]
    optimizer = make(small)
    evaluator = TorchEvaluator(getattr(Loops(), loop), optimizer, step, schedule(optimizer))
    initialised(evaluator, small).bind_model(small, {})
    recorder = Recorder(small.fc.weight)
    if name != "scaler":  # whose loop clips the gradients
        evaluator.patch_loss(recorder.expect)
    else:
        recorder.before = lambda: recorder.steps.append("before")
    patch_steps(evaluator, recorder.before, recorder.after)
    with ready(evaluator):
        evaluator.train(None, 1)
    assert recorder.steps == ["before", "after"] * expected
    evaluator.unbind_model()


def test_of_many_closures_in_a_step_the_first_one_counts(small: nn.Module) -> None:
    optimizer = nni.trace(torch.optim.LBFGS)(small.fc.parameters(), lr=0.01, max_iter=3)
    evaluator = initialised(TorchEvaluator(Loops().closure, optimizer, loss_of), small)
    evaluator.bind_model(small, {})
    calls: list[str] = []
    evaluator.patch_loss(lambda loss, batch: calls.append("closure") or loss)
    patch_steps(evaluator, lambda: calls.append("before"), lambda: calls.append("after"))
    evaluator.train(None, 1)
    assert calls == ["closure", "before", "closure", "closure", "after"] * 8


def test_every_patch_of_steps_runs_in_one_step(small: nn.Module, batches: Batches) -> None:
    evaluator = initialised(torch_evaluator(small, batches[:1]), small)
    evaluator.bind_model(small, {})
    calls: list[str] = []
    evaluator.patch_optimizer_step([lambda: calls.append("nni")], [lambda: calls.append("nni")])
    patch_steps(evaluator, lambda: calls.append("dnal"), lambda: calls.append("dnal"))
    evaluator.train(None, 1)
    assert calls == ["dnal", "nni", "nni", "dnal"]
    evaluator.unbind_model()
    evaluator.bind_model(small, {})
    evaluator.train(None, 1)
    assert len(calls) == 4


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


def test_a_search_in_a_torch_evaluator_is_a_search_in_a_loop(small: nn.Module, x: Tensor, batches: Batches) -> None:
    twin = copy.deepcopy(small)
    evaluator = initialised(torch_evaluator(small, batches), small)
    found = searched(evaluator, small, x, len(batches), max_epochs=1)
    assert_same_gates(found, own_loop(twin, x, lambda batch: loss_of(batch, twin), batches))


# -- Lightning ---------------------------------------------------------------------------------------------------------

QUIET = dict(
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
    log_every_n_steps=1,
)


@pytest.fixture
def lightning() -> SimpleNamespace:
    pl = pytest.importorskip("pytorch_lightning")

    class Data(pl.LightningDataModule):
        def __init__(self, batches: Any, **loader: Any) -> None:
            super().__init__()
            self.batches, self.loader = batches, loader

        def setup(self, stage: str) -> None:
            assert stage == "fit"
            self.set = [(image, label) for images, labels in self.batches for image, label in zip(images, labels)]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.set, **{"batch_size": 8, **self.loader})

    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module, configure: Callable[[nn.Module], Any] = sgd) -> None:
            super().__init__()
            self.net, self.configure = net, configure

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_of(batch, self)

        def configure_optimizers(self) -> Any:
            return self.configure(self)

    def make(module: nn.Module, batches: Any, dummy: Any = None, loader: Any = (), **trainer: Any) -> Any:
        data = nni.trace(Data)(batches, **dict(loader))
        return nnic.LightningEvaluator(nni.trace(pl.Trainer)(**{"max_epochs": 1, **QUIET, **trainer}), data, dummy)

    return SimpleNamespace(pl=pl, Data=Data, Module=Module, evaluator=make)


def in_dict(model: nn.Module) -> Any:
    optimizer = sgd(model)
    scheduler = nni.trace(lr_scheduler.StepLR)(optimizer, 2, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def in_lists(model: nn.Module) -> Any:
    optimizer = sgd(model)
    return [optimizer], [nni.trace(lr_scheduler.ExponentialLR)(optimizer, 0.9)]


@pytest.mark.parametrize("configure", [sgd, in_dict, in_lists])
def test_lightning_trains_and_a_search_sees_fresh_gradients(
    configure: Any, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(copy.deepcopy(small), configure)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    evaluator.bind_model(module, {})
    recorder = Recorder(module.net.fc.weight)
    evaluator.patch_loss(recorder.expect)
    patch_steps(evaluator, recorder.before, recorder.after)
    with ready(evaluator):
        evaluator.train(max_steps=13)  # further than the Trainer's own max_epochs
    evaluator.unbind_model()
    assert recorder.steps == ["before", "after"] * 13
    # an independent loop
    made = configure(small)
    optimizer, scheduler = (
        (made["optimizer"], made["lr_scheduler"]["scheduler"]) if configure is in_dict else (made, None)
    )
    optimizer, scheduler = (made[0][0], made[1][0]) if configure is in_lists else (optimizer, scheduler)
    for step in range(13):
        optimizer.zero_grad()
        loss_of(batches[step % 8], small).backward()
        optimizer.step()
        if configure is in_dict or (configure is in_lists and step % 8 == 7):
            scheduler.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), small.parameters()))


def test_nnis_own_patch_sees_stale_gradients_in_lightning(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    """The reason for patch_steps: when NNI is mended, this fails and the shim can go."""
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    evaluator.bind_model(module, {})
    seen: list[bool] = []
    evaluator.patch_optimizer_step([lambda: seen.append(small.fc.weight.grad is not None)], [])
    evaluator.train(max_epochs=1)
    assert seen[0] is False


def test_lightning_shims_act_inside_of_ready_only(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches, max_steps=3, max_epochs=None), module)
    evaluator.bind_model(module, {})
    loop, kwargs = type(evaluator.trainer.fit_loop), dict(evaluator.trainer.trace_kwargs)
    original = dict(vars(loop))
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    if original["max_steps"].fset is None:
        with pytest.raises(AttributeError, match="has no setter"):  # pytorch_lightning >= 2.0
            evaluator.train(max_steps=2)
    with pytest.raises(RuntimeError, match="of the user"):
        with ready(evaluator):
            raise RuntimeError("of the user")
    assert original == dict(vars(loop)) and kwargs == evaluator.trainer.trace_kwargs
    with ready(evaluator), ready(evaluator):  # of two compressors
        evaluator.train(max_epochs=2)
        assert len(steps) == 2 * len(batches)  # not the 3 of the Trainer
        evaluator.train(max_steps=5)
    assert len(steps) == 2 * len(batches) + 5
    assert original == dict(vars(loop)) and kwargs == evaluator.trainer.trace_kwargs


@pytest.mark.parametrize(
    ("trainer", "loader", "expected"),
    [
        ({}, {}, 8),
        ({"max_steps": 3}, {}, 8),
        ({"limit_train_batches": 5}, {}, 5),
        ({"limit_train_batches": 0.5}, {}, 4),
        ({"accumulate_grad_batches": 3}, {}, 3),
        ({"accumulate_grad_batches": 3, "limit_train_batches": 7}, {"shuffle": True}, 3),
        ({"overfit_batches": 2}, {}, 2),
        ({}, {"batch_size": 7}, 10),
        ({}, {"batch_size": 7, "drop_last": True}, 9),
    ],
)
def test_lightning_counts_as_it_trains(
    trainer: Any, loader: Any, expected: int, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches, loader=loader, **trainer), module)
    before = Snapshot(module)
    assert steps_per_epoch(evaluator, module, {}) == expected
    before.assert_same(module)
    assert evaluator.data_module.trainer is None
    evaluator.bind_model(module, {})
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    with ready(evaluator):
        evaluator.train(max_epochs=2)
    assert len(steps) == 2 * expected


def test_lightning_without_a_length_asks_for_max_steps(lightning: SimpleNamespace, small: nn.Module) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.randn(1, 8, 8), 3

    class Data(lightning.Data):
        def setup(self, stage: str) -> None:
            self.set = Endless()

    module = lightning.Module(small)
    trainer = lightning.evaluator(module, []).trainer
    evaluator = initialised(nnic.LightningEvaluator(trainer, nni.trace(Data)(None)), module)
    with pytest.raises(DNALError, match="has no length: pass max_steps instead of max_epochs"):
        steps_per_epoch(evaluator, module, {})
    schedule = lightning.pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 4})
    evaluator = initialised(lightning.evaluator(module, [], callbacks=[schedule]), module)
    with pytest.raises(DNALError, match="epochs of different lengths: pass max_steps instead"):
        steps_per_epoch(evaluator, module, {})


def test_lightnings_example_input(lightning: SimpleNamespace, small: nn.Module, x: Tensor, batches: Batches) -> None:
    module = lightning.Module(small)
    assert example_input(lightning.evaluator(module, batches, x)) is x
    evaluator = lightning.evaluator(module, batches, loader={"shuffle": True})
    before = Snapshot(module)
    found = example_input(evaluator)
    before.assert_same(module)
    assert found.shape == (8, 1, 8, 8) and module(found).shape == (8, 10)
    with pytest.raises(TypeError, match="positional arguments"):
        module(*evaluator.get_dummy_input())  # NNI's: images and labels

    class Dicts(lightning.Data):
        def setup(self, stage: str) -> None:
            self.set = [{"image": x[0], "label": 0}] * 8

    assert example_input(nnic.LightningEvaluator(evaluator.trainer, nni.trace(Dicts)(None))) is None


def test_a_search_in_lightning_is_a_search_in_a_loop(
    lightning: SimpleNamespace, small: nn.Module, x: Tensor, batches: Batches
) -> None:
    twin = lightning.Module(copy.deepcopy(small))
    module = lightning.Module(small)
    evaluator = initialised(lightning.evaluator(module, batches), module)
    found = searched(evaluator, module, x, 11, max_steps=11)
    assert_same_gates(found, own_loop(twin, x, lambda batch: loss_of(batch, twin), (batches * 2)[:11]))


@pytest.mark.parametrize("duration", [{"max_epochs": 2}, {"max_steps": 19}])
def test_the_pruner_compresses_in_lightning_as_in_a_loop(
    duration: Any, lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    twin, module = lightning.Module(copy.deepcopy(small)), lightning.Module(small)
    pruner = DNALPruner(module, CONV, lightning.evaluator(module, batches), budget=Budget(flops=0.5))
    model, masks = pruner.compress(**duration)
    assert model is module and masks.keys() == {"net.stem", "net.conv1", "net.conv2", "net.last"}
    own = DNALPruner(twin, CONV, dummy_input=batches[0][0], budget=Budget(flops=0.5))
    steps = duration.get("max_steps", 16)
    with own.search(steps, optimizer=sgd(twin), progress=False) as search:
        for step in range(steps):
            search.step(loss_of(batches[step % 8], twin))
    assert_same_gates(*([gate.s for gate in each.gates.values()] for each in (pruner, own)))
    assert torch.equal(module.net.fc.weight, twin.net.fc.weight)
    assert pruner.speedup()(batches[0][0]).shape == (8, 10)


def test_nnis_taylor_pruner_runs_in_lightning(lightning: SimpleNamespace, small: nn.Module, batches: Batches) -> None:
    masks = []
    for evaluate in (False, True):
        model = copy.deepcopy(small)
        module = lightning.Module(model) if evaluate else model
        evaluator = lightning.evaluator(module, batches) if evaluate else torch_evaluator(model, batches)
        check_evaluator(evaluator, module)
        pruner = TaylorPruner(module, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, training_steps=10)
        with ready(evaluator):
            masks.append(pruner.compress()[1])
    for name, mask in masks[0].items():
        assert torch.equal(mask["weight"], masks[1][f"net.{name}"]["weight"])


def test_lightning_modules_that_nni_cannot_train(
    lightning: SimpleNamespace, small: nn.Module, batches: Batches
) -> None:
    def refused(message: str, configure: Any = sgd, **members: Any) -> None:
        module = type("Changed", (lightning.Module,), members)(small, configure)
        with pytest.raises(DNALError, match=message):
            check_evaluator(lightning.evaluator(module, batches), module)

    refused("optimizes manually.*search in your own loop", automatic_optimization=False)
    refused(r"calls training_step\(batch, batch_idx\)", training_step=lambda self, batch: loss_of(batch, self))
    refused(r"configure_optimizers\(\) returns None: NNI needs an optimizer", lambda m: None)
    refused(r"configure_optimizers\(\) returns 'sgd'", lambda m: "sgd")
    refused(r"untraced SGD.*nni.trace\(torch.optim.SGD\)", lambda m: torch.optim.SGD(m.parameters(), 0.1))
    refused("untraced StepLR", lambda m: ([o := sgd(m)], [lr_scheduler.StepLR(o, 1)]))
    refused(r"lr_schedulers\[0\] is a dict", lambda m: ([o := sgd(m)], [{"scheduler": lr_scheduler.StepLR(o, 1)}]))
    refused('"lr_scheduler": {"scheduler": ', lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": o})
    refused(r"optimizers\[0\] is a NoneType", lambda m: {"optimiser": sgd(m)})
    refused("holds no parameter of the model", lambda m: sgd(other()))
    refused(
        r"configure_optimizers\(\) fails, which NNI calls ahead of any Trainer: .*not attached",
        lambda m: sgd(m, weight_decay=m.trainer.estimated_stepping_batches),
    )
    with pytest.raises(DNALError, match=r"uses several devices.*one device.*Trainer\(devices=1\)"):
        module = lightning.Module(small)
        check_evaluator(lightning.evaluator(module, batches, devices=2, strategy="ddp_spawn"), module)
    with pytest.raises(DNALError, match="a LightningEvaluator needs a LightningModule: the model is a Small"):
        check_evaluator(lightning.evaluator(small, batches), small)


# -- transformers ------------------------------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset[Any]):
    def __init__(self, length: int = 22) -> None:
        generator = torch.Generator().manual_seed(4)
        self.images, self.length = torch.randn(length, 1, 16, 16, generator=generator), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.images[index], "labels": index % 10}


@pytest.fixture
def hf(tmp_path: Any) -> SimpleNamespace:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def model(kind: str = "ResNet") -> Any:
        torch.manual_seed(0)
        size = dict(num_channels=1, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
        extra = dict(embedding_size=8, layer_type="basic") if kind == "ResNet" else dict(num_stages=2, patch_size=2)
        config = getattr(transformers, f"{kind}Config")(**size, **extra)
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    def trainer(model: Any, optimizers: Any = (None, None), data: Any = None, also: Any = (), **arguments: Any) -> Any:
        quiet = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1)
        own = dict(per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.01)
        training = transformers.TrainingArguments(str(tmp_path), **{**quiet, **own, **arguments})
        return nni.trace(transformers.Trainer)(
            model=model, args=training, train_dataset=data or Images(), optimizers=optimizers, **dict(also)
        )

    return SimpleNamespace(library=transformers, model=model, trainer=trainer)


def scheduled(model: nn.Module) -> Any:
    optimizer = sgd(model)
    return optimizer, nni.trace(lr_scheduler.StepLR)(optimizer, 2, 0.5)


HF_OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "default": lambda m: (None, None),
    "traced": lambda m: (sgd(m), None),
    "scheduler": scheduled,
}


@pytest.mark.parametrize("kind", ["ResNet", "ConvNext"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", HF_OPTIMIZERS)
def test_transformers_trains_as_a_trainer_does(hf: SimpleNamespace, name: str, accumulate: int, kind: str) -> None:
    expected = {1: 6, 4: 2}[accumulate]
    plain, model = hf.model(kind), hf.model(kind)
    hf.trainer(plain, HF_OPTIMIZERS[name](plain), gradient_accumulation_steps=accumulate).train()
    trainer = hf.trainer(model, HF_OPTIMIZERS[name](model), gradient_accumulation_steps=accumulate)
    functions = dict(vars(hf.library.Trainer))
    evaluator = initialised(TransformersEvaluator(trainer), model)
    assert functions == dict(vars(hf.library.Trainer)) and trainer.optimizer_cls_and_kwargs is None
    before = Snapshot(model)
    assert steps_per_epoch(evaluator, model, {}) == expected
    before.assert_same(model)
    evaluator.bind_model(model, {})
    calls: list[int] = []
    evaluator.patch_loss(lambda loss, batch: loss * 1)
    evaluator.patch_optimizer_step([lambda: calls.append(0)], [lambda: calls.append(3)])
    patch_steps(evaluator, lambda: calls.append(1), lambda: calls.append(2))
    with ready(evaluator):
        evaluator.train(max_epochs=1)
    evaluator.unbind_model()
    assert calls == [1, 0, 3, 2] * expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


def test_transformers_passes_on_what_a_loss_is_divided_by_and_patches_no_evaluation(hf: SimpleNamespace) -> None:
    plain, model, patched = hf.model(), hf.model(), []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or 1)

    also = dict(compute_loss_func=loss, eval_dataset=Images(6))
    arguments = dict(gradient_accumulation_steps=4, eval_strategy="epoch", per_device_eval_batch_size=2)
    hf.trainer(plain, also=also, **arguments).train()
    evaluator = initialised(TransformersEvaluator(hf.trainer(model, also=also, **arguments)), model)
    evaluator.bind_model(model, {})
    evaluator.patch_loss(lambda loss, batch: patched.append(len(batch["pixel_values"])) or loss)
    evaluator.train(max_epochs=1)
    assert patched == [4, 4, 4, 4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


def test_a_search_in_transformers_sees_fresh_gradients(hf: SimpleNamespace) -> None:
    model = hf.model()
    trainer = hf.trainer(model, (sgd(model), None), max_steps=3, max_grad_norm=0.0)
    evaluator = initialised(TransformersEvaluator(trainer), model)
    for _ in range(2):  # no patch leaks from one run into the next
        evaluator.bind_model(model, {})
        recorder = Recorder(model.classifier[1].weight)
        evaluator.patch_loss(recorder.expect)
        patch_steps(evaluator, recorder.before, recorder.after)
        evaluator.train(max_epochs=2)  # not the 3 steps of the arguments
        assert recorder.steps == ["before", "after"] * 12
        evaluator.train(max_steps=2)
        assert recorder.steps == ["before", "after"] * 14
        arguments = evaluator.traced_trainer.args
        assert (arguments.max_steps, arguments.num_train_epochs) == (3, 1)
        evaluator.unbind_model()

    def fails(loss: Tensor, batch: Any) -> Tensor:
        raise RuntimeError("of the user")

    evaluator.bind_model(model, {})
    evaluator.patch_loss(fails)
    with pytest.raises(RuntimeError, match="of the user"):
        evaluator.train(max_epochs=2)
    assert (arguments.max_steps, arguments.num_train_epochs) == (3, 1)


def test_a_search_in_transformers_is_a_search_in_a_loop(hf: SimpleNamespace) -> None:
    model, twin, x = hf.model(), hf.model(), torch.randn(2, 1, 16, 16)
    evaluator = TransformersEvaluator(hf.trainer(model, (sgd(model), None)), dummy_input=x)
    assert example_input(initialised(evaluator, model)) is x
    seen: list[Any] = []
    evaluator.bind_model(model, {})
    evaluator.patch_loss(lambda loss, batch: seen.append({k: v.clone() for k, v in batch.items()}) or loss * 0.0)
    weights = copy.deepcopy(model.state_dict())
    evaluator.train(max_epochs=1)  # the Trainer's batches
    evaluator.unbind_model()
    model.load_state_dict(weights)
    found = searched(evaluator, model, x, 6, max_epochs=1)
    twin.train()
    assert_same_gates(found, own_loop(twin, x, lambda batch: twin(**batch).loss, seen))


def test_the_pruner_compresses_in_transformers(hf: SimpleNamespace) -> None:
    model, x = hf.model(), torch.randn(2, 1, 16, 16)
    evaluator = TransformersEvaluator(hf.trainer(model, (sgd(model), None)), dummy_input=x)
    pruner = DNALPruner(model, CONV, evaluator, budget=Budget(flops=0.5))
    pruner.compress(max_epochs=2)
    assert pruner._search is not None and pruner._search.done == pruner._search.steps == 12
    slim = pruner.speedup()
    assert measure(slim, x).flops / measure(hf.model(), x).flops == pytest.approx(0.5, rel=0.1)
    assert torch.allclose(slim.eval()(x).logits, model.eval()(x).logits, atol=1e-5)


def test_nnis_taylor_pruner_runs_in_transformers(hf: SimpleNamespace) -> None:
    model = hf.model()
    evaluator = TransformersEvaluator(hf.trainer(model))
    pruner = TaylorPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, training_steps=5)
    _, masks = pruner.compress()
    assert len(masks) > 3 and all(0 < mask["weight"].mean() < 1 for mask in masks.values())


def test_trainers_that_nni_cannot_use(hf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.model()

    def refused(message: str, trainer: Any) -> None:
        with pytest.raises(DNALError, match=message):
            check_evaluator(TransformersEvaluator(trainer), model)

    with pytest.raises(DNALError, match=r"does not run on transformers \d.*build it as dnal_nni.evaluators.Transf"):
        check_evaluator(nnic.TransformersEvaluator(hf.trainer(model)), model)
    refused("holds another model", hf.trainer(hf.model()))
    refused(r"untraced AdamW", hf.trainer(model, (torch.optim.AdamW(model.parameters()), None)))
    optimizer = sgd(model)
    refused("untraced StepLR", hf.trainer(model, (optimizer, lr_scheduler.StepLR(optimizer, 1))))
    refused("holds no parameter of the model", hf.trainer(model, (sgd(other()), None)))
    trainer = hf.trainer(model)
    trainer.args.load_best_model_at_end = True
    refused("load_best_model_at_end=True would undo the search", trainer)
    trainer = hf.trainer(model)
    trainer.model_init = hf.model
    refused("has a model_init, which would discard the gates", trainer)
    trainer = hf.trainer(model)
    trainer.is_fsdp_enabled = True
    refused("shards the model", trainer)
    trainer = hf.trainer(model)
    trainer.args._n_gpu = 2  # DataParallel, which transformers takes by itself where it finds two
    refused("uses several devices.*one device.*CUDA_VISIBLE_DEVICES=0", trainer)
    monkeypatch.setattr("dnal_nni.evaluators.version", lambda package: "4.46.3")
    refused("transformers 4.46.3 is installed: a TransformersEvaluator needs 4.57 or later", hf.trainer(model))


def test_transformers_without_a_length_asks_for_max_steps(hf: SimpleNamespace) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield Images(1)[0]

    model = hf.model()
    trainer = hf.trainer(model, data=Endless(), max_steps=4)
    evaluator = initialised(TransformersEvaluator(trainer), model)
    with pytest.raises(DNALError, match="train_dataset has no length: pass max_steps instead of max_epochs"):
        steps_per_epoch(evaluator, model, {})
    evaluator.bind_model(model, {})
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    evaluator.train(max_steps=3)
    assert len(steps) == 3
