"""Mistakes with a pruner: in the search, with what it learned, and with what is cut."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dnal_nni import (
    Budget,
    measure,
    register_adapter,
    register_layer,
    register_rule,
    speedup,
)
from dnal_nni.plan import Plan
from dnal_nni.session import Session

from . import Mistakes, Net, Stage


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


def _steps_with(loss: Any, steps: int = 4, **settings: Any) -> Any:
    """A search whose step is given what ``loss(stage)`` makes."""

    def do(stage: Stage) -> None:
        pruner = stage.prune()
        with pruner.search(steps, progress=False, **settings) as search:
            for _ in range(steps):
                search.step(loss(stage))

    return do


def no_gradient(stage: Stage) -> torch.Tensor:
    with torch.no_grad():
        return stage.loss()


def backward_first(stage: Stage) -> torch.Tensor:
    loss = stage.loss()
    loss.backward()
    return loss


def learning(optimizer: Any) -> Any:
    """A search with what ``optimizer(model)`` makes."""

    def do(stage: Stage) -> None:
        stage.prune().search(4, optimizer=optimizer(stage.model), progress=False)

    return do


def step_outside(stage: Stage) -> None:
    search, loss = stage.prune().search(5, progress=False), stage.loss()
    stage.keep(stage.model)  # norm statistics have moved with the user's forward
    search.step(loss)


def step_behind(stage: Stage) -> None:
    pruner = stage.prune()
    with pruner.search(5, progress=False) as search:
        search.step(stage.loss())
    loss = stage.loss()
    stage.keep(stage.model)
    search.step(loss)


def entered_twice(stage: Stage) -> None:
    with stage.prune().search(5, progress=False) as search, search:
        pass


def two_searches(stage: Stage) -> None:
    pruner = stage.prune()
    with pruner.search(5, progress=False), pruner.search(5, progress=False):
        pass


def resumed_with_other_steps(stage: Stage) -> None:
    pruner = stage.searched()
    pruner.load_state_dict(pruner.state_dict())
    pruner.search(9, progress=False)


def replaced(name: str, layer: Any, then: Any) -> Any:
    """A layer that is replaced behind the pruner's back; then somebody goes on."""

    def do(stage: Stage) -> None:
        pruner = stage.searched()
        setattr(stage.model, name, layer())
        stage.keep(stage.model)
        then(pruner)

    return do


def deleted(stage: Stage) -> None:
    pruner = stage.searched()
    del stage.model.conv3
    stage.keep(stage.model)
    pruner.speedup()


def unwrapped(then: Any) -> Any:
    def do(stage: Stage) -> None:
        pruner = stage.searched()
        pruner.unwrap_model()
        stage.keep(stage.model)
        then(pruner)

    return do


def nan_loss(stage: Stage) -> torch.Tensor:
    return stage.loss() * float("nan")


