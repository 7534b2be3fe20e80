"""Whether two networks compute the same, in eval and train mode."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.running import FORWARD_ERRORS, call, clone, flatten_tensors, seeded
from .changes import newly_baked

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest accepted max|gated - sliced| / max|gated|."""

VALUES = 16  # that a batch norm averages over, at least, where sliced and gated are compared

_Dropout = nn.modules.dropout._DropoutNd


def example_like(dummy_input: Any, dtype: torch.dtype, times: int = 1) -> Any:
    """Standard normal data in the form of ``dummy_input``, floating tensors in ``dtype``, a batch of one made three.

    Args:
        dummy_input: a tensor, or tensors in lists, tuples and dicts.
        dtype: of the result.
        times: how many times as large a batch.
    """
    generator = torch.Generator().manual_seed(0)

    def convert(x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.dim() > 1:
                x = torch.cat([x] * (max(3, times) if x.shape[0] == 1 else times))
            if not x.is_floating_point():
                return x
            return torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device)
        if isinstance(x, Mapping):
            return {key: convert(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return tuple(convert(value) for value in x)
        return x

    return convert(dummy_input)


def difference(
    gated: nn.Module,
    slim: nn.Module,
    inputs: Any,
    watch: Collection[str] = (),
    modes: Sequence[str] = ("eval", "train", "eval"),
    returned: bool = True,
) -> tuple[float, float]:
    """(max|gated - slim|, the same / max|gated|) over every tensor returned, the worst of eval, train and eval again.

    Dropout is off in both modes (it draws one number per channel); other random layers see the same seed. Train mode is
    left out for a model that does not run there, such as a detector without targets. Both modules are left in train
    mode with their norm statistics moved: pass copies.

    Args:
        gated: the reference.
        slim: what is compared with it.
        inputs: tensor, tuple of arguments or dict of keyword arguments.
        watch: paths of layers whose outputs are compared too. A detector may return nothing for random weights.
        modes: in this order.
        returned: whether what the models return is compared, beside the watched layers.
    """
    absolute = relative = 0.0
    for mode in modes:
        before = [(buffer, buffer.clone()) for buffer in gated.buffers()] if mode == "train" else []
        try:
            expected, whole = _outputs(gated, inputs, watch, mode)
        except FORWARD_ERRORS:
            if mode == "eval":
                raise
            for buffer, value in before:  # the norms ahead of the failure have moved, and those of ``slim`` have not
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            continue
        got, still_whole = _outputs(slim, inputs, watch, mode)
        if returned and len(expected) != len(got):
            raise RuntimeError(f"the number of outputs changes from {len(expected)} to {len(got)}")
        # a layer's other axes may be channels of their own (token mixing): its output is then another tensor
        pairs = [(a, b) for a, b in zip(whole, still_whole) if a.shape == b.shape]
        for a, b in [*(zip(expected, got) if returned else ()), *pairs]:
            if a.shape != b.shape:
                raise RuntimeError(f"the shape of an output changes from {tuple(a.shape)} to {tuple(b.shape)}")
            gap, scale = _gap(a.detach().double(), b.detach().double())
            absolute = max(absolute, gap)
            relative = max(relative, gap / max(scale, 1e-12))
    return absolute, relative


def _gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    """max|a - b| and max|a|, over what is finite; infinite where the rest differs, or where nothing is finite."""
    if a.numel() == 0:
        return 0.0, 0.0
    finite = a.isfinite() & b.isfinite()
    if not bool(finite.any()) or not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
        return float("inf"), 1.0
    return float((a - b)[finite].abs().max()), float(a[finite].abs().max())


def check_equal(gated: nn.Module, slim: nn.Module, dummy_input: Any) -> tuple[float, float]:
    """Compare a cut network with the hard-gated one, in eval and train mode; both stay as they are.

    Returns:
        the largest difference in the model's own dtype, and the same relative to the largest output, in float64 where
        the model runs in it.

    Raises:
        DNALError: the cut network does not run, or computes something else.
    """
    native = next(p.dtype for p in gated.parameters() if p.is_floating_point())
    checks: dict[torch.dtype, tuple[float, float]] = {}
    for dtype in dict.fromkeys((native, torch.float64)):
        try:
            pair = clone(gated).to(dtype), clone(slim).to(dtype)
            checks[dtype] = difference(*pair, conditioned_example(pair[0], dummy_input, dtype))
        except FORWARD_ERRORS as error:
            if dtype is native:
                raise DNALError(f"the cut model does not run: {str(error).splitlines()[0]}") from error
    best = torch.float64 if torch.float64 in checks else native
    # a computed weight that the cut made plain has been rounded to the model's dtype
    exact = native if newly_baked(gated, slim) else best
    if not checks[best][1] <= TOLERANCE.get(exact, 5e-2):
        raise DNALError(
            f"the cut model differs from the gated one by {checks[best][1]:.1e} of its output (in {best}): please "
            "report the model; leaving layers out narrows it down"
        )
    return checks[native][0], checks[best][1]


def _outputs(
    model: nn.Module, inputs: Any, watch: Collection[str], mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    """What the model returns, and what the watched layers do."""
    watched: list[Tensor] = []
    model.train(mode == "train")
    for child in model.modules():
        if isinstance(child, _Dropout):
            child.eval()
    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda module, args, out: watched.append(out))
        for path in watch
        if path in modules  # not in a candidate that is gone; in the gated network that one does not run
    ]
    try:
        with seeded(model), torch.no_grad():
            returned = list(flatten_tensors(call(model, inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return returned, list(flatten_tensors(watched))


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            call(clone(model).eval(), inputs)
    except FORWARD_ERRORS:
        return False
    return True


def conditioned_example(model: nn.Module, dummy_input: Any, dtype: torch.dtype) -> Any:
    """:func:`example_like` with a batch so large that every batch norm of ``model`` averages over 16 values or more.

    The statistics of two or three values magnify rounding by many powers of ten. ``model`` is in ``dtype``.
    """
    example = example_like(dummy_input, dtype)
    return _conditioned(model, [example], _fewest_values(model, example) or VALUES)[0]


def _conditioned(model: nn.Module, inputs: list[Any], fewest: int) -> list[Any]:
    if fewest >= VALUES:
        return inputs
    dtype = next(t.dtype for x in inputs for t in flatten_tensors(x) if t.is_floating_point())
    larger = [example_like(x, dtype, -(-VALUES // max(1, fewest))) for x in inputs]
    return larger if all(_runs(model, x) for x in larger) else inputs


def _fewest_values(model: nn.Module, inputs: Any) -> int | None:
    """How many values a batch norm averages over, at least; None: the model does not take this input."""
    fewest = VALUES
    model = clone(model)

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal fewest
        fewest = min(fewest, args[0].numel() // args[0].shape[1])

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(look)
    return fewest if _runs(model, inputs) else None
