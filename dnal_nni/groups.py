"""Channel groups: units of the coupling graph with the same producers, one gate each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_pruning import ops

from .graph import Conv, CouplingGraph, Norm, Side, Vertex, whole_groups

Site = Literal["norm", "input"]


@dataclasses.dataclass(frozen=True)
class Member:
    """What a group holds of one layer, in the coordinates of the uncut model.

    Attributes:
        path: dotted path of the module (of the parameter, where ``dim`` is not None).
        side: "out" or "in" of a convolution or linear layer; "both" for layers that pass channels through.
        channels: int64 ``[n]``, channel indices of that layer.
        units: int64 ``[n]``, the unit of the group that each of these channels belongs to.
        width: number of channels of that side of the layer, those of other groups included.
        dim: the channel dimension of a bare parameter; None for a module.
    """

    path: str
    side: Side
    channels: Tensor
    units: Tensor
    width: int
    dim: int | None = None


@dataclasses.dataclass
class ChannelGroup:
    """Channels of several layers that can only be removed together.

    Attributes:
        name: path of the first producing layer (in the order of ``model.named_modules()``); where a layer feeds
            several groups, followed by its first channel there: ``conv1[16:]``.
        channels: number of units (usually one channel each): the length of the gate.
        width: number of channels of the root layer in this group.
        members: every layer concerned.
        producers: the convolution and linear layers whose output channels these are.
        norms: norms on which a gate can act (empty: none).
        site: where the gate acts: on the affine of ``norms``, or at the input of the consumers.
        frozen: why the group is left whole, or None.
    """

    name: str
    channels: int
    width: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    site: Site = "input"
    frozen: str | None = None

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The layers that read these channels."""
        return tuple(m for m in self.members if m.side == "in")


def find_groups(model: nn.Module, dummy_input: Any) -> list[ChannelGroup]:
    """All channel groups of ``model``, in the order of their root layers; those that must stay whole say why.

    Args:
        model: any module; it is not changed.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    """
    graph = CouplingGraph(model, dummy_input)
    rank = {name: i for i, (name, _) in enumerate(graph.model.named_modules())}
    frozen = _frozen_units(graph)
    norm_sites = _norm_sites(graph)

    producers_of: dict[int, set[int]] = defaultdict(set)  # unit -> ids of producing nodes
    node_of: dict[int, Any] = {}
    touching: dict[int, set[tuple[int, Side]]] = defaultdict(set)  # unit -> keys of vertices
    for key, vertex in graph.vertices.items():
        module = vertex.node.module
        node_of[id(vertex.node)] = vertex.node
        produces = vertex.side == "out" and not whole_groups(module)
        for unit in np.unique(graph.units(vertex)):
            touching[int(unit)].add(key)
            if produces:
                producers_of[int(unit)].add(id(vertex.node))

    parts: dict[frozenset[int], list[int]] = defaultdict(list)
    for unit, producers in producers_of.items():
        parts[frozenset(producers)].append(unit)

    groups = []
    for shared_by, units in parts.items():
        paths = sorted((graph.path(node_of[p]) or "" for p in shared_by), key=rank.__getitem__)
        keys = set().union(*(touching[unit] for unit in units))
        vertices = [graph.vertices[key] for key in keys]
        vertices.sort(key=lambda v: (rank.get(graph.path(v.node) or "", -1), graph.name(v.node), v.side))
        groups.append(_make_group(graph, paths, vertices, np.sort(np.asarray(units)), frozen, norm_sites))
    groups.sort(key=lambda group: (rank[group.producers[0]], _first_channel(group)))
    repeated = {g.name for g in groups if sum(h.name == g.name for h in groups) > 1}
    for group in groups:
        if group.name in repeated:
            group.name = f"{group.name}[{_first_channel(group)}:]"
    return groups


def _root(group: ChannelGroup) -> Member:
    return next(m for m in group.members if m.path == group.producers[0] and m.side == "out")


def _first_channel(group: ChannelGroup) -> int:
    return int(_root(group).channels.min())


