"""torch-pruning's dependency graphs as a source of couplings. No other file imports torch-pruning.

Its graph has a node for every layer, bare parameter and operation that autograd kept, and maps from the channels of one
to those of the next. torch-pruning walks these maps anew for every layer that it prunes, which need not end: where two
maps of a cycle disagree, the indices grow. Here every channel of every node is visited once, and none beyond the widest
layer: the units are the connected components, as in our own graph.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.adapters import adapt
from ..modules.functions import FunctionLayer
from ..modules.layers import Layer, RMSNorm, Side, kinds, layer_of, set_kind
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, seeded, twin
from .counts import Equal, StoredSize
from .graph import CouplingGraph, Vertex
from .shapes import Shapes
from .trace import names_of_tensors
from .work import Work

if TYPE_CHECKING:
    from torch_pruning import DependencyGraph
    from torch_pruning import Group as Group

Graph: TypeAlias = "DependencyGraph | Literal['torch-pruning'] | None"
GRAPH: Literal["torch-pruning"] = "torch-pruning"
SECONDS = 60.0  # for building a graph, and for reading it
REMEDY = "leave graph= out, and the operations of the model are followed instead"


def torch_pruning() -> Any:
    """torch-pruning, imported at first use: it takes seconds."""
    import torch_pruning

    return torch_pruning


class Dependencies:
    """The couplings that torch-pruning's graph says there are.

    Attributes:
        model: a copy of the model, with the classes that its modules have while they are gated.
        graph: the coupling graph.
        channel_dims: for every norm, its channel dimension, counted from the end.
        ends: by path, the sides of the layers that were met.
    """

    def __init__(self, model: nn.Module, dummy_input: Any, graph: DependencyGraph | Literal["torch-pruning"]) -> None:
        deadline = time.monotonic() + SECONDS
        self.model, self.graph = twin(model), CouplingGraph()
        adapt(self.model)
        self.channel_dims: dict[str, int] = {}
        # torch-pruning knows nothing of the sizes that modules store, nor of the work that is done between layers
        self.stored_sizes: list[StoredSize] = []
        self.equal: list[Equal] = []
        self.works: list[Work] = []
        self._shapes = Shapes(self.model, dummy_input)
        if isinstance(graph, str) and graph == GRAPH:
            model = twin(self.model)  # which is run with gradients; and its nodes hold what the run computed
            graphs = _built(model, dummy_input, self._shapes, deadline)
        else:
            check_graph(graph, model, self._shapes)
            graphs = [graph]
        self.ends: dict[str, dict[Side, Vertex]] = {}
        for source in graphs:
            self._register(source)
            _Walk(self, source, model, deadline).run()
        self._finish()

    def _register(self, graph: DependencyGraph) -> None:
        """Let modules that the graph has pruning functions for be cut by them, but for torch's own layers."""
        for kind, functions in graph.CUSTOMIZED_PRUNERS.items():
            own = not isinstance(kind, type) or kind.__module__.startswith("torch.nn.")
            if not own and isinstance(kinds().get(kind), (FunctionLayer, type(None))):
                axes = [axis for name in self._shapes.of(kind) if (axis := self._axis(name, functions)) is not None]
                set_kind(kind, FunctionLayer({}, {}, max(axes, default=1), opaque=True, functions=functions))

    def _axis(self, path: str, functions: Any) -> int | None:
        """Where the channels of a module lie that only its functions know: along axis 1, or the last one."""
        width = functions.get_in_channels(self.model.get_submodule(path))
        shapes = self._shapes.inputs[path]
        return next((axis for axis in (1, -1) if all(len(s) > 1 and s[axis] == width for s in shapes)), None)

    def layer(self, path: str) -> Layer | None:
        """The record of a module's kind."""
        return layer_of(self.model.get_submodule(path))

    def vertices(self, path: str, layer: Layer) -> dict[Side, Vertex]:
        """The sides of a layer; made, and coupled among themselves as its kind demands, at first use."""
        if path not in self.ends:
            module = self.model.get_submodule(path)
            ends = {side: self.graph.vertex(path, side, width) for side, width in layer.widths(module).items()}
            self.ends[path] = ends
            units = layer.units(module)
            self.graph.couple_units([(ends[side], numbers) for side, numbers in units.items()])
            if "out" in ends and not ("in" in units and bool(torch.isin(units["in"], units["out"]).any())):
                self.graph.producers.add(ends["out"].key)
            if "both" in ends:
                self._place(path, module, layer, ends["both"])
        return self.ends[path]

    def _place(self, path: str, module: nn.Module, layer: Layer, vertex: Vertex) -> None:
        """Note the channel dimension of what channels pass through."""
        for shape in self._shapes.inputs[path]:
            fits = [axis for axis in range(len(shape)) if shape[axis] == vertex.size]
            axis = layer.input_axis(module) % len(shape)
            if isinstance(module, (nn.LayerNorm, RMSNorm)) and axis not in fits:  # of a subclass that permutes
                axis = max(fits, default=axis)
            if axis not in fits:
                self.graph.freeze(vertex.ids, f"{path} gets other channels than it was made for")
            self.channel_dims[path] = axis - len(shape)

    def _finish(self) -> None:
        whole: tuple[str, ...] = ()  # what somebody's functions cut as one
        for path, module in self.model.named_modules():
            layer = layer_of(module)
            if isinstance(layer, FunctionLayer):
                whole += (f"{path}.",)
            elif layer and layer.mixes and path in self._shapes.inputs and not path.startswith(whole):
                if path not in self.ends:
                    why = f"the graph has no node for {path}: it was told to ignore it, or autograd did not follow it"
                    for vertex in self.vertices(path, layer).values():
                        self.graph.freeze(vertex.ids, why)
        _, tied = names_of_tensors(self.model)
        owners = {name.rpartition(".")[0] for name in tied}
        for vertex in self.graph.vertices.values():
            owner = vertex.path if vertex.dim is None else vertex.path.rpartition(".")[0]
            if vertex.path in tied or (vertex.dim is None and owner in owners):
                self.graph.freeze(vertex.ids, f"the weights of {owner} are tied to another layer")
            if vertex.side == "out" and vertex.path in self._shapes.returned:
                self.graph.freeze(vertex.ids, "the model returns these channels")


