"""Steps with sizes in their code, layers that are a function and a parameter, and what cannot be traced or copied."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .layers import SOME, WIDTHS
from .program import CONV, Made, Value, ingredient


class TakesWidth(nn.Module):
    """Attention that takes the width of its heads from its input, or from numbers that it keeps: ``[B, L, C]``."""

    def __init__(self, channels: int, heads: int, stored: bool) -> None:
        super().__init__()
        self.heads, self.channels, self.each, self.stored = heads, channels, channels // heads, stored
        self.scale = self.each**-0.5
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.stored:
            assert c == self.channels
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
            c = self.channels
        else:
            q, k, v = (t.unflatten(-1, (self.heads, c // self.heads)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(b, n, c))


@ingredient(often=2, heads=st.sampled_from((1, 2, 4)), stored=SOME)
def takes_width(x: Value, *, heads: int = 2, stored: bool = False) -> Made:
    fits = x.kind == "tokens" and x.channels % heads == 0
    return TakesWidth(x.channels, heads, stored) if fits else None


class Insisting(nn.Module):
    """A block that wants sizes to be Python's ints, or makes such of them, and asks for shapes with them."""

    FORMS = ("isinstance", "type", "int", "tensor", "pattern", "attribute")

    def __init__(self, channels: int, layer: nn.Module, form: str) -> None:
        super().__init__()
        self.width, self.layer, self.form = channels, layer, form

    def size(self, x: Tensor) -> int:
        width = x.shape[1]
        if self.form == "int":
            return int(width)
        if self.form == "tensor":
            return int(torch.tensor(x.shape)[1])
        if self.form == "pattern":
            match list(x.shape):
                case [int(), int(found), *_]:
                    return found
            raise TypeError(f"{x.shape}")
        assert isinstance(width, int) if self.form == "isinstance" else type(width) is int
        if self.form == "attribute":
            assert type(self.width) is int and width == self.width
            return self.width
        return width

    def forward(self, x: Tensor) -> Tensor:
        width, y = self.size(x), self.layer(x)
        return y.reshape(len(x), width // 2, 2, -1).mul(2.0).reshape(len(x), width, *y.shape[2:])


@ingredient(often=2, form=st.sampled_from(Insisting.FORMS))
def insisting(x: Value, *, form: str = "int") -> Made:
    fits = x.dims and x.channels % 2 == 0
    return Insisting(x.channels, CONV[x.dims](x.channels, x.channels, 1), form) if fits else None


class Cell(nn.Module):
    """A recurrent convolution, whose first state is zeros of a stored width."""

    def __init__(self, channels: int, width: int, dims: int, new: bool) -> None:
        super().__init__()
        self.width, self.new, self.gates = width, new, CONV[dims](channels + width, 2 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        space = list(x.shape[2:])
        size = [len(x), self.width, *space]
        state = x.new_zeros(size) if self.new else torch.zeros(len(x), self.width, *space, dtype=x.dtype)
        for _ in range(2):
            update, value = torch.split(self.gates(torch.cat([x, state], 1)), self.width, 1)
            state = state + torch.sigmoid(update) * torch.tanh(value)
        return state


@ingredient(width=WIDTHS, new=SOME)
def cell(x: Value, *, width: int = 4, new: bool = False) -> Made:
    return Cell(x.channels, width, x.dims, new) if x.dims else None


class Codebook(nn.Module):
    """Places take the mean of the rows of a table that are near (VQ-VAE, NetVLAD)."""

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, channels))

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        flat = last.reshape(-1, x.shape[1])
        far = (flat**2).sum(1, keepdim=True) + (self.table**2).sum(1) - 2 * flat @ self.table.t()
        return ((-far).softmax(-1) @ self.table).view(last.shape).movedim(-1, 1)


@ingredient(rows=st.sampled_from((3, 5)))
def codebook(x: Value, *, rows: int = 3) -> Made:
    return Codebook(x.channels, rows) if x.dims else None


class Chosen(nn.Module):
    """Some tokens, gathered by an index that is repeated for every channel (masked autoencoders)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(2, dim=1).indices
        return torch.gather(x, 1, best.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


@ingredient()
def chosen(x: Value) -> Made:
    return Chosen(x.channels) if x.kind == "tokens" and x.tensor.shape[1] > 2 else None


class Equalised(nn.Module):
    """A convolution (or linear layer) without a module, its weight scaled at every forward (StyleGAN)."""

    def __init__(self, channels: int, width: int, dims: int) -> None:
        super().__init__()
        self.scale, self.function = (9 * channels) ** -0.5, (F.linear, F.conv1d, F.conv2d, F.conv3d)[dims]
        self.weight = nn.Parameter(torch.randn(width, channels, *[1] * dims))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight * self.scale, self.bias)


@ingredient(often=2, width=WIDTHS)
def equalised(x: Value, *, width: int = 8) -> Made:
    return Equalised(x.channels, width, x.dims)


class Locked(nn.Module):
    """A convolution that cannot be pickled, nor deep-copied."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.held = conv, [threading.Lock(), (n for n in range(3))]

    def forward(self, x: Tensor) -> Tensor:
        with self.held[0]:
            return self.conv(x)


@ingredient(width=WIDTHS)
def locked(x: Value, *, width: int = 8) -> Made:
    return Locked(CONV[x.dims](x.channels, width, 1)) if x.dims else None


@ingredient(width=WIDTHS, pointwise=SOME)
def compiled(x: Value, *, width: int = 4, pointwise: bool = False) -> Made:
    """What torch.jit has compiled: an activation, or an activation between two layers."""
    if pointwise or not x.dims:
        return torch.jit.script(nn.SiLU())
    conv = CONV[x.dims]
    return torch.jit.script(nn.Sequential(conv(x.channels, width, 1), nn.SiLU(), conv(width, x.channels, 1)))
