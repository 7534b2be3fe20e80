"""What a user hands to a step of a search as its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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


class OnlyStep:
    """The step of the weights that belongs to ``step(loss)``; from the first on, another is an error ahead of it.

    Args:
        optimizer: of the weights; None: they are frozen, and nothing here is called.
        over: whether other steps are nobody's business any more.
    """

    def __init__(self, optimizer: Optimizer | None, over: Callable[[], bool]) -> None:
        self.optimizer, self.over = optimizer, over
        self._making = False
        self._hook: RemovableHandle | None = None

    def begin(self) -> None:
        """Ahead of the backward pass."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()

    def make(self) -> None:
        """The step, behind it."""
        assert self.optimizer is not None
        if self._hook is None:
            self._hook = self.optimizer.register_step_pre_hook(self._look)
        self._making = True
        self.optimizer.step()
        self._making = False

    def _look(self, *_: Any) -> None:
        if not self._making and not self.over():
            raise DNALError(
                "optimizer.step() beside step(loss), which makes the step of the weights itself: leave it out, or the "
                "weights would move twice for every batch"
            )

    def close(self) -> None:
        """From now on the optimizer is its owner's alone."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
