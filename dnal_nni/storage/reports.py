"""Reports in files; read without torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import DNALError
from ..report.record import Report
from .digest import check_sum, read_header

REPORT = "report.json"  # in the folder of a run


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report in a ``report.json``, in a network of ``save_compressed``, or in the folder of a run.

    Raises:
        DNALError: there is none, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT
    if not path.is_file():
        raise DNALError(f"there is no report {path}")
    if path.suffix == ".safetensors":
        return saved_report(path)
    try:
        return _report(path, path.read_text())
    except OSError as error:
        raise DNALError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DNALError(f"{path} is no report of dnal_nni: it is not JSON") from error


def saved_report(path: str | os.PathLike[str]) -> Report:
    """The report that ``save_compressed`` wrote beside a network."""
    header = read_header(path)
    if not re.fullmatch(r"dnal_nni/\d+", header.get("format", "")):
        raise DNALError(f"{path} was not written by save_compressed")
    check_sum(path, header)
    if "report" not in header:
        raise DNALError(f"{path} holds no report: it was saved without one")
    return _report(path, header["report"])


def _report(path: Any, text: str) -> Report:
    try:
        return Report.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DNALError(f"{path} is no report of dnal_nni: it is not JSON") from error
    except DNALError as error:
        raise DNALError(f"{path}: {error}") from error
