"""How channels pass through ATen operations: one rule for each kind of operation.

Operations that only move elements are run on the labels themselves; a pointwise operation couples the channels that
meet; one that mixes channels freezes them. An operation without a rule freezes everything that enters it: unknown is
left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...modules.running import FORWARD_ERRORS, flatten_tensors
from ..flow import Flow, Operation, Site, StoredSize, axes_of, compress
from .products import attention, batch_norm, convolution, matmul

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


def strided(flow: Flow, op: Operation) -> None:
    """A slice; of one that takes every n-th channel, only whole rows of n channels can go."""
    move(flow, op)
    labels, step = op.labels[0], op.argument("step", 1)
    if labels is None or step == 1:
        return
    axis = op.argument("dim", 0) % len(labels.shape)
    for array in labels.arrays:
        if axis not in axes_of(array):
            continue
        if array.shape[axis] % step:
            flow.graph.freeze(array, flow.why(f"one of {step} channels is taken"))
        else:
            flow.graph.require_rectangle(array.movedim(axis, 0).reshape(array.shape[axis] // step, -1), 0)


def by_number(flow: Flow, op: Operation) -> None:
    """Channels are named by their numbers, which change when others go: a roll, a selection by a fixed index."""
    labels = op.labels[0]
    dims = op.argument("dims", op.argument("dim", 0))
    if labels is not None:
        rank = len(labels.shape)
        axes = {dims % rank} if isinstance(dims, int) else {axis % rank for axis in dims or range(rank)}
        for array in labels.arrays:
            if axes & set(axes_of(array)):
                flow.graph.freeze(array, flow.why(f"{op.name} names channels by number"))
    move(flow, op)


def shuffle(flow: Flow, op: Operation) -> None:
    """Channel shuffle: the same slice of all parts can go."""
    labels = op.labels[0]
    for array in labels.arrays if labels else ():
        if 1 in axes_of(array):
            flow.graph.require_rectangle(array.movedim(1, 0).reshape(op.argument("groups"), -1), 1)
    move(flow, op)


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
    if labels is not None:
        widths, value = op.args[1], op.argument("value", 0.0)
        padded = {len(labels.shape) - 1 - i // 2 for i, width in enumerate(widths) if width}
        # along a spatial axis the padding is no channel: it has no label of its own
        arrays = [
            compress(op.func(array.expand(labels.shape), widths, -1)) if padded & set(axes_of(array)) else array
            for array in labels.arrays
        ]
        flow.put(op.out, arrays, labels.site if value == 0 else None)


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
        operands = [
            ((*shape[:axis], 1, *shape[axis + 1 :]), (array,) if array is not None else ())
            for shape, array, _ in pieces
        ]
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


def _windowed(flow: Flow, op: Operation, spatial: int) -> None:
    labels = op.labels[0]
    for other in op.labels[1:]:
        flow.freeze(other, f"{op.name} of two tensors")
    if labels is not None:
        axes = range(len(labels.shape) - spatial, len(labels.shape))
        arrays = flow.mix(labels, list(axes), f"{op.name} runs over the channels")
        for out in flatten_tensors(op.out):
            flow.put(out, arrays, labels.site)


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
            *("hardswish", "hardsigmoid", "hardtanh", "mish", "celu", "softshrink", "leaky_relu"),
            *("elu", "gelu", "silu", "softplus", "threshold", "_prelu_kernel"),
        ),
        pointwise,
    ),
    **dict.fromkeys(("clone", "_to_copy", "detach", "alias", "lift_fresh"), same),
    **dict.fromkeys(
        (
            *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli"),
            *("new_empty", "new_zeros", "new_ones", "new_full"),
        ),
        like,
    ),
    **dict.fromkeys(
        (
            *("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "flip", "rot90"),
            *("repeat", "pixel_shuffle", "pixel_unshuffle", "repeat_interleave", "diagonal", "unfold"),
        ),
        move,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), reshape),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split"), split),
    **dict.fromkeys(("unbind", "select"), unbind),
    "slice": strided,
    **dict.fromkeys(("roll", "index_select"), by_number),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shuffle),
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
    **{f"max_pool{n}d_with_indices": windowed(n) for n in (2, 3)},
    **{f"{op}_pool{n}d": windowed(n) for op in ("max", "adaptive_max") for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": windowed(n) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": windowed(n) for n in (1, 2, 3)},
    **{f"upsample_{kind}": windowed(n) for kind, n in (("linear1d", 1), ("bilinear2d", 2), ("trilinear3d", 3))},
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), windowed(2)),
    "grid_sampler_2d": windowed(2),
    "glu": glu,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), matmul),
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "convolution": convolution,
    **dict.fromkeys(("native_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"), batch_norm),
    **dict.fromkeys(("roi_align", "roi_pool", "ps_roi_align"), roi),
    "index": index,
    "index_put": index_put,
    "as_strided": as_strided,
}


def _is_pointwise(func: Any, functional: str) -> bool:
    """torch's own tag; in-place variants do not all carry it."""
    packet = getattr(torch.ops.aten, functional, None)
    overloads = [func] if packet is None else [func, *(getattr(packet, o) for o in packet.overloads())]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _rule(func: Any) -> Rule | None:
    """The rule for an operation of torch or torchvision; somebody else's may mean anything by the same name."""
    name = func.overloadpacket.__name__
    if func.namespace not in ("aten", "torchvision"):
        return None
    functional = name.rstrip("_") if _in_place(func) else name
    return RULES.get(functional) or (pointwise if _is_pointwise(func, functional) else None)


def _in_place(func: Any) -> bool:
    name: str = func.overloadpacket.__name__
    return name.endswith("_") and not name.endswith("__")


def run(flow: Flow, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation, and label what it returns. Where no rule can follow, what enters is frozen."""
    labels = [flow.of(t) for t in flatten_tensors([args, list(kwargs.values())])]
    if all(entering is None for entering in labels):
        return func(*args, **kwargs)
    rule = _rule(func)
    if rule in (pointwise, None) and _in_place(func) and isinstance(args[0], Tensor):
        flow.forget_sites(args[0])
    zero = _zero_test(func, args, kwargs) if rule is pointwise and any(x and x.site for x in labels) else None
    out = func(*args, **kwargs)
    name = func.overloadpacket.__name__
    why = f"{name} mixes channels, or is not known,"
    if rule is not None:
        try:
            rule(flow, Operation(func, args, kwargs, out, labels, zero))
            return out
        except FORWARD_ERRORS as error:  # a form of the operation that the rule does not expect
            why = f"{name} cannot be followed ({type(error).__name__})"
            for tensor in flatten_tensors(out):
                flow.put(tensor, (), None)
    for entering in labels:
        flow.freeze(entering, why)
    return out
