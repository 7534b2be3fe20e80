"""What happened: as data, as a page, as pictures."""

from ..moved import names_of

__getattr__ = names_of("report")
