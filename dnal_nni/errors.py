"""The one exception that a user's mistake can cause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def told(what: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """What somebody else's code raises, as one sentence; importing and building run code that may raise anything."""
    try:
        yield
    except DNALError:
        raise
    except errors as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DNALError(f"{what}: {lines[0]}") from error


class DNALError(Exception):
    """What was wrong, where (layer name and value), and what to do about it."""
