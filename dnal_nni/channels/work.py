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

from torch import Tensor

from ..modules.running import flatten_tensors
from .flow import Arrays, Flow, axes_of


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        path: the module in whose forward it ran; a layer that ran at positions which may go.
        amount: of its multiply-adds, as fvcore counts them.
        factors: arrays of channel ids (-1: a fixed position); the amount grows with the open share of each.
    """

    path: str
    amount: float
    factors: tuple[Tensor, ...]


Axes = dict[int, int]  # axis of an operand -> axis of the operation's loops
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
        found: list[tuple[set[int], Tensor]] = []
        for tensor, loops in operands:
            labels = flow.of(tensor)
            found += [
                ({loops[axis] for axis in axes_of(array)}, array)
                for array in (labels.arrays if labels else ())
                if set(axes_of(array)) <= loops.keys()
            ]
        works.append(Work(path, float(amount), _distinct(found)))


def _distinct(found: Sequence[tuple[set[int], Tensor]]) -> Arrays:
    """One array for every loop: of those over the same one, which are coupled, that with most loops."""
    kept: list[tuple[set[int], Tensor]] = []
    for loops, array in sorted(found, key=lambda entry: -len(entry[0])):
        if not any(loops <= others for others, _ in kept):
            kept.append((loops, array))
    return tuple(array for _, array in kept)


def shares(works: Sequence[Work]) -> list[float]:
    """Of the multiply-adds of the same module's own operations, the share of each."""
    whole: dict[str, float] = defaultdict(float)
    for work in works:
        whole[work.path] += work.amount
    return [work.amount / whole[work.path] if whole[work.path] else 0.0 for work in works]
