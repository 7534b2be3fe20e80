"""What a criterion of torch-pruning says that every unit is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..channels.tp_groups import dependency_groups, units_of_root
from ..errors import DNALError
from ..modules.gates import ChannelFactor, GateState
from ..modules.running import FORWARD_ERRORS

Criterion = Callable[[Any], Tensor | None]
"""A ``torch_pruning.importance.Importance``: one score for every channel of the root of a ``torch_pruning.Group``."""
Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to the loss of it, 0-d."""


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of ``(inputs, labels)``; what the model itself says of a dict of arguments (``.loss``).

    Raises:
        DNALError: a batch of another form.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if isinstance(loss, Tensor):
            return loss
    elif isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs, labels = batch
        out = model(inputs)
        if isinstance(out, Tensor) and not labels.is_floating_point():
            return F.cross_entropy(out, labels)
    raise DNALError("batches are not (inputs, labels) of a classifier: say what their loss is, loss=f(model, batch)")


def criterion_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Tensor:
    """What ``criterion`` says of every unit: float64 ``[units]``, the mean over the channels of the root in a unit.

    What it says nothing of (a group without the layers that it looks at, candidates of a supernet) is worth more than
    all others. The model is left as it was, its gradients included; it runs in eval mode.

    Args:
        model: with or without gates, which are open meanwhile.
        groups: those that are not left whole.
        criterion: of torch-pruning.
        batches: for criteria that need gradients or activations.
        loss: of a batch; None: :func:`classification_loss`.

    Raises:
        DNALError: the criterion fails, returns something else than a score a channel, or nothing at all.
    """
    name = type(criterion).__name__
    parts: list[Tensor | None] = []
    with _as_it_was(model), _prepared(model, criterion, batches, loss or classification_loss):
        scored = iter(dependency_groups(model, groups))
        for group in groups:
            parts.append(None if group.choice else _unit_scores(criterion, name, next(scored), group, batches is None))
    known = [part for part in parts if part is not None]
    if not known:
        raise DNALError(f"{name} gives no score for any group: it looks at layers that the model has none of")
    most = torch.cat(known).amax() + 1.0
    return torch.cat([most.expand(group.channels) if part is None else part for group, part in zip(groups, parts)])


def relative(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """``scores`` (``[units]``) such that those of every group are at least 0, and 1 on average."""
    parts = [part - part.amin().clamp(max=0) for part in scores.split(list(sizes))]
    return torch.cat([part / part.mean() if float(part.mean()) > 0 else torch.ones_like(part) for part in parts])


def _unit_scores(criterion: Criterion, name: str, scored: Any, group: ChannelGroup, blind: bool) -> Tensor | None:
    hint = ": a criterion of gradients or activations needs batches=" if blind else ""
    try:
        score = criterion(scored)
    except FORWARD_ERRORS as error:
        raise DNALError(f"{name} fails on {group.name} ({str(error) or type(error).__name__}){hint}") from error
    if score is None:
        return None
    units = units_of_root(group)
    if not isinstance(score, Tensor) or tuple(score.shape) != (len(units),):
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise DNALError(f"{name} must give {group.name} a tensor of {len(units)} scores, one a channel, not {got}")
    score = score.detach().double().cpu()
    if not bool(score.isfinite().all()):
        raise DNALError(f"{name} gives {group.name} a score that is nan or infinite{hint}")
    return torch.zeros(group.channels, dtype=torch.float64).index_add(0, units, score) / units.bincount()


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Open gates, eval mode, and what becomes of gradients; then everything as it was."""
    states = [(gate, gate.state) for m in model.modules() if isinstance(m, ChannelFactor) for gate in m.gates]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.is_floating_point()]
    for gate, _ in states:
        gate.state = GateState.TRANSPARENT
    model.eval()
    try:
        yield
    finally:
        for gate, state in states:
            gate.state = state
        for module, training in modes:
            module.training = training
        for parameter, trained, grad in parameters:
            parameter.requires_grad_(trained)
            parameter.grad = grad


@contextlib.contextmanager
def _prepared(model: nn.Module, criterion: Any, batches: Iterable[Any] | None, loss: Loss) -> Iterator[None]:
    """Gradients and activations, where there are batches to get them from."""
    if batches is None:
        yield
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            parameter.grad = None
    watching = getattr(criterion, "compute_importance", None)  # of activations
    with torch.enable_grad(), watching(model) if watching is not None else contextlib.nullcontext():
        number = 0
        for batch in batches:
            number += 1
            if hasattr(criterion, "accumulate_grad"):  # of squared gradients, sample by sample
                for sample in _samples(batch):
                    model.zero_grad()
                    loss(model, sample).backward()
                    criterion.accumulate_grad(model)
            else:
                loss(model, batch).backward()
        if not number:
            raise DNALError("batches is empty: give at least one, or None")
    yield


def _samples(batch: Any) -> Iterator[Any]:
    """A batch in batches of one."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, Mapping):
        for values in zip(*map(_samples, batch.values())):
            yield dict(zip(batch, values))
    else:
        yield from zip(*map(_samples, batch))
