"""Multiply-adds outside of layers: with which channels the cost of an operation grows.

A matrix product of attention, a convolution with a bare parameter, a functional norm or a resizing cost what their
operands' shapes say. What is noted here is a share of the cost of the module in whose forward they run; the cost itself
is counted by fvcore (:mod:`dnal_nni.cost.count`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..modules.running import flatten_tensors
from .flow import Flow, axes_of

Axes = dict[int, int]  # axis of an operand -> axis of the operation's loops


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        path: the module in whose forward it ran; a layer that ran at positions which may go.
        amount: of its multiply-adds, as fvcore counts them.
        factors: arrays of channel ids (-1: a fixed position); the amount grows with the open share of each.
        loops: of each factor, which loop of the operation each of its axes is, where that is known.
    """

    path: str
    amount: float
    factors: tuple[Tensor, ...]
    loops: tuple[Axes, ...] = ()

    def independent(self, labels: np.ndarray) -> list[np.ndarray]:
        """The labels of the factors (-1: fixed), without those of a factor that another one says all about.

        Of queries times keys that lose whole heads, both would say which heads are left.

        Args:
            labels: int64, by channel id: equal where channels are removed together.
        """
        of = [np.where(ids >= 0, labels[ids], -1) for ids in (factor.numpy() for factor in self.factors)]
        kept: list[int] = []
        for i in range(len(of)):
            if not (self.loops and any(_says_all(of[j], self.loops[j], of[i], self.loops[i]) for j in kept)):
                kept.append(i)
        return [of[i] for i in kept]


Operands = list[tuple[Any, Axes]]
Rule = Callable[[Any, Any], list[tuple[float, Operands]]]


def _product(args: Any, out: Any) -> list[tuple[float, Operands]]:
    """``[*, M, K] @ [*, K, N]``."""
    a, b = args[-2:]
    batch = {i: i for i in range(a.dim() - 2)}
    rank = a.dim()
    rows, columns = {**batch, rank - 2: rank - 2, rank - 1: rank}, {**batch, rank - 2: rank, rank - 1: rank - 1}
    return [(a.numel() * b.shape[-1], [(a, rows), (b, columns)])]


def _attention(args: Any, out: Any) -> list[tuple[float, Operands]]:
    """``softmax(q k^T) v`` with q ``[*, L, E]``, k ``[*, S, E]``, v ``[*, S, F]``: two products."""
    q, k, v = args[:3]
    rank = q.dim()
    same = {i: i for i in range(rank - 2)}
    first: Operands = [(q, {**same, rank - 1: rank}), (k, {**same, rank - 1: rank})]
    second: Operands = [(v, {**same, rank - 1: rank})]
    return [(q.numel() * k.shape[-2], first), (v.numel() * q.shape[-2], second)]


def _convolution(args: Any, out: Any) -> list[tuple[float, Operands]]:
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    places = (x if transposed else out).shape[2:]
    loops: Operands = [(out, {1: 0})]
    if groups == 1:
        loops.append((x, {1: 1}))
        loops.append((weight, {0: 1, 1: 0} if transposed else {0: 0, 1: 1}))
    elif not transposed:  # a kernel for every sample
        loops.append((weight, {1: 1}))
    return [(len(x) * weight.numel() * math.prod(places), loops)]


def _pooling(args: Any, out: Any) -> list[tuple[float, Operands]]:
    """``mean`` as ``adaptive_avg_pool2d`` calls it for an output of one value; fvcore does not count any other."""
    pools = args[1:] and list(args[1]) == [-1, -2]
    return _elementwise(1, of_input=True)(args, out) if pools else []


def _elementwise(scale: float, of_input: bool = False) -> Rule:
    def rule(args: Any, out: Any) -> list[tuple[float, Operands]]:
        first = next(flatten_tensors(out))
        amount = args[0].numel() if of_input else first.numel()
        return [(scale * amount, [(first, {i: i for i in range(first.dim())})])]

    return rule


def _deformable(args: Any, out: Any) -> list[tuple[float, Operands]]:
    x, weight = args[:2]
    return [(len(x) * weight.numel() * math.prod(out.shape[2:]), [(out, {1: 0}), (x, {1: 1}), (weight, {0: 0, 1: 1})])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    "convolution": _convolution,
    "deform_conv2d": _deformable,
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        ),
        _attention,
    ),
    # fvcore's numbers per element
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm"),
        _elementwise(2),
    ),
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), _elementwise(5)),
    **dict.fromkeys(("upsample_bilinear2d", "grid_sampler_2d"), _elementwise(4)),
    "upsample_nearest2d": _elementwise(1),
    "_adaptive_avg_pool2d": _elementwise(1, of_input=True),
    "mean": _pooling,
}
"""By the name of the ATen operation: (amount, operands with the loops that their axes are) of what it does."""


def note(works: list[Work], flow: Flow, path: str, func: Any, args: Any, out: Any) -> None:
    """Append what an operation does, if it is one that is counted."""
    rule = RULES.get(func.overloadpacket.__name__)
    if rule is None or func.namespace not in ("aten", "torchvision"):
        return
    for amount, operands in rule(args, out):
        found: list[tuple[Axes, Tensor]] = []
        for tensor, loops in operands:
            labels = flow.of(tensor)
            found += [
                ({axis: loops[axis] for axis in axes_of(array)}, array)
                for array in (labels.arrays if labels else ())
                if set(axes_of(array)) <= loops.keys()
            ]
        kept = _distinct(found)
        works.append(Work(path, float(amount), tuple(array for _, array in kept), tuple(loops for loops, _ in kept)))


def _distinct(found: Sequence[tuple[Axes, Tensor]]) -> list[tuple[Axes, Tensor]]:
    """One array for every loop: of those over the same one, which are coupled, that with most loops."""
    kept: list[tuple[Axes, Tensor]] = []
    for loops, array in sorted(found, key=lambda entry: -len(entry[0])):
        if not any(set(loops.values()) <= set(others.values()) for others, _ in kept):
            kept.append((loops, array))
    return kept


def _says_all(one: np.ndarray, its: Axes, other: np.ndarray, others: Axes) -> bool:
    """Whether both change along the loops that they share only, and alike."""
    shared = set(its.values()) & set(others.values())
    a, b = _along(shared, one, its), _along(shared, other, others)
    return bool(shared) and a is not None and b is not None and np.array_equal(a, b)


def _along(shared: set[int], labels: np.ndarray, loops: Axes) -> np.ndarray | None:
    """Labels along the shared loops, in their order; None where they change along others."""
    own = labels.reshape([labels.shape[axis] for axis in loops])
    order = sorted(range(len(loops)), key=list(loops.values()).__getitem__)
    constant = tuple(i for i, axis in enumerate(loops) if loops[axis] not in shared)
    if (own.min(constant) != own.max(constant)).any():
        return None
    return own.min(constant, keepdims=True).transpose(order).squeeze()


def shares(works: Sequence[Work]) -> list[float]:
    """Of the multiply-adds of the same module's own operations, the share of each."""
    whole: dict[str, float] = defaultdict(float)
    for work in works:
        whole[work.path] += work.amount
    return [work.amount / whole[work.path] if whole[work.path] else 0.0 for work in works]
