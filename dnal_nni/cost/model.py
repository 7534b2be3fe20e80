"""What a network costs as a differentiable function of the gates."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Complexity
from ..channels.groups import ChannelGroup
from ..modules.bake import bake
from ..modules.choices import choices_of
from ..modules.layers import MIXED, layer_of
from ..modules.running import twin
from .count import flops_by_module
from .latency import LayerLatency, layer_latencies


def _lies_in(path: str, part: str) -> bool:
    return f"{path}.".startswith(f"{part}.")


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]``; on a CPU faster than ``index_select`` along the last dimension."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


class WeightedSums:
    """A sparse matrix that is multiplied by ``[..., columns]``: ``[..., rows]``, the same on every device.

    Args:
        entries: by row and column.
        rows: how many there are.
    """

    def __init__(self, entries: Mapping[tuple[int, int], float], rows: int) -> None:
        row, column = (np.array(part, dtype=np.int64) for part in zip(*entries))
        order = np.argsort(row, kind="stable")
        self.column = torch.from_numpy(column[order])
        self.weight = torch.tensor(list(entries.values()), dtype=torch.float64)[torch.from_numpy(order)]
        self.last = torch.from_numpy(np.bincount(row, minlength=rows)).cumsum(0)  # of each row, in sums that start at 0
        self.first = F.pad(self.last[:-1], (1, 0))

    def to(self, device: torch.device | str) -> WeightedSums:
        """Move, in place."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        return self

    def __call__(self, x: Tensor) -> Tensor:
        # a cumulative sum and its differences: unlike index_add, one kernel for any number of leading dimensions
        sums = F.pad((self.weight.to(x.dtype) * _take(x, self.column)).cumsum(-1), (1, 0))
        return _take(sums, self.last) - _take(sums, self.first)


class _Rows:
    """The open share of every side of every layer, as sums over units: one row each; row 0 is the constant 1."""

    def __init__(self, active: Sequence[ChannelGroup]) -> None:
        self.of: dict[Any, int] = {}  # by (path, side, dim) of a member, or (operation, factor) of a part
        self._widths = [1]
        self._pieces: dict[tuple[int, bytes, bytes], int] = {}  # what tensors have of a group: most of them, all of it
        self._seen: dict[tuple[int, bytes], int] = {}  # (offset of the group, units) -> piece
        self._means: dict[tuple[int, int], float] = {}  # (piece, unit) -> share
        self._shares: dict[tuple[int, int], float] = defaultdict(float)  # (row, piece) -> share
        offset = 0
        for group in active:
            for member in group.members:
                if group.choice:
                    for unit in range(member.width):
                        self._add((member.path, "choice", unit), offset, torch.tensor([unit]), 1)
                elif member.side != "size":
                    self._add((member.path, member.side, member.dim), offset, member.units, member.width)
            for part in group.parts:
                self._add((part.operation, part.factor), offset, part.units, part.width)
            offset += group.channels
        self.means = WeightedSums(self._means, len(self._pieces))
        self.shares = WeightedSums(self._shares, len(self._widths))
        self.base = 1 - self.shares(torch.ones(len(self._pieces), dtype=torch.float64))

    def _add(self, key: Any, offset: int, units: Tensor, width: int) -> None:
        """Let the row of ``key``, of so many channels, have these units of the group that starts at ``offset``."""
        if key not in self.of:
            self.of[key] = len(self.of) + 1
            self._widths.append(width)
        known = offset, units.numpy().tobytes()
        if known not in self._seen:
            unit, count = np.unique(units.numpy(), return_counts=True)
            share = count / count.sum()
            self._seen[known] = self._pieces.setdefault((offset, unit.tobytes(), share.tobytes()), len(self._pieces))
            self._means.update({(self._seen[known], offset + u): s for u, s in zip(unit.tolist(), share.tolist())})
        self._shares[self.of[key], self._seen[known]] += len(units) / width


class Term(NamedTuple):
    """What ``place`` costs, times the open shares of ``rows``."""

    place: str
    flops: float
    params: float
    latency: float
    rows: tuple[int, ...]


