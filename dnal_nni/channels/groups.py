"""Channel groups: units of the coupling graph in the same layers, one gate each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import DNALError
from ..modules.adapters import adapt
from ..modules.choices import choices_of
from ..modules.layers import Norm, Side
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, rejected, seeded, twin
from .dependency import Dependencies, Graph
from .graph import Site as GraphSite
from .graph import Vertex, VertexKey, on_norms
from .stored import couple_counted, stored_sizes
from .trace import Trace, takes_gate
from .work import shares

Site = Literal["norm", "input", "output", "both"]


@dataclasses.dataclass(frozen=True)
class Member:
    """What a group holds of one layer, in the coordinates of the uncut model.

    Attributes:
        path: dotted path of the module; of the parameter or buffer, where ``dim`` is not None; of the attribute
            (``blocks.0.attn.num_heads``), where ``side`` is "size".
        side: "out" or "in" of a convolution or linear layer; "both" for what channels pass through; "size" for a number
            that a module keeps about its channels; "choice" for candidates of a supernet, which are not channels.
        channels: int64 ``[n]``, channel indices of that layer.
        units: int64 ``[n]``, the unit of the group that each of these channels belongs to.
        width: number of channels of that side of the layer, those of other groups included.
        dim: the channel dimension of a bare parameter or buffer; the position in a stored list of sizes; else None.
        axis: for a norm, the channel dimension of its input, counted from the end; else None.
        reads: whether these are the input channels of a parameter that a function computes with (``F.linear(x, w)``).
    """

    path: str
    side: Side
    channels: Tensor
    units: Tensor
    width: int
    dim: int | None = None
    axis: int | None = None
    reads: bool = False

    @property
    def bare(self) -> bool:
        """Whether this is a parameter or buffer that the forward reads itself."""
        return self.side != "size" and self.dim is not None

    @property
    def module(self) -> str:
        """Path of the module that this is, or that has it."""
        return self.path.rpartition(".")[0] if self.bare or self.side == "size" else self.path


@dataclasses.dataclass(frozen=True)
class Part:
    """What an operation outside of layers costs with the channels of a group.

    Attributes:
        path: the module in whose forward it runs.
        share: what the operation costs, of all that the module's own operations cost.
        operation: its number; with several factors it grows with the product of their open shares.
        factor: number of the factor.
        units: int64 ``[n]``, the units of the group that the factor has, as often as it has them.
        width: how many channels the factor has, those of other groups included.
    """

    path: str
    share: float
    operation: int
    factor: int
    units: Tensor
    width: int


@dataclasses.dataclass(repr=False)
class ChannelGroup:
    """Channels of several layers that can only be removed together.

    Attributes:
        name: path of the first producing layer (in the order of ``model.named_modules()``); where a layer feeds
            several groups, followed by its first channel there: ``conv1[16:]``.
        channels: number of units (usually one channel each): the length of the gate.
        width: number of channels of the root layer in this group.
        members: every layer concerned.
        parts: operations outside of layers that cost less with fewer of these channels.
        producers: the convolution and linear layers whose output channels these are.
        norms: norms on which a gate can act (empty: none); where channels are added up, layers too.
        site: where the gate acts: "norm", on the affine of ``norms``; "input", at the input of the consumers; "output",
            on the output of ``norms``, or of candidates of a supernet; "both", there and at the consumers.
        frozen: why the group is left whole, or None.
        least: units that must stay.
        most: candidates that may stay at the end of a search; None: all.
        source: what a reason says of the graph that the group is from, where that is not ours.
    """

    name: str
    channels: int
    width: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    site: Site = "input"
    frozen: str | None = None
    least: int = 1
    most: int | None = None
    parts: tuple[Part, ...] = ()
    source: str = ""

    def __repr__(self) -> str:
        layers = len({member.path for member in self.members})
        what = f"{self.channels} {'candidates' if self.choice else 'units'} of {layers} layer{'s' * (layers > 1)}"
        return f"<{self.name}: {what}, {f'left whole: {self.frozen}' if self.frozen else f'gate: {self.site}'}>"

    @property
    def choice(self) -> bool:
        """Whether the units are not channels, but candidates or blocks of a supernet."""
        return self.members[0].side == "choice"

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The layers that read these channels."""
        return tuple(m for m in self.members if m.side == "in")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A vertex or a stored size, and the unit of each of its channels (-1: fixed)."""

    key: VertexKey
    units: np.ndarray


def trace(model: nn.Module, dummy_input: Any) -> Trace:
    """The coupling graph of ``model``: one run in eval mode, one in train mode where the model has one.

    It is a twin that runs, with the parameters of ``model``.

    Raises:
        DNALError: the model returns no tensor, or nothing but NaN and infinity.
    """
    try:
        return _traced(model, dummy_input)
    except FORWARD_ERRORS:
        return _traced(model, dummy_input, plain=True)


def _traced(model: nn.Module, dummy_input: Any, plain: bool = False) -> Trace:
    """See :func:`trace`; ``plain`` as for :meth:`Trace.run`."""
    model = twin(model)
    adapt(model)
    result = Trace(model)
    with seeded(model):
        model.eval()
        tensors = result.run(dummy_input, plain)
        if not tensors:
            raise DNALError(
                "no tensor is found in what the model returns, so that there is nothing to compare a cut network by: "
                "give outputs=f, a function from what it returns to its tensors"
            )
        returned = [out for out in tensors if out.numel()]
        if returned and not any(bool(out.isfinite().any()) for out in returned):
            raise DNALError("the model returns no finite number for the dummy_input: check its weights for NaN")
        model.train()
        for way in [plain] if plain else [False, True]:
            try:
                result.run(dummy_input, way)
                break
            except FORWARD_ERRORS:
                pass  # detection models want targets there: train mode is then not verified either
    result.finish()
    return result


def find_groups(model: nn.Module, dummy_input: Any, graph: Graph = None) -> list[ChannelGroup]:
    """All channel groups of ``model``, in the order of their root layers; those that must stay whole say why.

    Args:
        model: any module; it is not changed.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        graph: None: the operations of the model are followed. "torch-pruning": its dependency graph is built, and read;
            or such a graph, built of this very model.
    """
    traced = trace(model, dummy_input) if graph is None else Dependencies(model, dummy_input, graph)
    groups = _grouped(traced)
    for group in groups if graph is not None else ():
        group.source = " (by torch-pruning's graph)"
        group.frozen = group.frozen and group.frozen + group.source
    groups += _choice_groups(traced.model)
    vars(traced).clear()  # a circle: its copy of the model would stay up to some garbage collection
    return groups


def _grouped(traced: Trace | Dependencies) -> list[ChannelGroup]:
    """The groups of channels that a graph amounts to."""
    graph = traced.graph
    for vertex in graph.vertices.values():
        reason = _uncuttable(traced.model, vertex)
        if reason is not None:
            graph.freeze(vertex.ids, reason)
    labels = couple_counted(graph, traced.stored_sizes, traced.equal, graph.units())
    frozen = graph.frozen_units(labels)

    slots = [_Slot(v.key, labels[v.offset : v.offset + v.size]) for v in graph.vertices.values()]
    slots += [_Slot(*found) for found in stored_sizes(traced.model, traced.stored_sizes, labels).items()]
    modules = {name: i for i, (name, _) in enumerate(traced.model.named_modules())}

    def rank(path: str) -> tuple[int, str]:
        return modules.get(path, modules.get(path.rpartition(".")[0], -1)), path

    slots.sort(key=lambda slot: (rank(slot.key[0]), slot.key[1], -1 if slot.key[2] is None else slot.key[2]))
    touching: dict[int, list[int]] = defaultdict(list)  # unit -> slots
    for i, slot in enumerate(slots):
        for unit in np.unique(slot.units[slot.units >= 0]):
            touching[int(unit)].append(i)
    # one group for all units in the same layers: whatever its gate leaves open, no layer is left without channels
    parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for unit, where in touching.items():
        parts[tuple(where)].append(unit)
    sums = graph.sums(labels)
    made = [
        _make_group(traced, [slots[i] for i in where], units, frozen, [s for u in units for s in sums.get(u, ())])
        for where, units in parts.items()
        if any(slots[i].key in graph.producers for i in where)
    ]
    groups = [group for group, _ in made]
    _add_parts(traced, labels, made)
    groups.sort(key=lambda group: (rank(group.producers[0]), _first_channel(group)))
    names = [g.name for g in groups]
    for group in groups:
        if names.count(group.name) > 1:
            group.name = f"{group.name}[{':, ' * (_root(group).dim or 0)}{_first_channel(group)}:]"
    return groups


def _choice_groups(model: nn.Module) -> list[ChannelGroup]:
    """One group for all choices of a label; exact by construction, whatever the rest of the network is."""
    members: dict[str, list[Member]] = defaultdict(list)
    limits = {}
    for path, choice in choices_of(model).items():
        every = torch.arange(len(choice.units))
        members[choice.label].append(Member(path, "choice", every, every, len(every)))
        limits[choice.label] = choice.least, choice.most
        if len(every) != members[choice.label][0].width:
            raise DNALError(
                f"{path} and {members[choice.label][0].path} have the label {choice.label!r}, but {len(every)} and "
                f"{members[choice.label][0].width} candidates: one decision needs the same ones everywhere"
            )
    return [
        ChannelGroup(same[0].path, same[0].width, same[0].width, tuple(same), (), (), "output", None, least, most)
        for same, (least, most) in zip(members.values(), limits.values())
    ]


def groups_of(model: nn.Module, dummy_input: Any, graph: Graph = None) -> list[ChannelGroup]:
    """:func:`find_groups` for a user's model and input: a :class:`DNALError` says what is wrong with them."""
    if any(x.numel() == 0 for x in flatten_tensors(dummy_input)):
        raise DNALError("the dummy_input has no elements: give it a batch of at least one")
    try:
        return find_groups(model, dummy_input, graph)
    except FORWARD_ERRORS as error:
        try:  # is it the model's own?
            with torch.no_grad():
                call(twin(model).eval(), dummy_input)
        except FORWARD_ERRORS as own:
            raise DNALError(rejected(dummy_input, own)) from own
        raise DNALError(f"the graph of {type(model).__name__} cannot be read: {error}") from error


