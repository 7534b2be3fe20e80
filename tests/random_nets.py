"""Random networks: a program of small steps that hypothesis draws, and the module that runs it.

A :class:`Program` is plain data and its ``repr`` is Python, so that a failing one can be pasted into a test. Every
program runs: sources are counted backwards and wrap around, and a step that does not fit the shape that it meets
(a pixel shuffle of a vector, a split of one channel) is left out. That lets hypothesis drop any step when it shrinks.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Kind = Literal["map", "tokens", "vector"]  # [B, C, ...], [B, L, C], [B, C]
Made = nn.Module | tuple[nn.Module, Kind] | None
MAX_CHANNELS, MAX_NUMEL = 32, 2048  # of one example

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
DROPOUT: dict[int, Any] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
POOL: dict[str, dict[int, Any]] = {
    "max": {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d},
    "avg": {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d},
    "adaptive": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
    "adaptive_max": {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d},
}


# -- programs ---------------------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """What a step reads: an example of the tensor, and where its channels are."""

    tensor: Tensor
    kind: Kind

    @property
    def channels(self) -> int:
        return int(self.tensor.shape[self.dim])

    @property
    def dim(self) -> int:
        return -1 if self.kind == "tokens" else 1

    @property
    def space(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[2:]) if self.kind == "map" else ()

    @property
    def dims(self) -> int:
        return len(self.space)


class Ingredient(NamedTuple):
    make: Callable[..., Made]
    arity: int
    options: dict[str, st.SearchStrategy[Any]]
    often: int


INGREDIENTS: dict[str, Ingredient] = {}


def ingredient(
    often: int = 1, **options: st.SearchStrategy[Any]
) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Register a maker of modules: positional parameters are its sources, keywords are drawn from ``options``."""

    def register(make: Callable[..., Made]) -> Callable[..., Made]:
        parameters = inspect.signature(make).parameters.values()
        arity = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        INGREDIENTS[make.__name__.rstrip("_")] = Ingredient(make, arity, options, often)
        return make

    return register


@dataclasses.dataclass(frozen=True, repr=False)
class Op:
    """One step. ``at`` and ``other`` count its sources backwards from the latest value."""

    name: str
    at: int = 0
    other: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        defaults = inspect.signature(INGREDIENTS[self.name].make).parameters
        given = [(k, v) for k, v in (("at", self.at), ("other", self.other)) if v != {"at": 0, "other": 1}[k]]
        given += [(k, v) for k, v in self.options if v != defaults[k].default]
        return f"op({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in given)])})"


def op(name: str, at: int = 0, other: int = 1, **options: Any) -> Op:
    return Op(name, at, other, tuple(options.items()))


@dataclasses.dataclass(frozen=True, repr=False)
class Program:
    """A network.

    Attributes:
        ops: the steps, in order; each may append values that later ones read.
        inputs: channels of every input; all have ``dims`` dimensions of length ``size`` behind them.
        batch: of the dummy input.
        head: what reads the last value.
        returns: in what the outputs are wrapped.
        also: values that are returned beside the head's, counted backwards.
        frozen: which parameters have requires_grad off.
        keywords: the inputs are passed as a dict.
        channels_last: memory format of the convolutions' weights (2d).
        seed: of all parameters, buffers and inputs.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...] = (3,)
    dims: int = 2
    size: int = 8
    batch: int = 2
    head: Literal["linear", "conv", "none"] = "linear"
    returns: Literal["tensor", "tuple", "dict", "dataclass", "nested"] = "tensor"
    also: tuple[int, ...] = ()
    frozen: Literal["nothing", "first half", "all"] = "nothing"
    keywords: bool = False
    channels_last: bool = False
    training: bool = True
    seed: int = 0

    def __repr__(self) -> str:
        parts = [f"({', '.join(map(repr, self.ops))}{',' * (len(self.ops) == 1)})"]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"Program({', '.join(parts)})"

    def example(self, batch: int, seed: int, size: int | None = None) -> Any:
        """Inputs in float64."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        shape = (size or self.size,) * self.dims
        tensors = [torch.randn(batch, c, *shape, generator=generator, dtype=torch.float64) for c in self.inputs]
        if self.keywords:
            return dict(zip("xyz", tensors))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def build(self) -> tuple[Network, Any]:
        """The network in float64 with norms that hide nothing, and its dummy input."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = Network(self).double()
            randomise(net)
        if self.channels_last and self.dims == 2:
            net.to(memory_format=torch.channels_last)
            if not runs(net, self.example(2, seed=0)):  # a view may need what is contiguous
                net.to(memory_format=torch.contiguous_format)
        runs(net, inputs := self.example(2, seed=0))
        net.guarded = str(inputs) != str(self.example(2, seed=0))  # in eval mode a dropout hands its input on
        net.train(self.training)
        return net, self.example(self.batch if runs(net, self.example(self.batch, seed=0)) else 2, seed=0)


@dataclasses.dataclass
class Result:
    """What some networks return."""

    out: Tensor
    features: list[Tensor]
    nothing: None = None
    auxiliary: Tensor | None = None


class Network(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.returns = program.returns
        self.guarded = False
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        values = [Value(torch.randn(2, c, *(program.size,) * program.dims), "map") for c in program.inputs]
        self.given = [(value.tensor, value.tensor.clone()) for value in values]
        for number, step in enumerate(program.ops):
            made = INGREDIENTS[step.name]
            back = (step.at, step.other)[: made.arity]
            sources = tuple((-1 - b) % len(values) for b in back)
            self._add(f"{step.name}{number}", values, sources, made.make, dict(step.options))
        self.last = len(values) - 1
        if program.head != "none":
            self._add("head", values, (self.last,), HEADS[program.head], {})
            self.last = len(values) - 1
        self.also = tuple({(self.last - 1 - a) % len(values): None for a in program.also})
        del self.given
        children = list(self.children())
        for child in children[: {"nothing": 0, "first half": len(children) // 2}.get(program.frozen, len(children))]:
            child.requires_grad_(False)

    def _add(
        self, name: str, values: list[Value], sources: tuple[int, ...], make: Callable[..., Made], options: Any
    ) -> None:
        if "net" in inspect.signature(make).parameters:
            options["net"] = self
        module: nn.Module | None = None
        known: str | None = None
        try:
            made = make(*(values[s] for s in sources), **options)
            if made is None:
                return
            module, kind = made if isinstance(made, tuple) else (made, values[sources[0]].kind)
            known = next((n for n, m in self.named_children() if m is module), None)
            results = module(*(values[s].tensor for s in sources))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            # called again where it does not fit; writes into a view; views what is not contiguous, or was overwritten
            told = ("view size is not compatible", "modified inplace")
            if known or isinstance(module, InPlace) or any(t in str(error) for t in told):
                return
            raise
        for now, before in self.given:
            if not torch.equal(now, before):  # a network that overwrites its own input is nobody's
                now.copy_(before)
                return
        news = [] if isinstance(module, TrainOnly) else [results] if isinstance(results, Tensor) else list(results)
        if any(r[0].numel() > MAX_NUMEL or r.numel() == 0 for r in news):
            return
        if any(Value(r, kind).channels > MAX_CHANNELS and kind != "vector" for r in news):
            return
        values += [Value(r, "vector" if r.dim() == 2 else kind) for r in news]
        if known is None:
            self.add_module(name, module)
        if not isinstance(module, Uncalled):
            self.steps.append((known or name, sources))

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        values = [v.clone() if self.guarded else v for v in (x, y, z) if v is not None]
        auxiliary = None
        for name, sources in self.steps:
            module = getattr(self, name)
            results = module(*(values[s] for s in sources))
            if isinstance(module, TrainOnly):
                auxiliary = results
            else:
                values += [results] if isinstance(results, Tensor) else list(results)
        out, features = values[self.last], [values[a] for a in self.also]
        if self.returns == "tuple":
            return (out, *features, None, auxiliary)
        if self.returns == "dict":
            return {"out": out, "features": features, "auxiliary": auxiliary, "number": 3}
        if self.returns == "dataclass":
            return Result(out, features, auxiliary=auxiliary)
        if self.returns == "nested":
            return [{"out": (out,)}, (None, features), auxiliary]
        if features or auxiliary is not None:
            return (out, *features) if auxiliary is None else (out, *features, auxiliary)
        return out


def run(net: nn.Module, inputs: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of them."""
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def runs(net: nn.Module, inputs: Any) -> bool:
    """Whether it takes these inputs in eval mode: one example is too few for some norms of a single place."""
    modes = {module: module.training for module in net.modules()}
    try:
        run(net.eval(), inputs)
    except (RuntimeError, ValueError):
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    return True


