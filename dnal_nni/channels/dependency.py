"""torch-pruning's dependency graphs as a source of couplings. No other file imports torch-pruning.

Its graph has a node for every layer, bare parameter and operation that autograd kept, and maps from the channels of one
to those of the next. torch-pruning walks these maps anew for every layer that it prunes, which need not end: where two
maps of a cycle disagree, the indices grow. Here every channel of every node is visited once, and none beyond the widest
layer: the units are the connected components, as in our own graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.adapters import adapt
from ..modules.functions import FunctionLayer
from ..modules.layers import Layer, RMSNorm, Side, kinds, layer_of, set_kind
from ..modules.running import call, flatten_tensors, seeded, twin
from .counts import Equal, StoredSize
from .deadline import REMEDY, Deadline
from .graph import CouplingGraph, Vertex
from .shapes import Shapes
from .tp_walk import GRAPH, Walk
from .trace import names_of_tensors
from .work import Work

if TYPE_CHECKING:
    from torch_pruning import DependencyGraph as DependencyGraph
    from torch_pruning import Group as Group

Graph: TypeAlias = "DependencyGraph | Literal['torch-pruning'] | None"
SECONDS = 60.0  # for building a graph, and for reading it


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
        deadline = Deadline(SECONDS)
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
            deadline.run(Walk(self, source, model).run, "torch-pruning's graph is not read")
        self._finish()

    def _register(self, graph: DependencyGraph) -> None:
        """Let modules that the graph has pruning functions for be cut by them, but for torch's own layers."""
        for kind, functions in graph.CUSTOMIZED_PRUNERS.items():
            own = not isinstance(kind, type) or kind.__module__.startswith("torch.nn.")
            if not own and isinstance(kinds().get(kind), (FunctionLayer, type(None))):
                axes = [axis for name in self._shapes.of(kind) if (axis := self._axis(name, functions)) is not None]
                set_kind(kind, FunctionLayer({}, {}, max(axes, default=1), opaque=True, functions=functions))

    def _axis(self, path: str, functions: Any) -> int | None:
        """Where the channels of a module lie that only its functions know: axis 1, the last one, or one between."""
        width = functions.get_in_channels(self.model.get_submodule(path))
        shapes = self._shapes.inputs[path]
        dims = min(map(len, shapes), default=0)
        axes = (1, -1, *range(2, dims - 1)) if dims > 1 else ()
        return next((axis for axis in axes if all(shape[axis] == width for shape in shapes)), None)

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


def _built(model: nn.Module, dummy_input: Any, shapes: Shapes, deadline: Deadline) -> list[DependencyGraph]:
    """torch-pruning's graph of a copy: of its eval mode, and of its train mode where other modules run there."""
    name = type(model).__name__
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # else there is no graph

    def forward(mode: bool) -> Callable[[nn.Module, Any], list[Tensor]]:
        def run(model: nn.Module, inputs: Any) -> list[Tensor]:
            return [out for out in flatten_tensors(call(model.train(mode), inputs)) if out.grad_fn is not None]

        return run

    def build(mode: bool) -> DependencyGraph:
        with torch.enable_grad():
            graph = torch_pruning().DependencyGraph()
            return graph.build_dependency(model, dummy_input, forward_fn=forward(mode), verbose=False)

    graphs = []
    for mode in [False, True] if set(shapes.inputs) - shapes.eval else [False]:
        late = f"torch-pruning's graph of {name} is not built"
        try:
            with seeded(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it guesses, which is verified
                graph = deadline.run(functools.partial(build, mode), late)
        except DNALError:
            raise
        except Exception as error:  # torch-pruning's own faults, of any kind, and those of users' pruning functions
            what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise DNALError(f"torch-pruning cannot build its graph of {name} ({what}): {REMEDY}") from error
        graphs.append(graph)
    return graphs


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
