"""What a criterion of torch-pruning says that every unit is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..channels.tp_groups import dependency_groups, rooted, roots
from ..errors import DNALError
from ..modules.gates import ChannelFactor, GateState
from ..modules.running import FORWARD_ERRORS
from .samples import samples_of

if TYPE_CHECKING:
    from ..channels.dependency import Group

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


def check_criterion(criterion: Any) -> None:
    """Raise for what is no criterion."""
    if not callable(criterion) or isinstance(criterion, type):
        what = f"the class {criterion.__name__}" if isinstance(criterion, type) else repr(criterion)
        raise DNALError(f"importance={what}: pass a criterion, as tp.importance.MagnitudeImportance()")


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
        loss: of a batch; None: :func:`classification_loss`. To a criterion of activations, inputs alone will do.

    Raises:
        DNALError: the criterion fails, returns something else than a score a channel, or nothing at all.
    """
    check_criterion(criterion)
    parts: list[Tensor | None] = []
    with as_it_was(model), _prepared(model, criterion, batches, loss):
        scored = iter(dependency_groups(model, groups))
        for group in groups:
            parts.append(None if group.choice else _unit_scores(model, criterion, next(scored), group, batches is None))
    known = [part for part in parts if part is not None]
    if not known:
        name = _name(criterion)
        raise DNALError(f"{name} gives no score for any group: it looks at layers that the model has none of")
    most = torch.cat(known).amax() + 1.0
    return torch.cat([most.expand(group.channels) if part is None else part for group, part in zip(groups, parts)])


def relative(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """``scores`` (``[units]``) such that those of every group are at least 0, and 1 on average."""
    parts = [part - part.amin().clamp(max=0) for part in scores.split(list(sizes))]
    return torch.cat([part / part.mean() if float(part.mean()) > 0 else torch.ones_like(part) for part in parts])


def _name(criterion: Criterion) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _unit_scores(
    model: nn.Module, criterion: Criterion, scored: Group, group: ChannelGroup, blind: bool
) -> Tensor | None:
    """Float64 ``[channels of the group]``; None: nothing is said.

    A criterion of torch-pruning gives as many scores as the first layer that it looks at has channels. Where the root
    has others (it looks at norms only, and these come behind a pixel shuffle), a layer with as many is made the root.
    """
    first: DNALError | None = None
    tried = set()
    for root in roots(model, group):
        if len(root.units) in tried:
            continue
        tried.add(len(root.units))
        try:
            score = _root_scores(criterion, rooted(model, group, root) if first else scored, group, blind)
        except DNALError as error:
            first = first or error
            continue
        if score is None:
            return None
        return torch.zeros(group.channels, dtype=torch.float64).index_add(0, root.units, score) / root.units.bincount()
    assert first is not None
    raise first


def _root_scores(criterion: Criterion, scored: Group, group: ChannelGroup, blind: bool) -> Tensor | None:
    """Float64 ``[channels of the root]``."""
    name, wanted = _name(criterion), len(scored[0].idxs)
    hint = ": a criterion of gradients or activations needs batches=, or to be given them ahead" if blind else ""
    try:
        score = criterion(scored)
    except FORWARD_ERRORS as error:
        raise DNALError(f"{name} fails on {group.name} ({str(error) or type(error).__name__}){hint}") from error
    if score is None:
        return None
    if not isinstance(score, Tensor) or tuple(score.shape) != (wanted,):
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise DNALError(f"{name} must give {group.name} a tensor of {wanted} scores, one a channel, not {got}")
    score = score.detach().double().cpu()
    if not bool(score.isfinite().all()):
        raise DNALError(f"{name} gives {group.name} a score that is nan or infinite{hint}")
    return score


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Open gates, eval mode, and what becomes of gradients; then everything as it was."""
    states = [(gate, gate.state) for m in model.modules() if isinstance(m, ChannelFactor) for gate in m.gates]
    modes = [(module, module.training, set(vars(module))) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.is_floating_point()]
    for gate, _ in states:
        gate.state = GateState.TRANSPARENT
    model.eval()
    try:
        yield
    finally:
        for gate, state in states:
            gate.state = state
        for module, training, names in modes:
            module.training = training
            for name in vars(module).keys() - names:  # where criteria of activations keep them
                delattr(module, name)
        for parameter, trained, grad in parameters:
            parameter.requires_grad_(trained)
            parameter.grad = grad


@contextlib.contextmanager
def _prepared(model: nn.Module, criterion: Any, batches: Iterable[Any] | None, loss: Loss | None) -> Iterator[None]:
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
        unlabelled = watching is not None and loss is None  # then the model need only run
        loss = loss or classification_loss
        number = 0
        for batch in batches:
            number += 1
            if unlabelled and isinstance(batch, Tensor):
                model(batch)
            elif hasattr(criterion, "accumulate_grad"):  # of squared gradients, sample by sample
                for sample in samples_of(batch):
                    model.zero_grad()
                    loss(model, sample).backward()
                    criterion.accumulate_grad(model)
            else:
                loss(model, batch).backward()
        if not number:
            raise DNALError("batches is empty: give at least one, or None")
    yield
