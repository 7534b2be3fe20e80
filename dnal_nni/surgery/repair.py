"""Repair at the cut: the layers of a cut network learn by regression to give what the uncut network's gave.

One pass of each network over the same examples, no labels and no gradient. The cut network runs second, and every layer
is fitted as the pass reaches it: to the input that the layers ahead of it, fitted already, give it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..channels.groups import ChannelGroup
from ..errors import DNALError, told
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, seeded
from .layer_calls import COLUMNS, LayerCall, LayerCalls, by_place, some_places, unfolds
from .slim import Keep

STRENGTHS = tuple(10.0**power for power in range(1, -6, -1))  # of the ridge, by the mean square of the inputs


def kept_outputs(groups: Sequence[ChannelGroup], keep: Keep) -> dict[str, Tensor]:
    """Bool ``[channels]`` by path of a layer: its output channels that a cut leaves; only of layers that lose some."""
    kept: dict[str, Tensor] = {}
    for group in groups:
        if group.frozen is not None or group.name not in keep:
            continue
        dropped = ~keep[group.name].cpu()
        for member in group.members:
            if member.side == "out" and not member.bare and bool(dropped.any()):
                mask = kept.setdefault(member.path, torch.ones(member.width, dtype=torch.bool))
                mask[member.channels[dropped[member.units]]] = False
    return kept


@torch.no_grad()
def repair(
    dense: nn.Module,
    slim: nn.Module,
    kept: Mapping[str, Tensor],
    inputs: Any,
    run: Callable[[nn.Module, Any], Any] = call,
) -> dict[str, tuple[float, float]]:
    """Fit every convolution and linear layer of ``slim``, in place, to the outputs that the one in ``dense`` has.

    For a layer with weights ``W`` (its bias is the weight of a constant input), inputs ``X`` in ``slim``, and outputs
    ``Y`` in ``dense``, one column a place: ``W + R X^T (X X^T + strength)^-1`` with ``R = Y - W X``, which is the least
    of ``|Y - V X|^2 + strength |V - W|^2`` over ``V``. The strength is that which does best on the half of the examples
    that it was not fitted to, the halves taking turns; a layer that no strength improves there stays as it is. Grouped
    and depthwise convolutions, layers that run more than once, of more than 5,000 inputs (VGG's first linear layer) and
    with computed weights stay too. At last :func:`settle_norms`, so that training begins at the function that was
    fitted.

    Args:
        dense: the uncut network.
        slim: the cut one, with the same names.
        kept: as :func:`kept_outputs` has it.
        inputs: in the form of a dummy input, with two or more examples along the first dimension.
        run: takes a network and the inputs.

    Returns:
        by path, the squared error of a layer's outputs relative to their squares: before, and after on the examples
        that it was not fitted to.

    Raises:
        DNALError: there are fewer than two examples, or the networks do not fit each other.
    """
    first = next(flatten_tensors(inputs), None)
    if first is None or first.dim() == 0 or len(first) < 2:
        raise DNALError("repair(inputs): give two examples or more in a batch; a few hundred are right")
    modes = [(module, module.training) for net in (dense, slim) for module in net.modules()]
    try:
        dense.eval()
        slim.eval()
        rejected = told(f"repair(inputs): the model rejects {shown(inputs)}", FORWARD_ERRORS)
        with seeded(dense), _Recorder(dense, kept) as recorder, rejected:
            run(dense, inputs)
        layers = dict(slim.named_modules())
        for path, outputs in recorder.outputs.items():
            weight = getattr(layers.get(path), "weight", None)
            if weight is None or weight.shape[0] != outputs.shape[-1]:
                raise DNALError(f"repair(slim): its {path} is not what the cut left: pass what speedup() returned last")
        with seeded(slim), _Fitter(slim, recorder) as fitter:
            run(slim, inputs)
        settle_norms(slim, lambda: run(slim, inputs))
    finally:
        for module, training in modes:
            module.training = training
    return fitter.errors


@torch.no_grad()
def settle_norms(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Write batch norms anew, in place: what ``model`` computes in eval mode stays, and train mode comes near to it.

    A regression leaves outputs of less variance than the ones that it is fitted to, and the running statistics are
    those of the uncut network: in train mode every norm would undo a part of the fit. So the running mean and variance
    become those of what arrives, and weight and bias take up the difference. Norms without a weight and a bias of their
    own, or that run more than once, stay as they are.

    Args:
        model: in eval mode.
        forward: runs it.
    """
    found: dict[nn.modules.batchnorm._BatchNorm, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def look(norm: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)
        if rows.shape[1] > 1:
            variance, mean = torch.var_mean(rows.float() if rows.dtype.itemsize < 4 else rows, 1)
            found[norm].append((mean.double(), variance.double()))

    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    owners = Counter(id(norm.weight) for norm in norms)
    own = [norm for norm in norms if norm.running_var is not None and norm.affine and owners[id(norm.weight)] == 1]
    hooks = [norm.register_forward_pre_hook(look) for norm in own if isinstance(norm.weight, nn.Parameter)]
    try:
        with seeded(model):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    for norm, moments in found.items():
        if len(moments) == 1:
            mean, variance = moments[0]
            assert norm.running_mean is not None and norm.running_var is not None
            deviation = (norm.running_var.double() + norm.eps).sqrt()
            norm.bias.add_(norm.weight * (mean - norm.running_mean) / deviation)
            norm.weight.mul_((variance + norm.eps).sqrt() / deviation)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


class _Recorder(LayerCalls):
    """Keeps what the layers return, at some places of every example.

    Attributes:
        places: by path, int64 ``[places]``.
        outputs: by path, ``[examples, places, channels]``, the channels that are left.
        times: how often each has run.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.kept, self.times = kept, Counter[str]()
        self.places: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def layer(self, path: str, module: nn.Module, made: LayerCall) -> Tensor:
        out = made()
        self.times[path] += 1
        rows = by_place(module, out)
        places = some_places(rows, len(self.places))
        rows = rows[:, places]
        self.places[path] = places
        self.outputs[path] = rows[..., self.kept[path].to(out.device)] if path in self.kept else rows.clone()
        return out


class _Fitter(LayerCalls):
    """Fits each layer, then lets it run."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        super().__init__(model)
        self.recorder = recorder
        self.errors: dict[str, tuple[float, float]] = {}

    def layer(self, path: str, module: nn.Module, made: LayerCall) -> Tensor:
        if self.recorder.times[path] == 1 and len(self.recorder.outputs[path]) == len(made.x):
            if unfolds(module):
                self._fit(path, module, made)
        return made()

    def _fit(self, path: str, module: Any, made: LayerCall) -> None:
        wanted, places = self.recorder.outputs[path], self.recorder.places[path]
        weight = module.weight.flatten(1).double()
        if weight.shape[1] > COLUMNS:
            return
        if module.bias is not None:
            weight = torch.cat([weight, module.bias.double().unsqueeze(1)], 1)
        moments = [_Moments(weight), _Moments(weight)]
        for start, examples in made.chunks(weight.shape[1]):
            columns = made.columns(module, places, examples).double()
            rest = wanted[examples] - columns @ weight.T
            for half, moment in enumerate(moments):  # every other example
                own = slice((half - start) % 2, None, 2)
                moment.add(columns[own], rest[own], wanted[examples][own])
        both = moments[0] + moments[1]
        if float(both.total) == 0:
            return
        left, strength = _best(moments)
        before = float(both.error / both.total)
        self.errors[path] = before, before
        if left >= 1:
            return
        change = both.change(strength).T.to(module.weight.dtype)
        if module.bias is not None:
            module.bias.add_(change[:, -1])
            change = change[:, :-1]
        module.weight.add_(change.reshape(module.weight.shape))
        self.errors[path] = before, before * left


class _Moments:
    """Sums over rows: what a ridge regression needs. float64.

    Attributes:
        inner: ``[n, n]``, of the columns with themselves.
        outer: ``[n, channels]``, of the columns with what is left to explain.
        error: 0-d, squares of what is left to explain.
        total: 0-d, squares of what is wanted.
    """

    def __init__(self, weight: Tensor) -> None:
        n, channels = weight.shape[1], weight.shape[0]
        self.inner = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
        self.outer = torch.zeros(n, channels, dtype=torch.float64, device=weight.device)
        self.error = self.total = torch.zeros((), dtype=torch.float64, device=weight.device)

    def add(self, columns: Tensor, rest: Tensor, wanted: Tensor) -> None:
        columns, rest = columns.flatten(0, 1), rest.flatten(0, 1)
        self.inner += columns.T @ columns
        self.outer += columns.T @ rest
        self.error = self.error + rest.square().sum()
        self.total = self.total + wanted.double().square().sum()

    def __add__(self, other: _Moments) -> _Moments:
        made = object.__new__(_Moments)
        for name, value in vars(self).items():
            setattr(made, name, value + getattr(other, name))
        return made

    def change(self, strength: float) -> Tensor:
        """What is added to the weights, ``[n, channels]``."""
        ridge = strength * self.inner.diagonal().mean().clamp(min=1e-30)
        factor = torch.linalg.cholesky(self.inner + torch.diag(ridge.expand(len(self.inner))))
        return torch.cholesky_solve(self.outer, factor)

    def after(self, change: Tensor) -> Tensor:
        """Squares that are left to explain with that change, 0-d."""
        return self.error + ((self.inner @ change - 2 * self.outer) * change).sum()


def _best(halves: Sequence[_Moments]) -> tuple[float, float]:
    """What the best ridge leaves unexplained, and its strength: from the strongest on, as long as weaker is better."""
    best = math.inf, STRENGTHS[0]
    for strength in STRENGTHS:
        left = _left(halves, strength)
        if left > best[0]:
            break
        best = left, strength
    return best


def _left(halves: Sequence[_Moments], strength: float) -> float:
    """What a ridge fitted to one half leaves unexplained of the other, as a fraction of what there is; both ways."""
    after = halves[1].after(halves[0].change(strength)) + halves[0].after(halves[1].change(strength))
    return float(after / (halves[0].error + halves[1].error).clamp(min=1e-300))
