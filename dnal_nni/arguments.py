"""Arguments of public functions, held against their annotations: what is no such thing is one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import DNALError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

_FEW = 4  # entries of a list that are shown

_SAID: dict[Any, str] = {
    NoneType: "None",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    os.PathLike: "a path",
    Mapping: "a dict",
    Sequence: "a list",
    Callable: "a function",
    Iterable: "a list, a DataLoader or whatever a loop can run over",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function or method of the public API refuse what is not of the types that it is annotated with.

    An argument that has the wrong type, is missing, or is of no such name is a :class:`DNALError` ahead of the call.
    """
    return checked_but()(function)


def checked_but(*own: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """:func:`checked`, but for arguments of which the function itself has more to say."""
    return lambda function: _checked(function, own)


def _checked(function: Callable[P, R], own: Collection[str]) -> Callable[P, R]:
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")
    name = name if function.__name__ == "of" else name.rpartition(".")[2]  # Plan.of

    @functools.lru_cache(maxsize=1)
    def hints() -> dict[str, Any]:
        written = {key: text for key, text in function.__annotations__.items() if key not in ("return", *own)}
        return get_type_hints(SimpleNamespace(__annotations__=written), function.__globals__)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise DNALError(f"{name}: {error}{_meant(str(error), kwargs, signature)}") from error
        _check(name, given, hints())
        return function(*args, **kwargs)

    return call


def told_of_names(kind: type[C]) -> type[C]:
    """Let a dataclass that checks its values by itself refuse names that it does not have."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    kind.__init__ = _checked(kind.__init__, names)  # type: ignore[method-assign]
    return kind


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that an annotation says; of what a loop runs over, entries are not looked at.

    A number may be whole, but no bool.
    """
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (UnionType, Union):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(fits(entry, parts[0]) for entry in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(fits, value, parts))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return isinstance(value, kind) and all(fits(vars(value)[k], part) for k, part in get_type_hints(kind).items())
    kind = {float: (int, float), Any: object}.get(kind, origin or kind)
    if not isinstance(kind, (type, tuple)) or getattr(kind, "_is_protocol", False) and kind.__module__ != "typing":
        return True  # a type variable, or what only its use can tell
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value in a few words: as it would be typed, or what it is."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {value.__name__}"
    if type(value) in (list, tuple, dict):
        entries = value.items() if isinstance(value, dict) else [(None, entry) for entry in value]
        said = [shown(entry) if key is None else f"{key!r}: {shown(entry)}" for key, entry in list(entries)[:_FEW]]
        said += ["..."] if len(value) > _FEW else []
        return f"{repr(type(value)())[0]}{', '.join(said)}{repr(type(value)())[1]}"
    if type(value).__module__ == "builtins" or isinstance(value, os.PathLike):
        text = " ".join(repr(value).split())
        if text.startswith("<"):  # <generator object ... at 0x...>
            return _a(type(value).__name__)
        return text if len(text) <= 60 else f"{text[:57]}..."
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    what = f"{'' if dtype is None else str(dtype).removeprefix('torch.') + ' '}{type(value).__name__}"
    return f"{_a(what)}{f' of shape {list(shape)}' if isinstance(shape, tuple) else ''}"


def _check(name: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for argument, value in given.items():
        kind = hints.get(argument, Any)
        if fits(value, kind):
            continue
        raise DNALError(f"{name}({argument}=...) is {shown(value)}: give {words(kind)}{_hint(argument, given, hints)}")


def _hint(argument: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    value, kind = given[argument], hints[argument]
    classes = tuple(part for part in _alternatives(kind) if isinstance(part, type))
    if inspect.isclass(value) and issubclass(value, classes):
        return f"; this is the class, make one of it: {value.__name__}(...)"
    for other, another in given.items():
        narrow = hints.get(other, Any) is not Any
        if other != argument and narrow and fits(value, hints[other]) and fits(another, kind):
            return f"; are {argument} and {other} swapped?"
    if isinstance(value, str):
        names = [part for one in _alternatives(kind) if get_origin(one) is Literal for part in get_args(one)]
        return nearest(value, [part for part in names if isinstance(part, str)])
    return ""


def nearest(word: str, words: Iterable[str]) -> str:
    """A question whether the nearest of some words was meant, or nothing where none is near."""
    words = list(words)
    small = {one.lower(): one for one in reversed(words)}
    close = difflib.get_close_matches(word, words, 1) or difflib.get_close_matches(word.lower(), small, 1)
    return f"; did you mean {small.get(close[0], close[0])!r}?" if close else ""


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)


def words(kind: Any) -> str:
    """What an annotation asks for."""
    said = []
    for one in _alternatives(kind):
        origin = get_origin(one)
        if origin is Literal:
            said += [repr(part) for part in get_args(one)]
            continue
        bare = origin or one
        known = next((words for plain, words in _SAID.items() if bare is (get_origin(plain) or plain)), None)
        name = getattr(bare, "__name__", str(bare))
        if str(getattr(bare, "__module__", "")).startswith("torch."):
            name = f"torch.{'optim' if name == 'Optimizer' else 'nn'}.{name}" if name != "Tensor" else "tensor"
        said.append(known or _a(name))
    said = list(dict.fromkeys(said))
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def _meant(error: str, kwargs: Mapping[str, Any], signature: inspect.Signature) -> str:
    """What may have been meant by arguments that do not go together."""
    named = {name: p for name, p in signature.parameters.items() if name not in ("self", "cls")}
    for name in kwargs:
        if name not in named:
            return nearest(name, named) or f"; it takes {', '.join(named)}"
    if "too many positional" in error:
        free = ", ".join(n for n, p in named.items() if p.kind is not p.KEYWORD_ONLY)
        return f"; {'without a name it takes' if named else 'it takes'} {free or 'none'}"
    return ""
