"""Numbers that modules keep about channels that can go: ``num_heads``, the sizes of a split, a static width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from .counts import Equal, StoredSize
from .graph import CouplingGraph, VertexKey, varying_axes


def stored_sizes(model: nn.Module, sizes: Sequence[StoredSize], labels: np.ndarray) -> dict[VertexKey, np.ndarray]:
    """The attributes that must follow a cut, and for each of its positions the unit that it counts (-1: fixed).

    Where a forward got a number that it handed to an operation is known, or it is looked up among the integer
    attributes of the module whose forward it was. Whether it is the right one is decided by verification.
    """
    found: dict[VertexKey, np.ndarray] = {}
    for stored, line in _along_one_axis(sizes, labels):
        attributes = vars(model.get_submodule(stored.path)).items()
        for name in (name for name, value in attributes if _fits(name, value, stored)):
            key: VertexKey = (f"{stored.path}.{name}".lstrip("."), "size", stored.position)
            found.setdefault(key, np.where(line >= 0, labels[line], -1))
    return found


def couple_counted(
    graph: CouplingGraph, sizes: Sequence[StoredSize], equal: Sequence[Equal], labels: np.ndarray
) -> np.ndarray:
    """What must stay equally many goes together, channels of the same position: what one attribute counts here and
    there, and the channels of a tensor whose size was asked for with those of another.

    Returns:
        the units of the graph, ``labels`` if nothing changed.
    """
    before: np.ndarray | None = None
    while before is None or not np.array_equal(before, labels):
        before = labels
        lines: dict[tuple[str, str | None, int | None], list[np.ndarray]] = defaultdict(list)
        for stored, line in _along_one_axis([s for s in sizes if s.attribute], labels):
            lines[stored.path, stored.attribute, stored.position].append(line)
        pairs = [
            (first, other, "what an attribute counts is fixed elsewhere")
            for first, *others in lines.values()
            for other in others
            if len(other) == len(first)
        ]
        pairs += [
            (pair.line.numpy(), np.moveaxis(pair.ids.numpy(), pair.axis, -1).reshape(-1, len(pair.line)), pair.why)
            for pair in equal
        ]
        apart = labels
        for first, other, why in pairs:
            if not _as_many(apart, first, other):  # nor after the couplings made so far: a permutation is as many
                graph.couple(torch.from_numpy(first), torch.from_numpy(other), why)
                apart = _joined(apart, first, other)
        labels = graph.units() if apart is not labels else labels
    return labels


def _joined(labels: np.ndarray, first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The units once these channels are coupled."""
    one, two = labels[np.broadcast_to(first, other.shape)].ravel(), labels[other].ravel()
    free = (np.broadcast_to(first, other.shape).ravel() >= 0) & (other.ravel() >= 0)
    size = int(labels.max()) + 1
    links = coo_array((np.ones(int(free.sum()), dtype=np.int8), (one[free], two[free])), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)[labels]


def _as_many(labels: np.ndarray, first: np.ndarray, other: np.ndarray) -> bool:
    """Whether two lines of channels (the second: any number of them) lose equally many, whatever unit goes."""
    one, others = (np.sort(np.where(ids >= 0, labels[ids], -1), -1) for ids in (first, other))
    return bool((one == others).all())


def _along_one_axis(sizes: Sequence[StoredSize], labels: np.ndarray) -> Iterator[tuple[StoredSize, np.ndarray]]:
    """Those that count channels, and these; first those of which it is known where they were read.

    Any other number must count them one by one: it may be of an axis such as batch times heads.
    """
    for stored in sorted(sizes, key=lambda stored: stored.attribute is None):
        if varying_axes(stored.ids.numpy(), labels) != (stored.axis,):
            continue
        line = stored.ids.movedim(stored.axis, 0).reshape(stored.ids.shape[stored.axis], -1)[:, 0].numpy()
        if stored.attribute or len(np.unique(line[line >= 0])) == (line >= 0).sum():
            yield stored, line


def _fits(name: str, value: Any, stored: StoredSize) -> bool:
    """Whether an attribute may be where a forward has taken a size from."""
    if name.startswith("_") or stored.attribute not in (None, name):
        return False
    if stored.position is not None:
        return isinstance(value, (list, tuple)) and tuple(value) == stored.sizes
    return type(value) is int and value == stored.sizes[0]
