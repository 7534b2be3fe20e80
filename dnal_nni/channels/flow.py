"""The labels of tensors: for every element the channel that it belongs to.

Labels are arrays that have size 1 along the axes where the channel does not change (``[1, C, 1, 1]`` behind a
convolution). :mod:`dnal_nni.channels.rules` says how they pass through an operation, in terms of what is here:
channels that *meet* are coupled, channels that are *mixed* are frozen.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..modules.running import flatten_tensors
from .counts import Sizes
from .graph import CouplingGraph, Site, Vertex
from .made import Made
from .parts import Parts
from .uses import Uses

Arrays = tuple[Tensor, ...]
_HOW_MANY = ("size", "repeats", "split_size", "split_sizes", "start", "end")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which channels a tensor's elements belong to.

    Attributes:
        shape: shape of the tensor.
        arrays: int64 channel ids, each with the tensor's number of dimensions and size 1 or the tensor's along each;
            -1: a fixed position. Usually one array; a bare parameter has one for each of its axes.
        site: what a gate can act on to zero the channels here, or None; to be handed on as it is, or not at all.
    """

    shape: torch.Size
    arrays: Arrays
    site: Site


def axes_of(array: Tensor) -> tuple[int, ...]:
    """The axes along which the channel changes."""
    return tuple(i for i, n in enumerate(array.shape) if n > 1)


def lay(line: Tensor, axis: int, rank: int) -> Tensor:
    """A line of labels, laid along one axis of a tensor."""
    return line.reshape([-1 if i == axis else 1 for i in range(rank)])


def compress(array: Tensor) -> Tensor:
    """The same labels with size 1 along every axis where the channel does not change."""
    for axis in range(array.dim()):
        if array.shape[axis] > 1:
            first = array.narrow(axis, 0, 1)
            if array.stride(axis) == 0 or bool((array == first).all()):
                array = first
    return array