class CostModel:
    """FLOPs, parameters and latency of the network as differentiable functions of all gates.

    A layer costs ``dense cost * open fraction of its inputs * open fraction of its outputs``; the open fraction of a
    tensor is the mean of the gates of its channels (1 for channels without a gate). An operation outside of layers (a
    product of attention, a functional convolution) costs its share of what its module's own operations cost, times the
    open fractions of what it runs over. What lies in a candidate of a supernet costs that times the gate of the
    candidate, and of all those around it. At 0/1 gates this is fvcore's count of the sliced network, in which the
    weights of layers that lose channels are no longer computed (weight standardisation): with all gates open it can be
    less than that of the dense one.

    Args:
        model: the ungated model.
        groups: its channel groups; those that are not frozen are the gates, in this order.
        dummy_input: what ``measure`` counts.
        timed: measure the layers' latencies too (some seconds).

    Attributes:
        active: the groups that have a gate.
        sizes: their numbers of units.
        flops_of: fvcore's count by dotted path of a module, "" the whole.
        dense: what the whole costs.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, timed: bool = False) -> None:
        self.active = [g for g in groups if g.frozen is None]
        self.sizes = [g.channels for g in self.active]
        flops_of = self.flops_of = flops_by_module(model, dummy_input)
        whole, latency_of = layer_latencies(model, dummy_input) if timed else (None, {})
        self.dense = Complexity(flops_of[""], sum(p.numel() for p in model.parameters()), whole)
        rows = _Rows(self.active)
        self.means, self.shares, self.base = rows.means, rows.shares, rows.base
        operations = _operations(self.active, rows.of)
        plain = _plain(model, self.active)
        left_of = flops_of if plain is model else flops_by_module(plain, dummy_input)
        terms = _layer_terms(plain, rows.of, left_of, latency_of, operations)
        terms += _operation_terms(operations, left_of, {term.place for term in terms})
        terms = _with_candidates(model, rows.of, terms, left_of, latency_of)
        most = max(len(term.rows) for term in terms)
        # [most, terms]: the shares that each term is multiplied by
        self.rows = torch.tensor([[*term.rows, *[0] * (most - len(term.rows))] for term in terms]).T.contiguous()
        self.flop_terms, self.param_terms, self.latency_terms = (
            torch.tensor(column, dtype=torch.float64) for column in list(zip(*terms))[1:4]
        )
        self.flop_rest = left_of[""] - float(self.flop_terms.sum())
        self.param_rest = sum(p.numel() for p in plain.parameters()) - float(self.param_terms.sum())
        self.latency_rest = (whole or 0.0) - float(self.latency_terms.sum())

    def to(self, device: torch.device | str) -> CostModel:
        """Move the tables, in place: gates on a GPU are priced there, without a transfer per call."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, WeightedSums)):
                setattr(self, name, value.to(device))
        return self

    def _fractions(self, g: Tensor) -> Tensor:
        f = self.base.to(g.dtype) + self.shares(self.means(g))
        share = _take(f, self.rows[0])
        for row in self.rows[1:]:
            share = share * _take(f, row)
        return share

    def flops(self, g: Tensor) -> Tensor:
        """Expected FLOPs ``[...]`` at gates ``g``: all active groups' gates concatenated, float ``[..., units]``."""
        return (self.flop_terms.to(g.dtype) * self._fractions(g)).sum(-1) + self.flop_rest

    def share(self, g: Tensor) -> Tensor:
        """:meth:`flops` as a fraction of the whole network's."""
        return self.flops(g) / self.dense.flops

    def params(self, g: Tensor) -> Tensor:
        """Expected number of parameters ``[...]`` at gates ``g``, float ``[..., units]``."""
        return (self.param_terms.to(g.dtype) * self._fractions(g)).sum(-1) + self.param_rest

    def latency(self, g: Tensor) -> Tensor:
        """Expected milliseconds ``[...]`` at gates ``g``, float ``[..., units]``; only if ``timed``."""
        return (self.latency_terms.to(g.dtype) * self._fractions(g)).sum(-1) + self.latency_rest

    def calibrate(self, g: Tensor, latency: float) -> None:
        """Take up the latency (ms) that was measured at 0/1 gates ``g``, float64 ``[units]``.

        What of it the layers do not explain is the same at all widths: launching kernels, the interpreter.
        """
        assert self.dense.latency is not None
        predicted = self.dense.latency - float(self.latency(g))
        if predicted <= 0:
            return  # nothing, or next to nothing, is closed
        self.latency_terms *= min(max((self.dense.latency - latency) / predicted, 0.05), 1.0)
        self.latency_rest = self.dense.latency - float(self.latency_terms.sum())

    def latency_state(self) -> dict[str, Any]:
        """What was measured: another process would measure something else, and go on with another search."""
        return {"whole": self.dense.latency, "terms": self.latency_terms.cpu(), "rest": self.latency_rest}

    def load_latency_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`latency_state` gave."""
        self.dense = dataclasses.replace(self.dense, latency=state["whole"])
        self.latency_terms, self.latency_rest = state["terms"].to(self.latency_terms), state["rest"]


def _plain(model: nn.Module, active: Sequence[ChannelGroup]) -> nn.Module:
    """The model, or a twin in which no weight is computed of the layers that may lose channels."""
    plain = twin(model)
    layers = {member.module for group in active for member in group.members}
    return plain if [path for path in layers if bake(plain.get_submodule(path))] else model


def _layer_terms(
    model: nn.Module,
    row_of: Mapping[Any, int],
    flops_of: Mapping[str, int],
    latency_of: Mapping[str, LayerLatency],
    operations: Mapping[str, Sequence[tuple[float, tuple[int, ...]]]],
) -> list[Term]:
    """Layers, and parameters that a forward reads itself."""
    terms = []
    tensors, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    rows_at: dict[str, list[int]] = defaultdict(list)
    for key, row in row_of.items():
        if len(key) == 3 and key[1] != "choice":
            rows_at[key[0]].append(row)
    for path, rows_here in sorted(rows_at.items()):
        if path in buffers:
            continue
        if path in tensors:
            terms.append(Term(path, 0.0, tensors[path].numel(), 0.0, tuple(rows_here)))
            continue
        module = model.get_submodule(path)
        flops, time = float(flops_of[path]), latency_of.get(path, LayerLatency(0.0, 0.0, 0.0, 0.0))
        layer = layer_of(module)
        if layer is None or not layer.mixes:  # None: a norm under another name
            own = sum(p.numel() for p in module.parameters(recurse=False))
            terms.append(Term(path, flops, own, time.by_out, (row_of[path, "both", None],)))
            continue
        into, out = (row_of.get((path, side, None), 0) for side in MIXED)
        weights = layer.weights(module)
        whole_size = sum(weight.numel() for weight in weights.values())
        for name, weight in weights.items():  # at equal positions, FLOPs are as the numbers of weights
            sides, share = layer.grows_with(module, name), weight.numel() / whole_size
            both = into if "in" in sides else 0, out if "out" in sides else 0
            calls = operations.get(path, ())  # at positions that go
            rest = 1 - sum(part for part, _ in calls)
            terms.append(Term(path, flops * share * rest, weight.numel(), time.by_both * share, both))
            terms += [Term(path, flops * share * part, 0.0, 0.0, (*both, *rows)) for part, rows in calls]
        terms.append(Term(path, 0.0, layer.vectors(module, "out"), time.by_out, (out,)))
        if into and "in" in layer.moves(module):
            terms.append(Term(path, 0.0, layer.vectors(module, "in"), time.by_in, (into,)))
    return terms


def _operations(
    active: Sequence[ChannelGroup], row_of: Mapping[Any, int]
) -> dict[str, list[tuple[float, tuple[int, ...]]]]:
    """By module, its operations: the share of each in what they all cost, and the rows that it grows with."""
    factors: dict[tuple[int, str, float], set[int]] = defaultdict(set)
    for group in active:
        for part in group.parts:
            factors[part.operation, part.path, part.share].add(row_of[part.operation, part.factor])
    found: dict[str, list[tuple[float, tuple[int, ...]]]] = defaultdict(list)
    for (_, path, share), rows in sorted(factors.items()):
        found[path].append((share, tuple(sorted(rows))))
    return found


def _operation_terms(
    operations: Mapping[str, Sequence[tuple[float, tuple[int, ...]]]],
    flops_of: Mapping[str, int],
    layers: Collection[str],
) -> list[Term]:
    """Operations outside of ``layers``: shares of what is left of a module's FLOPs without those of its children."""
    own = Counter(flops_of)
    for path in flops_of:
        if path:
            own[path.rpartition(".")[0]] -= flops_of[path]
    return [
        Term(path, share * own[path], 0.0, 0.0, rows)
        for path, each in operations.items()
        if own[path] > 0 and path not in layers
        for share, rows in each
    ]


def _with_candidates(
    model: nn.Module,
    row_of: Mapping[Any, int],
    terms: list[Term],
    flops_of: Mapping[str, int],
    latency_of: Mapping[str, LayerLatency],
) -> list[Term]:
    """The terms of a supernet: what does not go with channels goes with its candidate, and all with those around."""
    parts = {
        f"{path}.{part}": [row_of[path, "choice", unit] for unit in units]
        for path, choice in choices_of(model).items()
        for part, units in choice.parts().items()
        if units and (path, "choice", 0) in row_of
    }
    for part in sorted(parts, key=len, reverse=True):
        flops, params = float(flops_of[part]), float(sum(p.numel() for p in model.get_submodule(part).parameters()))
        ms = float(sum(sum(layer) for path, layer in latency_of.items() if _lies_in(path, part)))
        inside = [term for term in terms if _lies_in(term.place, part)]
        flops -= sum(term.flops for term in inside)
        params -= sum(term.params for term in inside)
        terms = [*terms, Term(part, flops, params, ms - sum(term.latency for term in inside), ())]
    return [
        term._replace(rows=(*term.rows, *(row for part in parts if _lies_in(term.place, part) for row in parts[part])))
        for term in terms
    ]
