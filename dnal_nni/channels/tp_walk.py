"""One pass over the maps of a dependency graph of torch-pruning: which channels of which layers it couples."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.layers import Layer, layer_of
from .deadline import REMEDY
from .graph import Vertex

if TYPE_CHECKING:
    from .dependency import Dependencies, DependencyGraph

GRAPH: Literal["torch-pruning"] = "torch-pruning"


def _is_output(node: Any) -> bool:
    return bool(node.type.name == "OUTPUT")


class _Index(NamedTuple):
    """What torch-pruning's maps take, and make of it: a channel, and the one that it comes from."""

    idx: int
    root_idx: int


class _Step(NamedTuple):
    """Channels of a port that are to be followed, and whether a map has led to them."""

    node: Any
    function: Any
    channels: np.ndarray
    mapped: bool


class Walk:
    """All channels of all nodes of a graph, followed along its maps once.

    A *port* is a node and one of its two pruning functions. Those of layers have all their channels from the start;
    those of operations get them as they are reached. Where a port is reached, through no map, by more channels than it
    has, these were positions (a transpose is no operation to torch-pruning): the walk is done anew without that edge.
    """

    def __init__(self, into: Dependencies, graph: DependencyGraph, model: nn.Module) -> None:
        self.into, self.source = into, graph
        self.paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.tensors = {id(p): name for name, p in model.named_parameters()}
        self.ports: dict[tuple[int, Any], Vertex | None] = {}  # None: a channel there is one too many
        self.starts: list[tuple[Any, Any, Vertex]] = []
        self.between: dict[tuple[int, Any], dict[int, int]] = defaultdict(dict)
        self.apart: set[frozenset[int]] = set()  # nodes that no edge joins
        self.queue: deque[_Step] = deque()

    def run(self) -> None:
        graph = self.into.graph
        nodes = list(self.source.module2node.values())
        for node in nodes:
            self._open(node)
        self.widest = max((vertex.size for _, _, vertex in self.starts), default=1)
        known = -1
        while known < len(self.apart):
            known = len(self.apart)
            found = self._coupled()
        for ids, others, fixed in found:
            graph.couple(torch.from_numpy(ids), torch.from_numpy(others), fixed)
        for node in nodes:
            path = self.paths.get(id(node.module))
            if path in self.into.ends and "in" in (ends := self.into.ends[path]):
                graph.read_by(ends["in"], self._site(node))

    def _coupled(self) -> list[tuple[np.ndarray, np.ndarray, str]]:
        """Ids that stand and fall together, along all edges but those of :attr:`apart`; and why a missing one is."""
        self.between.clear()
        self.queue.extend(
            _Step(node, function, np.arange(vertex.size), False) for node, function, vertex in self.starts
        )
        found = []
        while self.queue:
            step = self.queue.popleft()
            for dependency in step.node.dependencies:
                joined = frozenset((id(step.node), id(dependency.target))) not in self.apart
                if joined and dependency.is_triggered_by(step.function):
                    found.append(self._follow(step, dependency))
        return found

    def _open(self, node: Any) -> None:
        """Make the ports of a layer or parameter, with all its channels."""
        module, functions = node.module, self.source.get_pruner_of_module(node.module)
        into, out = functions.prune_in_channels, functions.prune_out_channels
        tensor, path = self.tensors.get(id(module)), self.paths.get(id(module))
        found: dict[Any, Vertex | None] = {}
        if tensor is not None:
            if not any(module is ignored for ignored in self.source.ignored_params):
                found[out] = self._parameter(tensor, module, node.pruning_dim % module.dim())
        elif path is not None:
            layer = self.into.layer(path)
            if layer is not None:
                ends = self.into.vertices(path, layer)
                if into == out:
                    found[out] = self._joined(path, list(ends.values()))
                else:
                    found = {into: ends.get("in", ends.get("both")), out: ends.get("out", ends.get("both"))}
            elif functions.get_out_channels(module) is not None:
                found = {into: None, out: None}  # one layer to torch-pruning, and none to us
        elif _is_output(node):
            found = {into: None}
        for function, vertex in found.items():
            self.ports[id(node), function] = vertex
            if vertex is not None:
                self.starts.append((node, function, vertex))

    def _parameter(self, name: str, tensor: Tensor, dim: int) -> Vertex:
        """The vertex of a dimension of a bare parameter; that of its owner, where we know that as a layer."""
        owner, _, own = name.rpartition(".")
        module = self.into.model.get_submodule(owner)
        layer = layer_of(module)
        side = next((side for side, d in layer.dims(module, own).items() if d == dim), None) if layer else None
        if layer is not None and side is not None:
            return self.into.vertices(owner, layer)[side]
        return self.into.graph.vertex(name, "both", tensor.shape[dim], dim)

    def _joined(self, path: str, ends: Sequence[Vertex]) -> Vertex:
        """One port for all sides of a layer that channels pass one by one."""
        first, *others = ends
        for other in others:
            if other.size == first.size:
                self.into.graph.couple(first.ids, other.ids, "")
            else:
                self.into.graph.freeze(other.ids, f"{GRAPH} takes {path} for a depthwise convolution")
                self.into.graph.freeze(first.ids, f"{GRAPH} takes {path} for a depthwise convolution")
        return first

    def _follow(self, step: _Step, dependency: Any) -> tuple[np.ndarray, np.ndarray, str]:
        """Channels of a port and those of the next one that they are coupled with, as ids."""
        here, there = self._mapped(dependency, step.channels)
        target, handler = dependency.target, dependency.handler
        ids = self._ids(step.node, step.function, here)
        fixed = f"torch-pruning's graph gives {target.name.partition(' ')[0]} channels that it does not have"
        if _is_output(target):
            fixed = "the model returns these channels"
        mapped = step.mapped or any(dependency.index_mapping)
        port = self.ports.get((id(target), handler))
        if port is not None and not mapped and bool((there >= port.size).any()):
            self.apart.add(frozenset((id(step.node), id(target))))
        return ids, self._reached(_Step(target, handler, there, mapped)), fixed

    @staticmethod
    def _mapped(dependency: Any, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Channels, and those that they are in the target."""
        maps = [mapping for mapping in dependency.index_mapping if mapping is not None]
        if not maps:
            return channels, channels
        items: list[Any] = [_Index(channel, channel) for channel in channels.tolist()]
        for mapping in maps:
            try:
                mapped = mapping(items)
            except Exception as error:  # torch-pruning's guesses: of grouped queries, and of heads of no width
                what = f"{type(error).__name__}: {error}"
                raise DNALError(f"torch-pruning's graph has a map that fails ({what}): {REMEDY}") from error
            if any(item.root_idx is None for item in mapped):  # of grouped queries: one for one, in order
                mapped = [_Index(new.idx, old.root_idx) for old, new in zip(items, mapped)]
            items = mapped
        return np.array([i.root_idx for i in items], dtype=np.int64), np.array([i.idx for i in items], dtype=np.int64)

    def _ids(self, node: Any, function: Any, channels: np.ndarray) -> np.ndarray:
        """The ids of channels of a port; -1 for those that it does not have."""
        port = id(node), function
        if port not in self.ports:
            known = self.between[port]
            return np.array([known.get(channel, -1) for channel in channels.tolist()], dtype=np.int64)
        vertex = self.ports[port]
        if vertex is None:
            return np.full_like(channels, -1)
        return np.where((channels >= 0) & (channels < vertex.size), channels + vertex.offset, -1)

    def _reached(self, step: _Step) -> np.ndarray:
        """:meth:`_ids`, where an operation takes up any channel, and hands it on."""
        port = id(step.node), step.function
        if port not in self.ports:
            known = self.between[port]
            new = [c for c in dict.fromkeys(step.channels.tolist()) if c not in known and 0 <= c < self.widest]
            if new:
                known.update(zip(new, self.into.graph.reserve(len(new)).tolist()))
                self.queue.append(step._replace(channels=np.array(new, dtype=np.int64)))
        return self._ids(step.node, step.function, step.channels)

    def _site(self, node: Any) -> frozenset[str] | None:
        """The norms that channels pass last on their way to a layer; None where some way there passes none."""
        found, seen, stack = set(), set(), list(node.inputs)
        while stack:
            before = stack.pop()
            if id(before) in seen:
                continue
            seen.add(id(before))
            module, path = before.module, self.paths.get(id(before.module))
            layer = self.into.layer(path) if path is not None else None
            if path is None or layer is None:
                if id(module) in self.tensors:
                    return None
                stack += before.inputs
            elif layer.zero == "affine" and getattr(module, "weight", None) is not None:
                found.add(path)
            elif layer.zero == "input" or self._each_by_itself(path, layer, module):
                stack += before.inputs
            else:
                return None
        return frozenset(found) if found else None

    def _each_by_itself(self, path: str, layer: Layer, module: nn.Module) -> bool:
        """Whether an output channel is zero where its input channel is: a depthwise convolution without a bias."""
        out = self.into.vertices(path, layer).get("out")
        return out is not None and out.key not in self.into.graph.producers and getattr(module, "bias", None) is None
