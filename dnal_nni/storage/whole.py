"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import DNALError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """``write(temporary path)``, then one atomic rename: whoever reads ``path`` sees the old file or the new one.

    Raises:
        DNALError: the file cannot be written; what was at ``path`` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name without its content
        os.replace(temporary, path)
    except OSError as error:
        raise DNALError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