def _built(model: nn.Module, dummy_input: Any, shapes: Shapes, deadline: float) -> list[DependencyGraph]:
    """torch-pruning's graph of a copy: of its eval mode, and of its train mode where other modules run there."""
    name = type(model).__name__
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # else there is no graph

    class Guarded(torch_pruning().DependencyGraph):  # type: ignore[misc]
        # torch-pruning looks for numbers of channels along all paths at once, of which there may be any number

        def get_out_channels(self, module_or_node: Any) -> Any:
            _check_time(deadline, f"torch-pruning's graph of {name} is not built")
            return super().get_out_channels(module_or_node)

        def get_in_channels(self, module_or_node: Any) -> Any:
            _check_time(deadline, f"torch-pruning's graph of {name} is not built")
            return super().get_in_channels(module_or_node)

    def forward(mode: bool) -> Callable[[nn.Module, Any], list[Tensor]]:
        def run(model: nn.Module, inputs: Any) -> list[Tensor]:
            return [out for out in flatten_tensors(call(model.train(mode), inputs)) if out.grad_fn is not None]

        return run

    graphs = []
    for mode in [False, True] if set(shapes.inputs) - shapes.eval else [False]:
        try:
            with seeded(model), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it guesses, which is verified
                graph = Guarded().build_dependency(model, dummy_input, forward_fn=forward(mode), verbose=False)
        except FORWARD_ERRORS as error:
            what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise DNALError(f"torch-pruning cannot build its graph of {name} ({what}): {REMEDY}") from error
        graphs.append(graph)
    return graphs