def _root(group: ChannelGroup) -> Member:
    return next(m for m in group.members if m.path == group.producers[0] and m.side != "in")


def _first_channel(group: ChannelGroup) -> int:
    return int(_root(group).channels.min())


def _uncuttable(model: nn.Module, vertex: Vertex) -> str | None:
    path = vertex.path if vertex.dim is None else vertex.path.rpartition(".")[0]
    module = model.get_submodule(path)
    if isinstance(module, torch.jit.ScriptModule):
        return f"torch.jit has compiled {path or 'the model'}: nothing can be removed from it"
    if vertex.dim is not None:
        return None
    if isinstance(module, Norm) and parametrize.is_parametrized(module):
        return f"the affine of {path} is computed from other tensors (parametrized)"
    stateful = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    if parametrize.is_parametrized(module):
        stateful = next(module.get_submodule("parametrizations").buffers(), None) is not None
    if stateful:
        return f"every forward in train mode changes how the weight of {path} is computed (spectral norm)"
    return None


def _make_group(
    traced: Trace | Dependencies, slots: list[_Slot], units: list[int], frozen: dict[int, str], sums: list[GraphSite]
) -> tuple[ChannelGroup, dict[int, int]]:
    """The group of these units of the graph, and the number that each has in it."""
    sources = [slot for slot in slots if slot.key in traced.graph.producers]
    root = sources[0]
    # units are numbered in the order of the root's channels, whatever labels the graph gave them
    in_root = root.units[np.isin(root.units, units)]
    number = {u: i for i, u in enumerate(dict.fromkeys(in_root.tolist()))}
    known, local = np.array(sorted(number)), np.array([i for _, i in sorted(number.items())])
    members = []
    sites = {slot.key: traced.graph.sites[slot.key] for slot in slots if slot.key in traced.graph.sites}
    for slot in slots:
        path, side, dim = slot.key
        place = np.searchsorted(known, slot.units).clip(max=len(known) - 1)
        channels = np.flatnonzero(known[place] == slot.units)
        axis = traced.channel_dims.get(path) if side == "both" and dim is None else None
        ours, numbers = torch.from_numpy(channels), torch.from_numpy(local[place[channels]])
        reads = dim is not None and slot.key in sites
        members.append(Member(path, side, ours, numbers, len(slot.units), dim, axis, reads))
    norms, site = _where_zeroed(members, list(sites.values()), sums)
    without_gate = [m.path for m in members if m.reads and not takes_gate(traced.model, m.path)]
    reason = next((frozen[u] for u in units if u in frozen), None)
    if len(root.units) == 1:
        reason = "it has a single channel"
    if reason is None and not sites and not sums:
        reason = "no layer reads its output"
    if reason is None and len(units) < 2:
        reason = "its channels can only be removed all at once"
    if reason is None and without_gate and site in ("input", "both"):
        reason = f"a function reads these channels with {without_gate[0]}, which is no parameter that a gate can sit on"
    group = ChannelGroup(
        name=root.key[0],
        channels=len(units),
        width=len(in_root),
        members=tuple(members),
        producers=tuple(dict.fromkeys(slot.key[0] for slot in sources)),
        norms=norms,
        site=site,
        frozen=reason,
    )
    return group, number


