"""Kinds of layers: which have channels, and how grouped ones lose them."""

from __future__ import annotations

from typing import Any

from torch import nn

Conv = nn.modules.conv._ConvNd
RMSNorm: Any = getattr(nn, "RMSNorm", ())  # torch 2.4
Norm: Any = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    RMSNorm,
)
Counted = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample)  # hold no tensors, but fvcore counts them


def whole_groups(conv: nn.Module) -> bool:
    """Whether a grouped convolution loses whole groups (input and output channels together), depthwise included.

    Otherwise every group loses the same positions. Either is exact; the one that leaves more freedom is taken.
    """
    return isinstance(conv, Conv) and 1 < conv.groups >= conv.in_channels // conv.groups


def masked_statistics(norm: nn.Module) -> bool:
    """Whether statistics run over channels that may be removed, and must be taken over the open ones only.

    A group norm with at least as many groups as channels in each loses whole groups instead: its statistics stay.
    """
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups < norm.num_channels // norm.num_groups
    return isinstance(norm, (nn.LayerNorm, RMSNorm))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is read as a whole, not op by op."""
    if isinstance(module, (nn.LayerNorm, RMSNorm)):
        return len(module.normalized_shape) == 1
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, (Conv, nn.Linear, *Norm))
