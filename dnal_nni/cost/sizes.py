"""What reports say of sizes beside the count: FLOPs layer by layer, and bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modules.gates import ScaledSigmoidGate
from .count import flops_by_module


def layer_flops(dense: nn.Module, slim: nn.Module, dummy_input: Any) -> dict[str, tuple[int, int]]:
    """By dotted path, fvcore's count (dense, slim) of what a module does itself, where that is anything.

    A layer that is gone counts 0; what a module does by functions, such as attention, is its own.
    """
    before, after = (_own(flops_by_module(model, dummy_input)) for model in (dense, slim))
    return {path: (count, after.get(path, 0)) for path, count in before.items() if count > 0}


def _own(counts: dict[str, int]) -> dict[str, int]:
    """Without what the modules inside of a module do."""
    own = dict(counts)
    for path in counts:
        if path:
            own[path.rpartition(".")[0]] -= counts[path]
    return own


def tensor_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers in the state dict, each once and gates left out: what a file of ``model`` takes."""
    gates = [module for module in model.modules() if isinstance(module, ScaledSigmoidGate)]
    theirs = {id(t) for gate in gates for t in gate.state_dict(keep_vars=True).values()}
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.nbytes for key, t in tensors.items() if key not in theirs)
