"""NNI's masks: what they say about channel groups, a network cut by them, and the masks that a cut amounts to.

The masks of any NNI pruner, ``{layer: {"weight": mask, "bias": mask}}`` with 0 for what goes, shaped as the tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import checked_but, shown
from ..channels.dependency import Graph
from ..channels.groups import ChannelGroup, Member, groups_of
from ..cost.count import complexity, count
from ..cost.sizes import layer_flops, tensor_bytes
from ..errors import DNALError
from ..modules.given import check_model
from ..modules.layers import Conv, layer_of
from ..modules.running import clone
from ..report.record import GroupReport, Report
from ..search.importance import importance
from ..surgery.compare import check_equal, difference
from ..surgery.inject import detach
from ..surgery.slim import Keep, slim_copy
from ..surgery.verify import hard_gated_copy, verify_and_freeze

Masks = Mapping[str, Mapping[str, Tensor | None]]
Conflicts = Literal["vote", "union", "intersection"]
Votes = dict[str, Tensor]
"""By layer, bool ``[units]`` of one group: those that its mask closes."""

REPORT = "dnal_report"
"""Attribute of a network cut by :func:`speedup`: its :class:`~dnal_nni.report.Report`."""

_logger = logging.getLogger(__name__)


@checked_but("model", "masks", "conflicts", "graph")
def speedup(
    model: nn.Module,
    masks: Masks,
    dummy_input: Any,
    *,
    conflicts: Conflicts = "vote",
    recalibrate: Iterable[Any] | None = None,
    verify_seconds: float | None = None,
    graph: Graph = None,
) -> nn.Module:
    """Remove for good what the masks of any NNI pruner close: NNI's ``ModelSpeedup``, which fails since torch 2.2.

    A channel that a mask closes wholly is removed with its bias, its norm (NNI's masked model leaves the norm's bias
    on) and everything coupled to it. What is masked inside of a channel that stays is zero in the result. The result
    is compared with the hard-gated model in eval and train mode. A layer of which every channel is closed keeps one
    that nothing reads.

    Args:
        model: the model, unwrapped (``pruner.unwrap_model()``); it is not changed.
        masks: of any NNI pruner: the second value that ``compress`` returns.
        dummy_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        conflicts: what goes where the masks of coupled layers disagree. Layers that have no mask follow.
            "vote": as many units as the layers ask for on average; those that most layers close, the smallest weights
            first. The decision replaces the layers' masks.
            "union": what all layers close (the union of what they keep, as in NNI); a channel closed by some of them
            stays, with their weights masked.
            "intersection": what any layer closes.
        recalibrate: batches (the input, or a tuple or list that starts with it) on which the statistics of the result's
            batch norms are estimated anew; None: they stay.
        verify_seconds: time limit for finding groups that cannot be cut exactly, which stay whole; as for
            :class:`~dnal_nni.DNALPruner`.
        graph: where the coupled channels come from: as for :class:`~dnal_nni.DNALPruner`.

    Returns:
        a new module. Its ``dnal_report`` says what was asked, what was removed, what stays whole and why, and how far
        the result is from NNI's masked model.

    Raises:
        DNALError: for masks that do not fit the model, or that remove no whole channel.
    """
    start = time.perf_counter()
    check_model(model)
    if conflicts not in ("vote", "union", "intersection"):
        raise DNALError(f"conflicts={conflicts!r}: choose 'vote', 'union' or 'intersection'")
    dense = clone(model)
    detach(dense)
    closed = closed_channels(dense, masks)
    groups = groups_of(dense if graph is None or isinstance(graph, str) else model, dummy_input, graph)
    votes = {group.name: votes_on(group, closed) for group in groups}
    wanted = [group for group in groups if any(bool(v.any()) for v in votes[group.name].values())]
    verify_and_freeze(dense, wanted, dummy_input, verify_seconds)
    cuttable = [group for group in wanted if group.frozen is None]
    keep = {group.name: decide(dense, group, votes[group.name], conflicts) for group in cuttable}
    if all(bool(mask.all()) for mask in keep.values()):
        raise DNALError(_nothing(wanted, votes))

    masked = masked_copy(dense, masks, cuttable if conflicts == "vote" else ())
    for group in cuttable:
        if not bool(keep[group.name].any()):
            _leave_unread(masked, group)
        missing = group.least - int(keep[group.name].sum())
        if missing > 0:
            closed_units = importance(dense, [group]).masked_fill(keep[group.name], -1.0)
            keep[group.name][closed_units.topk(missing).indices] = True
    reference = hard_gated_copy(masked, cuttable, keep)
    slim = slim_copy(reference, cuttable, keep)
    max_abs_diff, relative_diff = check_equal(reference, slim, dummy_input)
    before, after = (count(clone(model), dummy_input) for model in (dense, slim))
    report = Report(
        before=complexity(dense, before),
        after=complexity(slim, after),
        groups=[_group_report(group, keep, votes[group.name]) for group in groups],
        max_abs_diff=max_abs_diff,
        relative_diff=relative_diff,
        masked_diff=difference(masked_copy(dense, masks), clone(slim), dummy_input, modes=("eval",))[1],
        file_bytes=(tensor_bytes(dense), tensor_bytes(slim)),
        layer_flops=layer_flops(before.flops, after.flops),
    )
    if recalibrate is not None:
        training = slim.training
        torch.optim.swa_utils.update_bn(recalibrate, slim, next(slim.parameters()).device)
        slim.train(training)
    report.seconds["speedup"] = time.perf_counter() - start
    setattr(slim, REPORT, report)
    _tell(report, conflicts)
    return slim


def closed_channels(model: nn.Module, masks: Masks) -> dict[tuple[str, str], Tensor]:
    """By layer and side ("out", "in"), bool ``[channels]``: those that its mask closes wholly.

    A norm has the side "out" only.
    """
    if not isinstance(masks, Mapping) or not all(isinstance(targets, Mapping) for targets in masks.values()):
        raise DNALError(
            f"masks={shown(masks)}: give what an NNI pruner's compress() returns, {{layer: {{'weight': mask}}}}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))  # NNI names a shared layer by each of its names
    closed: dict[tuple[str, str], Tensor] = {}
    for path, targets in masks.items():
        if path not in modules:
            raise DNALError(f"masks: the model has no layer {path!r}")
        module = modules[path]
        for target, mask in targets.items():
            if mask is None:
                continue
            _check_mask(module, path, target, mask)
            if target.startswith("_") or target == "weight":
                for side, axis in _axes(module, target, mask.dim()).items():
                    others = [d for d in range(mask.dim()) if d != axis]
                    gone = ~(mask.amax(others) if others else mask).bool().cpu()
                    closed[path, side] = closed.get((path, side), torch.zeros_like(gone)) | gone
    return closed


def _check_mask(module: nn.Module, path: str, target: str, mask: Any) -> None:
    if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()):
        raise DNALError(f"masks[{path!r}][{target!r}] must be a tensor of zeros and ones")
    if target.startswith("_"):
        return
    value = getattr(module, target, None)
    if not isinstance(value, Tensor):
        raise DNALError(f"masks[{path!r}]: the layer has no {target!r}")
    if mask.shape != value.shape:
        raise DNALError(
            f"masks[{path!r}][{target!r}] has shape {tuple(mask.shape)}, the layer's {tuple(value.shape)}: these are "
            "masks of another model"
        )
    if target not in ("weight", "bias") and not bool(mask.all()):
        raise DNALError(f"masks[{path!r}][{target!r}]: only masks of weights, biases, inputs and outputs are supported")


def _axes(module: nn.Module, target: str, dims: int) -> dict[str, int]:
    """The channel axis of a mask, by side."""
    if target.startswith("_"):
        layer = layer_of(module)
        axis = layer.input_axis(module) % dims if layer is not None and dims > 1 else min(1, dims - 1)
        return {"in" if target.startswith("_input_") else "out": axis}
    layer = layer_of(module)
    found = layer.dims(module, target) if layer is not None else {"out": 0}
    return {"in" if side == "in" else "out": dim for side, dim in found.items()}


def votes_on(group: ChannelGroup, closed: Mapping[tuple[str, str], Tensor]) -> Votes:
    """What the masks of a group's layers say: a unit is closed by a layer where all of its channels there are.

    A norm speaks where it closes something. Where no layer closes an output, a unit that every reader closes is closed.
    """
    votes: Votes = {}
    readers = []
    for member in group.members:
        if member.bare or member.side == "size":
            continue
        gone = closed.get((member.path, "in" if member.side == "in" else "out"))
        said = torch.zeros(group.channels, dtype=torch.bool)
        if gone is not None and len(gone) == member.width:
            said[:] = True
            said[member.units[~gone[member.channels]]] = False
        if member.side == "in":
            readers.append(said)
        elif gone is not None and (member.side == "out" or bool(said.any())):
            # a layer that both makes and passes these channels speaks once
            votes[member.path] = votes.get(member.path, torch.zeros_like(said)) | said
    unread = torch.stack(readers).all(0) if readers else torch.zeros(0, dtype=torch.bool)
    if bool(unread.any()) and not any(bool(said.any()) for said in votes.values()):
        votes = {"all that read it": unread}
    return votes


def decide(model: nn.Module, group: ChannelGroup, votes: Votes, conflicts: Conflicts) -> Tensor:
    """The units to keep, bool ``[units]``, from what the layers of the group say; there may be none."""
    if not votes:
        return torch.ones(group.channels, dtype=torch.bool)
    said = torch.stack(list(votes.values()))
    if conflicts == "union":
        gone = said.all(0)
    elif conflicts == "intersection":
        gone = said.any(0)
    else:
        # by votes, and among equals by weight: the importance of a unit is far below 1e6 times the mean
        order = (said.sum(0) - importance(model, [group]) / 1e6).argsort(descending=True, stable=True)
        gone = torch.zeros(group.channels, dtype=torch.bool)
        gone[order[: round(float(said.sum(1).double().mean()))]] = True
    return ~gone


@torch.no_grad()
def _leave_unread(model: nn.Module, group: ChannelGroup) -> None:
    """Let nothing read the channels of a group, in place: what closing all of them amounts to."""
    passing = {member.path for member in group.members if member.side == "out"}
    for reader in group.consumers:
        layer = model.get_submodule(reader.path) if not reader.bare else None
        grouped = getattr(layer, "groups", 1) > 1
        if grouped and reader.path in passing:  # depthwise: its outputs are in this group too
            continue
        if not isinstance(layer, (Conv, nn.Linear)) or grouped:
            raise DNALError(f"the masks close every channel of {group.name}, which {reader.path} needs: leave one")
        columns = layer.weight.movedim(_axes(layer, "weight", layer.weight.dim())["in"], 0)
        columns[reader.channels.to(columns.device)] = 0


def masked_copy(dense: nn.Module, masks: Masks, replaced: Collection[ChannelGroup] = ()) -> nn.Module:
    """A copy whose weights and biases are multiplied by the masks, but for channels of ``replaced`` groups."""
    whole: dict[str, list[Member]] = {}
    for group in replaced:
        for member in group.members:
            if member.side in ("out", "both") and not member.bare:
                whole.setdefault(member.path, []).append(member)
    model = clone(dense)
    for path, targets in masks.items():
        module = model.get_submodule(path)
        for target, mask in targets.items():
            if mask is None or target not in ("weight", "bias"):
                continue
            mask = mask.clone()
            axis = _axes(module, target, mask.dim())["out"] if target == "weight" and mask.dim() > 1 else 0
            for member in whole.get(path, ()):
                if mask.shape[axis] == member.width:
                    rows = mask.movedim(axis, 0)
                    gone = rows.flatten(1).amax(1) == 0 if rows.dim() > 1 else rows == 0
                    channels = member.channels.to(gone.device)
                    rows[channels[gone[channels]]] = 1
            with torch.no_grad():
                value = getattr(module, target)
                value.mul_(mask.to(value))
    return model


def _nothing(wanted: Sequence[ChannelGroup], votes: Mapping[str, Votes]) -> str:
    if not wanted:
        return (
            "the masks close no whole channel: single weights (LevelPruner, or a granularity below 'out_channel') "
            "cannot be removed from a dense layer; mask whole output channels"
        )
    frozen = [f"{group.name}: {group.frozen}" for group in wanted if group.frozen is not None]
    if frozen:
        return f"none of the masked channels can be removed: {'; '.join(frozen[:5])}"
    return f"no channel is closed by all of {', '.join(votes[wanted[0].name])}, which are coupled: use conflicts='vote'"


def _group_report(group: ChannelGroup, keep: Keep, votes: Votes) -> GroupReport:
    kept = int(keep[group.name].sum()) if group.name in keep else group.channels
    asked = {layer: int(gone.sum()) for layer, gone in votes.items()}
    followed = all(count == group.channels - kept for count in asked.values())
    agreed = len({tuple(gone.tolist()) for gone in votes.values()}) <= 1
    asked = {} if agreed and followed else asked
    return GroupReport(group.name, group.channels, kept, group.site, len(group.members), group.frozen, asked)


def _tell(report: Report, conflicts: str) -> None:
    disputed = [g for g in report.groups if g.asked]
    if disputed:
        asked = sum(round(sum(g.asked.values()) / len(g.asked)) for g in disputed)
        removed = sum(g.units - g.kept for g in disputed)
        _logger.warning(
            "masks of coupled layers disagree or a layer stays whole: %d of %d groups, asked for %d channels on "
            "average, %d removed there (conflicts=%r); details: slim.%s",
            len(disputed), len(report.groups), asked, removed, conflicts, REPORT,
        )  # fmt: skip


def layer_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep, targets: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Tensor]]:
    """NNI masks of the layers named in ``targets`` (with the names of their tensors), from the units kept."""
    channels: dict[str, Tensor] = {}
    for group in groups:
        if group.name not in keep:
            continue
        dropped = ~keep[group.name]
        for member in group.members:
            if member.side in ("in", "size") or member.bare or member.path not in targets:
                continue
            open_channels = channels.setdefault(member.path, torch.ones(member.width))
            open_channels[member.channels[dropped[member.units]]] = 0
    masks: dict[str, dict[str, Tensor]] = {}
    for path, names in targets.items():
        module = model.get_submodule(path)
        for name in names:
            value = getattr(module, name, None)
            if not isinstance(value, Tensor):
                continue
            axis = _axes(module, name, value.dim()).get("out") if value.dim() > 1 else 0
            mask = torch.ones_like(value)
            if axis is not None and path in channels:
                mask.movedim(axis, 0)[channels[path].to(value.device) == 0] = 0
            masks.setdefault(path, {})[name] = mask
    return masks
