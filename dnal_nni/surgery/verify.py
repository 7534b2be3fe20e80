"""Exact or left alone: compare the sliced with the hard-gated network, and freeze the groups for which they differ."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..modules.gates import GateState, ScaledSigmoidGate
from ..modules.layers import Norm
from ..modules.running import FORWARD_ERRORS, clone, raised_in, twin
from .compare import Comparison, example_like, outputs, responds, unmoved
from .inject import attach
from .precise import in_dtype
from .sizes import has_volumes, numel, other_sizes
from .slim import Keep, slim_twin

SECONDS = 60.0  # limit of all comparisons, where none is given
STEPS = 40  # comparisons that there is time for then in any case


def whole_outputs(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[str]:
    """Layers that keep all their output channels: what they compute must stay the same."""
    cut = {m.path for g in groups if g.frozen is None for m in g.members if m.side == "out"}
    modules = dict(model.named_modules())
    return sorted({p for g in groups if g.frozen is not None for p in g.producers if p in modules} - cut)


def _perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose norms and per-channel scales hide nothing: zero-initialised branches and tiny scales are moved."""
    model = in_dtype(model, dtype)
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
    """For every group that is not frozen, some of its units dropped: at least one, and not those that must stay.

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
            drop = min(max(1, round(share * group.channels)), group.channels - max(1, group.least))
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


def verify_and_freeze(
    model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float | None = None
) -> int:
    """Slice the model and compare it with its hard-gated form; what differs changes its gate site or is frozen.

    One trial of all groups, with every input size and kind of mask, when all is well. Otherwise groups are admitted a
    half at a time, each together with all that were admitted before, under what has failed alone; and a trial of all
    that are left has the last word. What could not be compared within ``seconds`` is frozen.

    Args:
        model: the ungated model; it is not changed.
        groups: their ``site``, ``least`` and ``frozen`` are updated.
        dummy_input: an example of what the model takes; its shapes are used.
        seconds: wall-clock limit of all comparisons together; None: 60, or so long as 40 forward passes of both
            forms take.

    Returns:
        the number of trials made, of all groups or of some.
    """
    if all(group.frozen is not None for group in groups):
        return 0
    return _Verification(model, groups, dummy_input, seconds).run()


class _TimeUp(BaseException):
    """Not an Exception: a forward may catch those."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """One comparison of a trial: on which inputs, in which mode; whether what the model returns is compared."""

    inputs: Any
    mode: str
    returned: bool = True


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What went wrong: the masks and steps that led there, and the module that raised."""

    keep: Keep
    steps: Sequence[_Step]
    reason: str
    path: str | None = None

    def concerns(self, group: ChannelGroup) -> bool:
        return bool(self.path) and any(f"{m.path}.".startswith(f"{self.path}.") for m in group.members)


