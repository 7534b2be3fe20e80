"""DNAL for Microsoft NNI: learn a network's widths by gradient, then remove the channels for good."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import install

if TYPE_CHECKING:
    from .budget import Budget as Budget
    from .budget import Complexity as Complexity
    from .channels.rules.registry import register_rule as register_rule
    from .compression import compress as compress
    from .cost.count import measure as measure
    from .errors import DNALError as DNALError
    from .modules.adapters import register_adapter as register_adapter
    from .modules.cells import Topology as Topology
    from .modules.register import register_layer as register_layer
    from .outcome import report_of as report_of
    from .plugin.masks import speedup as speedup
    from .plugin.pruner import DNALPruner as DNALPruner
    from .plugin.strategies.bounded import BoundedStrategy as BoundedStrategy
    from .plugin.strategies.dnal import DNALStrategy as DNALStrategy
    from .plugin.strategies.prime import PrimeStrategy as PrimeStrategy
    from .plugin.strategies.topology import TopologyStrategy as TopologyStrategy
    from .search.informed import Informed as Informed
    from .storage.compressed import load_compressed as load_compressed
    from .storage.compressed import save_compressed as save_compressed

__version__ = "0.2.0.dev0"

# imported at first use: `import dnal_nni` needs neither nni nor matplotlib
_HOME = {
    "BoundedStrategy": "plugin.strategies.bounded",
    "Budget": "budget",
    "Complexity": "budget",
    "DNALError": "errors",
    "DNALPruner": "plugin.pruner",
    "DNALStrategy": "plugin.strategies.dnal",
    "Informed": "search.informed",
    "PrimeStrategy": "plugin.strategies.prime",
    "Topology": "modules.cells",
    "TopologyStrategy": "plugin.strategies.topology",
    "compress": "compression",
    "load_compressed": "storage.compressed",
    "measure": "cost.count",
    "register_adapter": "modules.adapters",
    "register_layer": "modules.register",
    "register_rule": "channels.rules.registry",
    "report_of": "outcome",
    "save_compressed": "storage.compressed",
    "speedup": "plugin.masks",
}
__all__ = [name for name in _HOME if not name.endswith("Strategy")]  # for these pytorch_lightning must be installed

install()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
