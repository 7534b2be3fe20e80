"""Random networks: a program of small steps that hypothesis draws, and the module that runs it.

A :class:`Program` is plain data and its ``repr`` is Python, so that a failing one can be pasted into a test. Every
program runs: sources are counted backwards and wrap around, and a step that does not fit the shape that it meets
(a pixel shuffle of a vector, a split of one channel) is left out. That lets hypothesis drop any step when it shrinks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .modules import InPlace, TrainOnly, Uncalled

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
HEADS: dict[str, Callable[..., Made]] = {}  # filled by blocks.py


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
            for parameter in child.parameters():  # a compiled module has no requires_grad_
                parameter.requires_grad_(False)

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
    except (IndexError, RuntimeError, ValueError):  # a table of positions has so many
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
