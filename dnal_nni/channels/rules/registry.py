"""Which operation has which rule: the package's own, and those that users add."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ...arguments import checked_but
from ...errors import DNALError
from ..flow import Flow, Operation

Rule = Callable[[Flow, Operation], None]
RULES: dict[str, Rule] = {}
"""By ``namespace::name``; the in-place variant of an operation follows the same rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for operations of ``aten``, or of the namespace that a name brings."""

    def register(function: Rule) -> Rule:
        RULES.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


@checked_but("rule")
def register_rule(operation: str, rule: Rule) -> ExitStack:
    """Say how channels pass through an operation: which of its inputs' and outputs' stand and fall together.

    An operation without a rule keeps every channel that enters it. The cut that a rule leads to is verified like any
    other: a rule that is wrong is found by the comparison, and its layers are left whole.

    Args:
        operation: its name in torch's registry, ``namespace::name``; all of its overloads follow the rule, and so does
            the variant that works in place (``name_``).
        rule: called with the :class:`~dnal_nni.channels.flow.Flow` of labels and the
            :class:`~dnal_nni.channels.flow.Operation` after each of its calls into which channels flow; it labels what
            the operation returned (:meth:`Flow.put`). What it does not label counts as fixed, so it freezes
            (:meth:`Flow.freeze`) or couples whatever else enters. What a rule raises freezes everything that enters.

    Returns:
        a context manager that takes the rule away again, as its ``close()`` does.

    Raises:
        DNALError: if torch knows no such operation, or the rule cannot be called.
    """
    namespace, _, name = operation.partition("::")
    if not name or getattr(getattr(torch.ops, namespace), name, None) is None:
        raise DNALError(
            f"register_rule: torch knows no operation {operation!r}: give its name as namespace::name, after the "
            "library that registers it is imported"
        )
    if not callable(rule):
        raise DNALError(f"register_rule: the rule for {operation} must be a function of (flow, operation)")
    key = _functional(operation)
    before = RULES.get(key)
    RULES[key] = rule

    def undo() -> None:
        if before is None:
            del RULES[key]
        else:
            RULES[key] = before

    registered = ExitStack()
    registered.callback(undo)
    return registered


def in_place(func: Any) -> bool:
    """Whether an overload writes into its first argument, by its name."""
    name: str = func.overloadpacket.__name__
    return _functional(name) != name


def key_of(func: Any) -> str:
    """Under which name an overload has its rule: ``namespace::name``, without the underscore of work in place."""
    return _functional(f"{func.namespace}::{func.overloadpacket.__name__}")


def _functional(name: str) -> str:
    return name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