SEARCHES: Mistakes = {
    "steps is 0": (
        lambda s: s.prune().search(0),
        "search(steps=0): must be a whole number >= 1, how many batches you will give it",
    ),
    "steps is negative": (
        lambda s: s.prune().search(-3),
        "search(steps=-3): must be a whole number >= 1, how many batches you will give it",
    ),
    "steps is a float": (
        lambda s: s.prune().search(1e3),
        "search(steps=1000.0): must be a whole number >= 1, how many batches you will give it",
    ),
    "steps is text": (
        lambda s: s.prune().search("100"),
        "search(steps='100'): must be a whole number >= 1, how many batches you will give it",
    ),
    "steps is a loader": (
        lambda s: s.prune().search([(s.x, s.y)]),
        "search(steps=[(a float32 Tensor of shape [4, 1, 8, 8], an int64 Tensor of shape [4])]): must be",
    ),
    "steps is None": (
        lambda s: s.prune().search(None),
        "search(steps=None): must be a whole number >= 1, how many batches you will give it",
    ),
    "steps is missing": (lambda s: s.prune().search(), "search: missing a required argument: 'steps'"),
    "steps is True": (
        lambda s: s.prune().search(True),
        "search(steps=True): must be a whole number >= 1, how many batches you will give it",
    ),
    "progress is text": (
        lambda s: s.prune().search(4, progress="no"),
        "search(progress=...) is 'no': give True or False",
    ),
    "misspelt argument": (
        lambda s: s.prune().search(4, optimiser=sgd(s.model)),
        "search: got an unexpected keyword argument 'optimiser'; did you mean 'optimizer'?",
    ),
    "optimizer is a number": (
        learning(lambda model: 0.01),
        "search(optimizer=...) is 0.01: give a torch.optim.Optimizer or None",
    ),
    "optimizer is a class": (
        learning(lambda model: torch.optim.SGD),
        "search(optimizer=...) is the class SGD: give a torch.optim.Optimizer or None; this is the",
    ),
    "optimizer is a function": (
        learning(lambda model: sgd),
        "search(optimizer=...) is the function sgd: give a torch.optim.Optimizer or None",
    ),
    "optimizer is a name": (
        learning(lambda model: "sgd"),
        "search(optimizer=...) is 'sgd': give a torch.optim.Optimizer or None",
    ),
    "optimizer is a schedule": (
        learning(lambda m: torch.optim.lr_scheduler.ConstantLR(sgd(m))),
        "search(optimizer=...) is a ConstantLR: give a torch.optim.Optimizer or None",
    ),
    "optimizer is a list": (
        learning(lambda model: [sgd(model)]),
        "search(optimizer=...) is [a SGD]: give a torch.optim.Optimizer or None",
    ),
    "optimizer of another model": (
        learning(lambda model: sgd(Net())),
        "search(optimizer=...): this SGD holds no parameter of the model",
    ),
    "optimizer is LBFGS": (
        learning(lambda model: torch.optim.LBFGS(model.parameters())),
        "search(optimizer=...): LBFGS runs the model itself, in a closure, and a search makes one step",
    ),
    "optimizer is the model": (
        learning(lambda model: model),
        "search(optimizer=...) is a Net: give a torch.optim.Optimizer or None",
    ),
    "loss is a number": (
        _steps_with(lambda s: s.loss().item()),
        "step(loss) at search step 0: the loss is 2.27616024017334: give the loss of a batch as a",
    ),
    "loss is None": (
        _steps_with(lambda s: None),
        "step(loss) at search step 0: the loss is None: give the loss of a batch as a tensor, for",
    ),
    "loss is a tuple": (
        _steps_with(lambda s: (s.loss(), s.model(s.x))),
        "step(loss) at search step 0: the loss is (a float32 Tensor of shape [], a float32 Tensor of",
    ),
    "loss is a dict": (
        _steps_with(lambda s: {"loss": s.loss()}),
        "step(loss) at search step 0: the loss is {'loss': a float32 Tensor of shape []}: give the loss",
    ),
    "loss is the criterion": (
        _steps_with(lambda s: nn.CrossEntropyLoss()),
        "step(loss) at search step 0: the loss is a CrossEntropyLoss: give the loss of a batch as a",
    ),
    "loss of every example": (
        _steps_with(lambda s: F.cross_entropy(s.model(s.x), s.y, reduction="none")),
        "step(loss) at search step 0: the loss has shape [4]: make one number of it, loss.mean()",
    ),
    "loss is the scores": (
        _steps_with(lambda s: s.model(s.x)),
        "step(loss) at search step 0: the loss has shape [4, 10]: make one number of it, loss.mean()",
    ),
    "loss is empty": (
        _steps_with(lambda s: s.model(s.x)[:0].sum(1)),
        "step(loss) at search step 0: the loss is empty, of shape [0]: is there an example in the batch?",
    ),
    "loss is detached": (
        _steps_with(lambda s: s.loss().detach()),
        "step(loss) at search step 0: the loss has no gradient: it was detached, or computed under",
    ),
    "loss without gradients": (
        _steps_with(no_gradient),
        "step(loss) at search step 0: the loss has no gradient: it was detached, or computed under",
    ),
    "loss of whole numbers": (
        _steps_with(lambda s: (s.model(s.x).argmax(1) != s.y).sum()),
        "step(loss) at search step 0: the loss has no gradient: it was detached, or computed under",
    ),
    "loss is nan": (
        _steps_with(nan_loss),
        "the loss is nan or infinite at search step 0: lower the learning rate, check the data, or use",
    ),
    "loss is infinite": (
        _steps_with(lambda s: s.loss() / 0),
        "the loss is nan or infinite at search step 0: lower the learning rate, check the data, or use",
    ),
    "loss of a copy": (
        _steps_with(lambda s: F.cross_entropy(copy.deepcopy(s.model)(s.x), s.y)),
        "in 3 steps no gradient has reached a gate, so nothing can be learned: the loss must be of this",
    ),
    "loss of another model": (
        _steps_with(lambda s: F.cross_entropy(Net()(s.x), s.y)),
        "in 3 steps no gradient has reached a gate, so nothing can be learned: the loss must be of this",
    ),
    "backward ahead of step": (
        _steps_with(backward_first),
        "step(loss) makes the backward pass itself: leave out loss.backward(), or make loss anew from",
    ),
    "step without a loss": (
        lambda s: s.prune().search(2, progress=False).step(),
        "step: missing a required argument: 'loss'",
    ),
    "step outside of the search": (
        step_outside,
        "step(loss) outside of the search: it has not begun; call it inside of `with",
    ),
    "step behind the search": (
        step_behind,
        "step(loss) outside of the search: it has ended after 1 of its 5 steps; call it inside of `with",
    ),
    "entered twice": (entered_twice, "this search is under way already: enter it once"),
    "two searches at once": (
        two_searches,
        "a search of this model is under way: leave its `with` ahead of another one",
    ),
    "search behind unwrap_model": (
        unwrapped(lambda p: p.search(4)),
        "the gates were taken off with unwrap_model(): call wrap_model() ahead of a search",
    ),
    "speedup behind unwrap_model": (
        unwrapped(lambda p: p.speedup()),
        "speedup: unwrap_model() has taken the gates off and put the dense weights back: call speedup()",
    ),
    "speedup ahead of a search": (
        lambda s: s.prune().speedup(),
        "nothing has been learned yet: run search() or compress() first, or pass keep=",
    ),
    "report ahead of speedup": (lambda s: s.searched().report, "there is no report yet: call speedup() first"),
    "compress without an evaluator": (
        lambda s: s.prune().compress(max_epochs=1),
        "compress() needs an evaluator: DNALPruner(model, config_list, evaluator), or use search()",
    ),
    "steps and epochs": (
        lambda s: s.prune().compress(5, 1),
        "compress() needs an evaluator: DNALPruner(model, config_list, evaluator), or use search()",
    ),
    "epochs as text": (
        lambda s: s.prune().compress(max_epochs="3"),
        "compress(max_epochs=...) is '3': give a whole number or None",
    ),
    "resumed with other steps": (
        resumed_with_other_steps,
        "search(steps=9): the search to be resumed was planned for 2",
    ),
    "replaced by a smaller layer": (
        replaced("conv2", lambda: nn.Conv2d(8, 6, 3), lambda p: p.speedup()),
        "conv2 is no longer the layer that it was when the pruner was made (in 8, out 12 channels then",
    ),
    "replaced by a layer of that size": (
        replaced("conv2", lambda: nn.Conv2d(8, 12, 3, padding=1), lambda p: p.speedup()),
        "conv2 is no longer the layer that it was when the pruner was made: change the model first, then",
    ),
    "replaced by another norm": (
        replaced("bn1", lambda: nn.GroupNorm(2, 8), lambda p: p.harden()),
        "bn1 is no longer the layer that it was when the pruner was made: change the model first, then",
    ),
    "replaced by nothing": (
        replaced("bn1", nn.Identity, lambda p: p.search(3)),
        "bn1 is no longer the layer that it was when the pruner was made (both 8 channels then, none",
    ),
    "deleted": (
        deleted,
        "conv3 is no longer the layer that it was when the pruner was made (in 12, out 12 channels then",
    ),
}


