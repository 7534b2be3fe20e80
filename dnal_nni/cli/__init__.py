"""The ``dnal`` command."""

from .main import main as main
