"""Our groups as torch-pruning's, for what is written for those: its criteria, and users' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..modules.functions import FunctionLayer
from ..modules.layers import Layer, layer_of
from .dependency import torch_pruning
from .groups import ChannelGroup, Member

if TYPE_CHECKING:
    from .dependency import Group


def dependency_groups(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Group]:
    """Every group of channels that is not left whole, as a ``torch_pruning.Group`` over the modules of ``model``.

    Item 0 is the root: :func:`roots`' first. ``idxs`` are channels of each layer, ``root_idxs`` the places among the
    root's ``idxs`` that they go with: criteria return one score for each of those, which belongs to the unit that
    ``root.units`` says.
    """
    graph = _graph(model)
    return [_group(model, graph, g, roots(model, g)[0]) for g in groups if g.frozen is None and not g.choice]


def rooted(model: nn.Module, group: ChannelGroup, root: Member) -> Group:
    """One group as a ``torch_pruning.Group`` with another one of its :func:`roots`."""
    return _group(model, _graph(model), group, root)


def roots(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """What may be the root of a group: layers that make its channels, those that read or scale them, then parameters.

    Criteria take it for granted that what they look at first has as many channels as the root, and they look at no bare
    parameters, such as the projection of an attention.
    """
    able = [m for m in group.members if _target(model, m) is not None]

    def rank(member: Member) -> tuple[bool, int]:
        made = member.side != "in" and member.path in group.producers
        return member.bare, group.producers.index(member.path) if made else len(group.producers)

    return sorted(able, key=rank)


class _Record:
    """A kind of layer of ours, in the form of torch-pruning's pruning functions."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.pruning_dim = layer.axis

    def prune_out_channels(self, module: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return self._prune(module, "out" if self.layer.mixes else "both", idxs)

    def prune_in_channels(self, module: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return self._prune(module, "in", idxs)

    def _prune(self, module: nn.Module, side: Any, idxs: Sequence[int]) -> nn.Module:
        keep = torch.ones(self.layer.widths(module)[side], dtype=torch.bool)
        keep[list(idxs)] = False
        self.layer.cut(module, {side: keep})
        return module

    def get_out_channels(self, module: nn.Module) -> int | None:
        widths = self.layer.widths(module)
        return widths.get("out", widths.get("both"))

    def get_in_channels(self, module: nn.Module) -> int | None:
        widths = self.layer.widths(module)
        return widths.get("in", widths.get("both"))


def _graph(model: nn.Module) -> Any:
    """A dependency graph without nodes: what build_dependency sets, but for the dependencies, which groups hold."""
    graph = torch_pruning().DependencyGraph()
    vars(graph).update(
        model=model,
        module2node={},
        ignored_params=[],
        _module2name={module: name for name, module in model.named_modules()},
        _param_to_name={p: name for name, p in model.named_parameters()},
    )
    return graph


def _group(model: nn.Module, graph: Any, group: ChannelGroup, root: Member) -> Group:
    tp = torch_pruning()
    result = tp.Group()
    vars(result).update(_DG=graph)
    first = None
    seen = set()
    for member in (root, *(m for m in group.members if m is not root)):
        target = _target(model, member)
        if target is None:
            continue
        node = _node(graph, target, member)
        functions = _own_functions(target, member.side) or graph.get_pruner_of_module(node.module)
        handler = functions.prune_in_channels if member.side == "in" else functions.prune_out_channels
        if (node, handler) in seen:
            continue
        seen.add((node, handler))
        first = first or (node, handler)
        result.add_dep(tp.Dependency(first[1], handler, source=first[0], target=node), member.channels.tolist())
        result[len(result) - 1].root_idxs = _root_places(root, member)
    return result


def _target(model: nn.Module, member: Member) -> nn.Module | nn.Parameter | None:
    """The layer or parameter; None for what torch-pruning has no node for: buffers, sizes, layers without tensors."""
    owner, _, name = member.path.rpartition(".")
    if member.bare:
        return model.get_submodule(owner)._parameters.get(name)
    if member.side == "size" or layer_of(model.get_submodule(member.path)) is None:
        return None
    return model.get_submodule(member.path)


def _own_functions(target: nn.Module | nn.Parameter, side: str) -> _Record | None:
    """In place of torch-pruning's, where its criteria would look for more rows of a convolution than there are.

    The input side of one that makes several channels of each, whose rows are those of its output side, and the output
    side of a transposed one of groups. Criteria pass over functions that they do not know.
    """
    if not isinstance(target, nn.modules.conv._ConvNd) or target.groups in (1, target.out_channels):
        return None
    odd = side == "out" if target.transposed else side == "in" and target.groups == target.in_channels
    layer = layer_of(target) if odd else None
    return None if layer is None else _Record(layer)


def _node(graph: Any, module: Any, member: Member) -> Any:
    """The node of a layer or parameter; one each, however many groups it is in."""
    tp = torch_pruning()
    if module not in graph.module2node:
        layer = layer_of(module) if isinstance(module, nn.Module) else None
        if isinstance(layer, FunctionLayer):
            graph.register_customized_layer(type(module), layer.functions)
        elif layer is not None and tp.ops.module2type(module) == tp.ops.OPTYPE.ELEMENTWISE:
            graph.register_customized_layer(type(module), _Record(layer))
        node = tp.dependency.node.Node(module, None, member.path)
        node.pruning_dim = -1 if member.dim is None else member.dim
        graph.module2node[module] = node
    return graph.module2node[module]


def _root_places(root: Member, member: Member) -> list[int]:
    """For every channel of a member, the place of the root's channel that it goes with.

    Channels of one unit are dealt out in order: those of a flattened map lie side by side, and come from one.
    """
    order = np.argsort(root.units.numpy(), kind="stable")
    of_root = np.bincount(root.units.numpy())
    units = member.units.numpy()
    counts = np.bincount(units, minlength=len(of_root))
    rank = np.empty_like(units)
    by_unit = np.argsort(units, kind="stable")
    rank[by_unit] = np.arange(len(units)) - np.repeat(counts.cumsum() - counts, counts)
    places: list[int] = order[(of_root.cumsum() - of_root)[units] + rank * of_root[units] // counts[units]].tolist()
    return places
