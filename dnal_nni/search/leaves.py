"""The tensors whose gradients a search reads: each gate's own ``s``, or the factors that the gates multiply by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.gates import ChannelFactor, ScaledSigmoidGate
from .ranks import mean_


class Leaves:
    """``s`` of every gate: its gradient goes through ``sigmoid(delta * s)``, and vanishes where a gate is saturated.

    Args:
        model: the gated model.
        gates: in the order of the units.

    Attributes:
        tensors: what backward passes leave a gradient on.
    """

    def __init__(self, model: nn.Module, gates: Sequence[ScaledSigmoidGate]) -> None:
        self.tensors = [gate.s.requires_grad_(True) for gate in gates]

    def show(self, g: Tensor) -> None:
        """Let the model compute with the gates ``g``, ``[units]``; here they follow from ``s`` already."""

    def gradient(self) -> Tensor:
        """What the backward passes since :meth:`clear` left: float64 ``[units]``, the mean over the ranks."""
        grad = torch.cat([t.grad if t.grad is not None else torch.zeros_like(t) for t in self.tensors]).double()
        grad.nan_to_num_(0.0, 0.0, 0.0)  # a GradScaler skips the steps that overflow, whose gradients stay here
        return mean_(grad)

    def clear(self) -> None:
        """Forget the gradients."""
        for leaf in self.tensors:
            leaf.grad = None


class FactorLeaves(Leaves):
    """A leaf for every factor in the model; those that are the same share one. Gradients are dL/dg.

    A saturated gate then has a gradient too, so that a closed one can reopen.
    """

    def __init__(self, model: nn.Module, gates: Sequence[ScaledSigmoidGate]) -> None:
        first = dict(zip(gates, itertools.accumulate([gate.s.numel() for gate in gates], initial=0)))
        self.units = sum(gate.s.numel() for gate in gates)
        leaves: dict[bytes, Tensor] = {}
        for factor in factors_of(model):
            own = [torch.arange(len(gate.s)) + first[gate] for gate in factor.gates]
            # the last entry is that of channels without a gate
            units = torch.cat([*own, torch.tensor([self.units])])[factor.index.cpu()]
            leaf = factor.gates[0].s.new_ones(len(units)).requires_grad_()
            factor.value = leaves.setdefault(units.numpy().tobytes(), leaf)
        unit_of = torch.from_numpy(np.frombuffer(b"".join(leaves), dtype=np.int64).copy())
        self.unit_of = unit_of.to(gates[0].s.device)
        self.tensors = list(leaves.values())

    def show(self, g: Tensor) -> None:
        values = F.pad(g, (0, 1), value=1.0).index_select(0, self.unit_of)
        torch._foreach_copy_(self.tensors, values.split([len(leaf) for leaf in self.tensors]))

    def gradient(self) -> Tensor:
        grad = super().gradient()
        return grad.new_zeros(self.units + 1).index_add_(0, self.unit_of, grad)[:-1]


def factors_of(model: nn.Module) -> list[ChannelFactor]:
    """Every factor in the model."""
    return [module for module in model.modules() if isinstance(module, ChannelFactor)]
