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
        raise DNALError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why, in the words of the system or the first line of somebody else's; no file name of ours, no codec's text."""
    if isinstance(error, UnicodeError):
        return "it is not text"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = words.strip().splitlines() or [type(error).__name__]
    if "DataLoader worker process" in lines[0]:  # then comes a traceback, and at its end what was raised
        return lines[-1].partition(": ")[2]
    return lines[0]


class DNALError(Exception):
    """What was wrong, where (layer name and value), and what to do about it."""
