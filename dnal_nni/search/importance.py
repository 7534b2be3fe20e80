"""What every unit is worth ahead of a search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..modules.layers import layer_of


def importance(model: nn.Module, groups: Sequence[ChannelGroup]) -> Tensor:
    """Norm of each unit's weights over all layers of its group, divided by the group's mean: float64 ``[units]``."""
    scores = []
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members:
            if member.bare or member.side == "size":
                continue
            module = model.get_submodule(member.path)
            layer = layer_of(module)
            if layer is None:
                continue
            for name, weight in layer.weights(module).items():
                dim = layer.dims(module, name).get(member.side)
                if dim is None:
                    continue
                squares = weight.detach().double().cpu().pow(2).sum([d for d in range(weight.dim()) if d != dim])
                if squares.numel() <= int(member.channels.max()):
                    continue
                part = torch.zeros(group.channels, dtype=torch.float64)
                part.index_add_(0, member.units, squares[member.channels])
                total += part / part.mean().clamp(min=1e-30)
        root = total.sqrt() if bool(total.any()) else torch.ones_like(total)  # candidates start alike
        scores.append(root / root.mean().clamp(min=1e-30))
    return torch.cat(scores)