class _Verification:
    """The trials of one model: one gated form for all of them, and cut ones that share its parameters."""

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], dummy_input: Any, seconds: float | None
    ) -> None:
        self.model, self.groups = model, groups
        self.patient = seconds is None  # with a slow model
        self.seconds = SECONDS if seconds is None else seconds
        self.start = time.monotonic()
        self.deadline = self.start + self.seconds
        self.limit = math.inf if self.patient else self.deadline
        self.thread = threading.get_ident()
        self.trials = self.steps = 0
        self.dummy_input = dummy_input
        self._take_form(torch.float64)

    def _take_form(self, dtype: torch.dtype) -> None:
        self.form, self.dtype = _perturbed(self.model, dtype), dtype
        self.full = example_like(self.dummy_input, dtype, least=2 if has_volumes(self.dummy_input) else 3)
        self.others = other_sizes(self.full)  # those that may do as a second size
        if self.others and has_volumes(self.dummy_input):  # several examples are seen there
            self.full = example_like(self.dummy_input, dtype, least=1)
        self.comparison: Comparison | None = None

    @property
    def inputs(self) -> list[Any]:
        """One size or two, the quickest first."""
        return sorted([*self.others[:1], self.full], key=numel)

    @property
    def active(self) -> list[ChannelGroup]:
        return [g for g in self.groups if g.frozen is None]

    def run(self) -> int:
        hook = nn.modules.module.register_module_forward_pre_hook(self._look_at_the_clock)
        try:
            while active := self.active:
                failure = self._trial(active)
                if failure is None:
                    break
                if self._takes(failure.steps[-1].inputs):
                    if self.patient:
                        step = (time.monotonic() - self.start) / max(1, self.steps)
                        self.patient, self.seconds = False, max(SECONDS, STEPS * step)
                        self.deadline = self.start + self.seconds
                    self._isolate(active, failure)
        except _TimeUp:
            self._too_late(self.active)
        finally:
            hook.remove()
        return self.trials

    def _look_at_the_clock(self, module: nn.Module, args: Any) -> None:
        if time.monotonic() > self.limit and threading.get_ident() == self.thread:
            raise _TimeUp

    def _too_late(self, groups: Sequence[ChannelGroup]) -> None:
        for group in groups:
            group.frozen = f"not verified within verify_seconds={self.seconds:g}{group.source}"

    def _takes(self, inputs: Any) -> bool:
        """Whether the model itself runs on these inputs; if not, others take their place."""
        if self._runs(inputs):
            return True
        if inputs is not self.full:
            del self.others[0]
            while self.others and not self._runs(self.others[0]):
                del self.others[0]
            if not self.others and has_volumes(self.dummy_input):
                self.full = example_like(self.dummy_input, self.dtype, least=2)
        elif self.dtype is torch.float64:
            self._take_form(torch.float32)
        elif inputs is not self.dummy_input:
            self.full, self.others = self.dummy_input, []
        else:
            return True
        return False

    def _runs(self, inputs: Any) -> bool:
        try:
            outputs(twin(self.form), inputs, (), "eval")
        except FORWARD_ERRORS:
            return False
        return True

    # -- trials -------------------------------------------------------------------------------------------------------

    def _trial(self, active: Sequence[ChannelGroup]) -> _Failure | None:
        """Compare with random masks; and in eval mode, on the quickest input, with one unit left of every other group.

        That unit is one that the random mask drops: of two units, each is then left alone once. The groups between are
        whole, so that what counts on equal numbers is found out. (In train mode the statistics of single channels
        magnify rounding beyond any tolerance.)
        """
        self.trials += 1
        random = random_keep(active, None, self.trials)
        inputs = self.inputs
        steps = [_Step(x, mode) for x in inputs for mode in ("eval", "train")]
        if len(inputs) == 1 and next(self.form.buffers(), None) is not None:
            steps.append(_Step(inputs[0], "eval"))  # with the statistics that training has left
        failure = self._compare(active, random, steps)
        if failure is None and self.comparison is not None and not responds(self.comparison.several):
            random = random_keep(active, 0.0, self.trials)  # dead channels prove nothing: nearly the whole network
            failure = self._compare(active, random, steps)
        alone = {g.name: _alone(random[g.name], max(1, g.least)) for g in active}
        for parity in range(min(2, len(alone))):
            if failure is not None:
                return failure
            keep = {
                name: mask if i % 2 == parity else torch.ones_like(mask) for i, (name, mask) in enumerate(alone.items())
            }
            assert self.comparison is not None
            # where scores tie, as nearly empty networks' do, rounding chooses labels and indices
            chosen = any(not out.is_floating_point() for out in self.comparison.expected[0])
            watched = bool(whole_outputs(self.form, self.groups))
            failure = self._compare(active, keep, [_Step(inputs[0], "eval", not (chosen and watched))])
        return failure

    def _compare(self, groups: Sequence[ChannelGroup], keep: Keep, steps: Sequence[_Step]) -> _Failure | None:
        """Run these steps with the masks ``keep`` of ``groups``, the other groups whole, up to the first failure."""
        gated = cut = self.form
        watch = whole_outputs(self.form, self.groups)
        done: list[_Step] = []
        try:
            comparison = self._gated(groups, keep)
            gated, cut = comparison.gated, slim_twin(self.form, groups, keep)
            with unmoved(gated):
                for step in steps:
                    done.append(step)
                    self.steps += 1
                    gap = comparison.gap(cut, step.inputs, step.mode, watch, step.returned)
                    if not gap.equal:
                        reason = f"removing channels would change the output by {gap.relative:.1e} of its size"
                        return _Failure(keep, done, reason)
        except FORWARD_ERRORS as error:
            return _Failure(keep, done or steps[:1], *_explained(error, (gated, cut)))
        return None

    def _gated(self, groups: Sequence[ChannelGroup], keep: Keep) -> Comparison:
        """The gated form with these groups hard, the others transparent; made again where a gate has moved."""
        if self.comparison is None or any(self.attached.get(g.name) != g.site for g in groups):
            try:
                self._attach(self.active)
            except FORWARD_ERRORS:
                self._attach(groups)
        assert self.comparison is not None
        for name, gate in self.gates.items():
            if name in keep and any(g.name == name for g in groups):
                gate.harden(keep[name])
            else:
                gate.state = GateState.TRANSPARENT
        return self.comparison

    def _attach(self, groups: Sequence[ChannelGroup]) -> None:
        self.comparison = None
        gated = twin(self.form)
        self.gates = {g.name: ScaledSigmoidGate(g.channels) for g in groups}
        attach(gated, groups, self.gates)
        self.attached = {g.name: g.site for g in groups}
        self.comparison = Comparison(gated, self.dtype)

    # -- failures -----------------------------------------------------------------------------------------------------

    def _isolate(self, active: Sequence[ChannelGroup], failure: _Failure) -> None:
        """Admit groups as long as what has failed passes; the others change their gate site, or are frozen.

        Part of the time is left for the trial of those admitted.
        """
        self.limit = time.monotonic() + 0.6 * (self.deadline - time.monotonic())
        admitted: list[ChannelGroup] = []
        try:
            self._admit(active, failure, admitted)
        except _TimeUp:
            self._too_late([g for g in active if g.frozen is None and g not in admitted])
        finally:
            self.limit = self.deadline

    def _admit(self, active: Sequence[ChannelGroup], failure: _Failure, admitted: list[ChannelGroup]) -> None:
        last = failure.steps[-1]
        for steps in ([step for step in failure.steps if step.inputs is last.inputs], failure.steps):
            found = self._probe(active, dataclasses.replace(failure, steps=steps))
            if found is not None:
                break
        else:  # it fails at times
            found = failure
            for group in active:
                group.frozen = failure.reason + group.source
            return
        pending = [(list(active), found)]  # each fails beside those admitted
        while pending:
            pending.sort(key=lambda part: len(part[0]))
            part, failure = pending.pop()
            if len(part) == 1:
                self._admit_one(part[0], failure, admitted)
                continue
            suspects = [g for g in part if failure.concerns(g)]
            if not 0 < len(suspects) < len(part):
                suspects = part[len(part) // 2 :]
            others = [g for g in part if g not in suspects]
            found = self._probe(admitted + others, failure)
            if found is None:
                admitted += others
                pending.append((suspects, failure))
            else:
                pending.append((others, found))
                found = self._probe(admitted + suspects, failure)
                if found is None:
                    admitted += suspects
                else:
                    pending.append((suspects, found))

    def _admit_one(self, group: ChannelGroup, failure: _Failure, admitted: list[ChannelGroup]) -> None:
        """Let the gate act where the channels are read; or two units stay where one alone fails; or freeze."""
        site = group.site
        if site == "norm":
            group.site = "input"
            found = self._probe([*admitted, group], failure)
            if found is None:
                admitted.append(group)
                return
            failure = found
        if int(failure.keep[group.name].sum()) == 1 == group.least and group.channels > 2 and not group.choice:
            group.site, group.least = site, 2
            # of a size in the code, which other numbers of units do not fit either, two or three are no multiple
            few = [_alone(~failure.keep[group.name], units) for units in (2, 3)]
            tried = [dataclasses.replace(failure, keep={**failure.keep, group.name: left}) for left in few]
            if all(self._probe([*admitted, group], instead) is None for instead in tried):
                admitted.append(group)
                return
            group.site, group.least = "input" if site == "norm" else site, 1
        group.frozen = failure.reason + group.source

    def _probe(self, groups: Sequence[ChannelGroup], failure: _Failure) -> _Failure | None:
        """Whether what failed fails for these groups."""
        self.trials += 1
        found = self._compare(groups, {g.name: failure.keep[g.name] for g in groups}, failure.steps)
        return None if found is None else dataclasses.replace(found, keep=failure.keep)


def _alone(mask: Tensor, units: int) -> Tensor:
    """The first units that ``mask`` drops; others where these are too few."""
    left = torch.zeros_like(mask)
    left[mask.long().argsort(stable=True)[:units]] = True
    return left


def _explained(error: BaseException, models: Sequence[nn.Module]) -> tuple[str, str | None]:
    """The reason that an error gives, and the path of the module that raised it."""
    where = raised_in(error)
    what = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
    place = f" in {type(where).__name__}.forward" if where is not None else ""
    paths = [path for model in models for path, module in model.named_modules() if module is where]
    reason = f"the model does not run without some of its channels ({what}{place})"
    return reason, paths[0] if paths else None
