"""What a network costs as a differentiable function of the gates."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Complexity
from ..channels.graph import VertexKey
from ..channels.groups import ChannelGroup
from ..modules.choices import choices_of
from ..modules.layers import MIXED, layer_of
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


class CostModel:
    """FLOPs, parameters and latency of the network as differentiable functions of all gates.

    A layer costs ``dense cost * open fraction of its inputs * open fraction of its outputs``; the open fraction of a
    tensor is the mean of the gates of its channels (1 for channels without a gate). What lies in a candidate of a
    supernet costs that times the gate of the candidate, and of all those around it. At 0/1 gates this is fvcore's count
    of the sliced network, but for operations outside of layers (functional pooling, attention), which stay constant.

    Args:
        model: the ungated model.
        groups: its channel groups; those that are not frozen are the gates, in this order.
        dummy_input: what ``measure`` counts.
        timed: measure the layers' latencies too (some seconds).
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, timed: bool = False) -> None:
        self.active = [g for g in groups if g.frozen is None]
        self.sizes = [g.channels for g in self.active]
        flops_of = flops_by_module(model, dummy_input)
        whole, latency_of = layer_latencies(model, dummy_input) if timed else (None, {})
        self.dense = Complexity(flops_of[""], sum(p.numel() for p in model.parameters()), whole)

        row_of: dict[VertexKey, int] = {}  # row 0 is the constant 1
        channels = [1]
        pieces: dict[tuple[int, bytes, bytes], int] = {}  # what tensors have of a group: most of them, all of it
        means: dict[tuple[int, int], float] = {}  # (piece, unit) -> share
        shares: dict[tuple[int, int], float] = defaultdict(float)  # (row, piece) -> share
        offset = 0
        for group in self.active:
            for member in group.members:
                if member.side == "size":
                    continue
                if group.choice:
                    keys: list[VertexKey] = [(member.path, "choice", unit) for unit in range(member.width)]
                    has = [torch.tensor([unit]) for unit in range(member.width)]
                else:
                    keys, has = [(member.path, member.side, member.dim)], [member.units]
                for key, units in zip(keys, has):
                    if key not in row_of:
                        row_of[key] = len(row_of) + 1
                        channels.append(1 if group.choice else member.width)
                    unit, count = np.unique(units.numpy(), return_counts=True)
                    share = count / count.sum()
                    piece = pieces.setdefault((offset, unit.tobytes(), share.tobytes()), len(pieces))
                    means.update({(piece, offset + int(u)): float(s) for u, s in zip(unit, share)})
                    shares[row_of[key], piece] += len(units) / channels[row_of[key]]
            offset += group.channels
        self.means = WeightedSums(means, len(pieces))
        self.shares = WeightedSums(shares, len(channels))
        self.base = 1 - self.shares(torch.ones(len(pieces), dtype=torch.float64))

        # place, flops, params, latency, row a, row b
        terms: list[tuple[str, float, float, float, int, int]] = []
        tensors = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        rows_at: dict[str, list[int]] = defaultdict(list)
        for (path, side, _), row in row_of.items():
            if side != "choice":
                rows_at[path].append(row)
        for path, rows_here in sorted(rows_at.items()):
            if path in buffers:
                continue
            if path in tensors:
                b = rows_here[1] if len(rows_here) > 1 else 0
                terms.append((path, 0.0, tensors[path].numel(), 0.0, rows_here[0], b))
                continue
            module = model.get_submodule(path)
            flops, time = float(flops_of[path]), latency_of.get(path, LayerLatency(0.0, 0.0, 0.0, 0.0))
            layer = layer_of(module)
            if layer is not None and layer.mixes:
                into, out = (row_of.get((path, side, None), 0) for side in MIXED)
                weights = layer.weights(module)
                whole_size = sum(weight.numel() for weight in weights.values())
                for name, weight in weights.items():  # at equal positions, FLOPs are as the numbers of weights
                    sides, share = layer.grows_with(module, name), weight.numel() / whole_size
                    a, b = into if "in" in sides else 0, out if "out" in sides else 0
                    terms.append((path, flops * share, weight.numel(), time.by_both * share, a, b))
                terms.append((path, 0.0, layer.vectors(module, "out"), time.by_out, out, 0))
                if into and any("in" in layer.grows_with(module, name) for name in layer.tensors):
                    terms.append((path, 0.0, layer.vectors(module, "in"), time.by_in, into, 0))
            else:
                own = sum(p.numel() for p in module.parameters(recurse=False))
                terms.append((path, flops, own, time.by_out, row_of[path, "both", None], 0))

        parts = {
            f"{path}.{part}": [row_of[path, "choice", unit] for unit in units]
            for path, choice in choices_of(model).items()
            for part, units in choice.parts().items()
            if units and (path, "choice", 0) in row_of
        }
        for part in sorted(parts, key=len, reverse=True):  # what does not go with channels goes with its candidate
            flops, params = float(flops_of[part]), float(sum(p.numel() for p in model.get_submodule(part).parameters()))
            ms = float(sum(sum(layer) for path, layer in latency_of.items() if _lies_in(path, part)))
            for place, *costs, _, _ in terms:
                if _lies_in(place, part):
                    flops, params, ms = flops - costs[0], params - costs[1], ms - costs[2]
            terms.append((part, flops, params, ms, 0, 0))
        around = [[row for part, rows in parts.items() if _lies_in(t[0], part) for row in rows] for t in terms]
        nesting = max(map(len, around), default=0)
        # [nesting, terms]: the gates that each term is multiplied by
        self.around = torch.tensor([rows + [0] * (nesting - len(rows)) for rows in around], dtype=torch.int64).T
        columns = list(zip(*terms))
        self.flop_terms, self.param_terms, self.latency_terms = (
            torch.tensor(column, dtype=torch.float64) for column in columns[1:4]
        )
        self.a, self.b = (torch.tensor(column) for column in columns[4:])
        self.flop_rest = self.dense.flops - float(self.flop_terms.sum())
        self.param_rest = self.dense.params - float(self.param_terms.sum())
        self.latency_rest = (whole or 0.0) - float(self.latency_terms.sum())

    def to(self, device: torch.device | str) -> CostModel:
        """Move the tables, in place: gates on a GPU are priced there, without a transfer per call."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, WeightedSums)):
                setattr(self, name, value.to(device))
        return self

    def _fractions(self, g: Tensor) -> Tensor:
        f = self.base.to(g.dtype) + self.shares(self.means(g))
        share = _take(f, self.a) * _take(f, self.b)
        for rows in self.around:
            share = share * _take(f, rows)
        return share

    def flops(self, g: Tensor) -> Tensor:
        """Expected FLOPs ``[...]`` at gates ``g``: all active groups' gates concatenated, float ``[..., units]``."""
        return (self.flop_terms.to(g.dtype) * self._fractions(g)).sum(-1) + self.flop_rest

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
