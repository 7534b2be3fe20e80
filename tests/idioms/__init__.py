"""Short modules in the style of other people's code, with what must become of them."""

# they register themselves
from . import attention, blocks, gating, generative, networks, norms, numbers, shapes, tokens
from .table import IDIOMS, Idiom

__all__ = ["IDIOMS", "Idiom"]
__all__ += ["attention", "blocks", "gating", "generative", "networks", "norms", "numbers", "shapes", "tokens"]
