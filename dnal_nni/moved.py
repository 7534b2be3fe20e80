"""Where the modules of version 0.1 have gone: code and pickles that name them find what they name.

``import dnal_nni`` installs the finder; nothing is imported until somebody asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]
_NOW = {
    "adapters": ("modules.adapters",),
    "attention": ("modules.attention", "modules.windows"),
    "bake": ("modules.bake",),
    "budget": ("budget", "search.objective"),
    "carry": ("surgery.optimizer",),
    "checkpoint": ("storage.compressed", "storage.reports"),
    "choices": ("modules.choices", "modules.cells"),
    "cli": ("cli.main", "report.tables"),
    "compress": ("cli.run", "cli.settings", "storage.reports", "compression"),
    "cost": ("cost.count", "budget", "cost.model"),
    "cut": ("search.close",),
    "data": ("cli.data",),
    "evaluators": ("plugin.evaluators",),
    "files": ("storage.files", "storage.whole"),
    "flow": ("channels.flow", "channels.counts"),
    "gate": ("modules.gates",),
    "graph": ("modules.layers", "channels.graph", "modules.running"),
    "groups": ("channels.groups",),
    "inject": ("surgery.inject", "modules.given"),
    "inspection": ("cli.inspection",),
    "latency": ("cost.latency",),
    "masks": ("plugin.masks",),
    "page": ("report.page",),
    "products": ("channels.rules.products", "channels.rules.convolutions", "channels.rules.normalisation"),
    "pruner": ("plugin.pruner",),
    "ranks": ("search.ranks",),
    "report": ("report.record",),
    "resume": ("storage.state",),
    "rules": tuple(
        f"channels.rules.{family}"
        for family in ("registry", "dispatch", "elementwise", "moving", "joining", "reductions", "windows", "indexing")
    ),
    "schedule": ("search.schedule",),
    "scores": ("search.scores", "search.importance"),
    "search": ("search.loop", "search.paper", "surgery.inject"),
    "selection": ("plugin.config", "search.settings"),
    "shims": ("plugin.shims",),
    "slim": ("surgery.slim", "surgery.changes"),
    "space": ("plugin.space",),
    "steps": ("plugin.steps",),
    "strategy": ("plugin.strategies.dnal",),
    "targets": ("errors", "cli.targets"),
    "trace": ("modules.layers", "channels.trace"),
    "verify": ("surgery.compare", "surgery.verify"),
}


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` (PEP 562) that finds what the module ``old`` had."""

    def find(name: str) -> Any:
        for new in () if name.startswith("__") else _NOW[old]:
            module = import_module(f"{_PACKAGE}.{new}")
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(f"module {_PACKAGE}.{old} has no attribute {name!r}")

    return find


class _Compress(ModuleType):
    """The old module ``compress``: once it is imported it stands where the function of that name does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module(f"{_PACKAGE}.compression").compress(*args, **kwargs)


class _Old(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and old in _NOW else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return _Compress(spec.name) if spec.name == f"{_PACKAGE}.compress" else None

    def exec_module(self, module: ModuleType) -> None:
        find = names_of(module.__name__.rpartition(".")[2])
        vars(module)["__getattr__"] = find


def install() -> None:
    """Let imports find the old names, after everything that is there."""
    sys.meta_path.append(_Old())
