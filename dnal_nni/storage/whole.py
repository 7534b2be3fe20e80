"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
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
    if not path.name or "\0" in path.name:
        raise DNALError(f"{str(path)!r} is no name of a file")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DNALError(f"{path} cannot be written: it is a device or a pipe, which a file would replace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name without its content
        os.replace(temporary, path)
    except OSError as error:
        raise DNALError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made
            temporary.unlink()
