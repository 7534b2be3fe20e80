"""What somebody hands to :func:`~dnal_nni.compression.compress`: batches, a loss, an optimizer, a validation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .arguments import shown
from .errors import DNALError, reason, told
from .modules.running import FORWARD_ERRORS
from .search.losses import check_loss

_OWN_LOOP = "for batches of another form, write the loop yourself, with DNALPruner and pruner.search()"


class Data:
    """Somebody's batches ``(inputs, targets)``, on the device of the model."""

    def __init__(self, name: str, loader: Iterable[Any], device: torch.device) -> None:
        self.name, self.loader, self.device = name, loader, device

    def steps(self) -> int:
        """How many batches an epoch has."""
        try:
            if not isinstance(self.loader, Sized) or isinstance(self.loader, (str, Mapping)):
                raise TypeError
            steps = len(self.loader)
        except TypeError:
            what = f"compress({self.name}=...) is {shown(self.loader)}"
            if isinstance(self.loader, DataLoader):
                raise DNALError(f"{what} of data without a length: give them a __len__, or a list of batches") from None
            raise DNALError(
                f"{what}: give a DataLoader, or a list of batches; a generator has no length, and is used up by its "
                "first epoch"
            ) from None
        if steps == 0:
            raise DNALError(f"compress({self.name}=...) gives no batch: it has fewer examples than one batch")
        return steps

    def batches(self) -> Iterator[tuple[Tensor, Any]]:
        """One epoch, of as many batches as the length says; None for targets where there are none."""
        steps, given, sizes = self.steps(), 0, (2,) if self._is_a_batch() else (1, 2)
        for batch in itertools.islice(self._each(), steps):
            given += 1
            parts = batch if isinstance(batch, (list, tuple)) else [batch]
            if len(parts) not in sizes or not all(isinstance(part, Tensor) for part in parts):
                raise DNALError(
                    f"compress({self.name}=...) gives {shown(batch)}, and should give (inputs, targets), two tensors, "
                    f"or inputs alone; {_OWN_LOOP}"
                )
            inputs, *targets = (part.to(self.device) for part in parts)
            yield inputs, targets[0] if targets else None
        if given < steps:
            raise DNALError(
                f"compress({self.name}=...) gives {given} batches, and its len() is {steps}: give it the length that "
                "it has, by which the search is planned"
            )

    def _is_a_batch(self) -> bool:
        """Whether what was given for batches is one itself: tensors of different kinds."""
        given = self.loader if isinstance(self.loader, (list, tuple)) else ()
        return len({(part.dtype, part.dim()) for part in given if isinstance(part, Tensor)}) > 1

    def _each(self) -> Iterator[Any]:
        with told(f"compress({self.name}=...) fails"):
            try:
                yield from self.loader
            except DNALError as error:
                raise DNALError(reason(error)) from error

    def first(self) -> tuple[Tensor, Any]:
        """The first batch, and an error where there is none."""
        self.steps()
        return next(self.batches())


def run(model: nn.Module, inputs: Tensor) -> Any:
    """What a model returns for a batch."""
    with told(f"the model rejects a batch of the loader ({shown(inputs)})", FORWARD_ERRORS):
        return model(inputs)


def measured(loss: Callable[..., Any], outputs: Any, targets: Any) -> Tensor:
    """The loss of a batch, which is one number with a gradient."""
    what = f"{shown(outputs)}, which the model returns, and targets, {shown(targets)}"
    with told(f"compress(loss=...) fails on {what}", FORWARD_ERRORS):
        value: Tensor = loss(outputs, targets)
    check_loss(value, "compress(loss=...)")
    return value


class Taught:
    """The loss of batches without targets: what the uncut network says stands in for them.

    Args:
        model: the uncut network, of which a copy is kept.
        loss: of what a network returns and what the uncut one does; None: cross entropy.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | None) -> None:
        self.teacher, self.loss = copy.deepcopy(model).eval(), loss or F.cross_entropy

    def __call__(self, model: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            said = run(self.teacher, inputs)
        if not isinstance(said, Tensor):
            raise DNALError(
                f"compress(loader=...) gives inputs alone, and the model returns {shown(said)}: what it says stands in "
                f"for targets where it is a tensor; {_OWN_LOOP}"
            )
        if self.loss is F.cross_entropy or isinstance(self.loss, nn.CrossEntropyLoss):
            said = said.softmax(1)  # it takes scores, and probabilities for targets
        elif self.loss is F.binary_cross_entropy_with_logits or isinstance(self.loss, nn.BCEWithLogitsLoss):
            said = said.sigmoid()
        return measured(self.loss, run(model, inputs), said)


def optimizer_of(
    parameters: Iterator[nn.Parameter], lr: float, make: Callable[[Iterator[nn.Parameter]], Optimizer] | None
) -> Optimizer:
    """What somebody's function makes of parameters, or SGD with momentum."""
    if make is None:
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    parameters, given = itertools.tee(parameters)
    with told("compress(optimizer=...) fails"):
        made = make(parameters)
    if not isinstance(made, Optimizer):
        raise DNALError(f"compress(optimizer=...) returns {shown(made)}: return an optimizer of the given parameters")
    known = set(map(id, given))
    if not any(id(parameter) in known for group in made.param_groups for parameter in group["params"]):
        raise DNALError(
            f"compress(optimizer=...) returns {shown(made)} of other parameters than it is given, which are the cut "
            "network's in the end: lambda parameters: torch.optim.SGD(parameters, 0.01)"
        )
    return made


def validation(
    validate: Iterable[Any] | Callable[[nn.Module], float] | None, device: torch.device
) -> Callable[[nn.Module], float] | None:
    """How good a model is: what the user's function says, or the top-1 accuracy on the user's data."""
    if validate is None:
        return None
    if callable(validate):
        return lambda model: _number(_called(validate, model))
    data = Data("validate", validate, device)
    data.steps()
    return lambda model: accuracy(model, data.batches())


def _called(validate: Callable[[nn.Module], float], model: nn.Module) -> Any:
    with told("compress(validate=...) fails on the model"):
        return validate(model)


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise DNALError(f"compress(validate=...) returns {shown(value)}: return a number, more is better")
    return float(value)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> float:
    """Top-1 in per cent, in eval mode."""
    right, total = 0, 0
    model.eval()
    for inputs, targets in batches:
        if targets is None:
            raise DNALError(
                "compress(validate=...) gives inputs alone, and the accuracy is of classes: give (inputs, targets), or "
                "a function from a model to a number"
            )
        outputs = run(model, inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or targets.shape != outputs.shape[:1]:
            raise DNALError(
                f"the accuracy is of scores [batch, classes] and classes [batch], and not of {shown(outputs)} and "
                f"{shown(targets)}: give validate=f, a function from a model to a number"
            )
        right += int((outputs.argmax(1) == targets).sum())
        total += len(targets)
    return 100 * right / max(total, 1)