def _where_zeroed(
    members: list[Member], readers: list[GraphSite], sums: list[GraphSite]
) -> tuple[tuple[str, ...], Site]:
    """The layers on which a gate zeroes a group's channels where they are read or added up, and how it acts.

    Outputs of layers are gated only where they must be, for the sake of sums: it costs memory.
    """
    where: Site = "norm" if all(map(on_norms, [*readers, *sums])) else "output" if sums else "input"
    if where == "output" and None in readers:
        where, readers = "both", []
    union: set[Any] = set().union(*(site for site in [*readers, *sums] if site is not None))
    norms = tuple(m.path for m in members if (m.side == "both" and m.path in union) or (m.path, m.side, m.dim) in union)
    return (norms, where) if norms and where != "input" else ((), "input")


def _add_parts(
    traced: Trace | Dependencies, labels: np.ndarray, made: list[tuple[ChannelGroup, dict[int, int]]]
) -> None:
    """Tell every group which operations outside of layers its channels take part in."""
    group_of = np.full(labels.max(initial=-1) + 1, -1)
    number_of = group_of.copy()
    for i, (_, number) in enumerate(made):
        units = np.array(list(number))
        group_of[units], number_of[units] = i, np.array(list(number.values()))
    parts: dict[int, list[Part]] = defaultdict(list)
    for operation, (work, share) in enumerate(zip(traced.works, shares(traced.works))):
        for factor, line in enumerate(work.independent(labels)):
            units = line[line >= 0]
            groups = group_of[units]
            for i in np.unique(groups[groups >= 0]).tolist():
                numbers = torch.from_numpy(number_of[units[groups == i]])
                parts[i].append(Part(work.path, share, operation, factor, numbers, line.size))
    for i, entries in parts.items():
        made[i][0].parts = tuple(entries)
