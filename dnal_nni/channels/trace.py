"""Draw the coupling graph of a model by running it: layers are read whole, everything between them op by op.

torch-pruning rebuilds the graph from autograd, and guesses index maps from shapes, which can crash, never end or be
silently wrong (`docs/models.md` compares both on a zoo). Here the labels of the channels travel with the tensors
through the very operations that the model runs, in eval and in train mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modules.layers import Layer, RMSNorm, layer_of
from ..modules.running import DispatchMode, call, flatten_tensors, hookable
from .counting import Counting, counted
from .counts import Equal, StoredSize
from .flow import Flow, Labels, axes_of, lay
from .graph import CouplingGraph, Site, Vertex
from .parts import couple_equal
from .rules.dispatch import run
from .work import Work, note

_CALLS = itertools.count()  # of modules, in all traces


class Trace(DispatchMode):
    """One or more runs of a model under which its coupling graph grows.

    Args:
        model: a copy of the user's model; its norm statistics move when it runs in train mode.

    Attributes:
        graph: the coupling graph.
        channel_dims: for every norm, its channel dimension, counted from the end.
        works: what operations outside of layers did in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = CouplingGraph()
        self.channel_dims: dict[str, int] = {}
        self.works: list[Work] = []
        self.flow = Flow(self.graph, self._leaf, self._frame, self._running)
        self._frames: list[tuple[str, str]] = [("", type(model).__name__)]
        self._calls: list[int] = [next(_CALLS)]  # of the modules in these frames
        self._inside: str | None = None  # the layer that is running
        self._arrived: list[tuple[Tensor | None, Labels | None]] = []
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._layers = {name: layer for name, module in model.named_modules() if (layer := layer_of(module))}
        self._tensors, self._tied = names_of_tensors(model)
        self._leaf_labels: dict[int, Labels | None] = {}

    @property
    def stored_sizes(self) -> list[StoredSize]:
        """Numbers that forwards passed to operations, and the channels that they count."""
        return self.flow.sizes.stored

    @property
    def equal(self) -> list[Equal]:
        """What forwards need as many of as of what else."""
        return self.flow.sizes.equal

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, dummy_input: Any, plain: bool = False) -> list[Tensor]:
        """Run the model once; whatever it returns, and this does, keeps its channels.

        Args:
            dummy_input: what it takes.
            plain: whether its numbers are ints, for forwards that take no others (``type(n) is int``).
        """
        del self._frames[1:], self._calls[1:], self._arrived[:]  # of a run that has failed
        self._inside = None
        counting = Counting(self.flow, lambda: self._inside is None, lambda: self._calls[-1], plain)
        # what torch.jit has compiled runs operation by operation
        one_by_one = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        numbers = nullcontext() if plain else counted(self.model)
        with torch.no_grad(), one_by_one, self._hooks(), numbers, counting, self:
            out = call(self.model, dummy_input)
        returned = list(flatten_tensors(out))
        for tensor in returned:
            labels = self.flow.of(tensor)
            for array in labels.arrays if labels else ():
                self.graph.freeze(array, "the model returns these channels")
        self.flow.uses.computed(returned, ())
        self.flow.uses.finish(self.model)
        return returned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside is None:
            out = run(self.flow, func, args, kwargs)
            if not self.model.training:  # as it is counted
                note(self.works, self.flow, self._frame()[0], func, args, out)
            return out
        return func(*args, **kwargs)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for _, module in hookable(self.model):
            # ahead of the hooks of torch.nn.utils.weight_norm, which belong to the layer
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _frame(self) -> tuple[str, str]:
        return self._frames[-1]

    def _running(self) -> list[int]:
        return self._calls

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path = self._paths[id(module)]
        self._frames.append((path, type(module).__name__))
        self._calls.append(next(_CALLS))
        if self._inside is None and path in self._layers:
            self._inside = path
            x, *others = [*flatten_tensors([args, list(kwargs.values())]), None]
            for other in others:
                self.flow.freeze(self.flow.of(other), f"{path} takes these channels as a further input")
            self._arrived.append((x, self.flow.of(x)))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        path = self._frames.pop()[0]
        self._calls.pop()
        if self._inside == path and path in self._layers:
            self._inside = None
            x, labels = self._arrived.pop()
            if isinstance(x, Tensor) and (isinstance(out, Tensor) or "out" not in self._layers[path].sides):
                self._layer(path, module, x, labels, out)
            else:
                self.flow.freeze(labels, f"{path} returns no tensor")
            # statistics that move are a use of their own
            moves = module.training and next(module.buffers(), None) is not None
            entering = flatten_tensors([args, list(kwargs.values())])
            self.flow.uses.computed(entering, () if moves else flatten_tensors(out))

    def finish(self) -> None:
        """After the last run: equal parts stay equal, and layers whose tensors others read too must stay whole."""
        for parts in self.flow.parts:
            couple_equal(self.graph, self.model, parts)
        called = {vertex.path for vertex in self.graph.vertices.values() if vertex.dim is None}
        bare = {vertex.path.rpartition(".")[0] for vertex in self.graph.vertices.values() if vertex.dim is not None}
        tied = {name.rpartition(".")[0] for name in self._tied}
        for vertex in self.graph.vertices.values():
            owner = vertex.path if vertex.dim is None else vertex.path.rpartition(".")[0]
            if owner in called and owner in bare and owner in self._layers:
                self.graph.freeze(vertex.ids, f"a function reads the weights of {owner} beside it")
            elif owner in tied and (vertex.dim is None or vertex.path in self._tied):
                self.graph.freeze(vertex.ids, f"the weights of {owner} are tied to another layer")

    # -- layers -------------------------------------------------------------------------------------------------------

    def _layer(self, path: str, module: nn.Module, x: Tensor, labels: Labels | None, out: Any) -> None:
        layer = self._layers[path]
        if layer.mixes:
            self._mixing(path, module, layer, x, labels, out)
        else:
            self._passing(path, module, layer, x, labels, out)

    def _mixing(self, path: str, module: nn.Module, layer: Layer, x: Tensor, labels: Labels | None, out: Any) -> None:
        axis, widths, units = layer.input_axis(module), layer.widths(module), layer.units(module)
        ends = {side: self.graph.vertex(path, side, width) for side, width in widths.items()}
        passed: list[Tensor] = []
        per_channel = bool(units) and bool(torch.isin(units["in"], units["out"]).any())
        if "in" in ends:
            if units and ends["in"].key not in self.graph.sites:
                self.graph.couple_units([(ends[side], numbers) for side, numbers in units.items()])
            place = axis % x.dim()
            passed = self._read(ends["in"], x, labels, place, layer.by_itself(module, x.dim(), place))
            self.graph.read_by(ends["in"], labels.site if labels is not None else None)
        else:
            self.flow.freeze(labels, f"{path} needs all channels of its input")
        if passed and not module.training:
            self.works.append(Work(path, float(sum(t.numel() for t in flatten_tensors(out))), tuple(passed)))
        if "out" in ends:
            if not per_channel:
                self.graph.producers.add(ends["out"].key)
            zero = per_channel and getattr(module, "bias", None) is None and labels is not None
            made = [lay(ends["out"].ids, axis % out.dim(), out.dim())] if widths["out"] > 1 else []
            site: Site = None if passed else frozenset([ends["out"].key])
            self.flow.put(out, [*made, *passed], labels.site if zero and labels else site)

    def _passing(
        self, path: str, module: nn.Module, layer: Layer, x: Tensor, labels: Labels | None, out: Tensor
    ) -> None:
        axis = layer.input_axis(module) % x.dim()
        width = layer.widths(module).get("both", x.shape[axis])
        last = axis == x.dim() - 1 and not hasattr(module, "axis")
        if last and isinstance(module, (nn.LayerNorm, RMSNorm)):
            axis = self._normalised_axis(x, labels, width)
        self.channel_dims[path] = axis - x.dim()
        vertex = self.graph.vertex(path, "both", width)
        if x.shape[axis] != vertex.size:  # an instance norm without affine takes any
            self.flow.freeze(labels, f"{path} gets other channels than it was made for")
            self.graph.freeze(vertex.ids, f"{path} gets other channels than it was made for")
            return
        passed = self._read(vertex, x, labels, axis, layer.by_itself(module, x.dim(), axis))
        if units := layer.units(module):
            self.graph.couple_units([(vertex, units["both"])])
        site: Site = labels.site if labels is not None and layer.zero == "input" else None
        if layer.zero == "affine" and getattr(module, "weight", None) is not None and not passed:
            site = frozenset([path])
        made = [lay(vertex.ids, axis, out.dim())] if width > 1 else []
        self.flow.put(out, [*made, *passed], site)

    @staticmethod
    def _normalised_axis(x: Tensor, labels: Labels | None, width: int) -> int:
        """The last axis, but axis 1 for the subclasses that permute: there the channels vary along axis 1 only."""
        varying = {a for array in labels.arrays for a in axes_of(array)} if labels else set()
        fits = {a for a in varying if x.shape[a] == width}
        return x.dim() - 1 if not fits or x.dim() - 1 in fits else max(fits)

    def _read(self, vertex: Vertex, x: Tensor, labels: Labels | None, axis: int, batch: Any) -> list[Tensor]:
        """Couple what arrives with the channels of a layer; labels of batch axes are passed on."""
        passed = []
        arrived = False
        for array in labels.arrays if labels is not None else ():
            axes = axes_of(array)
            if axis in axes:
                lone = Labels(x.shape, (array,), None)
                others = [a for a in range(x.dim()) if a != axis]
                for line in self.flow.mix(lone, others, "channels lie along several axes"):
                    self.graph.couple(vertex.ids, line.reshape(-1), self.flow.why("channels beside fixed ones"))
                arrived = True
            elif set(axes) <= set(batch):
                passed.append(array)
            else:
                self.graph.freeze(array, f"{vertex.path} runs over these channels as over positions")
        if not arrived:
            self.graph.freeze(vertex.ids, f"{vertex.path} reads a tensor whose channels are fixed")
        return passed

    # -- bare tensors -------------------------------------------------------------------------------------------------

    def _leaf(self, tensor: Tensor) -> Labels | None:
        name = self._tensors.get(id(tensor))
        if name is None:
            return None
        if id(tensor) not in self._leaf_labels:
            self._leaf_labels[id(tensor)] = self._new_leaf(name, tensor)
        return self._leaf_labels[id(tensor)]

    def _new_leaf(self, name: str, tensor: Tensor) -> Labels | None:
        ends = [self.graph.vertex(name, "both", size, dim) for dim, size in enumerate(tensor.shape) if size > 1]
        arrays = tuple(lay(vertex.ids, vertex.dim or 0, tensor.dim()) for vertex in ends)
        site = frozenset(vertex.key for vertex in ends) if takes_gate(self.model, name) else None
        return Labels(tensor.shape, arrays, site) if arrays else None


def takes_gate(model: nn.Module, path: str) -> bool:
    """Whether a gate can sit on a bare tensor: it is a parameter, and nothing else computes its values."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return name in module._parameters and not parametrize.is_parametrized(module)


def names_of_tensors(model: nn.Module) -> tuple[dict[int, str], set[str]]:
    """The first name of every parameter and buffer, by its id; and all names of those that have several."""
    first: dict[int, str] = {}
    tied: set[str] = set()
    for path, module in model.named_modules():  # each once, under the first of its names
        for name, tensor in [*module.named_parameters(path, False), *module.named_buffers(path, False)]:
            if id(tensor) in first:
                tied |= {name, first[id(tensor)]}
            first.setdefault(id(tensor), name)
    return first, tied
