"""What people decided about a network, and what was decided for them: counted, not judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from ..arguments import fits, shown, words
from ..errors import DNALError


@dataclasses.dataclass(frozen=True)
class Interventions:
    """The decisions behind a network, as data.

    Kinds of decisions are "operations" (what a layer computes), "depths", "inputs" (what is summed) and "widths" (of
    channel groups). Widths that the structure rules, such as the number of classes, are no decisions. The list is this
    package's own; RandomNet (arXiv 2003.01181), which asks how little a search can be told, has one that is not public.

    Attributes:
        searched: by kind, how many decisions a search or a criterion took.
        fixed: by kind, how many people took.
        changed: arguments that were given a value of their own, by name; the others have their defaults.
        steps: batches in which a search decided.
        epochs: the same in passes over the data, where it is known.
        candidates: networks that were trained only to be compared.

    Raises:
        DNALError: a value is not of its type.
    """

    searched: dict[str, int] = dataclasses.field(default_factory=dict)
    fixed: dict[str, int] = dataclasses.field(default_factory=dict)
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    epochs: int | None = None
    candidates: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, kind):
                raise DNALError(f"interventions.{name} is {shown(value)}: give {words(kind)}")

    @property
    def count(self) -> int:
        """Decisions that people took, arguments among them."""
        return sum(self.fixed.values()) + len(self.changed)

    def with_arguments(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Interventions:
        """These, and what of ``given`` is not as in ``defaults``."""
        own = {name: value for name, value in given.items() if value != defaults.get(name)}
        return dataclasses.replace(self, changed=self.changed | own)

    def rows(self) -> list[list[str]]:
        """(decision, searched, by hand), ready to print."""
        kinds = dict.fromkeys([*self.searched, *self.fixed])
        return [[kind, str(self.searched.get(kind, 0)), str(self.fixed.get(kind, 0))] for kind in kinds]

    def facts(self) -> list[str]:
        """What there is to say beside the rows, a sentence each."""
        given = ", ".join(f"{name}={value}" for name, value in self.changed.items())
        facts = [f"arguments that are not the defaults: {given or 'none'}"]
        if self.steps:
            passes = "" if self.epochs is None else f", {self.epochs} epochs"
            facts.append(f"searched for {self.steps} steps{passes}; candidates trained: {self.candidates}")
        elif self.candidates:
            facts.append(f"candidates trained: {self.candidates}")
        return [*facts, f"decisions that people took: {self.count}"]
