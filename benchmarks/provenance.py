"""Where a figure comes from: beside every result."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


@functools.cache
def commit() -> str:
    """The last commit that touched the package; marked where the working tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dnal_nni")
    return git("log", "-1", "--format=%H", "--", "dnal_nni") + ("+changes" if changed else "")


def device_name(device: str) -> str:
    """Of "cuda" or "cpu"."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device == "cuda" else cpu


def provenance(device: str, *packages: str) -> dict[str, Any]:
    """Command, commit, versions, the device's name and the load of the machine, for the result's JSON."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": device,
        "load_average": [round(load, 1) for load in os.getloadavg()],  # of other work as well
    }
