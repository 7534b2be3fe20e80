"""Physical removal: every tensor of a copy is cut once, from the union of what all groups drop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.graph import Side
from ..channels.groups import ChannelGroup
from ..modules.adapters import adapt
from ..modules.bake import bake
from ..modules.choices import Choice
from ..modules.layers import Conv, Counted, RMSNorm, masked_statistics, whole_groups
from ..modules.running import clone
from .inject import detach

Keep = Mapping[str, Tensor]  # group name -> bool [channels of the group]

CHANGES = "_dnal_changes"
"""Attribute of a cut network: what a cut did beside the shapes of its state dict.

``{"choices": {path: [0 or 1 per unit]}, "baked": [path], "stored": {path: number(s)},
"unsaved": [path of a buffer that is not persistent]}``.
"""


def slim_copy(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
    """A copy of ``model`` (gated or not) without gates and without the channels that ``keep`` drops.

    ``model`` is not touched. requires_grad, dtype, device, memory format and train/eval state are carried over.

    Args:
        model: the model, with or without gates attached.
        groups: its channel groups; frozen ones and those that ``keep`` does not name stay whole.
        keep: by group name, bool ``[channels]``: what stays.
    """
    slim = clone(model)
    detach(slim)
    adapt(slim)
    masks: dict[str, dict[tuple[Side, int | None], Tensor]] = defaultdict(dict)
    chosen: dict[str, list[int]] = {}
    homes: dict[str, str] = {}
    for group in groups:
        if group.frozen is not None or group.name not in keep:
            continue
        dropped = ~keep[group.name].cpu()
        if not dropped.any():
            continue
        for member in group.members:
            if group.choice:
                chosen[member.path] = keep[group.name].int().tolist()
                continue
            homes[member.path] = member.module
            mask = masks[member.path].setdefault((member.side, member.dim), torch.ones(member.width, dtype=torch.bool))
            mask[member.channels[dropped[member.units]]] = False
    drop(slim, chosen)
    left = {path for path, _ in slim.named_modules()}
    changes: dict[str, Any] = {"choices": chosen, "baked": [], "stored": {}, "unsaved": []}
    for path, sides in masks.items():
        if homes[path] not in left:
            continue  # in a candidate that is gone
        if any(side == "size" for side, _ in sides):
            changes["stored"][path] = _resize(slim, path, sides)
        elif any(dim is not None for _, dim in sides):
            owner, _, name = path.rpartition(".")
            for (_, dim), mask in sides.items():
                assert dim is not None
                _cut(slim.get_submodule(owner), name, dim, mask)
            holder = slim.get_submodule(owner)
            if name in holder._non_persistent_buffers_set:
                changes["unsaved"].append(path)
            if isinstance(holder, nn.Linear) and name == "weight":  # whose parent computes with its weight
                holder.out_features, holder.in_features = holder.weight.shape
        else:
            layer = slim.get_submodule(path)
            if bake(layer):
                changes["baked"].append(path)
            cut_module(layer, {side: mask for (side, _), mask in sides.items()})
    setattr(slim, CHANGES, changes)
    return slim


def drop(model: nn.Module, chosen: Mapping[str, Sequence[int]]) -> None:
    """Remove closed candidates from the module tree, in place; ``chosen``: 0 or 1 per unit, by path of the choice."""
    for path in sorted(chosen, key=len):  # what lies inside of a closed candidate is gone with it
        choice = dict(model.named_modules()).get(path)
        if choice is not None:
            assert isinstance(choice, Choice)
            choice.drop(torch.tensor(chosen[path], dtype=torch.bool))


def _resize(model: nn.Module, path: str, counts: Mapping[tuple[Side, int | None], Tensor]) -> Any:
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
    return value


def _cut(module: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    """Keep the entries ``keep`` (bool) of one dimension of a parameter or buffer; None stays None."""
    old = getattr(module, name, None)
    if old is None or bool(keep.all()):
        return
    new = old.detach().index_select(dim, keep.nonzero().flatten().to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)


def cut_module(module: nn.Module, sides: Mapping[Side, Tensor]) -> None:
    """Keep some channels of a layer, in place: bool ``[channels]`` for every side that loses some."""
    if isinstance(module, Conv):
        _cut_conv(module, sides)
    elif isinstance(module, nn.Linear):
        if "out" in sides:
            _cut(module, "weight", 0, sides["out"])
            _cut(module, "bias", 0, sides["out"])
        if "in" in sides:
            _cut(module, "weight", 1, sides["in"])
        module.out_features, module.in_features = module.weight.shape
    elif not isinstance(module, Counted):
        keep = sides["both"]
        for name in ("weight", "bias", "running_mean", "running_var"):
            _cut(module, name, 0, keep)
        left = int(keep.sum())
        if isinstance(module, nn.GroupNorm):
            if not masked_statistics(module):
                module.num_groups = module.num_groups * left // module.num_channels
            module.num_channels = left
        elif isinstance(module, (nn.LayerNorm, RMSNorm)):
            module.normalized_shape = (left,)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = left
        else:
            module.num_features = left  # type: ignore[assignment]


def _cut_conv(conv: nn.modules.conv._ConvNd, sides: Mapping[Side, Tensor]) -> None:
    keep_out = sides.get("out", torch.ones(conv.out_channels, dtype=torch.bool))
    keep_in = sides.get("in", torch.ones(conv.in_channels, dtype=torch.bool))
    out_dim, in_dim = (1, 0) if conv.transposed else (0, 1)
    groups = conv.groups
    if groups == 1:
        _cut(conv, "weight", out_dim, keep_out)
        _cut(conv, "weight", in_dim, keep_in)
    else:
        # the weight of a grouped convolution has all channels in dimension 0 and one group's in dimension 1
        first, second = (keep_in, keep_out) if conv.transposed else (keep_out, keep_in)
        _cut(conv, "weight", 0, first)
        if whole_groups(conv):
            groups = int(keep_in.view(groups, -1).any(1).sum())
        else:
            _cut(conv, "weight", 1, second.view(groups, -1)[0])
    _cut(conv, "bias", 0, keep_out)
    conv.in_channels, conv.out_channels, conv.groups = int(keep_in.sum()), int(keep_out.sum()), groups
