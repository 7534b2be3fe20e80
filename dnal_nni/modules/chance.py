"""A forward without chance: what is drawn does not depend on how many channels it is drawn for.

Two networks of other widths draw other numbers from one seed. Compared, dropout keeps everything in both, and noise is
its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .running import DispatchMode

# what a tensor is filled with, of the distribution's parameters
_MEANS: dict[str, Callable[..., float]] = {
    "rand": lambda *_: 0.5,
    "rand_like": lambda *_: 0.5,
    "randn": lambda *_: 0.0,
    "randn_like": lambda *_: 0.0,
    "bernoulli": lambda *_: 1.0,
    "bernoulli_": lambda *_: 1.0,
    "uniform_": lambda _, low=0.0, high=1.0: (low + high) / 2,
    "normal_": lambda _, mean=0.0, *__: mean,
    "exponential_": lambda _, rate=1.0: 1 / rate,
}


class WithoutChance(DispatchMode):
    """Noise is its mean, dropout passes everything; other draws, such as orders, stay as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name.startswith("rrelu_with_noise"):
            return func(*args[:4], False)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:  # of attention
            place = names.index("dropout_p")
            args = (*args[:place], *([0.0] if len(args) > place else []), *args[place + 1 :])
            return func(*args, **{key: value for key, value in kwargs.items() if key != "dropout_p"})
        out = func(*args, **kwargs)
        if name in ("normal", "poisson"):
            out.copy_(torch.as_tensor(args[0]))
        elif name in _MEANS:
            out.fill_(_MEANS[name](*args))
        return out
