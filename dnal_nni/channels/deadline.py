"""A limit on what somebody else's code may take, which need not come to an end."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import DNALError

T = TypeVar("T")

REMEDY = "leave graph= out, and the operations of the model are followed instead"


class _Stopped(BaseException):
    """Raised within what has run out of time."""


class Deadline:
    """A limit on building a graph and reading it.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def run(self, compute: Callable[[], T], what: str) -> T:
        """What ``compute`` returns or raises; a DNALError where that takes too long: ``what`` has not been done then.

        It runs in a thread, where settings that are a thread's own, such as gradients, are the defaults. Where it is
        late, it is stopped at its next line of Python.
        """
        done: list[T] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                done.append(compute())
            except BaseException as error:  # raised below, in the thread of the caller
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            thread.join(max(0.0, self._end - time.monotonic()))
        finally:
            if thread.is_alive():
                late = ctypes.c_ulong(thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(late, ctypes.py_object(_Stopped))
        if time.monotonic() > self._end:
            raise DNALError(f"{what} within {self.seconds:g} seconds: {REMEDY}, or pass a smaller dummy_input")
        if failed:
            raise failed[0]
        return done[0]
