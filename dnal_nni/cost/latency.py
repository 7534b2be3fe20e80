"""Latency, measured: of whole networks, and of single layers as a function of their open channels."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from ..modules.layers import MIXED, Layer, layer_of
from ..modules.running import call, clone
from ..surgery.inject import detach

FRACTIONS = (0.25, 0.5, 1.0)  # of a layer's inputs and of its outputs, at which it is timed
WARM_UP, ROUNDS, LAYER_SECONDS = 3, 30, 0.02


def latencies(models: Sequence[nn.Module], dummy_input: Any, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds of a forward pass of each model: eval mode, no gradients, on the device that it is on.

    The fastest of some rounds, in which the models take turns: whatever else runs on the machine only adds. Gates are
    taken off first (on copies). What holds for the caller holds here: the number of threads, autocast.

    Args:
        models: any modules that run on ``dummy_input``.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        rounds: forward passes of each model that count.
    """
    copies = [clone(model).eval() for model in models]
    for model in copies:
        detach(model)
    with torch.no_grad():
        times = [[milliseconds(call, model, dummy_input) for model in copies] for _ in range(WARM_UP + rounds)]
    return [min(taken) for taken in zip(*times[WARM_UP:])]


class LayerLatency(NamedTuple):
    """Milliseconds of a layer, ``rest + by_in * a + by_out * b + by_both * a * b``, at the open fractions a of its
    inputs and b of its outputs."""

    rest: float
    by_in: float
    by_out: float
    by_both: float


def layer_latencies(model: nn.Module, dummy_input: Any) -> tuple[float, dict[str, LayerLatency]]:
    """Milliseconds of a forward pass, and how every convolution, linear layer and norm contributes, by dotted path.

    Layers are timed one by one, at nine pairs of widths, on inputs as the model gives them; a non-negative fit turns
    that into a surface. What happens between them (activations, sums, the interpreter) follows their widths too: it is
    spread over the layers in proportion, so that all of them together are the whole.

    Args:
        model: the ungated model; it is not changed.
        dummy_input: what to run it on; its batch size and resolution are those that latency is measured at.
    """
    model = clone(model).eval()
    (whole,) = latencies([model], dummy_input)
    fits: dict[tuple[Any, ...], LayerLatency] = {}
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    with torch.no_grad():
        for path, x in _inputs(clone(model), dummy_input):
            layer = model.get_submodule(path)
            kind = (type(layer), repr(layer), x.shape, x.dtype, x.stride())
            if kind not in fits:
                fits[kind] = _fit(layer, x)
            sums[path] += torch.tensor(fits[kind], dtype=torch.float64)
    total = float(sum(float(parts.sum()) for parts in sums.values()))
    return whole, {path: LayerLatency(*(parts * whole / total).tolist()) for path, parts in sums.items()}


def _inputs(model: nn.Module, dummy_input: Any) -> list[tuple[str, Tensor]]:
    """Path and input of every call of a layer."""
    seen: list[tuple[str, Tensor]] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))  # conv(input=x)
        if isinstance(x, Tensor):
            seen.append((path, x.detach()))

    for path, module in model.named_modules():
        if layer_of(module) is not None:
            module.register_forward_pre_hook(functools.partial(note, path), with_kwargs=True)
    call(model, dummy_input)
    return seen


def _fit(layer: nn.Module, x: Tensor) -> LayerLatency:
    """The surface of one layer from timings."""
    kind = layer_of(layer)
    assert kind is not None
    if not kind.mixes:
        return LayerLatency(0.0, 0.0, _fastest(layer, x), 0.0)
    moves = kind.moves(layer)
    has_in, has_out = "in" in moves, "out" in moves
    rows, times = [], []
    for a, b in itertools.product(FRACTIONS if has_in else (1.0,), FRACTIONS if has_out else (1.0,)):
        narrow, a, b = _narrow(layer, kind, a if has_in else b, b)
        rows.append([1.0, a * has_in, b * has_out, a * b * has_in * has_out])
        times.append(_fastest(narrow, _cut_input(narrow, kind, x)))
    # relative errors count, and the whole layer for as much as all the others: it is what the fit is scaled by
    weight = np.array([1.0] * (len(rows) - 1) + [len(rows) ** 0.5]) / np.maximum(times, 1e-6)
    return LayerLatency(*nnls(np.array(rows) * weight[:, None], np.array(times) * weight)[0])


def _narrow(layer: nn.Module, kind: Layer, a: float, b: float) -> tuple[nn.Module, float, float]:
    """A layer with the first inputs and outputs (of every group) of itself, and the fractions that these are."""
    # the tensors are shared until they are cut, where it is known how
    narrow = copy.deepcopy(layer, {id(p): p for p in layer.parameters(recurse=False)} if kind.tensors else {})
    widths, units = kind.widths(layer), kind.units(layer)
    keep = {}
    for side, fraction in zip(MIXED, (a, b)):
        if side in widths:
            numbers = units.get(side, torch.arange(widths[side]))
            numbers = numbers - numbers.min()
            keep[side] = numbers < max(1, round(fraction * (int(numbers.max()) + 1)))
    kind.cut(narrow, keep)
    shares = [float(keep[side].double().mean()) if side in keep else 1.0 for side in MIXED]
    return narrow, shares[0], shares[1]


def _cut_input(layer: nn.Module, kind: Layer, x: Tensor) -> Tensor:
    """As many channels of ``x`` as a layer takes, in the memory format of ``x``."""
    widths = kind.widths(layer)
    if "in" not in widths:
        return x
    cut = x.narrow(kind.input_axis(layer) % x.dim(), 0, widths["in"])
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return cut.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fastest(layer: nn.Module, x: Tensor) -> float:
    """Milliseconds of the fastest of some forward passes."""
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < WARM_UP + 3 or (time.perf_counter() - start < LAYER_SECONDS and len(taken) < ROUNDS):
        taken.append(milliseconds(call, layer, x))
    return min(taken[WARM_UP:])


def milliseconds(function: Callable[..., Any], model: nn.Module, *args: Any) -> float:
    """What one call of ``function`` takes by the clock; where ``model`` is on a GPU, until that is done."""
    cuda = any(p.is_cuda for p in model.parameters())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(model, *args)
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
