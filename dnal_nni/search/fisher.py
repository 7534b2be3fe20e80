"""How much the loss minds: Kronecker factors of the Fisher matrix of layers, and its diagonal at the gates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DNALError
from ..modules.gates import GateState, ScaledSigmoidGate
from ..modules.running import flatten_tensors
from ..surgery.layer_calls import LayerCall, LayerCalls, by_place, some_places
from .leaves import FactorLeaves, factors_of

RIDGE = 1e-3  # by the mean variance of the inputs
ROUNDING = 1e-10  # by mean squares


@dataclasses.dataclass
class Factors:
    """Sums over examples and some of their places, float64: what K-FAC knows of a layer.

    Attributes:
        inner: ``[n, n]``, of the products of its input channels with each other, at the same place.
        sums: ``[n]``, of its input channels.
        rows: how many there are.
        outer: ``[channels, channels]``, of the products of the gradients at its outputs, as if of all places.
    """

    inner: Tensor
    sums: Tensor
    rows: int
    outer: Tensor

    @functools.cached_property
    def inverse(self) -> Tensor:
        """Of the covariance of the inputs, ``[n, n]``: a constant is made up for by a bias, or by the norm behind."""
        square, mean = self.inner / self.rows, self.sums / self.rows
        covariance = square - mean.outer(mean)
        ridge = RIDGE * covariance.diagonal().mean() + ROUNDING * square.diagonal().mean()
        ridge = ridge.clamp(min=1e-30).expand(len(covariance))
        return torch.cholesky_inverse(torch.linalg.cholesky(covariance + torch.diag(ridge)))


class FactorCalls(LayerCalls):
    """Adds up :class:`Factors` in forward and backward passes, whose loss is summed over the examples.

    Args:
        model: that will run.
        paths: of its layers, those to look at, where they are convolutions or linear layers.
        columns: input channels that a layer may have at most.
        examples: that will be seen in all.
    """

    def __init__(self, model: nn.Module, paths: Collection[str], columns: int, examples: int) -> None:
        super().__init__(model)
        self.examples = examples
        self.layers = {
            key: (path, module)
            for key, (path, module) in self.layers.items()
            if path in paths and module.weight.shape[1] <= columns
        }
        self.factors: dict[str, Factors] = {}
        self.calls = 0

    def layer(self, path: str, module: nn.Module, made: LayerCall) -> Tensor:
        out = made()
        if not out.requires_grad:
            return out
        assert isinstance(module.weight, Tensor)
        channels, n = module.weight.shape[:2]
        if path not in self.factors:
            zeros = torch.zeros(n * n + n + channels**2, dtype=torch.float64, device=out.device)
            inner, sums, outer = zeros.split([n * n, n, channels**2])
            self.factors[path] = Factors(inner.view(n, n), sums, 0, outer.view(channels, channels))
        factors = self.factors[path]
        with torch.no_grad():
            rows = by_place(module, made.x)
            rows = rows[:, some_places(rows, self.calls, self.examples)].flatten(0, 1).double()
            factors.inner += rows.T @ rows
            factors.sums += rows.sum(0)
            factors.rows += len(rows)
        seed = self.calls
        self.calls += 1

        def back(grad: Tensor) -> None:
            gradients = by_place(module, grad)
            places = some_places(gradients, seed, self.examples)
            some = gradients[:, places].flatten(0, 1).double()
            factors.outer.add_(some.T @ some, alpha=gradients.shape[1] / len(places))

        out.register_hook(back)
        return out


def gate_losses(
    model: nn.Module, gates: Sequence[ScaledSigmoidGate], samples: Iterable[Any], loss: Callable[[Any], Tensor]
) -> Tensor:
    """What the loss rises by as a gate closes and nothing makes up for it, by the Fisher matrix's diagonal there.

    Args:
        model: with its gates, whose parameters have gradients.
        gates: in the order of the units.
        samples: batches of one.
        loss: of a sample, 0-d.

    Returns:
        float64 ``[units]``.
    """
    leaves = FactorLeaves(model, gates)
    for gate in gates:
        gate.state = GateState.SOFT
    total = torch.zeros(leaves.units, dtype=torch.float64, device=leaves.unit_of.device)
    with torch.no_grad():
        leaves.show(torch.ones_like(total, dtype=leaves.tensors[0].dtype))
    try:
        count = 0
        for sample in samples:
            count += 1
            leaves.clear()
            loss(sample).backward()
            total += leaves.gradient().square()
    finally:
        for gate in gates:
            gate.state = GateState.TRANSPARENT
        for factor in factors_of(model):
            factor.value = None
    return 0.5 * total / count


def noise_in(returned: Any, generator: torch.Generator) -> Tensor:
    """Normal noise times what a model returned, 0-d: the squares of its gradients measure squared errors there.

    So no labels are needed. Every tensor counts by its mean square.

    Raises:
        DNALError: nothing that was returned has a gradient.
    """
    parts = []
    for out in flatten_tensors(returned):
        if out.is_floating_point() and out.requires_grad:
            noise = torch.randn(out.shape, generator=generator).to(out.device)
            parts.append((out.float() * noise).sum() / out.detach().float().square().mean().sqrt().clamp(min=1e-30))
    if not parts:
        raise DNALError("nothing that the model returns depends on its parameters: there is no gradient to go by")
    return torch.stack(parts).sum()
