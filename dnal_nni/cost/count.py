"""What a network costs, by fvcore's count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..budget import Complexity
from ..modules.running import clone
from ..surgery.inject import detach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts at import, which torch warns of: an error under python -W error
    from fvcore.nn import FlopCountAnalysis


def flops_by_module(model: nn.Module, dummy_input: Any) -> dict[str, int]:
    """fvcore's count for every module by dotted path, "" the whole, in eval mode, on a copy without gates.

    Args:
        model: any module that runs on ``dummy_input``.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of arguments in positional order.
    """
    model = clone(model).eval()
    detach(model)
    if isinstance(dummy_input, Mapping):
        inputs: tuple[Any, ...] = tuple(dummy_input.values())
    elif isinstance(dummy_input, (list, tuple)):
        inputs = tuple(dummy_input)
    else:
        inputs = (dummy_input,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on the user's forward
        analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return {path: int(count) for path, count in analysis.by_module().items()}


def measure(model: nn.Module, dummy_input: Any) -> Complexity:
    """Count ``model`` with fvcore, in eval mode, on a copy. Gates are taken off first: they cost nothing once cut.

    Args:
        model: any module that runs on ``dummy_input``.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of arguments in positional order.
    """
    return Complexity(flops_by_module(model, dummy_input)[""], sum(p.numel() for p in model.parameters()))
