"""Repair at the cut: the layers of a cut network learn by regression to give what the uncut network's gave.

One pass of each network over the same examples, no labels and no gradient. The cut network runs second, and every layer
is fitted as the pass reaches it: to the input that the layers ahead of it, fitted already, give it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arguments import shown
from ..channels.groups import ChannelGroup
from ..errors import DNALError, told
from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, seeded
from .slim import Keep

ROWS = 20_000  # positions of all examples together that a layer is fitted to; every example has one at least
CHUNK = 2**24  # numbers of a convolution's unfolded input at a time
STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # of the ridge, by the mean square of the inputs

_CONVOLUTIONS: tuple[Any, ...] = (torch.conv1d, torch.conv2d)


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
    dense: nn.Module, slim: nn.Module, kept: Mapping[str, Tensor], inputs: Any
) -> dict[str, tuple[float, float]]:
    """Fit every convolution and linear layer of ``slim``, in place, to the outputs that the one in ``dense`` has.

    For a layer with weights ``W`` (its bias is the weight of a constant input), inputs ``X`` in ``slim``, and outputs
    ``Y`` in ``dense``, one column a place: ``W + R X^T (X X^T + strength)^-1`` with ``R = Y - W X``, which is the least
    of ``|Y - V X|^2 + strength |V - W|^2`` over ``V``. The strength is that which does best on the half of the examples
    that it was not fitted to, the halves taking turns; a layer that no strength improves there stays as it is. Grouped
    and depthwise convolutions, layers that run more than once and those with computed weights stay too. At last
    :func:`settle_norms`, so that training begins at the function that was fitted.

    Args:
        dense: the uncut network.
        slim: the cut one, with the same names.
        kept: as :func:`kept_outputs` has it.
        inputs: in the form of a dummy input, with two or more examples along the first dimension.

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
            call(dense, inputs)
        layers = dict(slim.named_modules())
        for path, outputs in recorder.outputs.items():
            weight = getattr(layers.get(path), "weight", None)
            if weight is None or weight.shape[0] != outputs.shape[-1]:
                raise DNALError(f"repair(slim): its {path} is not what the cut left: pass what speedup() returned last")
        with seeded(slim), _Fitter(slim, recorder) as fitter:
            call(slim, inputs)
        settle_norms(slim, inputs)
    finally:
        for module, training in modes:
            module.training = training
    return fitter.errors


@torch.no_grad()
def settle_norms(model: nn.Module, inputs: Any) -> None:
    """Write batch norms anew, in place: what ``model`` computes in eval mode stays, and train mode comes near to it.

    A regression leaves outputs of less variance than the ones that it is fitted to, and the running statistics are
    those of the uncut network: in train mode every norm would undo a part of the fit. So the running mean and variance
    become those of what arrives, and weight and bias take up the difference. Norms without a weight and a bias of their
    own, or that run more than once, stay as they are.

    Args:
        model: in eval mode.
        inputs: in the form of a dummy input.
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
            call(model, inputs)
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


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a convolution or a linear layer is called with."""

    function: Callable[..., Tensor]
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Tensor:
        return self.function(self.x, *self.args, **self.kwargs)

    def columns(self, layer: nn.Module, places: Tensor, examples: slice) -> Tensor:
        """What each output at some ``places`` is a linear function of: ``[examples, places, n]``."""
        x = self.x[examples]
        if isinstance(layer, nn.Linear):
            columns = x.reshape(len(x), -1, x.shape[-1])[:, places]
        else:
            assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
            size, flat = layer.kernel_size, x.dim() == 3
            names = enumerate(("stride", "padding", "dilation"))
            stride, padding, dilation = (self._setting(i, name) for i, name in names)
            if flat:
                x, size, stride = x.unsqueeze(2), (1, *size), (1, *stride)
                padding, dilation = (0, *padding), (1, *dilation)
            columns = F.unfold(x, size, dilation, padding, stride)[:, :, places].transpose(1, 2)
        if layer.bias is not None:
            columns = torch.cat([columns, columns.new_ones(*columns.shape[:2], 1)], 2)
        return columns

    def _setting(self, position: int, name: str) -> tuple[int, ...]:
        # behind the weight and the bias
        value = self.args[2 + position] if len(self.args) > 2 + position else self.kwargs.get(name, position != 1)
        if isinstance(value, str):  # "same" with an even kernel and such are padded by torch itself
            assert value == "valid"
            value = 0
        return (int(value),) * (self.x.dim() - 2) if isinstance(value, (int, bool)) else tuple(value)


