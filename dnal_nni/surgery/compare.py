"""Whether two networks compute the same, in eval and train mode."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.chance import WithoutChance
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, map_tensors, seeded
from .changes import newly_baked
from .precise import in_dtype
from .sizes import has_volumes

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest accepted max|gated - sliced| / max|gated|, by the dtype of the comparison."""

VALUES = 8  # that a batch norm averages over, at least, where sliced and gated are compared

_AMPLIFIED = 10.0  # how much more than a moved input may rounding, in every layer, move the output
_DEAD = 1e-7  # what moves by less, relative to its size, shows nothing: a wrong cut ahead of it could pass
_BLIND = 1e-4  # no gap larger than this passes for rounding: it could hide a wrong cut

_Dropout = nn.modules.dropout._DropoutNd


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far a cut network is from the gated one.

    Attributes:
        absolute: max|gated - slim| over every tensor compared.
        relative: the largest max|gated - slim| / max|gated| of a tensor.
        equal: whether ``relative`` is within :data:`TOLERANCE`, or within what rounding does to the gated network.
    """

    absolute: float = 0.0
    relative: float = 0.0
    equal: bool = True

    def __or__(self, other: Gap) -> Gap:
        """The worst of both."""
        worst = [max(pair) for pair in ((self.absolute, other.absolute), (self.relative, other.relative))]
        return Gap(worst[0], worst[1], self.equal and other.equal)


def example_like(dummy_input: Any, dtype: torch.dtype, times: int = 1, least: int = 3) -> Any:
    """Standard normal data in the form of ``dummy_input``, floating tensors in ``dtype``.

    Args:
        dummy_input: a tensor, or tensors in lists, tuples and dicts.
        dtype: of the result.
        times: how many times as large a batch.
        least: what a batch of one is made, if that is more.
    """
    generator = torch.Generator().manual_seed(0)

    def convert(x: Tensor) -> Tensor:
        if x.dim() > 1:
            x = torch.cat([x] * (max(least, times) if x.shape[0] == 1 else times))
        if not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device)

    return map_tensors(convert, dummy_input)


def difference(
    gated: nn.Module,
    slim: nn.Module,
    inputs: Any,
    watch: Collection[str] = (),
    modes: Sequence[str] = ("eval", "train", "eval"),
) -> tuple[float, float]:
    """(max|gated - slim|, the same / max|gated|) over every tensor returned, the worst of eval, train and eval again.

    Dropout is off in both modes and noise is its mean (they draw numbers per channel). Train mode is left out for a
    model that does not run there, such as a detector without targets. Both modules are left in train mode with their
    norm statistics moved: pass copies.

    Args:
        gated: the reference.
        slim: what is compared with it.
        inputs: tensor, tuple of arguments or dict of keyword arguments.
        watch: paths of layers whose outputs are compared too. A detector may return nothing for random weights.
        modes: in this order.
    """
    worst = Gap()
    for mode in modes:
        expected = _reference(gated, inputs, watch, mode)
        if expected is not None:
            worst |= _gap(expected, outputs(slim, inputs, watch, mode))
    return worst.absolute, worst.relative


class Comparison:
    """Cut networks beside a gated one.

    Args:
        gated: the reference. Its mode and norm statistics change: pass a copy.
        dtype: in which it computes.

    Attributes:
        expected: what the gated network returned last, and what its watched layers did.
        several: the same, of the last batch of more than one example.
    """

    def __init__(self, gated: nn.Module, dtype: torch.dtype) -> None:
        self.gated = gated
        self.expected: Outputs = ([], [])
        self.several: Outputs = ([], [])
        self._draws: set[str] = set()
        self._dtype = dtype
        self._values = values = [VALUES]  # that batch norms average over, counted in eval mode

        def count(norm: nn.Module, args: tuple[Tensor, ...]) -> None:  # knows nothing of the model: no circle
            values.append(args[0].numel() // args[0].shape[1])

        for module in gated.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(count)

    def gap(self, slim: nn.Module, inputs: Any, mode: str, watch: Collection[str] = (), returned: bool = True) -> Gap:
        """Run both in one mode, see :func:`difference`.

        The batch in train mode, which must follow eval mode, is made so large that every batch norm averages over
        8 values or more: the statistics of two or three magnify rounding by many powers of ten.

        Args:
            slim: the cut network, in the dtype of the gated one.
            inputs: see :func:`example_like`.
            mode: "eval" or "train".
            watch: paths of layers whose outputs are compared too.
            returned: whether what the models return is compared, beside the watched layers.
        """
        batches = [inputs]
        if mode == "eval":
            self._values[:] = [VALUES]
        elif min(self._values) < VALUES:
            batches.insert(0, example_like(inputs, self._dtype, -(-VALUES // max(1, min(self._values))), least=1))
        for batch in batches:  # a model may insist on its batch size
            expected = _reference(self.gated, batch, watch, mode, self._draws)
            if expected is not None:
                self.expected = expected
                if any(x.dim() > 0 and len(x) > 1 for x in flatten_tensors(batch)):
                    self.several = expected
                gap = _gap(expected, outputs(slim, batch, watch, mode, self._draws), returned)
                within = TOLERANCE.get(self._dtype, 5e-2)
                if within < gap.relative <= _BLIND:
                    within = self._rounding(batch, watch, mode, returned)
                return dataclasses.replace(gap, equal=gap.relative <= within)
        return Gap()

    def _rounding(self, inputs: Any, watch: Collection[str], mode: str, returned: bool) -> float:
        """The gap that rounding explains, by what moving the input by a few units of it does to the gated network.

        Many branches summed ahead of a norm, or statistics of few values, magnify it.
        """
        runs = []
        for x in (inputs, _nudged(inputs)):
            with unmoved(self.gated):
                runs.append(outputs(self.gated, x, watch, mode, self._draws))
        return _AMPLIFIED * _gap(runs[0], runs[1], returned).relative


def _nudged(inputs: Any) -> Any:
    """Inputs moved by four units of rounding, up or down."""
    generator = torch.Generator().manual_seed(1)

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        up = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
        return x + x * up * 4 * torch.finfo(x.dtype).eps

    return map_tensors(nudge, inputs)


def check_equal(gated: nn.Module, slim: nn.Module, dummy_input: Any) -> tuple[float, float]:
    """Compare a cut network with the hard-gated one, in eval and train mode; both stay as they are.

    Returns:
        the largest difference between what the cut network returns in its own dtype and what the gated one does in the
        dtype of the comparison (eval mode), and the largest relative difference in float64 (both modes), or in the
        model's own dtype where it does not run in float64.

    Raises:
        DNALError: the cut network does not run, or computes something else.
    """
    native = floating_dtype(gated)
    inputs = example_like(dummy_input, native, least=1 if has_volumes(dummy_input) else 3)
    for dtype in dict.fromkeys((torch.float64, native)):
        try:
            comparison = Comparison(in_dtype(gated, dtype), dtype)
            cut, x = in_dtype(slim, dtype), map_tensors(partial(_converted, dtype=dtype), inputs)
            gap = comparison.gap(cut, x, "eval")
            returned = outputs(in_dtype(slim, native), inputs, (), "eval")
            absolute = _gap(comparison.expected, returned).absolute
            gap |= comparison.gap(cut, x, "train")
            break
        except FORWARD_ERRORS as error:
            if dtype is native:
                raise DNALError(f"the cut model does not run: {str(error).splitlines()[0]}") from error
    # a computed weight that the cut made plain has been rounded to the model's dtype
    rounded = newly_baked(gated, slim) and gap.relative <= TOLERANCE.get(native, 5e-2)
    if not gap.equal and not rounded:
        raise DNALError(
            f"the cut model differs from the gated one by {gap.relative:.1e} of its output (in {dtype}): please "
            "report the model; leaving layers out narrows it down"
        )
    return absolute, gap.relative


Outputs = tuple[list[Tensor], list[Tensor]]  # what a model returns, and what the watched layers do


def outputs(model: nn.Module, inputs: Any, watch: Collection[str], mode: str, draws: set[str] | None = None) -> Outputs:
    """What a model returns in eval or train mode, without chance, and what the watched layers do.

    Args:
        model: its mode is set; in train mode its norm statistics move.
        inputs: see :func:`~dnal_nni.modules.running.call`.
        watch: paths of layers.
        mode: "eval" or "train".
        draws: modes in which the model is known to draw random numbers; added to. Others are tried first as they are.
    """
    draws = set() if draws is None else draws
    watched: list[Tensor] = []
    model.train(mode == "train")
    for child in model.modules():
        if isinstance(child, _Dropout):
            child.eval()
    modules = dict(model.named_modules()) if watch else {}
    handles = [
        modules[path].register_forward_hook(lambda module, args, out: watched.append(out))
        for path in watch
        if path in modules  # not in a candidate that is gone; in the gated network that one does not run
    ]
    try:
        if mode not in draws and not next(model.parameters()).is_cuda:
            before = _buffers(model) if mode == "train" else []
            try:
                with seeded(model), torch.no_grad(), _no_draws():
                    returned = list(flatten_tensors(call(model, inputs)))
            except _Drawn:
                draws.add(mode)
                watched.clear()
                _put_back(before)
        if mode in draws or next(model.parameters()).is_cuda:
            with seeded(model), torch.no_grad(), WithoutChance():
                returned = list(flatten_tensors(call(model, inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return returned, list(flatten_tensors(watched))


class _Drawn(BaseException):
    """Not an Exception: a forward may catch those."""


@contextmanager
def _no_draws() -> Iterator[None]:
    """Raise as soon as a module has drawn a number: what follows would be run again."""
    state, thread = torch.get_rng_state(), threading.get_ident()

    def look(*_: Any) -> None:
        if threading.get_ident() == thread and not torch.equal(state, torch.get_rng_state()):
            raise _Drawn

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield
        look()
    finally:
        handle.remove()


def responds(found: Outputs) -> bool:
    """Whether anything that a model returned, or that was watched, differs between the samples of the batch.

    It does not where all that is left of a narrow network without norms is dead (ReLU): nothing ahead of it shows.
    """
    tensors = [x for x in (*found[0], *found[1]) if x.dim() > 1 and x.shape[0] > 1 and x.is_floating_point()]
    gaps = [_distance(x, x[:1].expand_as(x)) for x in tensors]
    return not gaps or any(gap > _DEAD * scale for gap, scale in gaps)


def _reference(
    gated: nn.Module, inputs: Any, watch: Collection[str], mode: str, draws: set[str] | None = None
) -> Outputs | None:
    """What a gated network returns; None where it does not run in train mode."""
    if mode == "eval":
        return outputs(gated, inputs, watch, mode, draws)
    try:
        with unmoved(gated, only_on_error=True):
            return outputs(gated, inputs, watch, mode, draws)
    except FORWARD_ERRORS:
        return None  # the norms ahead of the failure have moved, and those of the cut network have not


@contextmanager
def unmoved(model: nn.Module, only_on_error: bool = False) -> Iterator[None]:
    """Put the buffers of a model back, in the end or after an error."""
    kept = _buffers(model)
    try:
        yield
        moved = not only_on_error
    except BaseException:
        moved = True
        raise
    finally:
        if moved:
            _put_back(kept)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(m, name, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]


def _put_back(buffers: list[tuple[nn.Module, str, Tensor]]) -> None:
    for module, name, value in buffers:
        module._buffers[name] = value


def _gap(expected: Outputs, got: Outputs, returned: bool = True) -> Gap:
    if returned and len(expected[0]) != len(got[0]):
        raise RuntimeError(f"the number of outputs changes from {len(expected[0])} to {len(got[0])}")
    # a layer's other axes may be channels of their own (token mixing): its output is then another tensor
    pairs = [(a, b) for a, b in zip(expected[1], got[1]) if a.shape == b.shape]
    absolute = relative = 0.0
    for a, b in [*(zip(expected[0], got[0]) if returned else ()), *pairs]:
        if a.shape != b.shape:
            raise RuntimeError(f"the shape of an output changes from {tuple(a.shape)} to {tuple(b.shape)}")
        gap, scale = _distance(a.detach().double(), b.detach().double())
        absolute = max(absolute, gap)
        relative = max(relative, gap / max(scale, 1e-12))
    return Gap(absolute, relative)


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """max|a - b| and max|a|, over what is finite; infinite where the rest differs, or where nothing is finite."""
    if a.numel() == 0:
        return 0.0, 0.0
    finite = a.isfinite() & b.isfinite()
    if not bool(finite.any()) or not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
        return float("inf"), 1.0
    return float((a - b)[finite].abs().max()), float(a[finite].abs().max())


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
