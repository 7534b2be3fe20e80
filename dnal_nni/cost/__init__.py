"""What a network costs: counted, timed, and as a function of the gates."""

from ..moved import names_of

__getattr__ = names_of("cost")
