"""Which units stay."""

from ..moved import names_of

__getattr__ = names_of("search")
