"""Bytes: what autograd keeps for a backward pass, and what a call takes at its peak."""

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Of distinct tensors that autograd keeps from ``forward()`` for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # a graph that is let go of frees what it saved, and others take its place
    size = sum(storages.values())
    del kept
    return size


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """What a step takes at its peak beyond what is held before it; on Linux by the kernel's account of this process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    if platform.system() != "Linux":
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the step is given memory that counts as held

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    held = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return status("VmHWM") - held