class _Layers(TorchFunctionMode):
    """Hands the calls of a model's convolutions and linear layers to :meth:`layer`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {}
        for path, module in model.named_modules(remove_duplicate=False):
            plain = isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
            if (plain or isinstance(module, nn.Linear)) and isinstance(module.weight, nn.Parameter):
                self.layers[id(module.weight)] = path, module

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func in _CONVOLUTIONS or func is F.linear) and len(args) > 1 and id(args[1]) in self.layers:
            path, module = self.layers[id(args[1])]
            made = _Call(func, args[0], args[1:], kwargs)
            if made.x.dim() > (1 if func is F.linear else module.weight.dim() - 1):  # with examples
                return self.layer(path, module, made)
        return func(*args, **kwargs)

    @abc.abstractmethod
    def layer(self, path: str, module: nn.Module, made: _Call) -> Tensor:
        """What this layer returns, which has been called so."""


class _Recorder(_Layers):
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

    def layer(self, path: str, module: nn.Module, made: _Call) -> Tensor:
        out = made()
        self.times[path] += 1
        linear = isinstance(module, nn.Linear)
        rows = out.reshape(len(out), -1, out.shape[-1]) if linear else out.flatten(2).transpose(1, 2)
        generator = torch.Generator().manual_seed(len(self.places))
        places = torch.randperm(rows.shape[1], generator=generator)[: max(1, ROWS // len(out))].to(out.device)
        rows = rows[:, places]
        self.places[path] = places
        self.outputs[path] = rows[..., self.kept[path].to(out.device)] if path in self.kept else rows.clone()
        return out


class _Fitter(_Layers):
    """Fits each layer, then lets it run."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        super().__init__(model)
        self.recorder = recorder
        self.errors: dict[str, tuple[float, float]] = {}

    def layer(self, path: str, module: nn.Module, made: _Call) -> Tensor:
        if self.recorder.times[path] == 1 and len(self.recorder.outputs[path]) == len(made.x):
            padding = getattr(module, "padding", 0)
            if not isinstance(padding, str) or padding == "valid":
                self._fit(path, module, made)
        return made()

    def _fit(self, path: str, module: Any, made: _Call) -> None:
        wanted, places = self.recorder.outputs[path], self.recorder.places[path]
        weight = module.weight.flatten(1).double()
        if module.bias is not None:
            weight = torch.cat([weight, module.bias.double().unsqueeze(1)], 1)
        moments = [_Moments(weight), _Moments(weight)]
        for start, examples in _chunks(made.x, weight.shape[1]):
            columns = made.columns(module, places, examples).double()
            rest = wanted[examples] - columns @ weight.T
            for half, moment in enumerate(moments):  # every other example
                own = slice((half - start) % 2, None, 2)
                moment.add(columns[own], rest[own], wanted[examples][own])
        both = moments[0] + moments[1]
        if float(both.total) == 0:
            return
        found = [(_left(moments, strength), strength) for strength in STRENGTHS]
        left, strength = min(found)
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


def _left(halves: Sequence[_Moments], strength: float) -> float:
    """What a ridge fitted to one half leaves unexplained of the other, as a fraction of what there is; both ways."""
    after = halves[1].after(halves[0].change(strength)) + halves[0].after(halves[1].change(strength))
    return float(after / (halves[0].error + halves[1].error).clamp(min=1e-300))


def _chunks(x: Tensor, columns: int) -> Iterator[tuple[int, slice]]:
    """Examples that fit into memory unfolded."""
    positions = x[0].numel() // x.shape[1] if x.dim() > 2 else 1
    size = max(1, CHUNK // max(1, columns * positions))
    for start in range(0, len(x), size):
        yield start, slice(start, start + size)
