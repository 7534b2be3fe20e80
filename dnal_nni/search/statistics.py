"""Running statistics of norms that keep up with a search."""

from __future__ import annotations

from torch import nn

WINDOW = 10  # averages are to be no longer than a search by this
USUAL = 0.1  # torch's default: faster than that no norm is made


class Pace:
    """The momentum of batch norms, raised where their averages are longer than a search.

    A pretrained network often averages over hundreds of batches (TensorFlow's networks: momentum 0.01), or over none
    (networks that were converted: momentum 0). In a search, or a fine-tuning, of a few dozen steps its statistics stay
    those of the uncut network: the cut one then fails in eval mode, whatever it has learned.

    Args:
        model: whose norms are changed by :meth:`raise_`.
        steps: of the search.

    Attributes:
        least: the momentum that norms get at least.
        changed: the norms that are slower than that, and the momentum that they had.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.least = min(USUAL, WINDOW / steps)
        self.changed: list[tuple[nn.modules.batchnorm._BatchNorm, float]] = []
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                if norm.momentum is not None and norm.momentum < self.least:
                    self.changed.append((norm, norm.momentum))

    def raise_(self) -> None:
        """Let slow norms be faster."""
        for norm, _ in self.changed:
            norm.momentum = self.least

    def restore(self) -> None:
        """Give them the momentum that they had."""
        for norm, momentum in self.changed:
            norm.momentum = momentum

    @property
    def note(self) -> str:
        """What a reader should know, a sentence; empty where nothing was changed."""
        if not self.changed:
            return ""
        slowest = min(momentum for _, momentum in self.changed)
        return (
            f"the running statistics of {len(self.changed)} norms follow with momentum {self.least:g} instead of "
            f"{slowest:g}, in training and in the cut network: else they would lag behind"
        )
