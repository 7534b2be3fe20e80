"""Physical removal: every tensor of a copy is cut once, from the union of what all groups drop."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..arguments import nearest, shown
from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.adapters import adapt
from ..modules.bake import bake
from ..modules.choices import Choice
from ..modules.layers import Side, cut_tensor, layer_of
from ..modules.running import twin
from .changes import Changes, changes_of, set_changes
from .inject import detach

Keep = Mapping[str, Tensor]  # group name -> bool [channels of the group]


def slim_copy(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
    """A copy of ``model`` (gated or not) without gates and without the channels that ``keep`` drops.

    ``model`` is not touched. requires_grad, dtype, device, memory format and train/eval state are carried over.

    Args:
        model: the model, with or without gates attached.
        groups: its channel groups; frozen ones and those that ``keep`` does not name stay whole.
        keep: by group name, bool ``[channels]``: what stays.
    """
    slim = slim_twin(model, groups, keep)
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in slim.parameters():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.detach().clone(memory_format=torch.preserve_format)
    return slim


def slim_twin(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
    """:func:`slim_copy` whose parameters, where they lose nothing, share their memory with those of ``model``."""
    slim = twin(model)
    detach(slim)
    adapt(slim)
    masks, changes = _kept_channels(groups, keep), Changes()
    homes = {member.path: member.module for group in groups for member in group.members}
    for group in groups:
        if group.frozen is None and group.choice and group.name in keep and not bool(keep[group.name].all()):
            changes.choices |= {member.path: keep[group.name].int().tolist() for member in group.members}
    drop(slim, changes.choices)
    left = {path for path, _ in slim.named_modules()}
    for path, sides in masks.items():
        if homes[path] not in left:
            continue  # in a candidate that is gone
        if any(side == "size" for side, _ in sides):
            changes.stored[path] = _resize(slim, path, sides)
        elif any(dim is not None for _, dim in sides):
            owner, _, name = path.rpartition(".")
            holder = slim.get_submodule(owner)
            cut_tensor(holder, name, {dim: mask for (_, dim), mask in sides.items() if dim is not None})
            if name in holder._non_persistent_buffers_set:
                changes.unsaved.append(path)
            if kind := layer_of(holder):  # whose parent computes with its weight
                kind.follow(holder)
        else:
            layer = slim.get_submodule(path)
            if bake(layer):
                changes.baked.append(path)
            if kind := layer_of(layer):  # else it holds no tensors
                before = kind.numbers(layer)
                kind.cut(layer, {side: mask for (side, _), mask in sides.items()})
                after = kind.numbers(layer).items()
                changes.stored |= {f"{path}.{name}": number for name, number in after if number != before.get(name)}
    set_changes(slim, changes_of(slim).then(changes))  # a copy of a cut network says what went before
    return slim


def groups_left(groups: Sequence[ChannelGroup], keep: Keep) -> list[ChannelGroup]:
    """The groups of channels that are not left whole, in the coordinates of what :func:`slim_copy` makes.

    To look at, not to cut: a grouped convolution that is left narrow enough would now lose whole groups. What
    operations outside of layers cost is not taken over.
    """
    masks, found = _kept_channels(groups, keep), []
    for group in groups:
        if group.frozen is not None or group.choice:
            continue
        units = keep.get(group.name, torch.ones(group.channels, dtype=torch.bool)).cpu()
        members = []
        for member in group.members:
            whole = torch.ones(member.width, dtype=torch.bool)
            mask, stays = masks[member.path].get((member.side, member.dim), whole), units[member.units]
            members.append(dataclasses.replace(
                member, width=int(mask.sum()), channels=(mask.cumsum(0) - 1)[member.channels[stays]],
                units=(units.cumsum(0) - 1)[member.units[stays]],
            ))  # fmt: skip
        left = int(units.sum())
        found.append(dataclasses.replace(group, channels=left, members=tuple(members), parts=()))
    return found


_Masks = dict[str, dict[tuple[Side, int | None], Tensor]]


def _kept_channels(groups: Sequence[ChannelGroup], keep: Keep) -> _Masks:
    """By path, side and dimension, which channels stay: bool ``[width]``; only where some go."""
    masks: _Masks = defaultdict(dict)
    for group in groups:
        if group.frozen is not None or group.choice or group.name not in keep:
            continue
        dropped = ~keep[group.name].cpu()
        if not dropped.any():
            continue
        for member in group.members:
            mask = masks[member.path].setdefault((member.side, member.dim), torch.ones(member.width, dtype=torch.bool))
            mask[member.channels[dropped[member.units]]] = False
    return masks


def every_group(keep: Keep, active: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``keep`` for each of these groups: those not named stay whole; an error where it does not fit them."""
    chosen = {group.name: torch.ones(group.channels, dtype=torch.bool) for group in active}
    least = {group.name: group.least for group in active}
    for name, mask in keep.items():
        if name not in chosen:
            near = nearest(name, chosen) or "; the names are the keys of pruner.gates"
            raise DNALError(f"harden(keep): there is no gate {name!r}{near}")
        size = len(chosen[name])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (size,):
            raise DNALError(f"harden(keep): {name} needs a bool tensor of shape [{size}], and is given {shown(mask)}")
        if int(mask.sum()) < least[name]:
            few = "lose every channel; keep at least one"
            if least[name] > 1:
                few = f"keep {int(mask.sum())} channels, with which the model does not run; keep {least[name]}"
            raise DNALError(f"harden(keep): {name} would {few}")
        chosen[name] = mask.detach().cpu().clone()
    return chosen


def drop(model: nn.Module, chosen: Mapping[str, Sequence[int]]) -> None:
    """Remove closed candidates from the module tree, in place; ``chosen``: 0 or 1 per unit, by path of the choice."""
    for path in sorted(chosen, key=len):  # what lies inside of a closed candidate is gone with it
        choice = dict(model.named_modules()).get(path)
        if choice is not None:
            assert isinstance(choice, Choice)
            choice.drop(torch.tensor(chosen[path], dtype=torch.bool))


def _resize(model: nn.Module, path: str, counts: Mapping[tuple[Side, int | None], Tensor]) -> int | list[int]:
    """Bring a number that a module keeps about its channels up to date; the new value."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, name)
    for (_, position), mask in counts.items():
        left = int(mask.sum())
        value = (
            left if position is None else type(value)(left if i == position else entry for i, entry in enumerate(value))
        )
    setattr(module, name, value)
    return list(value) if isinstance(value, (list, tuple)) else value
