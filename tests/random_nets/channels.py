"""Steps of a program at which channels meet, part and move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .layers import SOME
from .modules import Bare, Fn, InPlace, StoredShuffle, StoredSplit, StoredView
from .program import CONV, POOL, Made, Value, ingredient


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


class EqualParts(nn.Module):
    """Takes its input apart by sizes that it computes, or by one that it keeps ("numbered")."""

    def __init__(self, form: str, parts: int, dim: int, size: int) -> None:
        super().__init__()
        self.form, self.parts, self.dim = form, parts, dim
        if form == "numbered":
            self.size = size

    def forward(self, x: Tensor) -> Any:
        n = self.size if self.form == "numbered" else x.shape[self.dim] // self.parts
        if self.form == "slices":
            return [x.narrow(self.dim, i * n, n) for i in range(self.parts)]
        return x.split((n,) * self.parts, self.dim)


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


SPLITS = ("chunk", "equal", "tuple", "slices", "tensor_split", "numbered", "unequal", "stored")


@ingredient(often=2, parts=st.sampled_from((2, 3)), form=st.sampled_from(SPLITS))
def split(x: Value, *, parts: int = 2, form: str = "chunk") -> Made:
    c, dim = x.channels, x.dim
    if c < parts + 1:
        return None
    if form == "chunk":
        return Fn(lambda x: x.chunk(parts, dim))
    if form == "equal":
        return Fn(lambda x: x.split(math.ceil(c / parts), dim))
    if form == "tensor_split":
        return Fn(lambda x: x.tensor_split(parts, dim))
    if form in ("tuple", "slices", "numbered"):
        return EqualParts(form, parts, dim, c // parts) if c % parts == 0 else None
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
