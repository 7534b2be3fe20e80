"""Mistakes with a pruner: in the search."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dnal_nni import Budget, DNALPruner

from . import CONV, Mistakes, Net, Stage


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


def stepped_twice(stage: Stage) -> None:
    pruner, optimizer = stage.prune(), sgd(stage.model)
    with pruner.search(4, optimizer=optimizer, progress=False) as search:
        for _ in range(4):
            search.step(stage.loss())
            optimizer.step()


def resumed_in_the_search(stage: Stage) -> None:
    pruner = stage.prune()
    pruner.save_checkpoint("search.safetensors")
    with pruner.search(3, progress=False) as search:
        search.step(stage.loss())
        pruner.load_checkpoint("search.safetensors")


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


def unwrapped_on_the_way(stage: Stage) -> None:
    """The gates are gone, and the weights learn on: nothing may be learned that is no search."""
    pruner = DNALPruner(stage.model, CONV, dummy_input=stage.x, budget=Budget(flops=0.5))
    with pruner.search(3, progress=False, optimizer=sgd(stage.model)) as search:
        search.step(stage.loss())
        pruner.unwrap_model()
        search.step(stage.loss())


def made_in_inference_mode(stage: Stage) -> None:
    with torch.inference_mode():
        stage.prune()


SEARCHES: Mistakes = {
    "unwrap_model in the search": (
        unwrapped_on_the_way,
        "step(loss) outside of the search: it has ended after 1 of its 3 steps",
    ),
    "a pruner made in inference mode": (
        made_in_inference_mode,
        "inside of torch.inference_mode() nothing can learn or be compared: leave it first",
    ),
    "loss is complex": (
        _steps_with(lambda s: s.loss() * (1 + 1j)),
        "step(loss) at search step 0: the loss is complex: make a real number of it, loss.abs()",
    ),
    "steps is 0": (
        lambda s: s.prune().search(0),
        "search(steps=0): must be a whole number >= 1, how many batches you give it",
    ),
    "steps is negative": (
        lambda s: s.prune().search(-3),
        "search(steps=-3): must be a whole number >= 1, how many batches you give it",
    ),
    "steps is a float": (
        lambda s: s.prune().search(1e3),
        "search(steps=1000.0): must be a whole number >= 1, how many batches you give it",
    ),
    "steps is text": (
        lambda s: s.prune().search("100"),
        "search(steps='100'): must be a whole number >= 1, how many batches you give it",
    ),
    "steps is a loader": (
        lambda s: s.prune().search([(s.x, s.y)]),
        "search(steps=[(a float32 Tensor of shape [4, 1, 8, 8], an int64 Tensor of shape [4])]): must be",
    ),
    "steps is None": (
        lambda s: s.prune().search(None),
        "search(steps=None): must be a whole number >= 1, how many batches you give it",
    ),
    "steps is missing": (lambda s: s.prune().search(), "search: missing a required argument: 'steps'"),
    "steps is True": (
        lambda s: s.prune().search(True),
        "search(steps=True): must be a whole number >= 1, how many batches you give it",
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
    "a step of the optimizer behind step": (
        stepped_twice,
        "optimizer.step() beside step(loss), which makes the step of the weights itself: leave it out, or the weights",
    ),
    "a loss and its labels": (
        lambda s: s.prune().search(2, progress=False).step(s.x, s.y),  # type: ignore[call-arg]
        "step: too many positional arguments; without a name it takes loss",
    ),
    "resumed in the midst of a search": (
        resumed_in_the_search,
        "the search is at 1 of its 3 steps: leave its `with` first",
    ),
    "steps by the name of epochs": (
        lambda s: s.prune().search(epochs=3),  # type: ignore[call-arg]
        "search: missing a required argument: 'steps'; it takes steps, optimizer, progress",
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
