"""What of an evaluator NNI and DNALPruner can work with, and the order of a step."""

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import nni
import nni.compression as nnic
import pytest
import torch
import torch.nn.functional as F
from evaluator_tools import (
    CASES,
    Batches,
    Loops,
    Recorder,
    assert_same_gates,
    initialised,
    loss_of,
    other,
    own_loop,
    plain_loop,
    searched,
    sgd,
    torch_evaluator,
)
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dnal_nni import DNALError
from dnal_nni.plugin.evaluators import TorchEvaluator, check_evaluator, example_input, patch_steps, ready


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
load("dnal_nni", "dnal_nni.plugin.shims", "dnal_nni.plugin.evaluators")
after = state()
assert before.keys() <= after.keys()
assert not [key for key in before if before[key] != {k: after[key].get(k) for k in before[key]}]
assert not [key for key in before if key[1] and before[key] != after[key]]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_a_search_in_a_torch_evaluator_is_a_search_in_a_loop(small: nn.Module, x: Tensor, batches: Batches) -> None:
    twin = copy.deepcopy(small)
    evaluator = initialised(torch_evaluator(small, batches), small)
    found = searched(evaluator, small, x, len(batches), max_epochs=1)
    assert_same_gates(found, own_loop(twin, x, lambda batch: loss_of(batch, twin), batches))
