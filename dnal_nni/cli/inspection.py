"""What of a network can be cut, and for the rest why not: what ``dnal inspect`` shows."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..channels.groups import find_groups
from ..cost.count import flops_by_module
from ..errors import told
from ..modules.layers import layer_of
from ..modules.running import FORWARD_ERRORS, call, clone
from ..surgery.verify import verify_and_freeze

_UNSEEN = "no run of the model on this input shows its channels"


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """One channel group.

    Attributes:
        channels: number of units, the length of its gate.
        flops: dense FLOPs of every layer that it touches, as a fraction of the model's (see :func:`inspect`).
        site: where its gate acts: on the affine of the norms, or at the input of the consumers.
        producers: layers whose output channels these are.
        consumers: layers that read them.
        members: everything that is cut with the group, those two included.
        frozen: why it is left whole, or None.
    """

    name: str
    channels: int
    flops: float
    site: str
    producers: list[str]
    consumers: list[str]
    members: list[str]
    frozen: str | None


@dataclasses.dataclass(frozen=True)
class WholeLayer:
    """A layer of which output channels must stay, and why.

    Attributes:
        channels: how many stay.
        width: how many it has.
    """

    name: str
    channels: int
    width: int
    why: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What of a network can be cut. ``touched``: fraction of the FLOPs in layers that a group to be cut touches."""

    target: str
    flops: int
    params: int
    groups: list[GroupRow]
    whole: list[WholeLayer]
    touched: float
    seconds: float

    def __str__(self) -> str:
        cut = [group for group in self.groups if group.frozen is None]
        width = max(map(len, ["left whole", *(g.name for g in cut), *(layer.name for layer in self.whole)])) + 2
        lines = []
        if cut:
            lines.append(f"{'group':{width}}{'channels':>10}{'FLOPs':>8}  {'gate':7}layers")
            for group in cut:
                layers = f"{_some(group.producers)} -> {_some(group.consumers)}"
                lines.append(
                    f"{group.name:{width}}{group.channels:>10}{group.flops:>8.1%}  {group.site:7}{layers}".rstrip()
                )
            lines.append("")
        if self.whole:
            lines.append(f"{'left whole':{width}}{'channels':>10}  why")
            for layer in self.whole:
                part = f" (of {layer.width})" if layer.channels < layer.width else ""
                lines.append(f"{layer.name:{width}}{layer.channels:>10}{part}  {layer.why}")
            lines.append("")
        lines.append(
            f"{len(cut)} of {len(self.groups)} groups can be cut; {self.touched:.1%} of the FLOPs are in layers "
            f"touched by one; {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" (+{len(names) - most})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def inspect(model: nn.Module, dummy_input: Any, target: str = "", verify_seconds: float = 60.0) -> Inspection:
    """Find the channel groups of ``model``, verify them, and count what share of its FLOPs they touch.

    The share of a group is the dense FLOPs (fvcore's, for the dummy input) of the layers that its channels leave or
    enter, every convolution and linear layer counted whole, divided by the model's. A layer lies between two groups and
    counts for both, so that the shares add up to more than 1; ``touched`` counts every layer once.

    Args:
        model: any module; it is not changed.
        dummy_input: a tensor, or a tuple of them.
        target: what to call the model.
        verify_seconds: time limit of the verification; groups not compared by then are left whole.

    Raises:
        DNALError: where the model does not run on the input, or cannot be traced or counted.
    """
    target = target or type(model).__name__
    start = time.perf_counter()
    shapes = " and ".join(str(tuple(x.shape)) for x in _as_tuple(dummy_input))
    with told(f"{target} rejects an input of shape {shapes}", FORWARD_ERRORS), torch.no_grad():
        call(clone(model).eval(), dummy_input)
    with told(f"the channels of {target} cannot be traced", FORWARD_ERRORS):
        groups = find_groups(model, dummy_input)
        verify_and_freeze(model, groups, dummy_input, verify_seconds)
    with told(f"the FLOPs of {target} cannot be counted", FORWARD_ERRORS):
        flops = flops_by_module(model, dummy_input)

    def share(paths: set[str]) -> float:
        return sum(flops.get(path, 0) for path in paths) / max(flops[""], 1)

    rows = []
    touched: set[str] = set()
    seen: set[str] = set()
    stays: dict[str, Counter[str]] = defaultdict(Counter)  # layer -> reason -> output channels
    for group in groups:
        ends = {m.path for m in group.members if m.side in ("in", "out")}
        rows.append(
            GroupRow(
                name=group.name,
                channels=group.channels,
                flops=share(ends),
                site=group.site,
                producers=list(group.producers),
                consumers=list(dict.fromkeys(m.path for m in group.consumers)),
                members=list(dict.fromkeys(m.path for m in group.members)),
                frozen=group.frozen,
            )
        )
        if group.frozen is None:
            touched |= ends
        for member in group.members:
            if member.side == "out":
                seen.add(member.path)
                if group.frozen is not None:
                    stays[member.path][group.frozen] += len(member.channels)
    whole = []
    for path, module in model.named_modules():
        layer = layer_of(module)
        if layer is not None and layer.mixes and "out" in layer.sides:
            width = layer.widths(module)["out"]
            reasons = stays[path] if path in seen else {_UNSEEN: width}
            whole += [WholeLayer(path, channels, width, why) for why, channels in reasons.items()]
    params = sum(p.numel() for p in model.parameters())
    return Inspection(target, flops[""], params, rows, whole, share(touched), time.perf_counter() - start)


def _as_tuple(dummy_input: Any) -> tuple[Any, ...]:
    return tuple(dummy_input) if isinstance(dummy_input, (list, tuple)) else (dummy_input,)