def randomise(net: nn.Module) -> None:
    """Statistics and affines that no removal leaves unnoticed; parameters that start at 0 or 1 moved away from it."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
        for parameter in net.parameters():
            if parameter.dim() and sum(n > 1 for n in parameter.shape) <= 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
                parameter.mul_(1 - 2 * (torch.rand_like(parameter) < 0.25).to(parameter))


# -- modules ----------------------------------------------------------------------------------------------------------


class Fn(nn.Module):
    """A function of its sources; whatever numbers it needs are constants in the user's code."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


class InPlace(Fn):
    """Writes into its source."""


class Uncalled(nn.Module):
    """Holds a module that the network never runs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


class Discard(Uncalled):
    """Runs a module and throws its output away."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.body(x)
        return ()


class TrainOnly(Uncalled):
    """An auxiliary head."""

    def forward(self, x: Tensor) -> Any:
        return self.body(x) if self.training else None


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None, act: nn.Module, drop: float, inplace: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act
        self.drop, self.inplace = drop, inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.drop and self.training:  # stochastic depth
            y = y * (torch.rand(len(y), *[1] * (y.dim() - 1), dtype=y.dtype) > self.drop)
        x = x if self.shortcut is None else self.shortcut(x)
        if self.inplace:
            y += x
        else:
            y = x + y
        return self.act(y)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class ChannelsLast(nn.Module):
    """A layer for [..., C] on a map [B, C, ...]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.movedim(1, -1)).movedim(-1, 1)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FunctionalNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)  # type: ignore[arg-type]


class SqueezeExcite(nn.Module):
    def __init__(self, conv: Any, dims: int, channels: int, reduced: int, gate: nn.Module, form: str) -> None:
        super().__init__()
        self.channels, self.form, self.dims, self.gate = channels, form, dims, gate
        make = conv if form == "conv" else nn.Linear
        size = (1,) if form == "conv" else ()
        self.reduce, self.expand = make(channels, reduced, *size), make(reduced, channels, *size)

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, 2 + self.dims))
        if self.form == "conv":
            return x * self.gate(self.expand(F.relu(self.reduce(x.mean(axes, keepdim=True)))))
        scale = self.gate(self.expand(F.relu(self.reduce(x.mean(axes)))))
        width = self.channels if self.form == "stored" else x.shape[1]
        return x * scale.view(len(x), width, *[1] * self.dims)


class SpatialAttention(nn.Module):
    def __init__(self, conv: nn.Module, form: str) -> None:
        super().__init__()
        self.conv, self.form = conv, form

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        if self.form == "max":
            both = torch.cat([x.amax(1, keepdim=True)] * 2, 1)
        return x * torch.sigmoid(self.conv(both))


class ChannelConv(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv, self.dims = nn.Conv1d(1, 1, 3, padding=1, bias=False), dims

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(2, 2 + self.dims)))
        return x * torch.sigmoid(self.conv(pooled[:, None]))[:, 0].view(*x.shape[:2], *[1] * self.dims)


class Attention(nn.Module):
    """Self-attention between the tokens of [B, L, C]."""

    def __init__(self, channels: int, heads: int, width: int, form: str) -> None:
        super().__init__()
        self.heads, self.width, self.form = heads, width, form
        inner = heads * width
        self.qkv = nn.Linear(channels, 3 * inner)
        self.project = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.form == "fused":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(b, n, -1))


class NonLocal(nn.Module):
    """Self-attention between the places of a map, by 1x1 convolutions."""

    def __init__(self, conv: Any, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = conv(channels, heads * width, 1), conv(channels, heads * width, 1)
        self.v, self.project = conv(channels, heads * width, 1), conv(heads * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        q, k, v = (f(x).view(b, self.heads, -1, math.prod(x.shape[2:])) for f in (self.q, self.k, self.v))
        y = v @ (q.transpose(-2, -1) @ k).softmax(-1)
        return x + self.project(y.reshape(b, -1, *x.shape[2:]))


class MultiHead(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class MLP(nn.Module):
    """A transformer's MLP: pre-norm, residual, optional layer scale, on [..., C]."""

    def __init__(self, channels: int, hidden: int, scale: bool, gated: bool) -> None:
        super().__init__()
        self.norm, self.gated = nn.LayerNorm(channels), gated
        self.expand = nn.Linear(channels, hidden * (1 + gated))
        self.contract = nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(channels)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.norm(x))
        if self.gated:
            a, b = y.chunk(2, -1)
            y = self.contract(F.silu(a) * b)
        else:
            y = self.contract(F.gelu(y))
        return x + (y if self.gamma is None else self.gamma * y)


