"""The scaled-sigmoid gate of DNAL (arXiv 2103.02126), and the ways in which a gate acts on a tensor.

The paper's symbols: ``s`` architecture parameter, ``delta`` scale, ``g = sigmoid(delta * s)`` gate. As delta grows from
1 to 1e4 the gate goes from soft to the unit step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class GateState(Enum):
    """What a gate does to its channels."""

    TRANSPARENT = "transparent"  # g = 1: the weight phases
    SOFT = "soft"  # g = sigmoid(delta * s): the architecture phase
    HARD = "hard"  # g in {0, 1}: after the cut is decided


class ScaledSigmoidGate(nn.Module):
    """One gate of a coupled channel group: ``g = sigmoid(delta * s)``.

    Args:
        channels: number of units of the group (a unit is what can only be removed as one: usually one channel).

    Attributes:
        s: parameter ``[channels]``, float32, trainable only inside a search.
        delta: 0-d buffer. A tensor, so that a compiled model is not compiled again as it grows.
        hard: buffer ``[channels]`` of zeros and ones in the dtype of ``s``: ``g`` in the hard state.
        state: a :class:`GateState`.
    """

    delta: Tensor
    hard: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.register_buffer("delta", torch.ones(()))
        self.register_buffer("hard", torch.ones(channels))
        self.state = GateState.TRANSPARENT

    def forward(self) -> Tensor:
        """``g``, shape ``[channels]``, dtype and device of ``s``."""
        if self.state is GateState.TRANSPARENT:
            return torch.ones_like(self.s)
        if self.state is GateState.HARD:
            return self.hard
        return torch.sigmoid(self.delta * self.s)

    @property
    def mask(self) -> Tensor:
        """What is open in the hard state: bool ``[channels]``."""
        return self.hard > 0.5

    def harden(self, keep: Tensor) -> None:
        """Fix the gate to 1 where ``keep`` (bool ``[channels]``) is true and to 0 elsewhere."""
        self.hard.copy_(keep)
        self.state = GateState.HARD

    def values(self) -> dict[str, Any]:
        """Copies of all that it is: tensors, and the name of its state."""
        tensors = {"s": self.s, "delta": self.delta, "mask": self.mask}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()} | {"state": self.state.value}

    @torch.no_grad()
    def take(self, values: Mapping[str, Any]) -> None:
        """Become what :meth:`values` were of."""
        self.s.copy_(values["s"])
        self.delta.copy_(values["delta"])
        self.harden(values["mask"])
        self.state = GateState(values["state"])

    def extra_repr(self) -> str:
        return f"channels={self.s.numel()}, state={self.state.value}"


class ChannelFactor(nn.Module):
    """The factor of every channel of one tensor, from the gates of the groups that these channels belong to.

    The gates are held by reference (in a tuple, so they are not submodules): one gate serves all layers of its group,
    and ``copy.deepcopy`` of the model keeps that sharing inside the copy.

    Args:
        gates: the gates concerned.
        index: int64 ``[C]``; channel ``c`` takes entry ``index[c]`` of ``cat(g of each gate, 1)``.

    Attributes:
        value: the factor itself, ``[C]``, while a search under a budget keeps it, as a leaf: the search computes all
            factors in one pass and reads dL/dg from the gradients. Saturated gates then have a gradient too, so that a
            closed one can reopen.
    """

    index: Tensor
    value: Tensor | None

    def __init__(self, gates: Sequence[ScaledSigmoidGate], index: Tensor) -> None:
        super().__init__()
        self.gates = tuple(gates)
        units = sum(gate.s.numel() for gate in self.gates)
        self._identity = len(self.gates) == 1 and torch.equal(index.cpu(), torch.arange(units))
        self.register_buffer("index", index, persistent=False)
        self.value = None

    def factor(self) -> Tensor | None:
        """``[C]``, or None while every gate is transparent."""
        # in a settled search the gates of candidates are hard, so that the closed ones need not run
        if self.value is not None and self.gates[0].state is GateState.SOFT:
            return self.value
        if all(gate.state is GateState.TRANSPARENT for gate in self.gates):
            return None
        if self._identity:
            return self.gates[0].forward()
        one = self.gates[0].s.new_ones(1)
        return torch.cat([*(gate.forward() for gate in self.gates), one]).index_select(0, self.index)

    def multiplied(self, x: Tensor, dim: int) -> Tensor:
        """``x`` times the factor, channels along ``dim`` (negative: from the end)."""
        factor = self.factor()
        return x if factor is None else x * factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ChannelFactor:
        # `model.to(device)` and `.double()` reach the gates through here
        for gate in self.gates:
            gate._apply(fn)
        super()._apply(fn, recurse)
        return self


class AffineGate(ChannelFactor):
    """Multiplies a norm's weight and bias: ``g * norm(x)`` at no cost in activation memory."""

    def forward(self, affine: Tensor) -> Tensor:
        return self.multiplied(affine, 0)


class WeightGate(AffineGate):
    """Multiplies a weight that a function computes with, along its input channels: gates what arrives there.

    Args:
        dim: the dimension of the input channels.
    """

    def __init__(self, gates: Sequence[ScaledSigmoidGate], index: Tensor, dim: int) -> None:
        super().__init__(gates, index)
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        return self.multiplied(weight, self.dim)


class InputGate(ChannelFactor):
    """Multiplies the input of a layer, or its output; channels lie in dimension ``dim`` (negative: from the end)."""

    def __init__(self, gates: Sequence[ScaledSigmoidGate], index: Tensor, dim: int) -> None:
        super().__init__(gates, index)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplied(x, self.dim)


class StatisticsGate(ChannelFactor):
    """Normalises over the open channels only: mean and variance weighted by the gates, ``sum g x / sum g``.

    At 0/1 gates these are the statistics of the cut layer.

    Args:
        axis: channel dimension of the norm's input, from the end.
    """

    def __init__(self, gates: Sequence[ScaledSigmoidGate], index: Tensor, axis: int) -> None:
        super().__init__(gates, index)
        self.axis = axis

    def forward(self, norm: nn.LayerNorm | nn.GroupNorm, x: Tensor, out: Tensor) -> Tensor:
        """What ``norm`` gives for ``x``; ``out``, its own result, while every gate is transparent."""
        factor = self.factor()
        if factor is None:
            return out
        over: tuple[int, ...]
        y = (x if x.dtype == torch.float64 else x.float()).movedim(self.axis, -1)  # [..., C]
        g = factor.to(y.dtype)
        if isinstance(norm, nn.GroupNorm):  # [B, spatial, groups, C / groups]: statistics run over space too
            y = y.reshape(x.shape[0], -1, norm.num_groups, x.shape[self.axis] // norm.num_groups)
            g = g.view(norm.num_groups, -1)
            over, positions = (1, 3), y.shape[1]
        else:
            over, positions = (-1,), 1
        n = g.sum(-1, keepdim=True) * positions
        centred = y if not hasattr(norm, "bias") else y - (g * y).sum(over, keepdim=True) / n  # RMSNorm has no mean
        eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
        y = centred * ((g * centred.square()).sum(over, keepdim=True) / n + eps).rsqrt()
        y = y.reshape(x.movedim(self.axis, -1).shape)
        if norm.weight is not None:
            y = y * norm.weight.to(y.dtype).flatten()
        if getattr(norm, "bias", None) is not None:
            y = y + norm.bias.to(y.dtype).flatten()
        y = y.movedim(-1, self.axis).to(out.dtype)
        for child in norm.children():  # timm's norms hold the dropout and activation that follow
            if not isinstance(child, ChannelFactor):
                y = child(y)
        return y
