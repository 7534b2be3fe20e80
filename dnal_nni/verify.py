"""Exact or left alone: compare the sliced with the hard-gated network, and freeze the groups for which they differ."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gate import ScaledSigmoidGate
from .graph import Norm, call, flatten_tensors
from .groups import ChannelGroup
from .inject import attach
from .slim import Keep, slim_copy

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest accepted max|gated - sliced| / max|gated|."""

# what a forward pass of somebody else's module raises on channels that it did not expect
FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_Dropout = nn.modules.dropout._DropoutNd


def example_like(dummy_input: Any, dtype: torch.dtype) -> Any:
    """Standard normal data in the form of ``dummy_input``, floating tensors in ``dtype``, a batch of one made four."""
    generator = torch.Generator().manual_seed(0)

    def convert(x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.dim() > 1 and x.shape[0] == 1:
                x = torch.cat([x] * 4)  # batch statistics of two values are ill-conditioned
            if not x.is_floating_point():
                return x
            return torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device)
        if isinstance(x, Mapping):
            return {key: convert(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return tuple(convert(value) for value in x)
        return x

    return convert(dummy_input)


def difference(gated: nn.Module, slim: nn.Module, inputs: Any) -> tuple[float, float]:
    """(max|gated - slim|, the same / max|gated|) over every tensor returned, the worse of eval and train mode.

    Dropout is off in both modes (it draws one number per channel); other random layers see the same seed. Both modules
    are left in train mode with their norm statistics moved: pass copies.
    """
    absolute = relative = 0.0
    for mode in ("eval", "train"):
        outputs = []
        for module in (gated, slim):
            module.train(mode == "train")
            for child in module.modules():
                if isinstance(child, _Dropout):
                    child.eval()
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                outputs.append(list(flatten_tensors(call(module, inputs))))
        assert len(outputs[0]) == len(outputs[1])
        for a, b in zip(*outputs):
            if a.shape != b.shape:
                raise RuntimeError(f"the shape of an output changes from {tuple(a.shape)} to {tuple(b.shape)}")
            if a.numel() == 0:
                continue
            a, b = a.double(), b.double()
            gap = float((a - b).abs().max())
            gap = gap if gap == gap else float("inf")
            absolute = max(absolute, gap)
            relative = max(relative, gap / max(float(a.abs().max()), 1e-12))
    return absolute, relative


def _perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose norms and per-channel scales hide nothing: zero-initialised branches and tiny scales are moved."""
    model = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) <= 1:
                parameter.add_(noise(parameter), alpha=0.3)
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(module, Norm) and mean is not None and var is not None:
                mean.add_(noise(mean), alpha=0.1)
                var.mul_(noise(var).abs() + 0.5)
    return model


def random_keep(groups: Sequence[ChannelGroup], fraction: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """For every group that is not frozen, about ``fraction`` of its units dropped: at least one, and one kept."""
    keep = {}
    for group in groups:
        if group.frozen is None:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
            drop = min(max(1, round(fraction * group.channels)), group.channels - 1)
            mask = torch.ones(group.channels, dtype=torch.bool)
            mask[torch.randperm(group.channels, generator=generator)[:drop]] = False
            keep[group.name] = mask
    return keep


def hard_gated_copy(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
    """A copy of the ungated ``model`` whose gates are fixed to ``keep``."""
    gated = copy.deepcopy(model)
    gates = {g.name: ScaledSigmoidGate(g.channels) for g in groups if g.frozen is None}
    attach(gated, groups, gates)
    for name, gate in gates.items():
        gate.harden(keep[name])
    return gated


def verify_and_freeze(model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float) -> int:
    """Slice copies and compare them with their hard-gated originals; what differs changes its gate site or is frozen.

    One comparison when all is well; otherwise bisection. What could not be compared within ``seconds`` is frozen.

    Args:
        model: the ungated model; it is not changed.
        groups: their ``site`` and ``frozen`` are updated.
        dummy_input: an example of what the model takes; its shapes are used.
        seconds: wall-clock limit of all comparisons together.

    Returns:
        the number of comparisons made.
    """
    deadline = time.monotonic() + seconds
    model, inputs = _trial_form(model, dummy_input)
    tolerance = TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]
    trials = 0

    def trial(subset: Sequence[ChannelGroup]) -> str | None:
        nonlocal trials
        trials += 1
        keep = random_keep(subset, seed=trials)
        try:
            _, gap = difference(hard_gated_copy(model, subset, keep), slim_copy(model, subset, keep), inputs)
        except FORWARD_ERRORS as error:
            return f"the model does not run without some of its channels ({str(error).splitlines()[0][:150]})"
        return None if gap <= tolerance else f"removing channels would change the output by {gap:.1e} of its size"

    def probe(subset: Sequence[ChannelGroup]) -> None:
        if time.monotonic() > deadline:
            for group in subset:
                group.frozen = f"not verified within verify_seconds={seconds:g}"
            return
        reason = trial(subset)
        if reason is None:
            return
        if len(subset) > 1:
            probe(subset[: len(subset) // 2])
            probe(subset[len(subset) // 2 :])
            return
        group = subset[0]
        if group.site == "norm":
            group.site = "input"
            reason = trial(subset)
        group.frozen = reason

    while active := [g for g in groups if g.frozen is None]:
        before = [(g.site, g.frozen) for g in groups]
        probe(active)
        if before == [(g.site, g.frozen) for g in groups]:
            if trials == 1 or trial(active) is None:
                break
            active[-1].frozen = "together with other groups, removing its channels changes the output"
    return trials


def _trial_form(model: nn.Module, dummy_input: Any) -> tuple[nn.Module, Any]:
    """The model and an input in float64, or in float32 where the model insists on it."""
    for dtype in (torch.float64, torch.float32):
        trial = _perturbed(model, dtype)
        inputs = example_like(dummy_input, dtype)
        try:
            with torch.no_grad():
                call(copy.deepcopy(trial).train(), inputs)
            return trial, inputs
        except FORWARD_ERRORS:
            continue
    return _perturbed(model, torch.float32), dummy_input
