"""What a user hands to a step of a search as its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..arguments import shown
from ..errors import DNALError

_EXAMPLE = "for example F.cross_entropy(model(images), labels)"


def check_loss(loss: Any, at: str) -> None:
    """Raise for what is no loss that can be learned from.

    Args:
        loss: whatever was given.
        at: where it was given.

    Raises:
        DNALError: it is no tensor, not one real number, or has no gradient.
    """
    if not isinstance(loss, Tensor):
        raise DNALError(f"{at}: the loss is {shown(loss)}: give the loss of a batch as a tensor, {_EXAMPLE}")
    if loss.numel() == 0:
        raise DNALError(f"{at}: the loss is empty, of shape {list(loss.shape)}: is there an example in the batch?")
    if loss.numel() > 1:
        raise DNALError(f"{at}: the loss has shape {list(loss.shape)}: make one number of it, loss.mean()")
    if loss.is_complex():
        raise DNALError(f"{at}: the loss is complex: make a real number of it, loss.abs()")
    if not loss.requires_grad:
        raise DNALError(
            f"{at}: the loss has no gradient: it was detached, or computed under torch.no_grad() or of integers; give "
            f"it as the model's outputs make it, {_EXAMPLE}"
        )


@contextlib.contextmanager
def told_of_backward() -> Iterator[None]:
    """A backward pass that the user has made already, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise DNALError(
            "step(loss) makes the backward pass itself: leave out loss.backward(), or make loss anew from this batch"
        ) from error
