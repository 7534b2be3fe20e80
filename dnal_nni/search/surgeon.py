"""What a removal costs when the layers behind make up for it: Optimal Brain Surgeon over whole channel groups.

Where columns ``R`` of the inputs of a layer go and the rest of its weights ``W`` change for the best, the loss rises by
``1/2 tr(A W_R ([H^-1]_RR)^-1 W_R^T)`` (Hassibi and Stork 1993), with ``H`` the covariance of its inputs and ``A`` that
of the gradients at its outputs, the Kronecker factors of the Fisher matrix (Martens and Grosse 2015). The places of a
kernel are taken for independent of each other. :mod:`~dnal_nni.surgery.repair` is what makes that change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..channels.groups import ChannelGroup
from ..errors import DNALError, told
from ..modules.gates import ScaledSigmoidGate
from ..modules.running import FORWARD_ERRORS, call, seeded
from ..surgery.layer_calls import COLUMNS
from .criteria import Loss, as_it_was
from .fisher import FactorCalls, Factors, gate_losses, noise_in
from .samples import examples_of, samples_of

SAMPLES = 64  # that the diagonal is of, where a group has no such layers
HOLD = 2**27  # numbers of covariances at a time
STAGES = 32  # a round removes one in so many of the units that are left


def removal_losses(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    gates: Sequence[ScaledSigmoidGate],
    batches: Iterable[Any],
    loss: Loss | None = None,
) -> Tensor:
    """What the loss rises by as each unit goes, behind those of its group that are worth less: float64 ``[units]``.

    Of groups that something else than plain convolutions and linear layers reads (a recurrent layer, a grouped
    convolution, the product of queries and keys), it is the rise when nothing makes up for it. The model runs in eval
    mode, and is left as it was.

    Args:
        model: with its gates.
        groups: those that are not left whole; of channels.
        gates: theirs.
        batches: in the form of a dummy input; what ``loss`` takes, where it is given.
        loss: from the model and a batch to its mean loss, 0-d; None: the squared error of what the model returns.

    Raises:
        DNALError: there are no batches, the model or the loss fails on one, or the loss is of another model.
    """
    generator, batches = torch.Generator().manual_seed(0), list(batches)
    examples = sum(map(examples_of, batches))
    if not examples:
        raise DNALError("choose(batches=[]): there are none; some hundred examples are right")

    def of(batch: Any) -> Tensor:
        """Summed over the examples."""
        with told(f"choose(batches=...): the model rejects {shown(batch)}", FORWARD_ERRORS):
            return noise_in(call(model, batch), generator) if loss is None else loss(model, batch) * examples_of(batch)

    found: list[Tensor | None] = []
    looked_at = ran = False
    with as_it_was(model), seeded(model), torch.enable_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for part in _passes(model, groups):
            paths = {member.path for group in part for member in group.consumers if not member.bare}
            calls = FactorCalls(model, paths, COLUMNS, examples)
            for batch in batches:
                with calls:
                    total = of(batch)
                with told("choose(batches=...): no gradient comes back through the model", FORWARD_ERRORS):
                    total.backward()
                model.zero_grad()
            looked_at, ran = looked_at or bool(calls.layers), ran or bool(calls.factors)
            for group in part:
                readers = _readers(model, group, calls.factors, examples)
                found.append(None if readers is None else _as_they_go(readers, group.channels))
        if looked_at and not ran:
            raise DNALError("choose(loss=...): it does not run the model that it is given; write it of model and batch")
        sizes = [group.channels for group in groups]
        if any(losses is None for losses in found):
            samples = itertools.islice(itertools.chain.from_iterable(map(samples_of, batches)), SAMPLES)
            alone = gate_losses(model, gates, samples, of).cpu().split(sizes)
            found = [own if losses is None else losses for own, losses in zip(alone, found)]
    return torch.cat([losses for losses in found if losses is not None])


def worth(losses: Tensor, costs: Tensor, sizes: Sequence[int], sole: Sequence[bool]) -> Tensor:
    """What removals cost, for what each unit costs: ``[units]``, as both are.

    Losses are of one group at a time, all else whole. Where nothing leads past a group, what it has stopped telling
    none behind it can tell: there a unit counts for more, the less of its group is left by then. Where a group loses
    ``T`` in all, and ``L`` ahead of the unit, it is ``T / (T - L)`` times its loss.

    Args:
        losses: of :func:`removal_losses`, ``[units]``.
        costs: of each unit, ``[units]``.
        sizes: of the groups.
        sole: whether nothing leads past each of them.
    """
    found = []
    for part, alone in zip(losses.split(list(sizes)), sole):
        ordered, order = part.sort(stable=True)
        if alone:
            left = ordered.flip(0).cumsum(0).flip(0)
            ordered = ordered * ordered.sum() / left.clamp(min=1e-300)
        found.append(torch.empty_like(part).scatter(0, order, ordered))
    return torch.cat(found) / costs.clamp(min=1e-3 * float(costs.mean()))


def _passes(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """The groups, so many at a time as the covariances of what reads them fit into memory."""
    part: list[ChannelGroup] = []
    held = 0
    for group in groups:
        weights = [getattr(model.get_submodule(m.path), "weight", None) for m in group.consumers if not m.bare]
        columns = [weight.shape[1] for weight in weights if isinstance(weight, Tensor) and weight.dim() > 1]
        size = sum(n**2 for n in columns if n <= COLUMNS)
        if part and held + size > HOLD:
            yield part
            part, held = [], 0
        part.append(group)
        held += size
    yield part


class _Reader:
    """A layer that reads the channels of a group, as units go.

    Args:
        weight: ``[channels, n, size of the kernel]``, whose places are taken for independent of each other.
        factors: of the layer.
        examples: that the gradients are of.
        columns: int64 ``[k]``, of the inputs.
        units: int64 ``[k]``, the unit that each of these belongs to.
    """

    def __init__(self, weight: Tensor, factors: Factors, examples: int, columns: Tensor, units: Tensor) -> None:
        order = units.argsort(stable=True)
        columns, units = columns[order], units[order]
        self.inverse = factors.inverse[columns][:, columns]  # of H; removals change this part by itself
        weight = weight[:, columns]
        minded = (factors.outer / examples @ weight.flatten(1)).view_as(weight)
        self.gram = torch.einsum("oik,ojk->ij", weight, minded)  # W^T A W, of what is left
        counts = units.bincount()
        self.blocks = []  # units with as many columns: int64 [m] and [m, columns of each]
        for count in counts[counts > 0].unique().tolist():
            mine = (counts[units] == count).nonzero().view(-1, count)
            self.blocks.append((units[mine[:, 0]], mine))

    def costs(self, units: int) -> Tensor:
        """What the loss rises by if one unit goes, of those that are left: float64 ``[units]``."""
        found = torch.zeros(units, dtype=torch.float64, device=self.gram.device)
        for members, columns in self.blocks:
            at = columns.unsqueeze(2), columns.unsqueeze(1)
            inner, own = self.inverse[at], self.gram[at]  # [members, columns of each, columns of each]
            costs = own / inner if columns.shape[1] == 1 else torch.linalg.solve(inner, own)
            found[members] = 0.5 * costs.diagonal(0, 1, 2).sum(1)
        return found

    def remove(self, chosen: Tensor) -> float:
        """Take units (bool ``[units]``) out, and return what the loss rises by."""
        gone = torch.cat([columns[chosen[units]].flatten() for units, columns in self.blocks])
        if not len(gone):
            return 0.0
        kept = torch.ones(len(self.inverse), dtype=torch.bool, device=gone.device).index_fill(0, gone, False)
        rows, gram = self.inverse[gone], self.gram[gone]
        own = gram[:, gone]
        found = torch.linalg.solve(rows[:, gone], torch.cat([rows[:, kept], own], 1))
        back, costs = found.split([found.shape[1] - len(gone), len(gone)], 1)
        change = back.T @ (gram[:, kept] - 0.5 * own @ back)
        self.gram = self.gram[kept][:, kept] - change - change.T
        self.inverse = self.inverse[kept][:, kept] - rows[:, kept].T @ back
        place = kept.cumsum(0) - 1
        for i, (units, columns) in enumerate(self.blocks):
            left = ~chosen[units]
            self.blocks[i] = units[left], place[columns[left]]
        return 0.5 * float(costs.diagonal().sum())


def _as_they_go(readers: Sequence[_Reader], units: int) -> Tensor:
    """What the loss rises by as each unit of a group goes, the cheapest first: float64 ``[units]``.

    The last one, which always stays, has what the one ahead of it has.
    """
    device = readers[0].gram.device
    left = torch.ones(units, dtype=torch.bool, device=device)
    found, so_far = torch.zeros(units, dtype=torch.float64), 0.0
    while (count := int(left.sum())) > 1:
        costs = torch.stack([reader.costs(units) for reader in readers]).sum(0).masked_fill(~left, torch.inf)
        rank = costs.argsort(stable=True)[: min(count - 1, -(-count // STAGES))]
        chosen = torch.zeros_like(left).index_fill(0, rank, True)
        together, own = sum(reader.remove(chosen) for reader in readers), costs[rank]
        left &= ~chosen
        for unit, part in zip(rank.tolist(), (own / own.sum().clamp(min=1e-300) * together).tolist()):
            so_far = max(so_far * (1 + 1e-9), part)  # what goes later is worth more
            found[unit] = so_far
    found[left.cpu()] = so_far
    return found


def _readers(
    model: nn.Module, group: ChannelGroup, factors: Mapping[str, Factors], examples: int
) -> list[_Reader] | None:
    """The layers that read a group; None: one of them is no plain convolution or linear layer, or a very wide one."""
    readers = []
    passed = {member.path for member in group.members if member.side == "out"}  # as a depthwise convolution is
    for member in group.consumers:
        if member.path not in factors and member.path in passed:
            continue
        if member.bare or member.path not in factors:
            return None
        if not bool(factors[member.path].inner.isfinite().all() & factors[member.path].outer.isfinite().all()):
            raise DNALError(f"choose(batches=...): what reaches {member.path}, or its gradient, is nan or infinite")
        weight = model.get_submodule(member.path).weight
        assert isinstance(weight, Tensor)
        flat = weight.detach().flatten(2) if weight.dim() > 2 else weight.detach().unsqueeze(2)
        columns, units = member.channels.to(weight.device), member.units.to(weight.device)
        readers.append(_Reader(flat.double(), factors[member.path], examples, columns, units))
    return readers or None