class Tokens(nn.Module):
    """A map as tokens with a class token and a learned position."""

    def __init__(self, channels: int, places: int, cls: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, places + cls, channels))
        self.cls = nn.Parameter(torch.randn(1, 1, channels)) if cls else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return x + self.position


class StoredSplit(nn.Module):
    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.widths, self.dim = list(widths), dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.widths, self.dim)


class StoredView(nn.Module):
    """Out of its channels and back again, by numbers that it stores."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.channels, self.groups = channels, groups

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x), self.groups, self.channels // self.groups, *x.shape[2:])
        return y.reshape(len(x), self.channels, *x.shape[2:])


class StoredShuffle(StoredView):
    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x), self.groups, self.channels // self.groups, *x.shape[2:])
        return y.transpose(1, 2).reshape(len(x), self.channels, *x.shape[2:])


class Res2Net(nn.Module):
    """Slices of a stored width, each of which also reads the slice before it."""

    def __init__(self, channels: int, width: int, scale: int, conv: Any, norm: Any) -> None:
        super().__init__()
        self.width = width
        self.expand, self.norm = conv(channels, width * scale, 1, bias=False), norm(width * scale)
        self.convs = nn.ModuleList(conv(width, width, 3, padding=1, bias=False) for _ in range(scale - 1))
        self.norms = nn.ModuleList(norm(width) for _ in range(scale - 1))
        self.contract = conv(width * scale, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.norm(self.expand(x))), self.width, 1)
        done = [parts[0]]
        for conv, norm, part in zip(self.convs, self.norms, parts[1:]):
            done.append(F.relu(norm(conv(part if len(done) == 1 else part + done[-1]))))
        return x + self.contract(torch.cat(done, 1))


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: half of the channels pass, the others are convolved, then both are shuffled."""

    def __init__(self, channels: int, conv: Any, norm: Any) -> None:
        super().__init__()
        half = channels // 2
        self.a, self.norm_a = conv(half, half, 1, bias=False), norm(half)
        self.depthwise, self.norm_d = conv(half, half, 3, padding=1, groups=half, bias=False), norm(half)
        self.b, self.norm_b = conv(half, half, 1, bias=False), norm(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = self.norm_d(self.depthwise(F.relu(self.norm_a(self.a(right)))))
        y = torch.cat([left, F.relu(self.norm_b(self.b(right)))], 1)
        b, c, *space = y.shape
        return y.view(b, 2, c // 2, *space).transpose(1, 2).reshape(b, c, *space)


class Ghost(nn.Module):
    """GhostNet: cheap features beside the real ones, cut to a stored width."""

    def __init__(self, channels: int, width: int, conv: Any) -> None:
        super().__init__()
        self.width = width
        half = math.ceil(width / 2)
        self.primary, self.cheap = conv(channels, half, 1), conv(half, half, 3, padding=1, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.primary(x))
        return torch.cat([y, F.relu(self.cheap(y))], 1)[:, : self.width]


class Bare(nn.Module):
    """A bare parameter or buffer that meets the channels."""

    def __init__(self, tensor: Tensor, buffer: bool, how: str, last: int) -> None:
        super().__init__()
        self.how, self.last = how, last  # last: dimensions to append in forward, as layer scales do
        if buffer:
            self.register_buffer("values", tensor)
        else:
            self.values = nn.Parameter(tensor)

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.view(-1, *[1] * self.last) if self.last else self.values
        if self.how == "concat":
            return torch.cat([x, values.expand(len(x), *values.shape[1:])], 1)
        return x * values if self.how == "mul" else x + values


class FunctionalConv(nn.Module):
    def __init__(self, channels: int, width: int, dims: int, form: str) -> None:
        super().__init__()
        self.form, self.dims = form, dims
        size = [3] * dims if form == "conv" else []
        self.kernel = nn.Parameter(torch.randn(width, channels, *size) / channels)
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "conv":
            conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.dims]
            return conv(x, self.kernel, self.offset, padding=1)
        return torch.einsum("bc...,oc->bo...", x, self.kernel)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=self.training)


# -- makers of layers -------------------------------------------------------------------------------------------------

WIDTHS = st.sampled_from((8, 4, 6, 5, 2, 12, 16))
SOME = st.booleans()
NORMS = ("batch", "group", "group_one", "layer", "layer_all", "instance", "rms", "response", "functional")
ZERO_ACTS = ("relu", "relu_", "relu6", "gelu", "silu", "tanh", "leaky", "hardswish", "prelu", "prelu_one", "square")
OTHER_ACTS = ("sigmoid", "plus_one", "exp", "hardsigmoid", "softplus", "one_minus", "cos", "affine")

ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "hardswish": nn.Hardswish,
    "prelu_one": nn.PReLU,
    "square": lambda: Fn(lambda x: x.clamp(-3, 3) ** 2),
    "sigmoid": nn.Sigmoid,
    "plus_one": lambda: Fn(lambda x: x + 1),
    "exp": lambda: Fn(lambda x: x.clamp(max=1).exp()),
    "hardsigmoid": nn.Hardsigmoid,
    "softplus": nn.Softplus,
    "one_minus": lambda: Fn(lambda x: 1 - x),
    "cos": lambda: Fn(torch.cos),
    "affine": lambda: Bare(torch.ones(1), False, "add", 0),
}


