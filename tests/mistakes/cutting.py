"""Mistakes with a pruner: with what it learned, with what is cut, and with what stands beside it."""

from __future__ import annotations

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


def hardened(keep: Any) -> Any:
    return lambda stage: stage.prune().harden(keep)


def on_the_way(then: Any) -> Any:
    """A search in which ``then(pruner)`` is called behind the first step."""

    def do(stage: Stage) -> None:
        pruner = stage.prune()
        with pruner.search(3, progress=False, optimizer=sgd(stage.model)) as search:
            search.step(stage.loss())
            then(pruner)

    return do


def repaired(inputs: Any) -> Any:
    def do(stage: Stage) -> None:
        pruner = stage.searched()
        slim = pruner.speedup()
        pruner.repair(slim, inputs(stage))

    return do


CUTS: Mistakes = {
    "speedup in the search": (
        on_the_way(lambda pruner: pruner.speedup()),
        "the search is at 1 of its 3 steps: leave its `with` first",
    ),
    "harden in the search": (
        on_the_way(lambda pruner: pruner.harden({"conv1": torch.arange(8) < 3})),
        "the search is at 1 of its 3 steps: leave its `with` first",
    ),
    "speedup with an input, as NNI's": (
        lambda s: s.searched().speedup(s.x),
        "speedup: too many positional arguments; it takes none",
    ),
    "repair with a loader": (
        repaired(lambda s: [(s.x, s.y)]),
        "repair(inputs): the model rejects [(a float32 Tensor of shape [4, 1, 8, 8], an int64 Tensor of shape [4])]",
    ),
    "repair with one example": (repaired(lambda s: s.x[:1]), "repair(inputs): give two examples or more in a batch"),
    "repair swapped": (
        lambda s: (p := s.searched()).repair(s.x, p.speedup()),  # type: ignore[arg-type]
        "repair(slim=...) is a float32 Tensor of shape [4, 1, 8, 8]: give a torch.nn.Module",
    ),
    "repair with text": (repaired(lambda s: "data"), "repair(inputs): give two examples or more in a batch"),
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
    "choose without a criterion": (
        lambda s: s.prune().choose(),
        "choose(): give batches=[inputs], some hundred examples, or a criterion of torch-pruning",
    ),
    "choose with a loss of one model": (
        lambda s: s.prune(budget=Budget(flops=0.3)).choose(
            batches=[(s.x, s.y)], loss=lambda model, batch: F.cross_entropy(s.model(batch[0]), batch[1])
        ),
        "choose(loss=...): it does not run the model that it is given; write it of model and batch",
    ),
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
