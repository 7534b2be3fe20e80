"""Steps of a program that are one layer: convolutions, norms, activations, pooling."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .modules import Bare, ChannelsLast, Dropping, Fn, FunctionalConv, FunctionalNorm, Residual, StandardisedConv2d
from .program import BATCH, CONV, DROPOUT, INSTANCE, POOL, TRANSPOSED, Made, Value, ingredient

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


class StoredFlat(nn.Module):
    """Flat to a number of features that it knows, channels first or last."""

    def __init__(self, features: int, last: bool) -> None:
        super().__init__()
        self.features, self.last = features, last

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) if self.last else x).reshape(-1, self.features)


@ingredient(often=2, form=st.sampled_from(("flatten", "view", "stored", "stored, last")))
def flatten(x: Value, *, form: str = "flatten") -> Made:
    features = x.tensor[0].numel()
    if x.kind == "vector" or features > 1024:
        return None
    if form.startswith("stored"):
        return StoredFlat(features, form.endswith("last")), "vector"
    return (nn.Flatten() if form == "flatten" else Fn(lambda x: x.view(len(x), -1))), "vector"


@ingredient(often=2, kind=st.sampled_from(("element", "channel", "path", *Dropping.FORMS)))
def dropout(x: Value, *, kind: str = "element") -> Made:
    if kind == "element":
        return nn.Dropout(0.3)
    if kind == "channel":
        return DROPOUT[x.dims](0.3) if x.dims else None
    if kind in Dropping.FORMS:
        return Dropping(kind)
    return Residual(nn.Identity(), None, nn.Identity(), 0.5, False)


@ingredient(value=st.sampled_from((0.5, 0.0)), mode=st.sampled_from(("constant", "replicate")))
def pad(x: Value, *, value: float = 0.5, mode: str = "constant") -> Made:
    if not x.dims or max(x.space) > 8:
        return None
    return Fn(lambda x: F.pad(x, (1, 0) * (x.dim() - 2), mode, *[value] * (mode == "constant")))
