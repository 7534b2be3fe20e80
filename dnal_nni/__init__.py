"""DNAL for Microsoft NNI: learn a network's widths by gradient, then remove the channels for good."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import register_adapter as register_adapter
    from .budget import Budget as Budget
    from .checkpoint import load_compressed as load_compressed
    from .checkpoint import save_compressed as save_compressed
    from .cost import Complexity as Complexity
    from .cost import measure as measure
    from .errors import DNALError as DNALError
    from .masks import speedup as speedup
    from .pruner import DNALPruner as DNALPruner
    from .strategy import DNALStrategy as DNALStrategy

__version__ = "0.1.0"

# imported at first use: `import dnal_nni` needs neither nni nor matplotlib
_HOME = {
    "Budget": "budget",
    "Complexity": "cost",
    "DNALError": "errors",
    "DNALPruner": "pruner",
    "DNALStrategy": "strategy",
    "load_compressed": "checkpoint",
    "measure": "cost",
    "register_adapter": "adapters",
    "save_compressed": "checkpoint",
    "speedup": "masks",
}
__all__ = [name for name in _HOME if name != "DNALStrategy"]  # for which pytorch_lightning must be installed


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