def _check_time(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise DNALError(f"{what} within {SECONDS:g} seconds: {REMEDY}, or pass a smaller dummy_input")


def check_graph(graph: Any, model: nn.Module, shapes: Shapes) -> None:
    """Raise where this is no graph of the model as it is now, run on input of the same shape."""
    if not isinstance(graph, torch_pruning().DependencyGraph) or not hasattr(graph, "module2node"):
        raise DNALError(
            f"graph={graph!r}: pass None, {GRAPH!r}, or a torch_pruning.DependencyGraph behind its build_dependency()"
        )
    again = "build it again: tp.DependencyGraph().build_dependency(model, example_inputs)"
    if graph.model is not model:
        raise DNALError(f"graph= is the graph of another model ({type(graph.model).__name__}): {again}")
    paths = {id(module): name for name, module in model.named_modules()}
    present = {*paths, *map(id, model.parameters())}
    cut = bool(graph.pruning_history())
    for module, node in graph.module2node.items():
        if not type(module).__module__.startswith("torch_pruning"):  # of an operation
            cut = cut or id(module) not in present
        layer, path = layer_of(module) if isinstance(module, nn.Module) else None, paths.get(id(module))
        if cut or layer is None or path is None or not shapes.outputs[path]:
            continue
        verb, then = _recorded(node.grad_fn)
        now = [tuple(shape) for shape in (shapes.outputs if verb == "gives" else shapes.inputs)[path]]
        if not then or any(a[1:] == b[1:] for a in then for b in now):
            continue
        axis = layer.input_axis(module)
        cut = len(then[0]) == len(now[0]) and then[0][axis] != now[0][axis]
        if not cut:
            raise DNALError(
                f"graph= was built for another input: {path} {verb} {list(then[0])} there, and {list(now[0])} for the "
                f"dummy_input: {again}"
            )
    if cut:
        raise DNALError(f"graph= was built ahead of a cut of the model: {again}")


def _recorded(function: Any) -> tuple[Literal["gives", "gets"], list[tuple[int, ...]]]:
    """Shapes that autograd kept of the outputs of a layer; ahead of torch 2.3, of the input, where it kept that."""
    if hasattr(function, "_input_metadata"):
        return "gives", [tuple(made.shape) for made in function._input_metadata]
    try:
        saved = getattr(function, "_saved_input", None)
    except RuntimeError:  # freed by a backward pass
        saved = None
    return "gets", [tuple(saved.shape)] if isinstance(saved, Tensor) else []


class _Index(NamedTuple):
    """What torch-pruning's maps take, and make of it: a channel, and the one that it comes from."""

    idx: int
    root_idx: int


class _Walk:
    """One pass over the channels of all nodes of a graph.

    A *port* is a node and one of its two pruning functions. Those of layers have all their channels from the start;
    those of operations get them as they are reached.
    """

    def __init__(self, into: Dependencies, graph: DependencyGraph, model: nn.Module, deadline: float) -> None:
        self.into, self.source, self.deadline = into, graph, deadline
        self.paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.tensors = {id(p): name for name, p in model.named_parameters()}
        self.ports: dict[tuple[int, Any], Vertex | None] = {}  # None: a channel there is one too many
        self.between: dict[tuple[int, Any], dict[int, int]] = defaultdict(dict)
        self.queue: deque[tuple[Any, Any, np.ndarray]] = deque()
        self.widest = 1

    def run(self) -> None:
        graph = self.into.graph
        nodes = list(self.source.module2node.values())
        for node in nodes:
            self._open(node)
        while self.queue:
            node, function, channels = self.queue.popleft()
            _check_time(self.deadline, "torch-pruning's graph is not read")
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function):
                    self._follow(node, function, channels, dependency)
        for node in nodes:
            path = self.paths.get(id(node.module))
            if path in self.into.ends and "in" in (ends := self.into.ends[path]):
                graph.read_by(ends["in"], self._site(node))

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
        elif node.type == torch_pruning().ops.OPTYPE.OUTPUT:
            found = {into: None}
        for function, vertex in found.items():
            self.ports[id(node), function] = vertex
            if vertex is not None:
                self.widest = max(self.widest, vertex.size)
                self.queue.append((node, function, np.arange(vertex.size)))

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

    def _follow(self, node: Any, function: Any, channels: np.ndarray, dependency: Any) -> None:
        """Couple channels of a port with those of the next one."""
        here, there = self._mapped(dependency, channels)
        target, handler = dependency.target, dependency.handler
        ids = self._ids(node, function, here)
        fixed = f"torch-pruning's graph gives {target.name.partition(' ')[0]} channels that it does not have"
        if target.type == torch_pruning().ops.OPTYPE.OUTPUT:
            fixed = "the model returns these channels"
        known = self._reached(target, handler, there)
        self.into.graph.couple(torch.from_numpy(ids), torch.from_numpy(known), fixed)

    @staticmethod
    def _mapped(dependency: Any, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Channels, and those that they are in the target."""
        maps = [mapping for mapping in dependency.index_mapping if mapping is not None]
        if not maps:
            return channels, channels
        items: list[Any] = [_Index(channel, channel) for channel in channels.tolist()]
        for mapping in maps:
            mapped = mapping(items)
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

    def _reached(self, node: Any, function: Any, channels: np.ndarray) -> np.ndarray:
        """:meth:`_ids`, where an operation takes up any channel, and hands it on."""
        port = id(node), function
        if port not in self.ports:
            known = self.between[port]
            new = [c for c in dict.fromkeys(channels.tolist()) if c not in known and 0 <= c < self.widest]
            if new:
                known.update(zip(new, self.into.graph.reserve(len(new)).tolist()))
                self.queue.append((node, function, np.array(new, dtype=np.int64)))
        return self._ids(node, function, channels)

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
