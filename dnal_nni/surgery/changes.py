"""What a cut did to a network beside the shapes of its tensors: kept with the network, and written into its file."""

from __future__ import annotations

import copy
import dataclasses
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from ..errors import DNALError

CHANGES = "_dnal_changes"
"""Attribute of a cut network, in plain dicts and lists: pickles of the network need nothing of this package."""


@dataclasses.dataclass
class Changes:
    """What a cut did. A field that is added needs a default, for files from before; its type is checked at loading.

    Attributes:
        choices: by path of a choice among candidates, 0 or 1 for each unit: those that went and those that stayed.
        baked: paths of layers whose weight was computed from other tensors, and is plain now.
        stored: by path, the new values of numbers that modules keep about their channels.
        unsaved: paths of buffers that no state dict holds, but that were cut.
    """

    choices: dict[str, list[Literal[0, 1]]] = dataclasses.field(default_factory=dict)
    baked: list[str] = dataclasses.field(default_factory=list)
    stored: dict[str, int | list[int]] = dataclasses.field(default_factory=dict)
    unsaved: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: a copy."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any, path: Any) -> Changes:
        """The changes that :meth:`to_json` gave.

        Args:
            values: what JSON holds: anything.
            path: of the file, for the message.

        Raises:
            DNALError: ``values`` has another form, or a part that this version does not know.
        """
        if not isinstance(values, dict):
            raise DNALError(f"{path} is damaged: its header has no 'changes'")
        forms = get_type_hints(cls)
        for name, value in values.items():
            if name not in forms:
                raise DNALError(f"{path} has changes that this version does not know ({name!r}): update dnal_nni")
            of_form(forms[name], value, name, path)
        return cls(**values)

    def then(self, later: Changes) -> Changes:
        """Both as one: ``later`` happened to the network that was left."""
        choices = self.choices | later.choices
        for place in self.choices.keys() & later.choices.keys():
            units = iter(later.choices[place])  # of those that were left
            choices[place] = [1 if stayed and next(units, 1) else 0 for stayed in self.choices[place]]
        return Changes(
            choices=choices,
            baked=list(dict.fromkeys(self.baked + later.baked)),
            stored=self.stored | later.stored,
            unsaved=list(dict.fromkeys(self.unsaved + later.unsaved)),
        )


def changes_of(model: nn.Module) -> Changes:
    """What cuts did to a network, as a copy; empty where nothing was cut."""
    return Changes(**copy.deepcopy(getattr(model, CHANGES, {})))


def set_changes(model: nn.Module, changes: Changes) -> None:
    """Keep with a network what cuts did to it."""
    setattr(model, CHANGES, changes.to_json())


def newly_baked(model: nn.Module, slim: nn.Module) -> list[str]:
    """The layers whose weight is computed in ``model``, and plain in ``slim``, which was cut from it."""
    return [path for path in changes_of(slim).baked if path not in changes_of(model).baked]


def of_form(form: Any, value: Any, name: str, path: Any) -> Any:
    """``value``, the part ``name`` of a file's header, where it is of the type ``form``; else a DNALError."""
    if not _has_form(value, form):
        raise DNALError(f"{path} is damaged: {name!r} in its header is not of the right form")
    return value


def _has_form(value: Any, form: Any) -> bool:
    """Whether JSON is of a type made of dict, list, unions, Literal, str and int. True is no int."""
    kind, inner = get_origin(form), get_args(form)
    if kind is UnionType:
        return any(_has_form(value, one) for one in inner)
    if kind is dict:
        return isinstance(value, dict) and all(_has_form(entry, inner[1]) for entry in value.values())
    if kind is list:
        return isinstance(value, list) and all(_has_form(entry, inner[0]) for entry in value)
    if kind is Literal:
        return type(value) is int and value in inner
    return type(value) is form
