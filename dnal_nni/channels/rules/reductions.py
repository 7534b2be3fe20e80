"""Operations that combine the elements along axes: what differs along those only is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...modules.running import flatten_tensors
from ..flow import Flow, Operation, axes_of
from .registry import rule

# 0 where everything along the axes is
ZEROS = {"sum", "mean", "nansum", "amax", "amin", "aminmax", "max", "min", "median", "nanmedian", "mode", "norm", "std"}
ZEROS |= {"linalg_vector_norm", "var", "cumsum", "cumprod", "cummax", "cummin", "sort", "topk", "kthvalue", "prod"}
ZEROS |= {"fft_r2c", "fft_c2r", "fft_c2c"}
SUMS = {"sum", "nansum", "norm", "linalg_vector_norm", "any", "count_nonzero"}  # what is 0 adds nothing to


def _combine(flow: Flow, op: Operation, axes: Sequence[int]) -> None:
    labels = op.labels[0]
    if labels is None:
        return
    rank = len(labels.shape)
    axes = [axis % rank for axis in axes]
    if op.name in SUMS and labels.site is not None and float(op.argument("ord", op.argument("p", 2)) or 2) >= 0:
        for array in labels.arrays:
            if set(axes_of(array)) <= set(axes):
                flow.graph.add_up(array, labels.site)
        labels = dataclasses.replace(labels, arrays=tuple(a for a in labels.arrays if not set(axes_of(a)) <= set(axes)))
    any_number = op.name not in ("topk", "kthvalue")  # of so many
    arrays = flow.mix(labels, axes, f"{op.name} runs over the channels", any_number)
    site = labels.site if op.name in ZEROS else None
    for out in flatten_tensors(op.out):
        kept = arrays
        if out.dim() < rank:
            gone = tuple(slice(None) if axis not in axes else 0 for axis in range(rank))
            kept = tuple(array[gone] for array in arrays)
        flow.put(out, kept, site if out.is_floating_point() or out.is_complex() else None)  # not indices


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "var_mean", "std_mean")
@rule("logsumexp", "prod", "any", "all", "argmax", "argmin", "median", "nanmedian", "nansum", "aminmax")
@rule("count_nonzero")
def reduce(flow: Flow, op: Operation) -> None:
    """Sums, means and extrema along axes; of all of them where none is named."""
    axes = op.argument("dim")
    if axes is None or axes == []:
        axes = range(op.args[0].dim())
    _combine(flow, op, [axes] if isinstance(axes, int) else axes)


@rule("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
@rule("sort", "argsort", "topk", "kthvalue", "mode", "_fft_r2c", "_fft_c2r", "_fft_c2c")
def along(flow: Flow, op: Operation) -> None:
    """Softmax, cumulative sums, sorting, Fourier transforms; along the last axis where none is named."""
    axes = op.argument("dim", -1)
    _combine(flow, op, [axes] if isinstance(axes, int) else axes)


@rule("_cdist_forward", "_pdist_forward", "dist", "trace", "unique_dim", "_unique2", "nonzero", "masked_select")
@rule("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "histc", "multinomial", "cholesky")
@rule("cholesky_inverse", "geqrf", "cholesky_solve", "ormqr", "linalg_cholesky_ex", "linalg_eig")
@rule("linalg_householder_product", "linalg_inv_ex", "linalg_lstsq", "linalg_lu", "linalg_lu_factor_ex")
@rule("linalg_lu_solve", "linalg_matrix_exp", "linalg_pinv", "linalg_qr", "linalg_solve_triangular", "_linalg_det")
@rule("affine_grid_generator", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "triangular_solve")
def mixing(flow: Flow, op: Operation) -> None:
    """Every element of the result depends on all that enters, or its size does."""
    for labels in op.labels:
        flow.freeze(labels, f"{op.name} mixes channels")
