"""Steps of a program that run along space, channel by channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from .modules import Fn
from .program import Made, Value, ingredient


def shifted(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., 1:] = x[..., :-1]
    return out


def volume(x: Tensor) -> Tensor:
    """Twice the channels, one place after the other, beside places that stay empty."""
    b, c, n, *rest = x.shape
    out = x.new_zeros(b, 2 * c, n + 1, *rest)
    for i in range(n):
        out[:, :c, i] = x[:, :, i]
        out[:, c:, i] = x[:, :, n - 1 - i].relu()
    return out


def accumulated(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[..., 1:] += x[..., 1:]
    out += x.tanh()
    return out


def unpooled(x: Tensor) -> Tensor:
    pool, unpool = {
        3: (F.max_pool1d, F.max_unpool1d),
        4: (F.max_pool2d, F.max_unpool2d),
        5: (F.max_pool3d, F.max_unpool3d),
    }[x.dim()]
    y, where = pool(x, 2, return_indices=True)
    return unpool(y, where, 2, output_size=x.shape)


def blurred(x: Tensor, transposed: bool) -> Tensor:
    dims, c = x.dim() - 2, x.shape[1]
    kernel = torch.full((1, 1, *[2] * dims), 0.5, dtype=x.dtype).expand(c, 1, *[2] * dims)
    plain, other = {
        1: (F.conv1d, F.conv_transpose1d),
        2: (F.conv2d, F.conv_transpose2d),
        3: (F.conv3d, F.conv_transpose3d),
    }[dims]
    return (other if transposed else plain)(x, kernel, groups=c)


def chosen(x: Tensor) -> Tensor:
    line = x.flatten(2)
    index = torch.arange(2).flip(0).expand(*line.shape[:2], 2)
    return line.gather(2, index).unflatten(2, (2, *[1] * (x.dim() - 3)))


def scattered(x: Tensor) -> Tensor:
    line = x.flatten(2)
    index = torch.zeros(line.shape, dtype=torch.long)
    return torch.zeros_like(line).scatter_add(2, index, line).view(x.shape)


def patches(x: Tensor) -> Tensor:
    return F.unfold(x, 3, padding=1).view(len(x), -1, 9, *x.shape[2:]).mean(2)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "circular": lambda x: F.pad(x, (1, 0) * (x.dim() - 2), mode="circular"),
    "shifted": shifted,
    "volume": volume,
    "accumulated": accumulated,
    "fourier": lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=-1) * 0.5, s=x.shape[-1:], dim=[-1]),
    "complex": lambda x: torch.view_as_real(torch.fft.fft(x)).sum(-1),
    "patches": patches,
    "folded": lambda x: F.fold(F.unfold(x, 2), x.shape[2:], 2),
    "unpooled": unpooled,
    "chosen": chosen,
    "largest": lambda x: x.flatten(2).topk(2)[0].unflatten(2, (2, *[1] * (x.dim() - 3))),
    "sorted": lambda x: x.sort(2)[0],
    "cumulated": lambda x: x.cumsum(-1) / x.shape[-1],
    "flipped": lambda x: x.flip(-1),
    "scattered": scattered,
    "blurred": lambda x: blurred(x, False),
    "enlarged": lambda x: blurred(x, True),
}


@ingredient(often=2, form=st.sampled_from(tuple(FORMS)))
def spatial(x: Value, *, form: str = "shifted") -> Made:
    if not x.dims or min(x.space) < 2 or max(x.space) > 8:
        return None
    if form in ("patches", "folded") and x.dims != 2:
        return None
    return Fn(FORMS[form])
