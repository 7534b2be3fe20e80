"""What reports say of sizes beside the count: FLOPs layer by layer, and bytes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..modules.gates import ScaledSigmoidGate


def layer_flops(dense: Mapping[str, int], slim: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By dotted path, the FLOPs (dense, slim) of what a module does itself, where that is anything.

    A layer that is gone counts 0; what a module does by functions, such as attention, is its own.

    Args:
        dense: by dotted path, as :func:`~dnal_nni.cost.count.count` has them.
        slim: the same of the cut network.
    """
    after = _own(slim)
    return {path: (flops, after.get(path, 0)) for path, flops in _own(dense).items() if flops > 0}


def _own(counts: Mapping[str, int]) -> dict[str, int]:
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