def make_act(name: str, x: Value) -> nn.Module | None:
    if name == "prelu":
        return None if x.kind == "tokens" else nn.PReLU(x.channels)
    return ACTS[name]()


def divisor(n: int, most: int = 4) -> int:
    return next((g for g in range(min(most, n), 1, -1) if n % g == 0), 1)


def make_norm(name: str, x: Value, affine: bool = True, tracked: bool = True) -> nn.Module | None:
    c = x.channels
    if x.kind == "tokens" and name not in ("layer", "rms") or name == "rms" and not hasattr(nn, "RMSNorm"):
        return None
    if name == "batch":
        return BATCH[x.dims](c, affine=affine, track_running_stats=tracked)
    if name in ("group", "group_one"):
        return nn.GroupNorm(1 if name == "group_one" else divisor(c), c, affine=affine)
    if name in ("layer", "rms"):
        norm = nn.LayerNorm(c, elementwise_affine=affine) if name == "layer" else nn.RMSNorm(c, 1e-5, affine)
        return ChannelsLast(norm) if x.kind == "map" else norm
    if name == "layer_all":
        return nn.LayerNorm([c, *x.space], elementwise_affine=affine)
    if name == "functional":
        return FunctionalNorm(c)
    if not x.dims:
        return None
    if name == "response":
        return nn.LocalResponseNorm(3)
    return INSTANCE[x.dims](c, affine=affine, track_running_stats=tracked) if math.prod(x.space) > 1 else None


