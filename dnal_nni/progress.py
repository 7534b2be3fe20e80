"""What is going on, through ``logging.getLogger("dnal_nni")`` at level INFO."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__.partition(".")[0])


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what is being done, and then how many seconds it took."""
    logger.info("%s ...", what)
    start = time.perf_counter()
    yield
    logger.info("%s: %.1f s", what, time.perf_counter() - start)
