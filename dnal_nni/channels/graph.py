"""The coupling graph: which channels of which layers can only be removed together.

Every channel of every side of a layer is a vertex. Whatever makes two channels stand or fall together (an addition, a
depthwise convolution, a concat's position ...) is an edge, and a *unit* is a connected component: linear time, always
ends. :mod:`dnal_nni.channels.trace` draws the edges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..modules.layers import Side

VertexKey = tuple[str, Side, int | None]
Site = frozenset[str | VertexKey] | None
"""What a gate can act on to zero the channels of a tensor: norms, by their paths, on whose affine it acts, and layers,
by their sides, whose output it multiplies. None: nothing that is known of."""


def on_norms(site: Site) -> bool:
    """Whether gates on norms zero the channels, at no cost in memory."""
    return site is not None and all(isinstance(mark, str) for mark in site)


@dataclasses.dataclass(frozen=True)
class Vertex:
    """The channels ``offset .. offset + size`` of the graph: one side of a layer, or one dimension of a bare tensor.

    Attributes:
        path: dotted path of the module, parameter, buffer or stored number.
        side: see :data:`Side`.
        dim: the dimension of a bare parameter or buffer; None for a module.
    """

    path: str
    side: Side
    dim: int | None
    size: int
    offset: int

    @property
    def key(self) -> VertexKey:
        return self.path, self.side, self.dim

    @functools.cached_property
    def ids(self) -> Tensor:
        """The channels, int64 ``[size]``."""
        return torch.arange(self.offset, self.offset + self.size)


class CouplingGraph:
    """Vertices, edges, and what may not be removed. Channel ids are int64; -1 stands for a fixed position."""

    def __init__(self) -> None:
        self.vertices: dict[VertexKey, Vertex] = {}
        self.producers: set[VertexKey] = set()
        """Where channels start: the outputs of layers that mix their inputs."""
        self.total = 0
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._frozen: list[tuple[np.ndarray, str] | None] = []
        self._rectangles: list[tuple[np.ndarray, tuple[int, ...]]] = []
        self._broadcasts: list[tuple[Tensor, Tensor, str]] = []
        self.sites: dict[VertexKey, Site] = {}
        """For every reader of channels: what zeroes them there, of all ways there; None where nothing does on one."""
        self._sums: list[tuple[np.ndarray, Site]] = []

    def vertex(self, path: str, side: Side, size: int, dim: int | None = None) -> Vertex:
        """The vertex of one side of a layer, made at first use."""
        key = (path, side, dim)
        if key not in self.vertices:
            self.vertices[key] = Vertex(path, side, dim, size, self.total)
            self.total += size
        return self.vertices[key]

    def reserve(self, size: int) -> Tensor:
        """Ids of channels that belong to no layer, int64 ``[size]``: what lies between layers."""
        self.total += size
        return torch.arange(self.total - size, self.total)

    def couple(self, a: Tensor, b: Tensor, why_fixed: str) -> None:
        """Let ``a`` and ``b`` (ids, broadcast against each other) stand and fall together; -1 fixes its partner."""
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        left, right = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        free = (left >= 0) & (right >= 0)
        self._edges.append((left[free], right[free]))
        if not free.all():
            self.freeze(torch.from_numpy(np.maximum(left, right)[~free]), why_fixed)

    def couple_units(self, ends: Sequence[tuple[Vertex, Tensor]]) -> None:
        """Let channels of one number stand and fall together: sides of a layer, and the number of each channel."""
        if ends:
            ids, numbers = torch.cat([vertex.ids for vertex, _ in ends]), torch.cat([number for _, number in ends])
            first = torch.full((int(numbers.max()) + 1,), self.total)
            first.scatter_reduce_(0, numbers, ids, "amin")
            self.couple(first[numbers], ids, "")

    def freeze(self, ids: Tensor, reason: str) -> int:
        """Keep these channels, and whatever is coupled with them; a number for :meth:`free`."""
        self._frozen.append((np.unique(ids[ids >= 0].numpy()), reason))
        return len(self._frozen) - 1

    def free(self, numbers: Iterable[int]) -> None:
        """Take back what :meth:`freeze` did; other reasons to keep the same channels remain."""
        for number in numbers:
            self._frozen[number] = None

    def require_rectangle(self, ids: Tensor, axis: int | Sequence[int] | None = None) -> None:
        """``ids`` lie in a tensor with several axes: what is removed must be whole slices along one of them.

        Args:
            ids: channel ids, with an axis for each axis of the tensor.
            axis: the axis that may lose slices; of several, and of all for None, the longest one that is not settled by
                other couplings.
        """
        if bool((ids < 0).any()):
            self.freeze(ids, "its channels lie among fixed ones in a tensor of several axes")
        axes = range(ids.dim()) if axis is None else [axis] if isinstance(axis, int) else axis
        self._rectangles.append((ids.numpy(), tuple(i for i in axes if ids.shape[i] > 1) or (axes[0],)))

    def all_bare(self, ids: Tensor) -> bool:
        """Whether these channels are of parameters and buffers only, and no such parameter makes them itself."""
        left = int((ids >= 0).sum())
        for vertex in self.vertices.values():
            if vertex.dim is not None and vertex.key not in self.producers:
                left -= int(((ids >= vertex.offset) & (ids < vertex.offset + vertex.size)).sum())
        return left == 0

    def broadcast(self, bare: Tensor, ids: Tensor, why: str) -> None:
        """Channels ``bare``, of a bare tensor, meet ``ids``, which vary along further axes.

        They go with those, slice by slice, if these slices can go; they stay if other couplings leave slices along the
        further axes alone: a table of rotary positions meets every head.
        """
        self._broadcasts.append((bare, ids, why))

    def add_up(self, ids: Tensor, site: Site) -> None:
        """These channels are added up where ``site`` zeroes them: without those that are zero, the sum is the same."""
        self._sums.append((np.unique(ids[ids >= 0].numpy()), site))

    def sums(self, labels: np.ndarray) -> dict[int, list[Site]]:
        """By unit, what zeroes it where it is added up."""
        found: dict[int, list[Site]] = {}
        for ids, site in self._sums:
            for unit in np.unique(labels[ids]).tolist():
                found.setdefault(unit, []).append(site)
        return found

    def read_by(self, vertex: Vertex, site: Site) -> None:
        """Note the gate site of the channels that arrive at a reader; of several calls, all must have one."""
        before = self.sites.get(vertex.key, frozenset())
        self.sites[vertex.key] = None if site is None or before is None else before | site

    def units(self) -> np.ndarray:
        """The unit of every channel, int ``[total]``."""
        while True:
            labels = self._components()
            pending = [straight for ids, axes in self._rectangles if (straight := _straighten(ids, labels, axes))]
            surest = max((sure for _, sure in pending), default=0.0)
            if surest < math.inf and self._met(labels):
                continue
            if not pending:
                return labels
            self._edges.append(_joined([edges for edges, sure in pending if sure == surest]))

    def _met(self, labels: np.ndarray) -> bool:
        """Decide what becomes of bare tensors that are broadcast; whether anything is coupled with them."""
        broadcasts, self._broadcasts = self._broadcasts, []
        coupled = False
        for bare, ids, why in broadcasts:
            axes = {axis for axis, size in enumerate(bare.shape) if size > 1}
            if axes & set(varying_axes(ids.numpy(), labels)):
                self.couple(bare, ids, why)
                coupled = True
            else:
                self.freeze(bare, why)
        return coupled

    def _components(self) -> np.ndarray:
        left, right = _joined(self._edges)
        links = coo_array((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self.total, self.total))
        return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)

    def frozen_units(self, labels: np.ndarray) -> dict[int, str]:
        """Units that must stay, with the reason given first."""
        frozen: dict[int, str] = {}
        for ids, reason in filter(None, self._frozen):
            for unit in np.unique(labels[ids]):
                frozen.setdefault(int(unit), reason)
        return frozen


def _joined(edges: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *(a for a, _ in edges)]), np.concatenate([empty, *(b for _, b in edges)])


def varying_axes(ids: np.ndarray, labels: np.ndarray) -> tuple[int, ...]:
    """Axes along which the unit changes (a fixed position counts as a unit of its own)."""
    units = np.where(ids >= 0, labels[ids], -1)
    return tuple(i for i in range(ids.ndim) if (units != units.take([0], axis=i)).any())


def _straighten(
    ids: np.ndarray, labels: np.ndarray, axes: tuple[int, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], float] | None:
    """Edges that make the units of ``ids`` constant along all axes but one of ``axes``; None if they are.

    That is the axis with which most units are left, the longest of these; with the edges, how many times as many they
    are as with the next best: infinity where there is no choice.
    """
    varying = varying_axes(ids, labels)
    if len(varying) <= 1 and set(varying) <= set(axes):
        return None
    open_axes = [i for i in varying if i in axes] or [axes[0]]
    left = {i: _units_left(ids, labels, i) if len(open_axes) > 1 else 1 for i in open_axes}
    best, *others = sorted(open_axes, key=lambda i: (left[i], ids.shape[i], i), reverse=True)
    first = ids[tuple(slice(None) if i == best else slice(0, 1) for i in range(ids.ndim))]
    first = np.broadcast_to(first, ids.shape)
    free = (first >= 0) & (ids >= 0) & (labels[first] != labels[ids])
    return ((first[free], ids[free]), left[best] / left[others[0]] if others else math.inf) if free.any() else None


def _units_left(ids: np.ndarray, labels: np.ndarray, axis: int) -> int:
    """How many units there are once every slice along ``axis`` is one."""
    units = np.unique(labels[ids], return_inverse=True)[1].reshape(ids.shape)
    slices = np.arange(ids.shape[axis]).reshape([-1 if i == axis else 1 for i in range(ids.ndim)])
    ends = units.ravel() + ids.shape[axis], np.broadcast_to(slices, ids.shape).ravel()
    nodes = ids.shape[axis] + int(units.max()) + 1
    links = coo_array((np.ones(ids.size, dtype=np.int8), ends), shape=(nodes, nodes))
    return int(connected_components(links, directed=False)[0])
