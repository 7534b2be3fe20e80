"""Layers whose weight is computed from other tensors: made plain ahead of a cut, since a cut changes the computation.

Weight standardisation takes mean and variance over the input channels, ``weight_norm`` the norm over them. The gated
network computes with the whole filter; the cut network keeps exactly those values as an ordinary weight.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Conv


class _Capture(TorchDispatchMode):
    """The weight that the first convolution is run with."""

    weight: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self.weight is None:
            self.weight = args[1]
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
            hook.remove(module)  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key]
    return _make_plain(module) or baked


def _make_plain(module: nn.Module) -> bool:
    """Turn a convolution whose forward computes its weight (weight standardisation) into an ordinary one."""
    ordinary: Any = next((c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv"), None)
    if not isinstance(module, Conv) or ordinary is None or type(module).forward is ordinary.forward:
        return False
    x = torch.randn(2, module.in_channels, *[32] * len(module.kernel_size)).to(module.weight)
    with torch.no_grad(), _Capture() as capture:
        expected = module(x)
    if capture.weight is None or capture.weight is module.weight:
        return False
    candidates: list[Any] = [ordinary]
    if "timm" in sys.modules and ordinary is nn.Conv2d:
        candidates.append(sys.modules["timm"].layers.Conv2dSame)
    original, state, parameters = type(module), dict(module.__dict__), dict(module._parameters)
    weight = capture.weight.detach().clone()
    for candidate in candidates:
        module.__class__ = candidate
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=parameters["weight"].requires_grad))  # type: ignore[union-attr]
        for name in set(module._parameters) - {"weight", "bias"}:
            del module._parameters[name]
        with torch.no_grad():
            got = module(x)
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
            return True
        module.__dict__.update(state)
        module._parameters.clear()
        module._parameters.update(parameters)
        module.__class__ = original
    return False