def hardened(keep: Any) -> Any:
    return lambda stage: stage.prune().harden(keep)


CUTS: Mistakes = {
    "harden is given a list": (
        hardened([True] * 8),
        "harden(keep=...) is [True, True, True, True, ...]: give a dict or None",
    ),
    "harden is given a tensor": (
        hardened(torch.ones(8, dtype=torch.bool)),
        "harden(keep=...) is a bool Tensor of shape [8]: give a dict or None",
    ),
    "harden of a name that is none": (
        hardened({"conv9": torch.arange(8) < 3}),
        "harden(keep): there is no gate 'conv9'; did you mean 'conv2'?",
    ),
    "harden of a layer without a gate": (
        hardened({"fc": torch.arange(10) < 3}),
        "harden(keep): there is no gate 'fc'; the names are the keys of pruner.gates",
    ),
    "harden with a list of bools": (
        hardened({"conv1": [True] * 8}),
        "harden(keep): conv1 needs a bool tensor of shape [8], and is given [True, True, True, True, ...]",
    ),
    "harden with another length": (
        hardened({"conv1": torch.arange(16) < 3}),
        "harden(keep): conv1 needs a bool tensor of shape [8], and is given a bool Tensor of shape [16]",
    ),
    "harden with indices": (
        hardened({"conv1": torch.tensor([0, 1])}),
        "harden(keep): conv1 needs a bool tensor of shape [8], and is given an int64 Tensor of shape [2]",
    ),
    "harden with zeros and ones": (
        hardened({"conv1": torch.ones(8)}),
        "harden(keep): conv1 needs a bool tensor of shape [8], and is given a float32 Tensor of shape [8]",
    ),
    "harden with nothing left": (
        hardened({"conv1": torch.zeros(8, dtype=torch.bool)}),
        "harden(keep): conv1 would lose every channel; keep at least one",
    ),
    "harden with masks of NNI": (
        hardened({"conv1": {"weight": torch.ones(8, 1, 3, 3)}}),
        "harden(keep): conv1 needs a bool tensor of shape [8], and is given {'weight': a float32 Tensor",
    ),
    "harden ahead of a search": (
        hardened(None),
        "nothing has been learned yet: run search() or compress() first, or pass keep=",
    ),
    "choose without a criterion": (lambda s: s.prune().choose(), "choose: missing a required argument: 'importance'"),
    "choose by name": (lambda s: s.prune().choose("l1"), "choose(importance=...) is 'l1': give a function"),
    "choose without a budget": (
        lambda s: s.prune(budget=None).choose(lambda group: torch.ones(8)),
        "choose() needs a budget, or a sparse_ratio in the config_list, to cut to",
    ),
    "a criterion that gives one number": (
        lambda s: s.prune().choose(lambda group: torch.tensor(1.0)),
        "<lambda> must give conv1 a tensor of 8 scores, one a channel, not []",
    ),
    "a criterion that gives nan": (
        lambda s: s.prune().choose(lambda g: torch.full((len(g[0].idxs),), torch.nan)),
        "<lambda> gives conv1 a score that is nan or infinite: a criterion of gradients or activations",
    ),
    "a criterion that fails": (
        lambda s: s.prune().choose(lambda group: group.nothing),
        "<lambda> fails on conv1 ('Group' object has no attribute 'nothing'): a criterion of gradients",
    ),
    "a criterion that gives nothing": (
        lambda s: s.prune().choose(lambda group: None),
        "<lambda> gives no score for any group: it looks at layers that the model has none of",
    ),
    "no batch for a criterion": (
        lambda s: s.prune().choose(lambda g: torch.ones(len(g[0].idxs)), []),
        "batches is empty: give at least one, or None",
    ),
    "carry_optimizer ahead of the cut": (
        lambda s: s.prune().carry_optimizer(sgd(s.model), s.model),
        "carry_optimizer: nothing has been cut yet: call speedup() first",
    ),
    "carry_optimizer swapped": (
        lambda s: carried(s, lambda p, slim: p.carry_optimizer(slim, sgd(s.model))),
        "carry_optimizer(optimizer=...) is a Net: give a torch.optim.Optimizer; are optimizer and slim",
    ),
    "carry_optimizer of another model": (
        lambda s: carried(s, lambda p, slim: p.carry_optimizer(sgd(Net()), slim)),
        "carry_optimizer: this optimizer holds a parameter that is not the model's",
    ),
    "carry_optimizer without the network": (
        lambda s: carried(s, lambda p, slim: p.carry_optimizer(sgd(s.model))),
        "carry_optimizer: missing a required argument: 'slim'",
    ),
    "carry_optimizer to the class": (
        lambda s: carried(s, lambda p, slim: p.carry_optimizer(torch.optim.SGD, slim)),
        "carry_optimizer(optimizer=...) is the class SGD: give a torch.optim.Optimizer; this is the",
    ),
    "carry_optimizer to another network": (
        lambda s: carried(s, lambda p, slim: p.carry_optimizer(sgd(s.model), nn.Linear(2, 2))),
        "carry_optimizer: slim is not what the last speedup() returned: its conv1.weight is not there",
    ),
    "masks are None": (
        lambda s: speedup(s.model, None, s.x),
        "masks=None: give what an NNI pruner's compress() returns, {layer: {'weight': mask}}",
    ),
    "masks are a list": (
        lambda s: speedup(s.model, [1], s.x),
        "masks=[1]: give what an NNI pruner's compress() returns, {layer: {'weight': mask}}",
    ),
    "masks are empty": (
        lambda s: speedup(s.model, {}, s.x),
        "the masks close no whole channel: single weights (LevelPruner, or a granularity below",
    ),
    "masks of a layer that is none": (
        lambda s: speedup(s.model, {"conv9": {"weight": torch.ones(1)}}, s.x),
        "masks: the model has no layer 'conv9'",
    ),
    "masks of another shape": (
        lambda s: speedup(s.model, {"conv1": {"weight": torch.ones(4, 1, 3, 3)}}, s.x),
        "masks['conv1']['weight'] has shape (4, 1, 3, 3), the layer's (8, 1, 3, 3): these are masks of",
    ),
    "masks of scores": (
        lambda s: speedup(s.model, {"conv1": {"weight": torch.rand(8, 1, 3, 3)}}, s.x),
        "masks['conv1']['weight'] must be a tensor of zeros and ones",
    ),
    "masks that close nothing": (
        lambda s: speedup(s.model, {"conv1": {"weight": torch.ones(8, 1, 3, 3)}}, s.x),
        "the masks close no whole channel: single weights (LevelPruner, or a granularity below",
    ),
    "masks and dummy input swapped": (
        lambda s: speedup(s.model, s.x, {"conv1": {"weight": torch.ones(8, 1, 3, 3)}}),
        "masks=a float32 Tensor of shape [4, 1, 8, 8]: give what an NNI pruner's compress() returns",
    ),
    "conflicts misspelt": (
        lambda s: speedup(s.model, {}, s.x, conflicts="votes"),
        "conflicts='votes': choose 'vote', 'union' or 'intersection'",
    ),
    "update_masks of another model": (
        lambda s: s.prune().update_masks({"layer1": {"weight": torch.ones(3)}}),
        "masks: the model has no layer 'layer1'",
    ),
    "update_masks with a list": (
        lambda s: s.prune().update_masks([]),
        "masks=[]: give what an NNI pruner's compress() returns, {layer: {'weight': mask}}",
    ),
    "state of something else": (
        lambda s: s.prune().load_state_dict({"a": 1}),
        "load_state_dict: this is not what pruner.state_dict() returned",
    ),
    "state of the model": (
        lambda s: s.prune().load_state_dict(s.model.state_dict()),
        "load_state_dict: this is not what pruner.state_dict() returned",
    ),
    "state of another budget": (
        lambda s: state_of_another_budget(s),
        "load_state_dict: the search ran with budget={'flops': 0.7}, here it is {'flops': 0.5}: make the",
    ),
    "state is None": (
        lambda s: s.prune().load_state_dict(None),
        "load_state_dict: this is not what pruner.state_dict() returned",
    ),
    "measure of a path": (
        lambda s: measure("model.pt", s.x),
        "measure(model=...) is 'model.pt': give a torch.nn.Module",
    ),
    "measure swapped": (
        lambda s: measure(s.x, s.model),
        "measure(model=...) is a float32 Tensor of shape [4, 1, 8, 8]: give a torch.nn.Module",
    ),
    "measure without an input": (lambda s: measure(s.model), "measure: missing a required argument: 'dummy_input'"),
    "measure on another shape": (
        lambda s: measure(s.model, torch.randn(1, 3, 8, 8)),
        "the model rejects the dummy_input of shape (1, 3, 8, 8), float32, on cpu",
    ),
    "measure on a shape": (
        lambda s: measure(s.model, (1, 1, 8, 8)),
        "the dummy_input is (1, 1, 8, 8), and has no tensor in it: give what your model takes, such as",
    ),
    "a session of no plan": (lambda s: Session(s.model, None), "Session(plan=...) is None: give a Plan"),
    "a session of another model's plan": (
        lambda s: Session(nn.Linear(2, 2), Plan.of(s.model, s.x)),
        "the plan is of another model, with a layer conv1: make one of this, Plan.of()",
    ),
    "a plan of a path": (lambda s: Plan.of("model.pt", s.x), "model must be a torch.nn.Module, and is 'model.pt'"),
    "a plan that selects a list": (
        lambda s: Plan.of(s.model, s.x, selected=["conv1"]),
        "Plan.of(selected=...) is ['conv1']: give a dict or None",
    ),
    "register_layer of an object": (
        lambda s: register_layer(nn.Conv2d(1, 8, 3)),
        "register_layer(Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))): pass a subclass of",
    ),
    "register_layer without sizes": (
        lambda s: register_layer(nn.Linear, {"weight": {"out": 0}}),
        "register_layer(Linear): sizes needs one attribute that counts 'out', as {'channels': 'out'}",
    ),
    "register_adapter of objects": (
        lambda s: register_adapter(s.model, s.model),
        "register_adapter(original=...) is a Net: give a type",
    ),
    "register_adapter of strangers": (
        lambda s: register_adapter(nn.Conv2d, nn.Linear),
        "register_adapter: Linear must be a subclass of Conv2d",
    ),
    "register_rule of an unknown operation": (
        lambda s: register_rule("mine::op", lambda flow, operation: None),
        "register_rule: torch knows no operation 'mine::op': give its name as namespace::name, after the",
    ),
    "register_rule swapped": (
        lambda s: register_rule(lambda flow, operation: None, "aten::add"),
        "register_rule(operation=...) is the function <lambda>: give a string",
    ),
}


def carried(stage: Stage, then: Any) -> None:
    pruner = stage.prune()
    pruner.harden({"conv1": torch.arange(8) < 3})
    slim = pruner.speedup()
    stage.keep(stage.model)
    then(pruner, slim)


def state_of_another_budget(stage: Stage) -> None:
    other = Stage().prune(budget=Budget(flops=0.7))
    stage.prune().load_state_dict(other.state_dict())
