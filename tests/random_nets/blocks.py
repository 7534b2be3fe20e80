"""Steps of a program that are whole blocks, and a network's own ways: shared modules, detached branches."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .layers import ACTS, SOME, WIDTHS, act_of, block, norm_of
from .modules import (
    MLP,
    Attention,
    ChannelConv,
    ChannelsLast,
    Checkpointed,
    Discard,
    Fn,
    Ghost,
    MultiHead,
    NonLocal,
    Recurrent,
    Res2Net,
    Residual,
    ShuffleUnit,
    SpatialAttention,
    SqueezeExcite,
    Tokens,
    TrainOnly,
    Uncalled,
)
from .program import BATCH, CONV, HEADS, Made, Network, Value, ingredient


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
    if x.kind == "vector" and any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return None  # it would take the batch for the channels of one example
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


HEADS.update(linear=linear_head, conv=conv_head)