def _make_group(
    graph: CouplingGraph,
    producers: list[str],
    vertices: list[Vertex],
    units: np.ndarray,
    frozen: dict[int, str],
    norm_sites: dict[tuple[int, Side], frozenset[str] | None],
) -> ChannelGroup:
    root = next(v for v in vertices if graph.path(v.node) == producers[0] and v.side == "out")
    # units are numbered in the order of the root's channels, whatever labels the graph gave them
    in_root = [u for u in graph.units(root) if u in set(units.tolist())]
    number = {u: i for i, u in enumerate(dict.fromkeys(in_root))}
    members = []
    for vertex in vertices:
        path = graph.path(vertex.node)
        if path is None:
            continue
        labels = graph.units(vertex)
        channels = np.flatnonzero(np.isin(labels, units))
        members.append(
            Member(
                path,
                vertex.side,
                torch.from_numpy(channels),
                torch.tensor([number[u] for u in labels[channels]], dtype=torch.int64),
                vertex.size,
                vertex.node.pruning_dim if isinstance(vertex.node.module, nn.Parameter) else None,
            )
        )
    reason = next((frozen[int(u)] for u in units if int(u) in frozen), None)
    consumers = [m for m in members if m.side == "in"]
    if reason is None and not consumers:
        reason = "no layer reads its output"
    if reason is None and len(units) < 2:
        reason = "its channels can only be removed all at once"
    paths = {m.path for m in members}
    sites = [norm_sites[id(v.node), v.side] for v in vertices if v.side == "in"]
    norms: tuple[str, ...] = ()
    if sites and all(site is not None for site in sites):
        union = frozenset().union(*(site for site in sites if site is not None))
        norms = tuple(m.path for m in members if m.path in union and m.path in paths)
    return ChannelGroup(
        name=producers[0],
        channels=len(units),
        width=len(in_root),
        members=tuple(members),
        producers=tuple(producers),
        norms=norms,
        site="norm" if norms else "input",
        frozen=reason,
    )


def _frozen_units(graph: CouplingGraph) -> dict[int, str]:
    """Units that must stay, with the reason."""
    frozen: dict[int, str] = {}

    def freeze(vertex: Vertex, reason: str, channels: Iterable[int] | None = None) -> None:
        labels = graph.units(vertex)
        for unit in labels if channels is None else labels[list(channels)]:
            frozen.setdefault(int(unit), reason)

    tied = defaultdict(list)
    for name, parameter in graph.model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    shared = {name.rpartition(".")[0] for names in tied.values() if len(names) > 1 for name in names}
    for vertex in graph.vertices.values():
        node, module = vertex.node, vertex.node.module
        where = graph.name(node)
        if vertex.trouble:
            freeze(vertex, vertex.trouble)
        if graph.is_output(node) and vertex.side != "in":
            freeze(vertex, f"the model returns the output of {where}")
        if isinstance(module, nn.Module) and not isinstance(module, (Conv, nn.Linear, *Norm, nn.PReLU)):
            if graph.path(node) is not None and next(module.parameters(), None) is not None:
                freeze(vertex, f"{type(module).__name__} {where} mixes its channels, or cannot be cut")
        if isinstance(module, nn.Module) and parametrize.is_parametrized(module):
            freeze(vertex, f"the weight of {where} is computed from other tensors (parametrized)")
        elif graph.two_sided(node) and "weight" not in module._parameters:
            freeze(vertex, f"the weight of {where} is not a parameter (weight norm, or a wrapper)")
        if graph.path(node) in shared:
            freeze(vertex, f"the weights of {where} are tied to another layer")
        if vertex.side == "in" and node.inputs:
            # a layer that reads the model's input beside the group's channels, or channels that nobody accounts for
            fed = {int(u) for source in node.inputs for u in graph.units(graph.vertex(source, "out"))}
            if len({int(u) for u in graph.units(vertex)} - fed) > 0:
                freeze(vertex, f"not every input channel of {where} is accounted for")
    return frozen


def _carries(size: int, width: int) -> bool:
    """Whether an input of ``size`` channels brings the channels of a tensor of ``width``, and is not broadcast."""
    return size > 1 if width > 1 else size > 0


def _norm_sites(graph: CouplingGraph) -> dict[tuple[int, Side], frozenset[str] | None]:
    """For the input of every layer: the norms that a channel passes last on its way there.

    A gate on the affine of those zeroes the channel, as far as the graph can tell; None where some way there passes no
    norm. Of the factors of a product one is enough.
    """
    sites: dict[int, frozenset[str] | None] = {}
    result: dict[tuple[int, Side], frozenset[str] | None] = {}
    for node in graph.order:
        module = node.module
        width = graph.vertex(node, "in").size
        arriving = [
            sites.get(id(source))
            for source in node.inputs
            if not isinstance(source.module, nn.Parameter) and _carries(graph.vertex(source, "out").size, width)
        ]
        through: frozenset[str] | None
        if not arriving:
            through = None
        elif node.type == ops.OPTYPE.ELEMENTWISE and "mul" in graph.name(node).lower() and not graph.path(node):
            through = next((site for site in arriving if site is not None), None)
        elif any(site is None for site in arriving):
            through = None
        else:
            through = frozenset().union(*(site for site in arriving if site is not None))
        if graph.two_sided(node):
            result[id(node), "in"] = through
            # a depthwise convolution without bias keeps a zero channel zero
            sites[id(node)] = through if whole_groups(module) and module.bias is None else None
        elif isinstance(module, Norm) and getattr(module, "weight", None) is not None and module.bias is not None:
            sites[id(node)] = frozenset([graph.path(node) or ""])
        else:
            sites[id(node)] = through
    return result
