"""What of a network can be cut, and for the rest why not: what ``dnal inspect`` shows."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import checked_but
from ..channels.dependency import Graph
from ..channels.groups import ChannelGroup, Member, find_groups
from ..cost.count import flops_by_module
from ..errors import told
from ..modules.given import check_model
from ..modules.layers import layer_of
from ..modules.running import FORWARD_ERRORS, call, clone
from ..report.tables import table
from ..surgery.verify import verify_and_freeze

GroupRow = ChannelGroup  # its name in version 0.1
_UNSEEN = "no run of the model on this input shows its channels"


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
    """What of a network can be cut.

    Attributes:
        target: what it is called.
        flops: of the dense network.
        params: likewise.
        groups: its channel groups.
        shares: by group, the dense FLOPs of every layer that it touches, as a fraction of the model's.
        whole: layers that stay, and why.
        touched: the fraction of the FLOPs in layers that a group to be cut touches.
        seconds: that it took.
    """

    target: str
    flops: int
    params: int
    groups: list[ChannelGroup]
    shares: dict[str, float]
    whole: list[WholeLayer]
    touched: float
    seconds: float

    def __str__(self) -> str:
        cut = [group for group in self.groups if group.frozen is None]
        rows = []
        for g in cut:
            layers = f"{_some(g.producers)} -> {_some(_readers(g))}"
            rows.append([g.name, f"{g.channels}", f"{self.shares[g.name]:.1%}", g.site, layers])
        whole = [
            [layer.name, f"{layer.channels}", f"(of {layer.width})" if layer.channels < layer.width else "", layer.why]
            for layer in self.whole
        ]
        parts = [table(["group", "channels", "FLOPs", "gate", "layers"], rows, "lrrll")] if rows else []
        parts += [table(["left whole", "channels", "", "why"], whole, "lrll")] if whole else []
        parts.append(
            f"{len(cut)} of {len(self.groups)} groups can be cut; {self.touched:.1%} of the FLOPs are in layers "
            f"touched by one; {self.seconds:.1f} s"
        )
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        groups = [
            {
                "name": g.name,
                "channels": g.channels,
                "flops": self.shares[g.name],
                "site": g.site,
                "producers": list(g.producers),
                "consumers": _readers(g),
                "members": list(dict.fromkeys(m.path for m in g.members)),
                "frozen": g.frozen,
            }
            for g in self.groups
        ]
        whole = [dataclasses.asdict(layer) for layer in self.whole]
        return {**vars(self), "groups": groups, "whole": whole}


def _readers(group: ChannelGroup) -> list[str]:
    return list(dict.fromkeys(m.path for m in group.consumers))


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" (+{len(names) - most})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@checked_but("model", "graph")
def inspect(
    model: nn.Module, dummy_input: Any, target: str = "", verify_seconds: float | None = None, graph: Graph = None
) -> Inspection:
    """Find the channel groups of ``model``, verify them, and count what share of its FLOPs they touch.

    The share of a group is the dense FLOPs (fvcore's, for the dummy input) of the layers that its channels leave or
    enter, every convolution and linear layer counted whole, divided by the model's. A layer lies between two groups and
    counts for both, so that the shares add up to more than 1; ``touched`` counts every layer once.

    Args:
        model: any module; it is not changed.
        dummy_input: a tensor, or a tuple of them.
        target: what to call the model.
        verify_seconds: time limit of the verification, as for :class:`~dnal_nni.DNALPruner`.
        graph: where the groups come from: as for :class:`~dnal_nni.DNALPruner`.

    Raises:
        DNALError: where the model does not run on the input, or cannot be traced or counted.
    """
    target = target or type(model).__name__
    check_model(model)
    start = time.perf_counter()
    shapes = " and ".join(str(tuple(x.shape)) for x in _as_tuple(dummy_input))
    kinds = " and ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in _as_tuple(dummy_input)))
    with told(f"{target} rejects an input of shape {shapes}, {kinds}", FORWARD_ERRORS), torch.no_grad():
        call(clone(model).eval(), dummy_input)
    with told(f"the channels of {target} cannot be traced", FORWARD_ERRORS):
        groups = find_groups(model, dummy_input, graph)
        verify_and_freeze(model, groups, dummy_input, verify_seconds)
    with told(f"the FLOPs of {target} cannot be counted", FORWARD_ERRORS):
        flops = flops_by_module(model, dummy_input)

    def share(paths: set[str]) -> float:
        return sum(flops.get(path, 0) for path in paths) / max(flops[""], 1)

    modules = dict(model.named_modules())
    shares: dict[str, float] = {}
    touched: set[str] = set()
    seen: set[str] = set()
    stays: dict[str, Counter[str]] = defaultdict(Counter)  # layer -> reason -> output channels
    for group in groups:
        ends = {m.path for m in group.members if m.side in ("in", "out")}
        shares[group.name] = share(ends)
        if group.frozen is None:
            touched |= ends
        for member in group.members:
            if path := _makes(member, modules):
                seen.add(path)
                if group.frozen is not None:
                    stays[path][group.frozen] += len(member.channels)
    whole = []
    for path, module in modules.items():
        layer = layer_of(module)
        if layer is not None and layer.mixes and "out" in layer.sides:
            width = layer.widths(module)["out"]
            reasons = stays[path] if path in seen else {_UNSEEN: width}
            whole += [WholeLayer(path, channels, width, why) for why, channels in reasons.items()]
    params = sum(p.numel() for p in model.parameters())
    return Inspection(target, flops[""], params, groups, shares, whole, share(touched), time.perf_counter() - start)


def _makes(member: Member, modules: Mapping[str, nn.Module]) -> str:
    """Path of the layer whose output channels these are, also where a function computes with its weight; or empty."""
    if member.side == "out":
        return member.path
    module = modules.get(member.module) if member.bare and member.path.endswith(".weight") else None
    layer = None if module is None else layer_of(module)
    if module is None or layer is None or not layer.mixes:
        return ""
    return member.module if layer.dims(module, "weight").get("out") == member.dim else ""


def _as_tuple(dummy_input: Any) -> tuple[Any, ...]:
    return tuple(dummy_input) if isinstance(dummy_input, (list, tuple)) else (dummy_input,)
