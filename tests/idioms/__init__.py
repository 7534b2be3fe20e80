"""Short modules in the style of other people's code, with what must become of them."""

from . import attention, blocks, gating, generative, networks, norms, numbers, shapes, tokens  # noqa: F401  # they register themselves
from .table import IDIOMS, Idiom

__all__ = ["IDIOMS", "Idiom"]