def block(x: Value, *parts: tuple[str, Any]) -> nn.Module | None:
    """Layers in a row, each made for what the one before it returns; nn.Module or a maker (kind of norm or act)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    tensor = x.tensor
    for name, part in parts:
        value = Value(tensor, x.kind)
        module = part if isinstance(part, nn.Module) else part(value)
        if module is None:
            continue
        layers[name] = module
        tensor = module(tensor)
    return nn.Sequential(layers)


def act_of(name: str | None) -> Callable[[Value], nn.Module | None]:
    return lambda value: None if name is None else make_act(name, value)


def norm_of(name: str | None) -> Callable[[Value], nn.Module | None]:
    return lambda value: None if name is None else make_norm(name, value)


# -- ingredients: layers ----------------------------------------------------------------------------------------------

CONV_OPTIONS = dict(
    width=WIDTHS,
    kernel=st.sampled_from((3, 1)),
    norm=st.sampled_from((None, *("batch",) * 12, *NORMS)),
    act=st.sampled_from((None, *("relu",) * 18, *ZERO_ACTS, *OTHER_ACTS)),
    bias=st.sampled_from((True, False)),
)


@ingredient(
    often=16,
    **CONV_OPTIONS,
    stride=st.sampled_from((1, 1, 1, 2)),
    groups=st.sampled_from(("one", "one", "one", "some", "depthwise", "multiplier", "outputs")),
    padding=st.sampled_from(("zeros", "zeros", "zeros", "zeros", "circular", "reflect")),
    weight=st.sampled_from(("plain",) * 12 + ("weight_norm", "old_weight_norm", "spectral_norm", "standardised")),
)
def conv(
    x: Value,
    *,
    width: int = 8,
    kernel: int = 3,
    norm: str | None = None,
    act: str | None = None,
    bias: bool = True,
    stride: int = 1,
    groups: str = "one",
    padding: str = "zeros",
    weight: str = "plain",
) -> Made:
    if not x.dims:
        return None
    c = x.channels
    number = 1
    if groups == "some":
        number = divisor(c)
        width = math.ceil(width / number) * number
    elif groups in ("depthwise", "multiplier"):
        number, width = c, c * (1 + (groups == "multiplier"))
    elif groups == "outputs":
        number = width = c // 2 if c % 2 == 0 else 1
    if min(x.space) < 3:
        kernel, stride, padding = 1, 1, "zeros"
    classes: Any = StandardisedConv2d if weight == "standardised" and x.dims == 2 else CONV[x.dims]
    if weight == "standardised":
        padding = "zeros"
    layer = classes(c, width, kernel, stride, kernel // 2, groups=number, bias=bias, padding_mode=padding)
    if weight == "weight_norm":
        parametrizations.weight_norm(layer)
    elif weight == "spectral_norm":
        parametrizations.spectral_norm(layer)
    elif weight == "old_weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(layer)
    return block(x, ("conv", layer), ("norm", norm_of(norm)), ("act", act_of(act)))


@ingredient(often=2, **CONV_OPTIONS, groups=st.sampled_from(("one", "some", "depthwise")))
def transposed(
    x: Value,
    *,
    width: int = 8,
    kernel: int = 3,
    norm: str | None = None,
    act: str | None = None,
    bias: bool = True,
    groups: str = "one",
) -> Made:
    if not x.dims:
        return None
    number = 1
    if groups == "some":
        number = divisor(x.channels)
        width = math.ceil(width / number) * number
    elif groups == "depthwise":
        number = width = x.channels
    stride = 2 if max(x.space) <= 4 else 1
    layer = TRANSPOSED[x.dims](x.channels, width, kernel, stride, kernel // 2, groups=number, bias=bias)
    return block(x, ("conv", layer), ("norm", norm_of(norm)), ("act", act_of(act)))


@ingredient(often=3, **{k: v for k, v in CONV_OPTIONS.items() if k != "kernel"})
def linear(x: Value, *, width: int = 8, norm: str | None = None, act: str | None = None, bias: bool = True) -> Made:
    """On the last dimension of vectors and tokens; on the channels of maps moved there."""
    layer: nn.Module = nn.Linear(x.channels, width, bias=bias)
    if x.kind == "map":
        layer = ChannelsLast(layer)
    return block(x, ("linear", layer), ("norm", norm_of(norm)), ("act", act_of(act)))


@ingredient(often=3, kind=st.sampled_from(NORMS), affine=SOME, tracked=SOME)
def norm(x: Value, *, kind: str = "batch", affine: bool = True, tracked: bool = True) -> Made:
    return make_norm(kind, x, affine, tracked)


@ingredient(often=3, kind=st.sampled_from((*ZERO_ACTS, *OTHER_ACTS)))
def act(x: Value, *, kind: str = "relu") -> Made:
    return make_act(kind, x)


@ingredient(often=2, width=WIDTHS, form=st.sampled_from(("conv", "einsum")))
def functional(x: Value, *, width: int = 8, form: str = "conv") -> Made:
    return FunctionalConv(x.channels, width, x.dims, form) if x.dims else None


@ingredient(kind=st.sampled_from(("max", "avg", "adaptive", "adaptive_max", "mean")), size=st.sampled_from((2, 1)))
def pool(x: Value, *, kind: str = "max", size: int = 2) -> Made:
    if not x.dims or min(x.space) < 2:
        return None
    axes = tuple(range(2, 2 + x.dims))
    if kind == "mean":
        return Fn(lambda x: x.mean(axes)), "vector"
    if kind == "max" and size == 1:
        return POOL["max"][x.dims](3, 1, 1)
    return POOL[kind][x.dims](2 if kind in ("max", "avg") else size)


@ingredient(mode=st.sampled_from(("nearest", "linear", "function")))
def upsample(x: Value, *, mode: str = "nearest") -> Made:
    if not x.dims or max(x.space) > 4:
        return None
    if mode == "function":
        return Fn(lambda x: F.interpolate(x, scale_factor=2))
    linear_mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dims]
    return nn.Upsample(scale_factor=2, mode="nearest" if mode == "nearest" else linear_mode)


@ingredient(often=2, form=st.sampled_from(("flatten", "view")))
def flatten(x: Value, *, form: str = "flatten") -> Made:
    if x.kind == "vector" or x.tensor[0].numel() > 1024:
        return None
    return (nn.Flatten() if form == "flatten" else Fn(lambda x: x.view(len(x), -1))), "vector"


@ingredient(kind=st.sampled_from(("element", "channel", "function", "path")))
def dropout(x: Value, *, kind: str = "element") -> Made:
    if kind == "element":
        return nn.Dropout(0.3)
    if kind == "channel":
        return DROPOUT[x.dims](0.3) if x.dims else None
    if kind == "function":
        return Dropping()
    return Residual(nn.Identity(), None, nn.Identity(), 0.5, False)


@ingredient(value=st.sampled_from((0.5, 0.0)), mode=st.sampled_from(("constant", "replicate")))
def pad(x: Value, *, value: float = 0.5, mode: str = "constant") -> Made:
    if not x.dims or max(x.space) > 8:
        return None
    return Fn(lambda x: F.pad(x, (1, 0) * (x.dim() - 2), mode, *[value] * (mode == "constant")))


# -- ingredients: channels that meet, part and move -------------------------------------------------------------------


def matched(x: Value, y: Value) -> tuple[Value, nn.Module | None] | None:
    """A projection that gives ``y`` the shape of ``x``: None inside where none is needed, None where none can."""
    if x.kind != y.kind or (x.kind == "tokens" and x.tensor.shape != y.tensor.shape):
        return None
    parts: list[nn.Module] = []
    if x.dims and x.space != y.space:
        if x.dims != y.dims:
            return None
        adaptive = POOL["adaptive"][x.dims]
        parts.append(adaptive(x.space if x.dims > 1 else x.space[0]))
    if x.channels != y.channels:
        parts.append(CONV[x.dims](y.channels, x.channels, 1) if x.dims else nn.Linear(y.channels, x.channels))
    return x, (nn.Sequential(*parts) if parts else None)


class Meet(nn.Module):
    def __init__(self, project: nn.Module | None, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.function = project, function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y if self.project is None else self.project(y))


MEET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "gate": lambda x, y: x * torch.sigmoid(y),
    "max": torch.maximum,
    "mix": lambda x, y: 0.3 * x + 0.7 * y,
    "norm_mul": lambda x, y: x * (1 + y),
}


@ingredient(often=5, how=st.sampled_from(tuple(MEET)))
def meet(x: Value, y: Value, *, how: str = "add") -> Made:
    found = matched(x, y)
    return None if found is None else Meet(found[1], MEET[how])


@ingredient(often=2, how=st.sampled_from(("add", "mul", "relu", "slice")))
def inplace(x: Value, y: Value, *, how: str = "add") -> Made:
    if x.tensor.shape != y.tensor.shape or x.kind != y.kind or x.tensor is y.tensor:
        how = "slice" if how == "slice" else "relu"
    if how == "relu":
        return InPlace(lambda x, y: x.relu_())
    if how == "slice":

        def write(x: Tensor, y: Tensor) -> Tensor:
            x[:, :1] += 1
            return x

        return InPlace(write)
    return InPlace((lambda x, y: x.add_(y)) if how == "add" else (lambda x, y: x.mul_(y)))


@ingredient(often=4)
def concat(x: Value, y: Value) -> Made:
    if x.kind != y.kind or x.kind == "tokens" or x.space != y.space:
        return None
    return Fn(lambda x, y: torch.cat([x, y], 1))


@ingredient(order=st.sampled_from(("xx", "xrx")))
def concat_self(x: Value, *, order: str = "xx") -> Made:
    dim = x.dim
    return Fn(lambda x: torch.cat([x, F.relu(x), x] if order == "xrx" else [x, x], dim))


@ingredient(often=2, parts=st.sampled_from((2, 3)), form=st.sampled_from(("chunk", "equal", "unequal", "stored")))
def split(x: Value, *, parts: int = 2, form: str = "chunk") -> Made:
    c, dim = x.channels, x.dim
    if c < parts + 1:
        return None
    if form == "chunk":
        return Fn(lambda x: x.chunk(parts, dim))
    if form == "equal":
        return Fn(lambda x: x.split(math.ceil(c / parts), dim))
    first = max(1, c // 3)
    sizes = [first, c - first] if parts == 2 else [first, 1, c - first - 1]
    return StoredSplit(sizes, dim) if form == "stored" else Fn(lambda x: torch.split(x, sizes, dim))


@ingredient(form=st.sampled_from(("function", "halves", "swapped")))
def glu(x: Value, *, form: str = "function") -> Made:
    dim = x.dim
    if x.channels % 2:
        return None
    if form == "function":
        return Fn(lambda x: F.glu(x, dim))

    def halves(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        return a * torch.sigmoid(b) if form == "halves" else F.silu(b) * a

    return Fn(halves)


@ingredient(form=st.sampled_from(("half", "constant", "strided", "tail", "pick")))
def slice_(x: Value, *, form: str = "half") -> Made:
    c, dim = x.channels, x.dim
    if c < 3:
        return None
    half = c // 2
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "half": lambda x: x.narrow(dim, 0, x.shape[dim] // 2),
        "constant": lambda x: x.narrow(dim, 0, half),
        "strided": lambda x: x[..., ::2] if dim == -1 else x[:, ::2],
        "tail": lambda x: x[..., 1:] if dim == -1 else x[:, 1:],
        "pick": lambda x: x.index_select(dim, torch.tensor([0, 2])),
    }
    return Fn(forms[form])


@ingredient(how=st.sampled_from(("flip", "roll", "permute", "sort", "swap")))
def move(x: Value, *, how: str = "flip") -> Made:
    dim = x.dim
    order = torch.randperm(x.channels)

    def swap(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        return torch.cat([b, a], dim)

    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "flip": lambda x: x.flip(dim),
        "roll": lambda x: x.roll(1, dim),
        "permute": lambda x: x.index_select(dim, order),
        "sort": lambda x: x.sort(dim).values,
        "swap": swap,
    }
    return None if x.channels < 2 else Fn(moves[how])


@ingredient(how=st.sampled_from(("repeat", "interleave", "expand")))
def repeat(x: Value, *, how: str = "repeat") -> Made:
    dim = x.dim
    if x.kind == "tokens" or how == "interleave":
        return Fn(lambda x: x.repeat_interleave(2, dim))
    if how == "repeat":
        return Fn(lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)))
    return Fn(lambda x: x[:, None].expand(-1, 2, *x.shape[1:]).reshape(len(x), -1, *x.shape[2:]))


@ingredient(often=2, form=st.sampled_from(("shape", "stored", "view")), groups=st.sampled_from((2, 4, 3)))
def shuffle(x: Value, *, form: str = "shape", groups: int = 2) -> Made:
    """Channel shuffle; or with "view" only the reshape there and back, by stored numbers."""
    if x.kind == "tokens" or x.channels % groups:
        return None
    if form != "shape":
        return (StoredShuffle if form == "stored" else StoredView)(x.channels, groups)

    def shuffled(x: Tensor) -> Tensor:
        b, c, *space = x.shape
        return x.view(b, groups, c // groups, *space).transpose(1, 2).reshape(b, c, *space)

    return Fn(shuffled)


@ingredient(up=SOME)
def pixel(x: Value, *, up: bool = True) -> Made:
    if x.dims != 2:
        return None
    if up:
        return nn.PixelShuffle(2) if x.channels % 4 == 0 else None
    return nn.PixelUnshuffle(2) if all(n % 2 == 0 for n in x.space) else None


@ingredient(front=SOME, strided=SOME)
def pad_channels(x: Value, *, front: bool = True, strided: bool = False) -> Made:
    """The shortcut of option A: more channels, filled with zeros, at half of the resolution."""
    if x.dims != 2:
        return None

    def padded(x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2] if strided else x
        return F.pad(x, (0, 0, 0, 0, 2 if front else 0, 2))

    return Fn(padded)


@ingredient(how=st.sampled_from(("maxout", "radix", "gram", "mean", "scale", "coordinates")))
def mix(x: Value, *, how: str = "maxout") -> Made:
    """Channels that see each other, or their own number."""
    c, dim = x.channels, x.dim
    if how == "mean":
        return Fn(lambda x: x - x.mean(dim, keepdim=True))
    if how == "scale":
        return Fn(lambda x: x * x.shape[dim] ** -0.5)
    if x.kind != "map":
        return None
    if how == "coordinates":
        return Bare(torch.randn(1, 2, *x.space), True, "concat", 0)
    if how == "gram":
        return Fn(
            lambda x: torch.einsum("bcn,bdn->bcd", x.flatten(2), x.flatten(2)).flatten(1) / math.prod(x.shape[2:])
        ), ("vector")
    if c % 2:
        return None
    if how == "maxout":
        return Fn(lambda x: x.view(len(x), x.shape[1] // 2, 2, *x.shape[2:]).amax(2))

    def radix(x: Tensor) -> Tensor:
        y = x.view(len(x), 2, -1, *x.shape[2:])
        return (y * y.softmax(1)).sum(1)

    return Fn(radix)


@ingredient(kind=st.sampled_from(("softmax", "l2", "sum")))
def normalise(x: Value, *, kind: str = "softmax") -> Made:
    """Over the channels, without parameters."""
    dim = x.dim
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(dim),
        "l2": lambda x: F.normalize(x, dim=dim, eps=1e-2),
        "sum": lambda x: x / (1 + x.abs().sum(dim, keepdim=True)),
    }
    return Fn(forms[kind])


@ingredient(
    often=2,
    shape=st.sampled_from(("C11", "1C11", "1CHW", "scale", "scalar")),
    how=st.sampled_from(("mul", "add")),
    buffer=SOME,
)
def bare(x: Value, *, shape: str = "C11", how: str = "mul", buffer: bool = False) -> Made:
    """A bare parameter or buffer; "scale" is a vector that forward reshapes, as LayerScale does."""
    c = x.channels
    ones = [1] * x.dims
    if x.kind == "tokens":
        shapes = {"C11": [c], "1C11": [1, 1, c], "1CHW": [1, *x.tensor.shape[1:]], "scale": [c], "scalar": []}
    else:
        shapes = {"C11": [c, *ones], "1C11": [1, c, *ones], "1CHW": [1, c, *x.space], "scale": [c], "scalar": []}
    return Bare(torch.randn(shapes[shape]), buffer, how, x.dims if shape == "scale" else 0)


# -- ingredients: blocks ----------------------------------------------------------------------------------------------


@ingredient(
    often=4,
    width=WIDTHS,
    project=SOME,
    norm=st.sampled_from(("batch", None, "group", "instance")),
    act=st.sampled_from(("relu", None, "sigmoid")),
    drop=st.sampled_from((0.0, 0.5)),
    inplace=SOME,
)
def residual(
    x: Value,
    *,
    width: int = 8,
    project: bool = False,
    norm: str | None = "batch",
    act: str | None = "relu",
    drop: float = 0.0,
    inplace: bool = False,
) -> Made:
    if not x.dims:
        return None
    out = width if project else x.channels
    kernel = 3 if min(x.space) >= 3 else 1
    layers = CONV[x.dims]
    body = block(
        x,
        ("conv1", layers(x.channels, width, kernel, padding=kernel // 2, bias=norm is None)),
        ("norm1", norm_of(norm)),
        ("act1", act_of("relu")),
        ("conv2", layers(width, out, kernel, padding=kernel // 2, bias=norm is None)),
        ("norm2", norm_of(norm)),
    )
    assert body is not None
    shortcut = layers(x.channels, out, 1) if project else None
    return Residual(body, shortcut, ACTS[act]() if act else nn.Identity(), drop, inplace)


@ingredient(form=st.sampled_from(("conv", "shape", "stored")), hard=SOME)
def squeeze(x: Value, *, form: str = "conv", hard: bool = False) -> Made:
    if not x.dims:
        return None
    gate = nn.Hardsigmoid() if hard else nn.Sigmoid()
    return SqueezeExcite(CONV[x.dims], x.dims, x.channels, 3, gate, form)


@ingredient(form=st.sampled_from(("both", "max", "channels")))
def attend(x: Value, *, form: str = "both") -> Made:
    """Spatial attention from the mean and maximum over the channels; or a convolution along the channels (ECA)."""
    if not x.dims:
        return None
    if form == "channels":
        return ChannelConv(x.dims)
    return SpatialAttention(CONV[x.dims](2, 1, 3, padding=1), form)


@ingredient(
    often=2,
    form=st.sampled_from(("fused", "chunk", "sdpa", "conv", "module", "recurrent")),
    heads=st.sampled_from((1, 2)),
    width=st.sampled_from((2, 4)),
)
def attention(x: Value, *, form: str = "fused", heads: int = 2, width: int = 4) -> Made:
    if x.kind == "vector":
        return None
    if form == "conv" or x.kind == "map":
        return NonLocal(CONV[x.dims], x.channels, width, heads) if x.kind == "map" else None
    if form == "module":
        return MultiHead(x.channels, heads) if x.channels % heads == 0 else None
    if form == "recurrent":
        return Recurrent(x.channels, width)
    return Attention(x.channels, heads, width, form)


@ingredient(often=2, hidden=WIDTHS, scale=SOME, gated=SOME)
def mlp(x: Value, *, hidden: int = 8, scale: bool = False, gated: bool = False) -> Made:
    module = MLP(x.channels, hidden, scale, gated)
    return ChannelsLast(module) if x.kind == "map" else module


@ingredient(cls=SOME)
def tokens(x: Value, *, cls: bool = False) -> Made:
    """A map becomes tokens; tokens become a vector, their mean or the class token."""
    if x.kind == "tokens":
        return Fn(lambda x: x[:, 0] if cls else x.mean(1)), "vector"
    if x.kind == "vector" or math.prod(x.space) > 64:
        return None
    return Tokens(x.channels, math.prod(x.space), cls), "tokens"


@ingredient(often=2, kind=st.sampled_from(("res2net", "shuffle", "ghost", "inverted", "dense", "csp")), width=WIDTHS)
def known(x: Value, *, kind: str = "res2net", width: int = 4) -> Made:
    """Blocks of well-known networks."""
    if not x.dims or min(x.space) < 2:
        return None
    conv, norm, c = CONV[x.dims], BATCH[x.dims], x.channels
    if kind == "res2net":
        return Res2Net(c, min(width, 6), 3, conv, norm)
    if kind == "shuffle":
        return ShuffleUnit(c, conv, norm) if c % 2 == 0 else None
    if kind == "ghost":
        return Ghost(c, width, conv)
    if kind == "inverted":
        wide = 2 * width
        body = nn.Sequential(
            OrderedDict(
                expand=nn.Sequential(conv(c, wide, 1, bias=False), norm(wide), nn.ReLU6(inplace=True)),
                depthwise=nn.Sequential(
                    conv(wide, wide, 3, padding=1, groups=wide, bias=False), norm(wide), nn.ReLU6(inplace=True)
                ),
                se=SqueezeExcite(conv, x.dims, wide, 3, nn.Hardsigmoid(), "conv"),
                contract=nn.Sequential(conv(wide, c, 1, bias=False), norm(c)),
            )
        )
        return Residual(body, None, nn.Identity(), 0.0, False)
    if kind == "dense":
        return Dense(c, width, conv, norm)
    return CSP(c, width, conv, norm)


class Dense(nn.Module):
    """DenseNet: norm, activation, convolution, and the result beside everything before."""

    def __init__(self, channels: int, growth: int, conv: Any, norm: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels + i * growth) for i in range(2))
        self.convs = nn.ModuleList(conv(channels + i * growth, growth, 3, padding=1, bias=False) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


class CSP(nn.Module):
    """Cross-stage partial: half of the channels pass a block, then both halves are joined and mixed."""

    def __init__(self, channels: int, width: int, conv: Any, norm: Any) -> None:
        super().__init__()
        self.expand, self.norm = conv(channels, 2 * width, 1, bias=False), norm(2 * width)
        self.block = nn.Sequential(conv(width, width, 3, padding=1, bias=False), norm(width), nn.LeakyReLU(0.1))
        self.mix = conv(2 * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.leaky_relu(self.norm(self.expand(x)), 0.1).chunk(2, 1)
        return self.mix(torch.cat([a, b + self.block(b)], 1))


# -- ingredients: the network's own ways ------------------------------------------------------------------------------


@ingredient(often=3, which=st.integers(0, 5))
def again(x: Value, *, net: Network, which: int = 0) -> Made:
    """A module of an earlier step, called once more."""
    names = [name for name, _ in net.steps]
    if not names:
        return None
    module = net.get_submodule(names[-1 - which % len(names)])
    return None if isinstance(module, (TrainOnly, Tokens)) else module


@ingredient(often=2, which=st.integers(0, 3))
def tied(x: Value, *, net: Network, which: int = 0) -> Made:
    """A new convolution or linear layer with the weight of an earlier one."""
    wanted: Any = CONV[x.dims] if x.dims else nn.Linear
    found = [m for m in net.modules() if type(m) is wanted and isinstance(m._parameters.get("weight"), nn.Parameter)]
    found = [m for m in found if (m.in_channels if x.dims else m.in_features) == x.channels]
    found = [m for m in found if not x.dims or (m.padding_mode == "zeros" and min(x.space) > 2)]
    if not found:
        return None
    old = found[-1 - which % len(found)]
    if x.dims:
        layer = wanted(
            old.in_channels, old.out_channels, old.kernel_size, 1, old.padding, groups=old.groups, bias=False
        )
    else:
        layer = wanted(old.in_features, old.out_features, bias=False)
    layer.weight = old.weight
    return layer


@ingredient(form=st.sampled_from(("detach", "no_grad", "checkpoint", "reentrant")), width=WIDTHS)
def cut(x: Value, *, form: str = "checkpoint", width: int = 8) -> Made:
    """What autograd does not see, or sees late."""
    if form == "detach":
        return Fn(lambda x: x.detach())
    if not x.dims:
        return None
    layer = nn.Sequential(CONV[x.dims](x.channels, width, 1), nn.ReLU(), CONV[x.dims](width, width, 1))
    return NoGrad(layer) if form == "no_grad" else Checkpointed(layer, form == "reentrant")


class NoGrad(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.body(x)


@ingredient(form=st.sampled_from(("unused", "discarded", "auxiliary")))
def side(x: Value, *, form: str = "auxiliary") -> Made:
    """A module that is never called, one whose output nobody reads, or a head that only training has."""
    if not x.dims:
        body: nn.Module = nn.Linear(x.channels, 3)
    else:
        body = nn.Sequential(CONV[x.dims](x.channels, 4, 1), nn.ReLU(), CONV[x.dims](4, 3, 1))
    return {"unused": Uncalled, "discarded": Discard, "auxiliary": TrainOnly}[form](body)


def linear_head(x: Value) -> Made:
    if x.kind == "tokens":
        return nn.Sequential(Fn(lambda x: x.mean(1)), nn.Linear(x.channels, 3)), "vector"
    if x.kind == "vector":
        return nn.Linear(x.channels, 3)
    axes = tuple(range(2, 2 + x.dims))
    return nn.Sequential(Fn(lambda x: x.mean(axes)), nn.Linear(x.channels, 3)), "vector"


def conv_head(x: Value) -> Made:
    return CONV[x.dims](x.channels, 3, 1) if x.dims else nn.Linear(x.channels, 3)


HEADS: dict[str, Callable[..., Made]] = {"linear": linear_head, "conv": conv_head}


# -- the strategy -----------------------------------------------------------------------------------------------------

BACK = st.sampled_from((0, 0, 0, 0, 1, 2, 3))


def drawn(name: str, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Op]:
    known = INGREDIENTS[name]
    other = st.integers(1, 4) if known.arity > 1 else st.just(1)
    return st.builds(op, st.just(name), at=BACK, other=other, **{**known.options, **fixed})


def any_op() -> st.SearchStrategy[Op]:
    names = [name for name, known in INGREDIENTS.items() for _ in range(known.often)]
    table = {name: drawn(name) for name in INGREDIENTS}
    return st.sampled_from(names).flatmap(table.__getitem__)


PLAIN: dict[str, st.SearchStrategy[Any]] = dict(
    norm=st.sampled_from((None, "batch")), act=st.sampled_from((None, "relu"))
)


def plain_op() -> st.SearchStrategy[Op]:
    """Steps after which it is beyond doubt what a closed gate computes: zeros at the input of every reader."""
    return st.one_of(
        drawn("conv", **PLAIN, groups=st.just("one"), weight=st.just("plain")),
        drawn("conv", **PLAIN, groups=st.just("depthwise"), weight=st.just("plain"), bias=st.just(False)),
        drawn("residual", norm=st.just("batch"), act=PLAIN["act"], drop=st.just(0.0)),
        drawn("meet", how=st.just("add")),
        drawn("concat"),
        drawn("pool", kind=st.sampled_from(("max", "avg", "adaptive", "mean"))),
        drawn("act", kind=st.just("relu")),
        drawn("linear", **PLAIN),
        drawn("flatten"),
    )


@st.composite
def programs(draw: st.DrawFn, plain: bool = False) -> Program:
    """A random program of up to ten steps; ``plain``: of :func:`plain_op` only."""
    dims = draw(st.sampled_from((2, 2, 2, 1, 3)))
    first = drawn("conv", **(PLAIN if plain else {}), groups=st.just("one"), weight=st.just("plain"))
    ops = draw(st.lists(plain_op() if plain else any_op(), min_size=2, max_size=9))
    return Program(
        (draw(first), *ops),
        inputs=draw(st.sampled_from(((3,), (3,), (3,), (4,), (3, 4), (4, 4)))),
        dims=dims,
        size=4 if dims == 3 else draw(st.sampled_from((8, 6, 4))),
        batch=draw(st.sampled_from((2, 2, 1, 3))),
        head=draw(st.sampled_from(("linear", "linear", "conv", "none"))),
        returns=draw(st.sampled_from(("tensor", "tuple", "dict", "dataclass", "nested"))),
        also=() if draw(st.sampled_from((True, True, False))) else draw(st.sampled_from(((1,), (3,), (0, 2)))),
        frozen=draw(st.sampled_from(("nothing", "nothing", "first half", "all"))),
        keywords=draw(SOME),
        channels_last=draw(st.sampled_from((False, False, True))),
        training=draw(st.sampled_from((True, False))),
        seed=draw(st.integers(0, 99)),
    )
