"""Bytes that a training holds: what autograd keeps for a backward pass, parameters, gradients, optimizer states."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DNALError


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def mib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**20:.1f} MiB"


def state_bytes(optimizers: Iterable[Optimizer]) -> tuple[int, int]:
    """Bytes of the states that optimizers have by now (counters left out), and of the parameters that these are of."""
    states, parameters = 0, 0
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            states += size_of(value for value in state.values() if isinstance(value, Tensor) and value.dim())
            parameters += size_of([parameter])
    return states, parameters


def kept_storages(model: nn.Module, forward: Callable[[], object], seen: Callable[[int, int], None]) -> None:
    """Tell ``seen`` of every storage that autograd keeps from ``forward()``, once: its address and bytes.

    The parameters and buffers of ``model`` are left out. No address is given to two storages, since all are held until
    the end.
    """
    own, held = _storages(model), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in held:
            held[storage.data_ptr()] = storage
            seen(storage.data_ptr(), storage.nbytes())
        return tensor.detach()  # an operation that keeps what it returns would be kept by it in turn

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    del graph


class OverLimit(DNALError):
    """A training would hold more than it may."""


class Meter:
    """Counts what a training holds, and ends it where that is above a limit.

    What autograd keeps is counted as it is kept and let go of, each storage once. What is kept inside of a checkpoint
    (``torch.utils.checkpoint``) is not seen while it is computed again. Of parameters, a gradient is counted whether it
    is there by now or not. What an operation needs while it runs is not counted.

    Args:
        limit: in bytes; None: count only. Above it an :class:`OverLimit` is raised.

    Attributes:
        fixed: bytes of parameters and buffers, gradients and optimizer states.
        held: bytes that autograd keeps now.
        peak: the largest sum of both so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.fixed = self.held = self.peak = 0
        self._own: set[int] = set()
        self._references: Counter[int] = Counter()

    def weigh(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Take up the parameters and buffers of what is trained, and the states that its optimizers have by now."""
        self._own = _storages(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.fixed = size_of([*model.parameters(), *model.buffers(), *trained]) + state_bytes(optimizers)[0]
        self._check()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what this thread keeps for backward passes."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._own:
            size = 0
        elif address not in self._references:
            self._check(size)
        return _Kept(self, tensor, address, size)

    def refer(self, address: int, size: int, change: int) -> None:
        """Count the references to a storage, which is held from the first to the last one."""
        if size:
            self.held += size * (address not in self._references)
            self._references[address] += change
            if not self._references[address]:
                del self._references[address]
                self.held -= size

    def _check(self, more: int = 0) -> None:
        total = self.fixed + self.held + more
        if self.limit is not None and total > self.limit:
            raise OverLimit(
                f"the training needs more than memory={self.limit} bytes ({mib(self.limit)}): it would hold {total}, "
                f"{self.fixed} of them parameters, gradients and optimizer states; give it more, or smaller batches"
            )
        self.peak = max(self.peak, total)


class _Kept:
    """A tensor that autograd keeps; the meter hears of its end."""

    __slots__ = ("address", "meter", "size", "tensor")

    def __init__(self, meter: Meter, tensor: Tensor, address: int, size: int) -> None:
        # detached: an operation that keeps what it returns would be kept by it in turn
        self.meter, self.tensor, self.address, self.size = meter, tensor.detach(), address, size
        meter.refer(address, size, 1)

    def __del__(self) -> None:
        self.meter.refer(self.address, self.size, -1)


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
