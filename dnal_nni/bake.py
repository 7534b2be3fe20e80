"""Layers whose weight is computed from other tensors: made plain ahead of a cut, since a cut changes the computation.

Weight standardisation takes mean and variance over the input channels, ``weight_norm`` the norm over them. The gated
network computes with the whole filter; the cut network keeps exactly those values as an ordinary weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Conv


class _Capture(TorchDispatchMode):
    """The weight of the first convolution, and whether the layer padded its input itself."""

    weight: Tensor | None = None
    padding: list[int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self.weight is None:
            self.weight, self.padding = args[1].detach().clone(), args[4]
        return func(*args, **(kwargs or {}))


def bake(module: nn.Module) -> bool:
    """Give a convolution or linear layer its effective weight as a plain parameter, in place.

    Returns:
        whether the weight was computed from other tensors; other modules stay as they are.
    """
    if not isinstance(module, (Conv, nn.Linear)):
        return False
    baked = False
    if parametrize.is_parametrized(module):
        baked = True
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[operator, union-attr]
        trainable = any(p.requires_grad for p in module.parameters())
        # not parametrize.remove_parametrizations: it edits the class, which copies of the module share
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
    for key, hook in list(module._forward_pre_hooks.items()):
        name = getattr(hook, "name", None)
        if hasattr(hook, "compute_weight") and isinstance(name, str):  # torch.nn.utils.weight_norm, spectral_norm
            baked = True
            hook.remove(module)
            del module._forward_pre_hooks[key]
    plain = _plain_class(module)
    if plain is not None:
        with torch.no_grad(), _Capture() as capture:
            module(torch.zeros(1, module.in_channels, *[32] * len(module.kernel_size)).to(module.weight))  # type: ignore[union-attr, arg-type]
        if capture.weight is not None:
            with torch.no_grad():
                module.weight.copy_(capture.weight)  # type: ignore[operator, union-attr]
            for name in set(module._parameters) - {"weight", "bias"}:
                delattr(module, name)
            module.__class__ = plain
            baked = True
    return baked


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """For a weight-standardised convolution of timm, the convolution with the same padding."""
    name = type(module).__name__
    if not (isinstance(module, nn.Conv2d) and "Std" in name and type(module).forward is not nn.Conv2d.forward):
        return None
    if not name.endswith("Same"):
        return nn.Conv2d
    from timm.layers import Conv2dSame

    return Conv2dSame
