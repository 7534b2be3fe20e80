"""How channels pass through ATen operations: one rule for each kind of operation.

Operations that only move elements are run on the labels themselves; a pointwise operation couples the channels that
meet; one that mixes channels freezes them. An operation without a rule freezes everything that enters it: unknown is
left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flow import Arrays, Flow, Labels, Site, StoredSize, axes_of, compress, lay
from .graph import flatten_tensors


def _is_pointwise(func: Any, name: str) -> bool:
    """torch's own tag; in-place variants do not all carry it."""
    functional = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    overloads = [func] if functional is None else [func, *(getattr(functional, o) for o in functional.overloads())]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


@dataclasses.dataclass
class Operation:
    """One call of an ATen operation: arguments, result, labels of its tensors, which zeros pass (see `_zero_test`)."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    labels: list[Labels | None]
    zero: Callable[[set[int]], bool] | None

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__).strip("_")

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)
        return default

    @property
    def numbers(self) -> list[Any]:
        return _flatten([self.args, list(self.kwargs.values())])


def _flatten(x: Any) -> list[Any]:
    return [z for y in x for z in _flatten(y)] if isinstance(x, (list, tuple)) else [x]


Rule = Callable[[Flow, Operation], None]


def _zero_test(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[set[int]], bool]:
    """A test by evaluation: does the operation give 0 where these operands (numbers of its tensors) are 0?

    The other operands are random, not what they happen to be: a norm initialised to zero would prove anything.
    """
    forms = [(t.shape, t.dtype) for t in flatten_tensors([args, list(kwargs.values())])]

    def zero(which: set[int]) -> bool:
        generator = torch.Generator().manual_seed(0)

        def value(i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            if i in which:
                return torch.zeros(shape, dtype=dtype)
            return torch.randn(shape, generator=generator).to(dtype)

        values = iter([value(i, shape, dtype) for i, (shape, dtype) in enumerate(forms)])

        def replaced(x: Any) -> Any:
            if isinstance(x, Tensor):
                return next(values)
            return type(x)(replaced(y) for y in x) if isinstance(x, (list, tuple)) else x

        new_args = replaced(args)
        out = func(*new_args, **{key: replaced(x) for key, x in kwargs.items()})
        return not any(bool(t.any()) for t in flatten_tensors(out))

    return zero


def _site_of_pointwise(op: Operation) -> Site:
    labelled = {i: x.site for i, x in enumerate(op.labels) if x is not None}
    if op.zero is None:
        return None
    for i, site in labelled.items():
        if site is not None and op.zero({i}):
            return site
    sites = list(labelled.values())
    if len(sites) < 2 or any(site is None for site in sites) or not op.zero(set(labelled)):
        return None
    return frozenset().union(*(site for site in sites if site is not None))


# -- rules ------------------------------------------------------------------------------------------------------------


def pointwise(flow: Flow, op: Operation) -> None:
    """Elements at the same place meet: activations, addition, multiplication, comparison, where."""
    tensors = list(flatten_tensors([op.args, list(op.kwargs.values())]))
    operands = [
        (labels.shape if labels else tensor.shape, labels.arrays if labels else ())
        for tensor, labels in zip(tensors, op.labels)
    ]
    arrays = flow.meet(operands, f"{op.name} meets a tensor whose channels are fixed")
    site = _site_of_pointwise(op)
    for out in flatten_tensors(op.out):
        flow.put(out, arrays, site)


def same(flow: Flow, op: Operation) -> None:
    """The result has the labels of the first argument: copies, casts."""
    labels = op.labels[0]
    if labels is not None:
        flow.put(op.out, labels.arrays, labels.site)


def like(flow: Flow, op: Operation) -> None:
    """A new tensor with the sizes of the first along labelled axes: its channels come and go with those."""
    labels = op.labels[0]
    if labels is not None and op.out.dim() == len(labels.shape):
        kept = [a for a in labels.arrays if all(op.out.shape[axis] == a.shape[axis] for axis in axes_of(a))]
        flow.put(op.out, kept, None)


def move(flow: Flow, op: Operation) -> None:
    """Elements change places only: the operation is run on the labels."""
    labels = op.labels[0]
    if labels is None:  # only an index is labelled
        for other in op.labels:
            flow.freeze(other, f"{op.name} indexes with channels")
        return
    outs = op.out if isinstance(op.out, (list, tuple)) else [op.out]
    kept: list[list[Tensor]] = [[] for _ in outs]
    further = [a.cpu() if isinstance(a, Tensor) else a for a in op.args[1:]]  # labels stay on the CPU
    for array in labels.arrays:
        moved = op.func(array.expand(labels.shape), *further, **op.kwargs)
        for i, piece in enumerate(moved if isinstance(moved, (list, tuple)) else [moved]):
            kept[i].append(compress(piece))
        flow.note_sizes(op.numbers, array, labels.shape)
    for out, arrays in zip(outs, kept):
        for array in arrays:
            flow.note_sizes(op.numbers, array, out.shape)
        flow.put(out, arrays, labels.site)


def reshape(flow: Flow, op: Operation) -> None:
    """Where an axis is split, only whole slices along one of its parts can go."""
    labels = op.labels[0]
    if labels is None:
        return
    arrays = []
    for array in labels.arrays:
        new = compress(array.expand(labels.shape).reshape(op.out.shape))
        arrays.append(new)
        if len(axes_of(new)) > 1:
            flow.graph.require_rectangle(new)
        flow.note_sizes(op.numbers, new, op.out.shape)
        for axis in axes_of(new):
            flow.stored_sizes.append(StoredSize(flow.frame()[0], tuple(op.args[1]), axis, new, axis))
        flow.note_sizes(labels.shape, array, labels.shape)  # a forward often keeps the size of the axis that it splits
    flow.put(op.out, arrays, labels.site)


def pad(flow: Flow, op: Operation) -> None:
    """Padding positions are fixed, and zero only if that is the value."""
    labels = op.labels[0]
    value = op.argument("value", 0.0)
    if labels is not None:
        arrays = [compress(op.func(array.expand(labels.shape), op.args[1], -1)) for array in labels.arrays]
        widths = list(op.args[1])
        padded = {labels.shape.__len__() - 1 - i // 2 for i, width in enumerate(widths) if width}
        # along a spatial axis the padding is no channel: it has no label of its own
        free = [
            a if padded & set(axes_of(array)) else array for a, array in zip(arrays, labels.arrays)
        ]
        flow.put(op.out, free, labels.site if value == 0 else None)


def mirror_pad(flow: Flow, op: Operation) -> None:
    """Reflection and replication padding of spatial axes."""
    _windowed(flow, op, len(op.args[1]) // 2)


def split(flow: Flow, op: Operation) -> None:
    """Equal parts of the channels must stay equal: a forward unpacks a fixed number of them."""
    move(flow, op)
    labels = op.labels[0]
    axis = op.argument("dim", 0)
    size = op.argument("split_size") or op.argument("split_sizes")
    if labels is None:
        return
    axis = axis % len(labels.shape)
    for array in labels.arrays:
        total = array.shape[axis]
        if total == 1:
            continue
        flow.note_sizes([total], array, labels.shape)
        if isinstance(size, int) and size < total and total % size == 0:
            flow.graph.require_rectangle(array.movedim(axis, 0).reshape(total // size, size, -1), 1)
        elif not isinstance(size, int):
            for i, part in enumerate(array.split(size, axis)):
                flow.note_sizes(size, part, part.shape)
                flow.stored_sizes.append(StoredSize(flow.frame()[0], tuple(size), i, part, axis))


def unbind(flow: Flow, op: Operation) -> None:
    """The parts are counted by the forward: none of them can go, but the same slice of all of them can."""
    labels = op.labels[0]
    axis = op.argument("dim", 0)
    if labels is None:
        return
    arrays = flow.mix(labels, [axis], f"{op.name} takes single channels")
    outs = op.out if isinstance(op.out, (list, tuple)) else [op.out]
    for out in outs:
        flow.put(out, [array.select(axis, 0) for array in arrays], labels.site)


def concat(flow: Flow, op: Operation) -> None:
    """Channels side by side."""
    _side_by_side(flow, op, list(op.args[0]), op.argument("dim", 0), lambda array: array)


def stack(flow: Flow, op: Operation) -> None:
    """Concat along a new axis."""
    axis = op.argument("dim", 0) % (op.out.dim())
    _side_by_side(flow, op, list(op.args[0]), axis, lambda array: array.unsqueeze(axis))


def _side_by_side(
    flow: Flow, op: Operation, tensors: list[Tensor], axis: int, form: Callable[[Tensor], Tensor]
) -> None:
    axis = axis % op.out.dim()
    pieces: list[tuple[torch.Size, Tensor | None, Site]] = []  # shape as put side by side, labels there, site
    for tensor, labels in zip(tensors, op.labels):
        if tensor.numel() == 0 and tensor.dim() == 1:
            continue  # the empty start of a list that a forward concatenates to
        if labels is not None and len(labels.arrays) > 1:
            flow.freeze(labels, f"{op.name} of a tensor with several kinds of channels")
            labels = None
        shape = form(torch.empty(labels.shape if labels else tensor.shape, device="meta")).shape
        pieces.append((shape, form(labels.arrays[0]) if labels else None, labels.site if labels else None))
    shown = [array for _, array, _ in pieces if array is not None]
    if not shown:
        return
    sites = [site for _, array, site in pieces if array is not None]
    site = None if any(s is None for s in sites) else frozenset().union(*(s for s in sites if s is not None))
    if not any(axis in axes_of(array) for array in shown):
        # tokens beside tokens: their channels meet
        operands = [((*shape[:axis], 1, *shape[axis + 1 :]), (array,) if array is not None else ())
                    for shape, array, _ in pieces]
        flow.put(op.out, flow.meet(operands, f"{op.name} beside a tensor whose channels are fixed"), site)
        return
    varying = {a for array in shown for a in axes_of(array)} | {axis}
    lined_up = []
    for shape, array, _ in pieces:
        wanted = [n if i in varying else 1 for i, n in enumerate(shape)]
        lined_up.append(torch.full(wanted, -1) if array is None else array.expand(wanted))
    flow.put(op.out, [compress(torch.cat(lined_up, axis))], site)


def reduce(flow: Flow, op: Operation) -> None:
    """Sums, means and extrema along axes."""
    labels = op.labels[0]
    if labels is None:
        return
    axes = op.argument("dim")
    rank = len(labels.shape)
    if axes is None or axes == []:
        axes = list(range(rank))
    axes = [a % rank for a in ([axes] if isinstance(axes, int) else axes)]
    arrays = flow.mix(labels, axes, f"{op.name} runs over the channels")
    zeros = {"sum", "mean", "amax", "amin", "max", "min", "norm", "linalg_vector_norm", "std", "var"}
    site = labels.site if op.name in zeros else None
    for out in flatten_tensors(op.out):
        if out.dim() == rank:
            flow.put(out, arrays, site)
        else:
            gone = [slice(None) if i not in axes else 0 for i in range(rank)]
            flow.put(out, [array[tuple(gone)] for array in arrays], site)


def along(flow: Flow, op: Operation) -> None:
    """Softmax, cumulative sums, sorting: elements along one axis are combined, the shape stays."""
    labels = op.labels[0]
    if labels is not None:
        arrays = flow.mix(labels, [op.argument("dim", -1)], f"{op.name} runs over the channels")
        for out in flatten_tensors(op.out):
            if out.shape == labels.shape:
                flow.put(out, arrays, None)


def _windowed(flow: Flow, op: Operation, spatial: int, keeps_zero: bool = True) -> None:
    labels = op.labels[0]
    for other in op.labels[1:]:
        flow.freeze(other, f"{op.name} of two tensors")
    if labels is not None:
        axes = range(len(labels.shape) - spatial, len(labels.shape))
        arrays = flow.mix(labels, list(axes), f"{op.name} runs over the channels")
        for out in flatten_tensors(op.out):
            flow.put(out, arrays, labels.site if keeps_zero else None)


def windowed(spatial: int) -> Rule:
    """Pooling and resizing over the last ``spatial`` axes."""
    return lambda flow, op: _windowed(flow, op, spatial)


def glu(flow: Flow, op: Operation) -> None:
    """The two halves of the channels meet."""
    labels = op.labels[0]
    if labels is None:
        return
    axis = op.argument("dim", -1) % len(labels.shape)
    arrays = []
    for array in labels.arrays:
        if array.shape[axis] > 1:
            first, second = array.chunk(2, axis)
            flow.graph.couple(first, second, flow.why("the halves of glu"))
            array = first
        arrays.append(array)
    flow.put(op.out, arrays, labels.site)


def matmul(flow: Flow, op: Operation) -> None:
    """Matrix products. What is summed over stands or falls as a whole, unless one factor is a bare parameter.

    ``x @ parameter`` is a linear layer without a module: its input channels are read, its outputs produced, one by one.
    """
    names = ("mat1", "mat2") if op.name == "addmm" else ("batch1", "batch2") if op.name == "baddbmm" else None
    a, b = (op.argument(n) for n in names) if names else op.args[:2]
    bias = op.args[0] if names else None
    la, lb = flow.of(a), flow.of(b)
    what = f"{op.name} multiplies channels with a tensor whose channels are fixed"
    rank = op.out.dim()
    summed_a, summed_b = a.dim() - 1, max(b.dim() - 2, 0)
    arrays_a, arrays_b = list(la.arrays if la else ()), list(lb.arrays if lb else ())
    along_a = [x for x in arrays_a if summed_a in axes_of(x)]
    along_b = [x for x in arrays_b if summed_b in axes_of(x)]
    others_a = [x for x in arrays_a if summed_a not in axes_of(x)]
    others_b = [x for x in arrays_b if summed_b not in axes_of(x)]
    reader = flow.parameter(along_b[0]) if len(along_b) == 1 else None
    source = flow.parameter(others_b[0]) if len(others_b) == 1 else None
    if source is not None:
        flow.graph.producers.add(source.key)
    if reader is not None:
        for x in along_a:
            if axes_of(x) == (summed_a,):
                flow.graph.couple(reader.ids, x.reshape(-1), flow.why(what))
                flow.graph.read_by(reader, la.site if la else None)
            else:
                flow.graph.freeze(x, flow.why(what))
        if not along_a:
            flow.graph.freeze(reader.ids, flow.why(what))
    else:
        for mine, labels, axis, kept in ((along_a, la, summed_a, others_a), (along_b, lb, summed_b, others_b)):
            if labels is not None:
                kept += flow.mix(dataclasses.replace(labels, arrays=tuple(mine)), [axis], what)
    # the result has the rows of a and the columns of b
    if a.dim() == 1 or b.dim() == 1:
        for x in others_a + others_b:
            flow.graph.freeze(x, flow.why(what))
        return
    shape_a, shape_b = (*a.shape[:-1], 1), (*b.shape[:-2], 1, b.shape[-1])
    operands: list[tuple[Sequence[int], Arrays]] = [(shape_a, tuple(others_a)), (shape_b, tuple(others_b))]
    if bias is not None:
        lbias = flow.of(bias)
        operands.append((bias.shape, lbias.arrays if lbias else ()))
    met = flow.meet(operands, what)
    flow.put(op.out, [x for x in met if x.dim() == rank], None)


def attention(flow: Flow, op: Operation) -> None:
    """Fused attention: query and key are summed over their last axis, heads meet heads."""
    q, k, v = (flow.of(t) for t in op.args[:3])
    mask = op.argument("attn_mask")
    what = "attention over channels that are fixed elsewhere"
    for labels in (q, k, v):
        if labels is not None and any(len(labels.shape) - 2 in axes_of(array) for array in labels.arrays):
            for other in op.labels:
                flow.freeze(other, "attention over tokens that are channels")
            return
    operands: list[tuple[Sequence[int], Arrays]] = []
    for tensor, labels in ((op.args[0], q), (op.args[1], k), (mask, flow.of(mask))):
        if tensor is not None:
            summed = [-1] if tensor is not mask else [-1, -2]
            operands.append(((*tensor.shape[:-2], 1, 1), flow.mix(labels, summed, what)))
    value = op.args[2]
    operands.append(((*value.shape[:-2], 1, value.shape[-1]), v.arrays if v else ()))
    flow.put(next(flatten_tensors(op.out)), flow.meet(operands, what), None)


def convolution(flow: Flow, op: Operation) -> None:
    """A convolution that is no layer: its kernel may be one for each channel, or a bare parameter."""
    x, weight, bias = (flow.of(op.argument(name)) for name in ("input", "weight", "bias"))
    kernel, offset = op.argument("weight"), op.argument("bias")
    groups, channels = op.argument("groups", 1), op.argument("input").shape[1]
    if groups == channels == kernel.shape[0] and not op.argument("transposed", False):
        if x is None:
            flow.freeze(weight, "a convolution with fixed channels")
            return
        lines = flow.mix(x, [0, *range(2, len(x.shape))], "a convolution runs over the channels")
        columns: list[tuple[Sequence[int], Arrays]] = [
            ((channels,), tuple(a.reshape(-1) for a in lines)),
            ((channels,), tuple(a.reshape(-1) for a in weight.arrays if axes_of(a) == (0,)) if weight else ()),
        ]
        if offset is not None:
            columns.append((offset.shape, bias.arrays if bias else ()))
        met = flow.meet(columns, "a convolution with a fixed kernel")
        for array in met:
            flow.note_sizes([groups], array, (groups,))
        flow.put(op.out, [lay(array, 1, op.out.dim()) for array in met], x.site if offset is None else None)
        return
    reads, makes = (0, 1) if op.argument("transposed", False) else (1, 0)
    sides = [next((a for a in weight.arrays if axes_of(a) == (d,)), None) if weight else None for d in (reads, makes)]
    reader, source = (flow.parameter(a) if a is not None else None for a in sides)
    if groups > 1 or source is None or reader is None and x is not None:
        for labels in (x, weight, bias):
            flow.freeze(labels, "a convolution that is no layer")
        return
    arrived = [a for a in x.arrays if axes_of(a) == (1,)] if x is not None else []
    if reader is not None and len(arrived) == 1 and x is not None and len(x.arrays) == 1:
        flow.graph.couple(reader.ids, arrived[0].reshape(-1), flow.why("channels beside fixed ones"))
        flow.graph.read_by(reader, x.site)
    else:
        flow.freeze(x, "a convolution runs over the channels")
        if reader is not None:
            flow.graph.freeze(reader.ids, flow.why("a convolution reads fixed channels"))
    flow.graph.producers.add(source.key)
    if offset is not None:
        made = [((source.size,), (source.ids,)), (offset.shape, bias.arrays if bias else ())]
        flow.meet(made, "a convolution with a fixed bias")
    flow.put(op.out, [lay(source.ids, 1, op.out.dim())], None)


def batch_norm(flow: Flow, op: Operation) -> None:
    """Batch norm as a function: all its tensors are per channel."""
    x = flow.of(op.args[0])
    shape = op.args[0].shape
    operands: list[tuple[Sequence[int], Arrays]] = []
    arrays = flow.mix(x, [i for i in range(len(shape)) if i != 1], "batch norm over other axes than channels")
    operands.append(((1, shape[1]), tuple(a.reshape(a.shape[:2]) for a in arrays)))
    for tensor in op.args[1:5]:
        if isinstance(tensor, Tensor):
            labels = flow.of(tensor)
            operands.append((tensor.shape, labels.arrays if labels else ()))
    met = flow.meet(operands, "batch norm with fixed statistics")
    out = next(flatten_tensors(op.out))
    flow.put(out, [lay(a, 1, out.dim()) for a in met], None)


def roi(flow: Flow, op: Operation) -> None:
    """Regions cut out of a feature map: axis 1 stays, the regions themselves are not channels."""
    labels = flow.of(op.args[0])
    for other in op.labels[1:]:
        flow.freeze(other, f"{op.name} with channels as regions")
    if labels is not None:
        arrays = flow.mix(labels, [0, 2, 3], f"{op.name} runs over the channels")
        flow.put(op.out, arrays, labels.site)


def index(flow: Flow, op: Operation) -> None:
    """Advanced indexing: channels along an axis that is indexed are chosen by position, and stay."""
    labels = op.labels[0]
    indices = op.argument("indices")
    if labels is None:
        for other in op.labels:
            flow.freeze(other, "indexing with channels")
        return
    axes, axis = [], 0
    for entry in indices:
        width = entry.dim() if entry is not None and entry.dtype in (torch.bool, torch.uint8) else 1
        if entry is not None:
            axes += list(range(axis, axis + width))
        axis += width
    arrays = flow.mix(labels, axes, "indexing picks channels")
    on_cpu = [entry.cpu() if entry is not None else None for entry in indices]
    moved = [compress(torch.ops.aten.index(array.expand(labels.shape), on_cpu)) for array in arrays]
    flow.put(op.out, moved, labels.site)


def index_put(flow: Flow, op: Operation) -> None:
    """Rows written into a tensor: their channels meet those of the other rows, or fill a new tensor."""
    target, values = flow.of(op.args[0]), flow.of(op.argument("values"))
    indices = op.argument("indices")
    rows = len(indices) == 1 and indices[0].dtype in (torch.int64, torch.bool) and indices[0].dim() == 1
    if not rows or values is None or len(values.shape) != op.out.dim() or any(0 in axes_of(a) for a in values.arrays):
        for labels in op.labels:
            flow.freeze(labels, "writing by index")
    elif target is None:
        flow.put(op.out, values.arrays, None)
    else:
        one_row = [(labels.shape[1:], tuple(a[0] for a in labels.arrays)) for labels in (target, values)]
        met = flow.meet(one_row, "rows beside rows with fixed channels")
        flow.put(op.out, [a[None] for a in met], None)


def as_strided(flow: Flow, op: Operation) -> None:
    """torch changes the memory format of some results in place; any other use is not followed."""
    labels = op.labels[0]
    if labels is not None and tuple(op.args[1]) == tuple(labels.shape):
        flow.put(op.out, labels.arrays, labels.site)
    else:
        flow.freeze(labels, "as_strided")


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            # without torch's tag, or without it in torch 2.2
            *("hardswish", "hardsigmoid", "hardtanh", "mish", "rrelu", "celu", "selu", "softshrink", "leaky_relu"),
            *("elu", "gelu", "silu", "relu6", "softplus", "log_sigmoid", "threshold", "_prelu_kernel"),
        ),
        pointwise,
    ),
    **dict.fromkeys(("clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "dropout"), same),
    **dict.fromkeys(
        (
            *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli"),
            *("new_empty", "new_zeros", "new_ones", "new_full"),
        ),
        like,
    ),
    **dict.fromkeys(
        (
            *("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice", "flip", "roll", "rot90"),
            *("repeat", "index_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat_interleave"),
            *("native_channel_shuffle", "diagonal", "unfold"),
        ),
        move,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unflatten", "_reshape_alias"), reshape),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"), split),
    **dict.fromkeys(("unbind", "select"), unbind),
    "constant_pad_nd": pad,
    **dict.fromkeys([f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)], mirror_pad),
    "cat": concat,
    "stack": stack,
    **dict.fromkeys(
        (
            *("sum", "mean", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "var_mean"),
            *("logsumexp", "prod", "any", "all", "argmax", "argmin", "std_mean", "median"),
        ),
        reduce,
    ),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "sort"), along),
    **{f"{op}_pool{n}d": windowed(n) for op in ("avg", "_adaptive_avg", "adaptive_avg") for n in (1, 2, 3)},
    **{f"{op}_pool{n}d_with_indices": windowed(n) for op in ("max",) for n in (1, 2, 3)},
    **{f"{op}_pool{n}d": windowed(n) for op in ("max", "adaptive_max") for n in (1, 2, 3)},
    **{f"upsample_{kind}": windowed(n) for kind, n in (
        ("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2),
        ("trilinear3d", 3), ("_nearest_exact2d", 2), ("_bilinear2d_aa", 2), ("_bicubic2d_aa", 2),
    )},
    **{f"_upsample_{kind}": windowed(2) for kind in ("nearest_exact2d", "bilinear2d_aa", "bicubic2d_aa")},
    "grid_sampler_2d": windowed(2),
    "glu": glu,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul"), matmul),
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), convolution),
    **dict.fromkeys(("native_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"), batch_norm),
    **dict.fromkeys(("roi_align", "roi_pool", "ps_roi_align"), roi),
    "index": index,
    "index_put": index_put,
    "as_strided": as_strided,
}


def run(flow: Flow, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation, and label what it returns."""
    labels = [flow.of(t) for t in flatten_tensors([args, list(kwargs.values())])]
    if all(entering is None for entering in labels):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    rule = RULES.get(name.rstrip("_") if in_place else name)
    if rule is None and _is_pointwise(func, name):
        rule = pointwise
    if rule in (pointwise, None) and in_place and isinstance(args[0], Tensor):
        flow.forget_sites(args[0])
    zero = _zero_test(func, args, kwargs) if rule is pointwise and any(x and x.site for x in labels) else None
    out = func(*args, **kwargs)
    if rule is None:
        for entering in labels:
            flow.freeze(entering, f"{name} mixes channels, or is not known,")
    else:
        rule(flow, Operation(func, args, kwargs, out, labels, zero))
    return out
