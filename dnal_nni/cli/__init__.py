"""The ``dnal`` command."""

from ..moved import names_of
from .main import main as main

__getattr__ = names_of("cli")
