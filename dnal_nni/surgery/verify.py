"""Exact or left alone: compare the sliced with the hard-gated network, and freeze the groups for which they differ."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..modules.gates import ScaledSigmoidGate
from ..modules.layers import Norm
from ..modules.running import FORWARD_ERRORS, call, clone, flatten_tensors, raised_in
from .compare import TOLERANCE, _conditioned, _fewest_values, difference, example_like
from .inject import attach
from .slim import Keep, slim_copy


def whole_outputs(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[str]:
    """Layers that keep all their output channels: what they compute must stay the same."""
    cut = {m.path for g in groups if g.frozen is None for m in g.members if m.side == "out"}
    modules = dict(model.named_modules())
    return sorted({p for g in groups if g.frozen is not None for p in g.producers if p in modules} - cut)


def _perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose norms and per-channel scales hide nothing: zero-initialised branches and tiny scales are moved."""
    model = clone(model).to(dtype)
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


def random_keep(groups: Sequence[ChannelGroup], fraction: float | None = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """For every group that is not frozen, some of its units dropped: at least one, and one kept.

    Args:
        groups: the channel groups.
        fraction: how much to drop, about (0: one unit, 1: all but one); None: something else in every group.
        seed: of the choice, together with the group's name.
    """
    keep = {}
    for group in groups:
        if group.frozen is None:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
            share = fraction if fraction is not None else float(0.1 + 0.6 * torch.rand((), generator=generator))
            drop = min(max(1, round(share * group.channels)), group.channels - 1)
            mask = torch.ones(group.channels, dtype=torch.bool)
            mask[torch.randperm(group.channels, generator=generator)[:drop]] = False
            keep[group.name] = mask
    return keep


def hard_gated_copy(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
    """A copy of the ungated ``model`` whose gates are fixed to ``keep``."""
    gated = clone(model)
    gates = {g.name: ScaledSigmoidGate(g.channels) for g in groups if g.frozen is None}
    attach(gated, groups, gates)
    for name, gate in gates.items():
        gate.harden(keep[name])
    return gated


def verify_and_freeze(model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float) -> int:
    """Slice copies and compare them with their hard-gated originals; what differs changes its gate site or is frozen.

    One comparison (on every input size tried) when all is well; otherwise groups are admitted one half at a time, each
    together with all that were admitted before. What could not be compared within ``seconds`` is frozen.

    Args:
        model: the ungated model; it is not changed.
        groups: their ``site`` and ``frozen`` are updated.
        dummy_input: an example of what the model takes; its shapes are used.
        seconds: wall-clock limit of all comparisons together.

    Returns:
        the number of comparisons made.
    """
    if all(group.frozen is not None for group in groups):
        return 0
    return _Verification(model, groups, dummy_input, seconds).run()


class _Verification:
    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.groups = groups
        self.model, self.inputs = _trial_form(model, dummy_input)
        self.quick = min(self.inputs, key=_numel)
        self.tolerance = TOLERANCE[next(p.dtype for p in self.model.parameters() if p.is_floating_point())]
        self.chooses = _chooses(self.model, self.quick)
        self.trials = 0
        self.admitted: list[ChannelGroup] = []

    def run(self) -> int:
        inputs = [self.quick]
        while active := [g for g in self.groups if g.frozen is None]:
            if self._trial(active, self.inputs) is None or self._late(active):
                break
            self.admitted = []
            self._admit(active, inputs)
            inputs = self.inputs  # what the quick one does not show, another may
        return self.trials

    def _late(self, pending: Sequence[ChannelGroup]) -> bool:
        late = time.monotonic() > self.deadline
        for group in pending if late else ():
            group.frozen = f"not verified within verify_seconds={self.seconds:g}"
        return late

    def _admit(self, pending: list[ChannelGroup], inputs: Sequence[Any]) -> None:
        if not pending or self._late(pending):
            return
        failure = self._trial(self.admitted + pending, inputs)
        if failure is None:
            self.admitted += pending
            return
        if len(pending) > 1:
            suspects = [g for g in pending if failure.concerns(g)]
            if suspects and len(suspects) < len(pending):
                first = [g for g in pending if g not in suspects]
            else:
                first, suspects = pending[: len(pending) // 2], pending[len(pending) // 2 :]
            self._admit(first, inputs)
            self._admit(suspects, inputs)
            return
        group = pending[0]
        if group.site == "norm":
            group.site = "input"
            self._admit(pending, inputs)
        else:
            group.frozen = failure.reason

    def _trial(self, subset: Sequence[ChannelGroup], inputs: Sequence[Any]) -> _Failure | None:
        """Compare with random masks; and in eval mode, on the quick input, with one unit left of every other group.

        That unit is one that the random mask drops: of two units, each is then left alone once. The groups between are
        whole, so that what counts on equal numbers is found out. (In train mode the statistics of single channels
        magnify rounding beyond any tolerance.)
        """
        self.trials += 1
        watch = whole_outputs(self.model, self.groups)
        thorough, both = ["eval", "train", "eval"], ["eval", "train"]
        usual = [(x, thorough if x is self.quick else both) for x in inputs]
        random = random_keep(subset, None, self.trials)
        alone = {name: torch.arange(len(keep)) == keep.long().argmin() for name, keep in random.items()}
        extremes = [
            {name: keep if i % 2 == parity else torch.ones_like(keep) for i, (name, keep) in enumerate(alone.items())}
            for parity in range(min(2, len(alone)))
        ]
        compare_returned = not (self.chooses and watch)
        for keep, runs in ((random, usual), *((extreme, [(self.quick, ["eval"])]) for extreme in extremes)):
            everything = keep is random or compare_returned
            gated = cut = self.model
            try:
                gated, cut = hard_gated_copy(self.model, subset, keep), slim_copy(self.model, subset, keep)
                gap = max(difference(gated, cut, x, watch, modes, everything)[1] for x, modes in runs)
            except FORWARD_ERRORS as error:
                return _failure(error, (gated, cut))
            if not gap <= self.tolerance:
                return _Failure(f"removing channels would change the output by {gap:.1e} of its size", None)
        return None


@dataclasses.dataclass(frozen=True)
class _Failure:
    reason: str
    path: str | None  # the module that raised

    def concerns(self, group: ChannelGroup) -> bool:
        return bool(self.path) and any(f"{m.path}.".startswith(f"{self.path}.") for m in group.members)


def _failure(error: BaseException, models: Sequence[nn.Module]) -> _Failure:
    where = raised_in(error)
    what = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
    place = f" in {type(where).__name__}.forward" if where is not None else ""
    paths = [path for model in models for path, module in model.named_modules() if module is where]
    reason = f"the model does not run without some of its channels ({what}{place})"
    return _Failure(reason, paths[0] if paths else None)


def _chooses(model: nn.Module, inputs: Any) -> bool:
    """Whether labels or indices are returned: where scores tie, as nearly empty networks' do, rounding chooses them."""
    try:
        with torch.no_grad():
            return any(not out.is_floating_point() for out in flatten_tensors(call(clone(model).eval(), inputs)))
    except FORWARD_ERRORS:
        return False


def _other_size(inputs: Any) -> Any:
    """The same input half as large in space, from 128 pixels on, or half as large again; None if it is no image."""
    if isinstance(inputs, tuple) and all(isinstance(x, Tensor) for x in inputs):
        others = tuple(_other_size(x) for x in inputs)
        return None if any(x is None for x in others) else others
    if not isinstance(inputs, Tensor) or inputs.dim() < 3 or not inputs.is_floating_point():
        return None
    sizes = [n // 64 * 32 if n >= 128 else n + n // 2 for n in inputs.shape[2:]]
    generator = torch.Generator().manual_seed(1)
    return torch.randn((*inputs.shape[:2], *sizes), generator=generator, dtype=inputs.dtype).to(inputs.device)


def _numel(inputs: Any) -> int:
    return sum(t.numel() for t in flatten_tensors(inputs))


def _trial_form(model: nn.Module, dummy_input: Any) -> tuple[nn.Module, list[Any]]:
    """The model and its inputs, one size or two, in float64, or in float32 where the model insists on it."""
    for dtype in (torch.float64, torch.float32):
        trial = _perturbed(model, dtype)
        full = example_like(dummy_input, dtype)
        other = _other_size(full)
        fewest = None if other is None else _fewest_values(trial, other)
        inputs = [full] if fewest is None else [full, other]
        if fewest is None or _numel(other) > _numel(full):
            fewest = _fewest_values(trial, full)
        if fewest is not None:
            return trial, _conditioned(trial, inputs, fewest)
    return trial, [dummy_input]
