"""Several processes (``torch.distributed``): what one of them finds and all of them go by.

Nothing here does anything in a single process. In several, every process makes the same calls, as torch's own wrappers
ask for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DNALError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this process; 0 where it is the only one."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that measures, shows and writes: rank 0, or the only one."""
    return rank() == 0


def from_first(compute: Callable[[], T]) -> T:
    """What ``compute`` returns on rank 0, on every rank; the others do not call it.

    Raises:
        DNALError: on every rank, if ``compute`` raised it on rank 0. Any other exception is rank 0's own, and the
            others raise a DNALError that points to it.
    """
    if world_size() == 1:
        return compute()
    found: list[Any] = [None, DNALError("rank 0 failed: what it says is the cause")]
    if is_first():
        try:
            found = [compute(), None]
        except DNALError as error:
            found[1] = error
            raise
        finally:
            dist.broadcast_object_list(found)
    else:
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
    result: T = found[0]
    return result


def check_same(what: str, value: object, remedy: str) -> None:
    """Raise on every rank unless all have an equal ``value``."""
    if world_size() == 1:
        return
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise DNALError(
                f"{what} on rank {rank} are not those of rank 0 ({_short(other)}, {_short(values[0])}): {remedy}"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mean_(tensor: Tensor) -> Tensor:
    """Replace by the mean over the ranks, in place."""
    if world_size() > 1:
        moved = _for_the_group(tensor)
        dist.all_reduce(moved)
        tensor.copy_(moved / world_size())
    return tensor


def _for_the_group(tensor: Tensor) -> Tensor:
    """``tensor`` on a device that the processes exchange tensors of: NCCL knows those of GPUs alone."""
    return tensor.cuda() if not tensor.is_cuda and dist.get_backend() == "nccl" else tensor


def broadcast_(*tensors: Tensor) -> None:
    """Give ``tensors`` the values that they have on rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            moved = _for_the_group(tensor)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)


def share_state(part: Any) -> None:
    """Give ``part`` the state that it has on rank 0, by its ``state_dict`` of tensors and ``load_state_dict``."""
    state = part.state_dict()
    broadcast_(*state.values())
    part.load_state_dict(state)  # a generator's state is a copy


def checksum(model: nn.Module) -> int:
    """Of all parameters, bit for bit."""
    total = 0
    for parameter in model.parameters():
        data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(data.numpy().tobytes(), total)
    return total
