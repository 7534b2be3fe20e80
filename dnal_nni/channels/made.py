"""Tensors that a forward makes for itself, as large as it asks for, and fills piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

UNFILLED = -2  # no channel, and no fixed position either


class Made:
    """Which tensors are plain, and what has been written into parts of such.

    A plain tensor holds one value, or random ones: it is as large as the forward asks for, in a cut network too.
    """

    def __init__(self) -> None:
        self._plain: Any = WeakIdKeyDictionary()  # tensor -> the numbers that it was asked for with, if known
        self._repeated: Any = WeakIdKeyDictionary()  # tensor -> axes along which it repeats one position
        # storage -> a tensor that keeps it alive, and the id of the channel at each of its elements
        self._filled: dict[int, tuple[Tensor, Tensor]] = {}

    def mark(self, tensor: Tensor, numbers: tuple[int, ...] = ()) -> None:
        """This tensor is plain; ``numbers`` are those of the call, its sizes first."""
        sizes = numbers[: tensor.dim()]
        self._plain[tensor] = sizes if sizes == tuple(tensor.shape) else ()

    def size(self, tensor: Tensor, axis: int) -> int:
        """What the forward asked for as the size of a plain tensor along an axis, where that is known."""
        sizes = self._plain.get(tensor)
        return sizes[axis] if sizes else tensor.shape[axis]

    def repeat(self, tensor: Tensor, axes: tuple[int, ...]) -> None:
        """This tensor repeats one position along ``axes``, as often as the forward asks for."""
        self._repeated[tensor] = axes

    def repeated(self, tensor: Tensor) -> tuple[int, ...]:
        """The axes along which it does."""
        axes: tuple[int, ...] = self._repeated.get(tensor, ())
        return axes

    def plain(self, tensor: Tensor) -> bool:
        """Whether this tensor is plain, or a part of one into which nothing has been written."""
        ids = self._part(tensor)
        if ids is not None:
            return bool((ids == UNFILLED).all())
        return tensor in self._plain or tensor.numel() == 1

    def fill(self, part: Tensor, ids: Tensor | None) -> None:
        """Channels ``ids`` (broadcast) are written into a part of a plain tensor; None: values that are fixed."""
        storage = part.untyped_storage()
        if storage.data_ptr() not in self._filled:
            elements = storage.nbytes() // part.element_size()
            whole = torch.full((elements,), UNFILLED, dtype=torch.int32)
            self._filled[storage.data_ptr()] = part, whole
        there = self._part(part)
        assert there is not None
        there.copy_(torch.tensor(-1) if ids is None else ids)

    def ids(self, tensor: Tensor) -> Tensor | None:
        """The channels of a tensor that was filled, or of a part of it: an array for labels; None of any other.

        Where nothing was written, a position counts as its neighbours along the axes where these are all the same.
        """
        ids = self._part(tensor)
        if ids is None or not bool((ids >= 0).any()):
            return None
        for axis in range(ids.dim()):
            most = ids.amax(axis, keepdim=True)
            if bool(((ids == most) | (ids == UNFILLED)).all()):
                ids = most
        return ids.clamp(min=-1).long()

    def _part(self, tensor: Tensor) -> Tensor | None:
        if not self._filled:
            return None
        held, whole = self._filled.get(tensor.untyped_storage().data_ptr(), (None, None))
        if held is None or whole is None or held.element_size() != tensor.element_size():
            return None
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