def reshaped(array: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The labels behind a reshape from ``old`` to ``new``; axes that are merged and split among themselves go together.

    Args:
        array: labels of the tensor, size 1 along axes where the channel does not change.
        old: shape of the tensor.
        new: shape that it gets.
    """
    sizes: list[int] = []  # of the axes, where something changes along those that they are merged with
    result: list[int] = []
    while len(sizes) < len(old) or len(result) < len(new):
        into, out = list(old[len(sizes) : len(sizes) + 1]), list(new[len(result) : len(result) + 1])
        while math.prod(into) != math.prod(out):
            if math.prod(into) < math.prod(out):
                into.append(old[len(sizes) + len(into)])
            else:
                out.append(new[len(result) + len(out)])
        varies = any(n > 1 for n in array.shape[len(sizes) : len(sizes) + len(into)])
        sizes += into if varies else [1] * len(into)
        result += out if varies else [1] * len(out)
    return compress(array.expand(sizes).reshape(result))


class Flow:
    """The labels of every tensor that is alive during a trace, and what a rule can do with them.

    Args:
        graph: receives the couplings.
        leaf: labels of a parameter or buffer that an operation reads directly, None for any other tensor.
        frame: path and class name of the module whose forward is running.
        running: the numbers of the calls of modules that are running.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        leaf: Callable[[Tensor], Labels | None],
        frame: Callable[[], tuple[str, str]],
        running: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.graph = graph
        self._leaf = leaf
        self.frame = frame
        self._labels: Any = WeakIdKeyDictionary()
        self.made = Made()
        self.uses = Uses(graph)
        self.sizes = Sizes(frame, running, self.why)
        self.parts: list[Parts] = []

    # -- labels -------------------------------------------------------------------------------------------------------

    def known(self, tensor: Tensor) -> Labels | None:
        """Labels of a tensor that an operation returned."""
        labels: Labels | None = self._labels.get(tensor)
        return labels

    def of(self, tensor: Any) -> Labels | None:
        """Labels of a tensor, None where nothing in it can be removed."""
        if not isinstance(tensor, Tensor):
            return None
        known: Labels | None = self._labels.get(tensor)
        if known is None:
            known = self._leaf(tensor)
        if known is None and (ids := self.made.ids(tensor)) is not None:
            known = self._labels[tensor] = Labels(tensor.shape, (ids,), None)
        return known

    def put(self, tensor: Any, arrays: Iterable[Tensor], site: Site) -> None:
        """Label a tensor that an operation returned. What is not labelled counts as fixed.

        Args:
            tensor: the result, or a part of it.
            arrays: its channel ids, see :class:`Labels`; those that nothing can be removed from are dropped. A channel
                that is all there is along every axis must stay.
            site: the labels' own, where the operation returns 0 wherever its channels are 0; else None.
        """
        arrays = tuple(arrays)
        for single in (a for a in arrays if a.numel() == 1):
            self.graph.freeze(single, self.why("a single channel is taken by itself"))
        arrays = tuple(a for a in arrays if a.numel() > 1 and bool((a >= 0).any()))
        if isinstance(tensor, Tensor):
            if arrays:
                self._labels[tensor] = Labels(tensor.shape, arrays, site)
            else:
                self._labels.pop(tensor, None)

    def written(self, target: Tensor, plain: bool) -> None:
        """After the first labels are written into a tensor, which may be a part of another: that has them too.

        Args:
            target: labelled by the operation that worked in place, or not: then it holds fixed values now.
            plain: whether it was :meth:`Made.plain`.
        """
        labels: Labels | None = self._labels.get(target)
        if plain and (labels is None or len(labels.arrays) == 1):
            self.made.fill(target, labels.arrays[0] if labels else None)
            for tensor in self._sharing(target):
                del self._labels[tensor]
        elif labels is not None and not _is_whole(target):
            self.freeze(labels, "channels are written beside fixed values")

    def adjustable(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor without labels, with 1 along axes whose size the forward can choose.

        These are all axes of a plain tensor, and those along which a tensor is expanded.
        """
        if self.made.plain(tensor):
            return torch.Size([1] * tensor.dim())
        repeated = self.made.repeated(tensor)
        shape = enumerate(zip(tensor.shape, tensor.stride()))
        return torch.Size(1 if step == 0 or axis in repeated else n for axis, (n, step) in shape)

    def asked_for(self, tensor: Tensor, axis: int) -> Tensor | None:
        """Labels of a plain tensor along an axis whose size the forward has asked for by a number of known source."""
        line = self.sizes.line(self.made.size(tensor, axis), self.graph.reserve) if self.made.plain(tensor) else None
        return None if line is None else lay(line, axis, tensor.dim())

    def why(self, what: str) -> str:
        """A reason, and the module in whose forward it lies."""
        path, name = self.frame()
        return f"{path + ': ' if path else ''}{what} in {name}.forward"

    def freeze(self, labels: Labels | None, what: str) -> None:
        """Keep every channel of a tensor; ``what`` is the reason, such as "fft runs over the channels"."""
        for array in labels.arrays if labels else ():
            self.graph.freeze(array, self.why(what))

    def couple(self, a: Tensor, b: Tensor, what: str) -> None:
        """Let channels (ids, broadcast against each other) stand and fall together; what meets a -1 is frozen."""
        self.graph.couple(a, b, self.why(what))

    def parameter(self, array: Tensor) -> Vertex | None:
        """The vertex of the bare parameter or buffer whose untouched labels ``array`` are."""
        ids = array.reshape(-1)
        return next((v for v in self.graph.vertices.values() if v.dim is not None and torch.equal(v.ids, ids)), None)

    def mix(self, labels: Labels | None, axes: Sequence[int], what: str, if_used: bool = False) -> Arrays:
        """The arrays behind an operation that combines all elements along ``axes``, which keep their size.

        Channels that differ only along those axes are frozen, for the reason ``what``; where they differ along others
        too, they are coupled along ``axes``: whole slices may still go.

        Args:
            labels: of the tensor that enters.
            axes: numbers of its axes.
            what: the reason, such as "mean runs over the channels".
            if_used: whether the operation runs with fewer channels too, so that they need to stay only where its
                result reaches something.
        """
        if labels is None:
            return ()
        axes = [axis % len(labels.shape) for axis in axes]
        left = []
        for array in labels.arrays:
            mixed = [axis for axis in axes_of(array) if axis in axes]
            if mixed and set(axes_of(array)) <= set(axes):
                (self.uses.hold if if_used else self.graph.freeze)(array, self.why(what))
                continue
            left.append(self._sliced(array, mixed, what) if mixed else array)
        return tuple(left)

    def _sliced(self, array: Tensor, axes: Sequence[int], what: str) -> Tensor:
        """The channels of an array, coupled along these axes: slices along the others can go as a whole."""
        first = array
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        self.couple(first, array, what)
        return first

    def _pair(self, a: Tensor, b: Tensor, what: str) -> None:
        """Couple two arrays; of a bare tensor that is broadcast along some axes of the other, see the graph."""
        for array, bare in ((a, b), (b, a)):
            if set(axes_of(bare)) < set(axes_of(array)) and self.graph.all_bare(bare):
                self.graph.broadcast(bare, array, self.why(what))
                return
        self.couple(a, b, what)

    def meet(self, operands: Sequence[tuple[Sequence[int], Arrays]], what: str) -> list[Tensor]:
        """Arrays of the broadcast result of tensors, given as (shape, arrays): what meets is coupled.

        An axis of full size without labels cannot be cut: channels that meet it are frozen, for the reason ``what``.
        """
        rank = max(len(shape) for shape, _ in operands)
        sizes = [(1,) * (rank - len(shape)) + tuple(shape) for shape, _ in operands]
        aligned = [
            [array.reshape((1,) * (rank - array.dim()) + array.shape) for array in arrays] for _, arrays in operands
        ]
        result: list[tuple[int, Tensor]] = []  # with the number of the operand
        for i, arrays in enumerate(aligned):
            for array in arrays:
                axes = axes_of(array)
                alive = True
                for j, others in enumerate(aligned):
                    fixed = [axis for axis in axes if sizes[j][axis] != 1]
                    if i == j or not fixed:
                        continue
                    partners = [other for other in others if set(axes_of(other)) & set(axes)]
                    if not partners and len(fixed) == len(axes):
                        self.graph.freeze(array, self.why(what))
                        alive = False
                        break
                    if not partners:  # it is the same along the other axes, of which whole slices can go
                        array = self._sliced(array, fixed, what)
                        axes = axes_of(array)
                    for partner in partners if j > i else ():
                        self._pair(array, partner, what)
                # of coupled arrays the one with most axes stays: it still names every channel
                if alive and not any(set(axes) <= set(axes_of(kept)) for j, kept in result if j != i):
                    result = [(j, kept) for j, kept in result if j == i or not set(axes_of(kept)) <= set(axes)]
                    result.append((i, array))
        return [array for _, array in result]

    def note_sizes(self, numbers: Iterable[Any], array: Tensor, shape: Sequence[int]) -> None:
        """Numbers among the arguments of an operation may count labelled positions of ``array``; see :class:`Sizes`."""
        self.sizes.note(numbers, array, shape)

    def forget_sites(self, changed: Tensor) -> None:
        """After an in-place change of a part of a tensor, its norms no longer zero the channels of the whole."""
        for tensor in () if _is_whole(changed) else self._sharing(changed):
            self._labels[tensor] = dataclasses.replace(self._labels[tensor], site=None)

    def _sharing(self, part: Tensor) -> list[Tensor]:
        place = part.untyped_storage().data_ptr()
        return [tensor for tensor in self._labels.keys() if tensor.untyped_storage().data_ptr() == place]


def _is_whole(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@dataclasses.dataclass
class Operation:
    """One call of an operation.

    Attributes:
        func: the overload, as PyTorch dispatched it.
        args, kwargs: what it was called with.
        out: what it returned.
        labels: of every tensor among the arguments, in their order; None where nothing can be removed.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    labels: list[Labels | None]

    @property
    def name(self) -> str:
        """Its name without underscores at the ends, for reasons."""
        return str(self.func.overloadpacket.__name__).strip("_")

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)
        return default

    @property
    def numbers(self) -> list[Any]:
        """The arguments that say how many, and may count channels: sizes, repeats, ends of slices; axes do not."""
        return _flatten([self.argument(name) for name in _HOW_MANY])

    def gives_zero(self, where: set[int]) -> bool:
        """A test by evaluation: is the result 0 where these operands (numbers of its tensors) are 0?

        The other operands are random, not what they happen to be: a norm initialised to zero would prove anything.
        And they are 0 too: a channel that is closed may be so in all of them. Elements are taken one by one (or by
        broadcasting): some of them stand for all.
        """
        for sign in (1.0, -1.0, 0.0):
            generator = torch.Generator().manual_seed(0)
            numbers = itertools.count()

            def replaced(x: Any, sign: float = sign, generator: Any = generator, numbers: Any = numbers) -> Any:
                if isinstance(x, Tensor):
                    few = [min(n, 4) for n in x.shape]
                    value = torch.randn(few, generator=generator) * (0.0 if next(numbers) in where else sign)
                    return value > 0 if x.dtype == torch.bool else value.to(x.dtype)
                return type(x)([replaced(y) for y in x]) if isinstance(x, (list, tuple)) else x

            out = self.func(*replaced(self.args), **{key: replaced(x) for key, x in self.kwargs.items()})
            # 0 / 0 is another matter
            if any(bool(((t != 0) & ((t == t) | (sign > 0))).any()) for t in flatten_tensors(out)):
                return False
        return True


def _flatten(x: Any) -> list[Any]:
    return [z for y in x for z in _flatten(y)] if isinstance(x, (list, tuple)) else [x]
