"""torch-pruning's dependency graph, read into units: sets of channels that can only be removed together.

torch-pruning traces the model and knows how indices map through concat, split, flatten and slice. Its own group closure
is not used: it never returns on some models and merges self-coupled channels. Here every channel of every tensor side
is a vertex, every edge of the graph couples vertices, and a unit is a connected component: linear time, always ends.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping, shape_infer
from torch_pruning.dependency.graph import DependencyGraph

Conv = nn.modules.conv._ConvNd
Norm = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
Counted = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample)  # hold no tensors, but fvcore counts them
Side = Literal["out", "in", "both"]


def whole_groups(conv: nn.Module) -> bool:
    """Whether a grouped convolution loses whole groups (input and output channels together), depthwise included.

    Otherwise every group loses the same positions. Either is exact; the one that leaves more freedom is taken.
    """
    return isinstance(conv, Conv) and 1 < conv.groups >= conv.in_channels // conv.groups


@dataclasses.dataclass
class Vertex:
    """One side of one node: the channels ``offset .. offset + size`` of the coupling graph."""

    node: Any
    side: Side
    size: int = 0
    offset: int = 0
    trouble: str | None = None


def flatten_tensors(out: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns: nested lists, tuples, dicts, dataclasses, None and numbers included."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from flatten_tensors(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from flatten_tensors(value)
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        for field in dataclasses.fields(out):
            yield from flatten_tensors(getattr(out, field.name))


def call(model: nn.Module, dummy_input: Any) -> Any:
    """Run the model on a tensor, on a tuple or list of positional arguments, or on a dict of keyword arguments."""
    if isinstance(dummy_input, Mapping):
        return model(**dummy_input)
    if isinstance(dummy_input, (list, tuple)):
        return model(*dummy_input)
    return model(dummy_input)


class CouplingGraph:
    """The coupled channels of ``model``, as torch-pruning sees them on one example input.

    Args:
        model: any module; it is traced on a copy in eval mode and left as it is.
        dummy_input: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Attributes:
        vertices: by ``(id(node), side)``.
        order: nodes, producers ahead of consumers.
        labels: int array; the unit of every channel of every vertex.
    """

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # torch-pruning follows autograd; frozen layers would be invisible
        self.paths = {module: name for name, module in self.model.named_modules()}
        self.parameter_paths = {id(p): name for name, p in self.model.named_parameters()}
        self._trouble: dict[int, str] = {}
        self._outputs: set[Any] = set()
        self._counted: dict[Any, str] = {}  # grad_fn -> path of the pooling module that made it
        self.nodes = self._trace(dummy_input)
        self.order = self._topological_order()
        self.vertices: dict[tuple[int, Side], Vertex] = {}
        self.labels = self._couple()

    # -- tracing ------------------------------------------------------------------------------------------------------

    def _trace(self, dummy_input: Any) -> list[Any]:
        graph = DependencyGraph()
        graph.verbose = False
        graph.model = self.model
        graph._module2name = dict(self.paths)
        graph.ignored_params = []
        graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)

        def forward(module: nn.Module, inputs: Any) -> list[Tensor]:
            outputs = [o for o in flatten_tensors(call(module, inputs)) if o.grad_fn is not None]
            self._outputs = {o.grad_fn for o in outputs}
            return outputs

        def record(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._counted[output.grad_fn] = self.paths[module]

        hooks = [m.register_forward_hook(record) for m in self.model.modules() if isinstance(m, Counted)]
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-pruning warns of every op that it takes for element-wise
            nodes = graph._trace(self.model, dummy_input, forward, None)
            graph.module2node = nodes
            graph._build_dependency(nodes)
            self._map_indices(graph)
        for hook in hooks:
            hook.remove()
        return list(nodes.values())

    def _map_indices(self, graph: DependencyGraph) -> None:
        """torch-pruning's index mappings, one node at a time: where one raises, that node alone is in trouble."""
        updates: dict[Any, Callable[[Any, Any], None]] = {
            ops.OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
            ops.OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
            ops.OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
            ops.OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
            ops.OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
            ops.OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
        }
        mappable = (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
        try:
            shape_infer.init_shape_information(graph)
        except mappable as error:
            for node in graph.module2node.values():
                if node.type == ops.OPTYPE.SPLIT:
                    self._trouble[id(node)] = f"torch-pruning cannot read a split: {error}"
        for node in graph.module2node.values():
            if node.type in updates:
                try:
                    updates[node.type](graph, node)
                except mappable as error:
                    self._trouble[id(node)] = f"torch-pruning cannot map a {node.type.name.lower()}: {error}"

    def _topological_order(self) -> list[Any]:
        waiting = {id(node): len(node.inputs) for node in self.nodes}
        ready = deque(node for node in self.nodes if not node.inputs)
        order = []
        while ready:
            node = ready.popleft()
            order.append(node)
            for follower in node.outputs:
                waiting[id(follower)] -= 1
                if waiting[id(follower)] == 0:
                    ready.append(follower)
        done = {id(node) for node in order}
        for node in self.nodes:  # a module called again downstream of itself
            if id(node) not in done:
                self._trouble[id(node)] = "it is called more than once, on its own output"
                order.append(node)
        return order

    # -- coupling -----------------------------------------------------------------------------------------------------

    def two_sided(self, node: Any) -> bool:
        """Whether input and output channels of a node are different things."""
        return isinstance(node.module, (Conv, nn.Linear))

    def vertex(self, node: Any, side: Side) -> Vertex:
        side = side if self.two_sided(node) else "both"
        key = (id(node), side)
        if key not in self.vertices:
            self.vertices[key] = Vertex(node, side, self._own_size(node, side), trouble=self._trouble.get(id(node)))
        return self.vertices[key]

    @staticmethod
    def _own_size(node: Any, side: Side) -> int:
        module = node.module
        if isinstance(module, Conv):
            return int(module.out_channels if side == "out" else module.in_channels)
        if isinstance(module, nn.Linear):
            return int(module.out_features if side == "out" else module.in_features)
        if isinstance(module, nn.GroupNorm):
            return int(module.num_channels)
        if isinstance(module, Norm):
            return int(module.num_features)  # type: ignore[arg-type]
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return int(module.num_parameters)
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        if isinstance(module, nn.Parameter):
            return int(module.shape[node.pruning_dim])
        if isinstance(module, nn.Embedding):
            return int(module.embedding_dim)
        return 0  # an operation: as many as its inputs bring

    def _couple(self) -> np.ndarray:
        edges: list[tuple[Vertex, np.ndarray, Vertex, np.ndarray]] = []
        incoming: dict[int, list[tuple[Vertex, np.ndarray, np.ndarray]]] = {}
        for node in self.order:
            into = self.vertex(node, "in")
            self._settle(into, incoming.pop(id(node), []), edges)
            source = self.vertex(node, "out")
            for position, follower in enumerate(node.outputs):
                dependency = node.dependencies[len(node.inputs) + position]
                assert dependency.target is follower
                pushed = _map(dependency.index_mapping, source.size)
                if pushed is None:
                    source.trouble = source.trouble or "torch-pruning does not say where its indices come from"
                    continue
                mapped, origin = pushed
                incoming.setdefault(id(follower), []).append((source, origin, mapped))
        total = 0
        for vertex in self.vertices.values():
            vertex.offset, total = total, total + vertex.size
        left = [np.zeros(0, dtype=np.int64)]
        right = [np.zeros(0, dtype=np.int64)]
        for source, origin, target, mapped in edges:
            left.append(source.offset + origin)
            right.append(target.offset + mapped)
        for a, b in self._inner_couplings():
            left.append(a)
            right.append(b)
        rows, columns = np.concatenate(left), np.concatenate(right)
        links = coo_array((np.ones(rows.size, dtype=np.int8), (rows, columns)), shape=(total, total))
        return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)

    def _settle(
        self, into: Vertex, arriving: Sequence[tuple[Vertex, np.ndarray, np.ndarray]], edges: list[Any]
    ) -> None:
        """Fix the size of a vertex from what arrives there, and record the couplings, or the trouble."""
        sizes = {int(mapped.max()) + 1 for _, _, mapped in arriving if mapped.size}
        widest = max(sizes, default=0)
        if into.size == 0:
            into.size = widest
        is_concat = into.node.type == ops.OPTYPE.CONCAT
        for source, origin, mapped in arriving:
            if not mapped.size:
                continue
            size = int(mapped.max()) + 1
            if source.size == 1 and into.size > 1 and not is_concat and into.side == "both":
                continue  # broadcast: one channel beside many is coupled with none of them
            if size > into.size or (size < into.size and not is_concat):
                into.trouble = into.trouble or (
                    f"{size} channels of {self.name(source.node)} meet {into.size} of {self.name(into.node)}"
                )
                keep = mapped < into.size
                origin, mapped = origin[keep], mapped[keep]
            edges.append((source, origin, into, mapped))

    def _inner_couplings(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for node in self.order:
            module = node.module
            if isinstance(module, Conv) and module.groups > 1:
                into, out = self.vertex(node, "in"), self.vertex(node, "out")
                fan_in, fan_out = into.size // module.groups, out.size // module.groups
                if whole_groups(module):
                    first = into.offset + np.arange(module.groups) * fan_in
                    yield np.repeat(first, fan_in), into.offset + np.arange(into.size)
                    yield np.repeat(first, fan_out), out.offset + np.arange(out.size)
                else:
                    for vertex, fan in ((into, fan_in), (out, fan_out)):
                        yield vertex.offset + np.arange(vertex.size) % fan, vertex.offset + np.arange(vertex.size)
            elif isinstance(module, nn.GroupNorm):
                # whole normalisation groups go, so that the statistics of the others do not change
                vertex = self.vertex(node, "both")
                fan = vertex.size // module.num_groups
                every = np.arange(vertex.size)
                yield vertex.offset + every // fan * fan, vertex.offset + every

    # -- reading ------------------------------------------------------------------------------------------------------

    def is_output(self, node: Any) -> bool:
        """Whether the model returns this tensor."""
        return node.type == ops.OPTYPE.OUTPUT or node.grad_fn in self._outputs

    def path(self, node: Any) -> str | None:
        """Dotted path of a node's module or parameter in the model; None for an operation."""
        if isinstance(node.module, nn.Parameter):
            return self.parameter_paths.get(id(node.module))
        return self.paths.get(node.module) or self._counted.get(node.grad_fn)

    def name(self, node: Any) -> str:
        """Path of a module, or the name of the operation."""
        return self.path(node) or str(node.grad_fn.name() if hasattr(node.grad_fn, "name") else node.type.name)

    def units(self, vertex: Vertex) -> np.ndarray:
        """The unit of every channel of a vertex."""
        return self.labels[vertex.offset : vertex.offset + vertex.size]


def _map(mappings: Sequence[Any], size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Push the channels ``0 .. size`` through torch-pruning's mappings: (mapped, origin), None if it loses track."""
    mappings = [mapping for mapping in mappings if mapping is not None]
    identity = np.arange(size)
    if not mappings:
        return identity, identity
    indices = [_HybridIndex(idx=i, root_idx=i) for i in range(size)]
    for mapping in mappings:
        indices = mapping(indices)
    if any(i.root_idx is None for i in indices):
        return None
    return (
        np.fromiter((i.idx for i in indices), dtype=np.int64, count=len(indices)),
        np.fromiter((i.root_idx for i in indices), dtype=np.int64, count=len(indices)),
    )
