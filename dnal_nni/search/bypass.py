"""Which groups everything passes through: on the branch of a residual block, the rest goes past it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..channels.groups import ChannelGroup
from ..modules.gates import GateState, ScaledSigmoidGate
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, seeded
from ..surgery.compare import responds
from .criteria import as_it_was
from .samples import as_one

FEW = 4  # examples that are compared


def sole_ways(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    gates: Sequence[ScaledSigmoidGate],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any] = call,
) -> list[bool]:
    """Whether what the model returns is the same for all examples, with every unit of a group closed; of each group.

    Args:
        model: with its gates; it runs in eval mode, and is left as it was.
        groups: of channels.
        gates: theirs.
        batches: in the form that ``run`` takes.
        run: from the model and a batch to anything: what the model returns is looked at.
    """
    returned: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, out: returned.append(out))

    def tells(batch: Any) -> bool:
        returned.clear()
        run(model, batch)
        return responds((list(flatten_tensors(returned[-1:])), []))

    found = []
    with as_it_was(model), seeded(model), torch.no_grad():
        try:
            few = as_one(batches, FEW, tells)
            for gate, group in zip(gates, groups):
                gate.harden(torch.zeros(group.channels, dtype=torch.bool))
                try:
                    found.append(not tells(few))
                except FORWARD_ERRORS:  # a model may insist on what a closed group gives: nothing is known then
                    found.append(False)
                gate.state = GateState.TRANSPARENT
        finally:
            hook.remove()
    return found
