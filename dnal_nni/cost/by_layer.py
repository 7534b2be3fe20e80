"""The FLOPs of a network and of what was cut from it, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import nn

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
