"""Operations on elements at the same place, and copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...modules.running import flatten_tensors
from ..flow import Flow, Operation, axes_of
from ..graph import Site, on_norms
from .registry import rule


# without torch's tag, or without it in torch 2.2
@rule("hardswish", "hardsigmoid", "hardtanh", "mish", "celu", "softshrink", "leaky_relu")
@rule("elu", "gelu", "silu", "softplus", "threshold", "_prelu_kernel", "rrelu_with_noise", "log_sigmoid_forward")
@rule("hardshrink", "isinf", "rad2deg", "floor_divide", "complex", "polar", "_conj_physical", "native_dropout")
@rule("copy", "fill", "zero", "normal", "uniform", "exponential", "cauchy", "geometric", "log_normal", "random")
def pointwise(flow: Flow, op: Operation) -> None:
    """Elements at the same place meet: activations, addition, multiplication, comparison, where."""
    tensors = list(flatten_tensors([op.args, list(op.kwargs.values())]))
    operands = [
        (labels.shape, labels.arrays) if labels else (flow.adjustable(tensor), ())
        for tensor, labels in zip(tensors, op.labels)
    ]
    arrays = flow.meet(operands, f"{op.name} meets a tensor whose channels are fixed")
    site = _site(op, arrays)
    for out in flatten_tensors(op.out):
        flow.put(out, arrays, site)


def _site(op: Operation, arrays: Sequence[Tensor]) -> Site:
    """What zeroes the result: for each of its arrays, what zeroes one operand that alone does, or all that carry it."""
    found: frozenset[Any] = frozenset()
    for array in arrays:
        axes = {axis - array.dim() for axis in axes_of(array)}
        carriers = {
            i: x.site
            for i, x in enumerate(op.labels)
            if x is not None and any(axes & {axis - a.dim() for axis in axes_of(a)} for a in x.arrays)
        }
        known = [(i, site) for i, site in carriers.items() if site is not None]
        known.sort(key=lambda carrier: not on_norms(carrier[1]))
        alone = next((site for i, site in known if op.gives_zero({i})), None)
        if alone is None:
            sites = [site for _, site in known]
            if len(sites) < max(2, len(carriers)) or not op.gives_zero(set(carriers)):
                return None
            alone = frozenset().union(*sites)
        found |= alone
    return found


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "_conj", "_neg_view")
def same(flow: Flow, op: Operation) -> None:
    """The result has the labels of the first argument: copies, casts."""
    labels = op.labels[0]
    if labels is not None:
        flow.put(op.out, labels.arrays, labels.site)


@rule("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli")
@rule("new_empty", "new_zeros", "new_ones", "new_full")
def like(flow: Flow, op: Operation) -> None:
    """A new tensor with the sizes of the first along labelled axes: its channels come and go with those."""
    labels = op.labels[0]
    if labels is not None and op.out.dim() == len(labels.shape):
        kept = [a for a in labels.arrays if all(op.out.shape[axis] == a.shape[axis] for axis in axes_of(a))]
        flow.put(op.out, kept, None)
    if flow.of(op.out) is None:
        flow.made.mark(op.out, flow.sizes.given)
