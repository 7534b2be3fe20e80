"""Layers whose weight is computed from other tensors: made plain ahead of a cut, since a cut changes the computation.

Weight standardisation takes mean and variance over the input channels, ``weight_norm`` the norm over them. The gated
network computes with the whole filter; the cut network keeps exactly those values as an ordinary weight. Masks of
``torch.nn.utils.prune`` become zeros in it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from .layers import Conv
from .running import DispatchMode


class _Capture(DispatchMode):
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
        names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
        values = {name: getattr(module, name).detach().clone() for name in names}
        trainable = any(p.requires_grad for p in module.parameters())
        # not parametrize.remove_parametrizations: it edits the class, which copies of the module share
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (WeightNorm, BasePruningMethod)):  # torch.nn.utils.weight_norm, torch.nn.utils.prune
            baked = True
            hook.remove(module)
            del module._forward_pre_hooks[key]
    return _make_plain(module) or baked


def _make_plain(module: nn.Module) -> bool:
    """Turn a convolution whose forward computes its weight (weight standardisation) into an ordinary one."""
    ordinary: Any = next((c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv"), None)
    if not isinstance(module, Conv) or ordinary is None or type(module).forward is ordinary.forward:
        return False
    sizes = [(k - 1) * d + 4 for k, d in zip(module.kernel_size, module.dilation)]
    x = torch.randn(2, module.in_channels, *sizes, generator=torch.Generator().manual_seed(0)).to(module.weight)
    with torch.no_grad(), _Capture() as capture:
        module(x)
    if capture.weight is None or capture.weight is module.weight:
        return False
    candidates = [ordinary]
    if "timm" in sys.modules and ordinary is nn.Conv2d:
        candidates.append(sys.modules["timm"].layers.Conv2dSame)
    exact = copy.deepcopy(module).double()
    with torch.no_grad(), _Capture() as precise:
        expected = exact(x.double())
    assert precise.weight is not None
    for candidate in candidates:
        plain = copy.deepcopy(exact)
        _become(plain, candidate, precise.weight)
        with torch.no_grad():
            got = plain(x.double())
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-9):
            _become(module, candidate, capture.weight)
            return True
    return False


def _become(module: Conv, plain: type[nn.Module], weight: Tensor) -> None:
    """Make ``module`` a ``plain`` convolution with this weight; parameters that computed it are dropped."""
    trainable = module.weight.requires_grad
    for name in set(module._parameters) - {"bias"}:
        del module._parameters[name]
    module.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=trainable))
    module.__class__ = plain  # type: ignore[assignment]  # torch types it as the variable's own class
