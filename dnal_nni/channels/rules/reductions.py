"""Operations that combine the elements along axes."""

from __future__ import annotations

from ...modules.running import flatten_tensors
from ..flow import Flow, Operation
from .registry import rule


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "var_mean", "std_mean")
@rule("logsumexp", "prod", "any", "all", "argmax", "argmin", "median")
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


@rule("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "sort")
def along(flow: Flow, op: Operation) -> None:
    """Softmax, cumulative sums, sorting: elements along one axis are combined, the shape stays."""
    labels = op.labels[0]
    if labels is not None:
        arrays = flow.mix(labels, [op.argument("dim", -1)], f"{op.name} runs over the channels")
        for out in flatten_tensors(op.out):
            if out.shape == labels.shape:
                flow.put(out, arrays, None)
