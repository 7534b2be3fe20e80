"""Networks that sum their candidates: the supernet of DNAL (arXiv 2103.02126), as plain modules.

Every layer of a supernet is the sum of its candidate operations, each behind a gate. A gate is 1 while nothing is
searched, soft in a search, and 0 or 1 after it: the sum then is that of the open candidates, and a cut removes the
closed ones from the module tree. Channels inside of candidates are gated as in any network.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import DNALError
from .gates import ChannelFactor, GateState, ScaledSigmoidGate

_GATE = "dnal_choice_gate"
Weight = float | Tensor


class Choice(nn.Module, abc.ABC):
    """Units that can each be left out. One gate serves all choices of one label: they decide alike.

    Args:
        label: name of the decision.

    Attributes:
        least: units that must stay.
        most: units that may stay; None: all.
        resting: units whose weight is 0 in a search, and that need not run there.
    """

    least = 1
    most: int | None = None
    resting: frozenset[int] = frozenset()

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    @property
    @abc.abstractmethod
    def units(self) -> list[str]:
        """The names of what can be left out, in the order of the gate."""

    @abc.abstractmethod
    def parts(self) -> dict[str, tuple[int, ...]]:
        """By relative path of a submodule, the units that must all be open for it to run."""

    @abc.abstractmethod
    def drop(self, keep: Tensor) -> None:
        """Remove what is closed from the module tree. ``keep``: bool ``[units]``."""

    def attach(self, gate: ScaledSigmoidGate) -> None:
        """Let ``gate`` act."""
        device = next((p.device for p in self.parameters()), gate.s.device)
        self.add_module(_GATE, ChannelFactor([gate], torch.arange(gate.s.numel())).to(device))

    def detach(self) -> None:
        """Take the gate off."""
        self._modules.pop(_GATE, None)
        self.resting = frozenset()

    def weights(self) -> list[Weight]:
        """The factor of every unit: 0-d tensors in a search, else 0.0 or 1.0."""
        factor = self._modules.get(_GATE)
        g = factor.factor() if isinstance(factor, ChannelFactor) else None
        if g is None:
            return [1.0] * len(self.units)
        assert isinstance(factor, ChannelFactor)
        if factor.gates[0].state is GateState.SOFT:
            return [0.0 if i in self.resting else weight for i, weight in enumerate(g.unbind())]
        return g.double().tolist()

    def _sum(self, terms: Sequence[tuple[Weight, Callable[[Weight], Any]]]) -> Tensor:
        """The sum of what the open terms return, each called with its weight."""
        total: Tensor | None = None
        for name, (weight, term) in zip(self.units, terms):
            if isinstance(weight, float) and weight == 0.0:
                continue
            out = term(weight)
            if not isinstance(out, Tensor):
                raise DNALError(f"{self.label}: candidate {name} returns a {type(out).__name__}: it must be a tensor")
            if total is not None and out.shape != total.shape:
                raise DNALError(
                    f"{self.label}: candidate {name} returns the shape {tuple(out.shape)}, those before it "
                    f"{tuple(total.shape)}: candidates are summed, so give them one shape"
                )
            total = out if total is None else total + out
        assert total is not None
        return total

    def extra_repr(self) -> str:
        return f"label={self.label!r}"


def times(out: Any, weight: Weight) -> Any:
    """A tensor times its weight; an open candidate's, as it is."""
    return out * weight.to(out.dtype) if isinstance(weight, Tensor) and isinstance(out, Tensor) else out


class Mixture(Choice):
    """The sum of candidate modules; what is closed is removed, at least one candidate stays.

    Args:
        candidates: by name. They return tensors of one shape.
        label: name of the decision.
        sources: by candidate, the number of the tensor that it reads, where the input is a list of tensors; None: all
            candidates get the same arguments.

    Attributes:
        sequential: run every candidate again in the backward pass instead of keeping its activations (memory for one
            candidate at a time, for one forward pass more). Norm statistics move once all the same.
    """

    def __init__(
        self, candidates: Mapping[str, nn.Module], label: str, sources: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(label)
        self.names = list(candidates)
        self.sources = None if sources is None else dict(sources)
        self.sequential = False
        for name, candidate in candidates.items():
            if hasattr(self, name):
                raise DNALError(f"{label}: a candidate cannot be called {name!r}, which modules have: rename it")
            self.add_module(name, candidate)

    @property
    def units(self) -> list[str]:
        return self.names

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {name: (i,) for i, name in enumerate(self.names)}

    def drop(self, keep: Tensor) -> None:
        for name, stays in zip(self.names, keep.tolist()):
            if not stays:
                delattr(self, name)
        self.names = [name for name, stays in zip(self.names, keep.tolist()) if stays]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._sum([(w, self._term(name, args, kwargs)) for name, w in zip(self.names, self.weights())])

    def _term(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Weight], Any]:
        candidate: nn.Module = getattr(self, name)
        inputs = args if self.sources is None else (args[0][self.sources[name]],)

        # the weight is multiplied inside of the checkpoint: outside, the product would keep the candidate's output
        def weighted(weight: Weight, *inputs: Any) -> Any:
            return times(candidate(*inputs, **kwargs), weight)

        def run(weight: Weight) -> Any:
            if not (self.sequential and torch.is_grad_enabled()):
                return weighted(weight, *inputs)
            return checkpoint(
                weighted,
                weight,
                *inputs,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _statistics_stand(candidate)),
            )

        return run


@contextlib.contextmanager
def _statistics_stand(module: nn.Module) -> Iterator[None]:
    """Batch norms do not count the batch a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # not track_running_stats: the backward pass looks for the tensors of the first run
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


class Depth(Choice):
    """A chain of blocks that can end early: after one of ``depths`` blocks.

    A unit is what lies between one depth and the next; it runs where all units before it are open, so that the first
    blocks are those that stay.

    Args:
        blocks: at least ``max(depths)``. Behind each of ``depths`` the shape is the same.
        depths: numbers of blocks to choose from.
        label: name of the decision.
    """

    least = 0

    def __init__(self, blocks: Sequence[nn.Module], depths: Sequence[int], label: str) -> None:
        super().__init__(label)
        self.depths = sorted(depths)
        self.blocks = nn.ModuleList(blocks[: self.depths[-1]])

    @property
    def units(self) -> list[str]:
        return [f"depth {depth}" for depth in self.depths[1:]]

    def parts(self) -> dict[str, tuple[int, ...]]:
        before = [sum(i >= depth for depth in self.depths) for i in range(len(self.blocks))]
        return {f"blocks.{i}": tuple(range(units)) for i, units in enumerate(before)}

    def drop(self, keep: Tensor) -> None:
        left = int(keep.cumprod(0).sum())
        self.depths = self.depths[: left + 1]
        self.blocks = self.blocks[: self.depths[-1]]

    def forward(self, x: Any) -> Any:
        if len(self.depths) == 1:
            return self._run(x, 0, self.depths[0])
        weights = self.weights()
        hard = _GATE in self._modules and all(isinstance(w, float) for w in weights)
        if hard:
            return self._run(x, 0, self.depths[next((i for i, w in enumerate(weights) if w == 0.0), len(weights))])
        outs, at = [], 0
        for depth in self.depths:
            x = self._run(x, at, depth)
            outs.append(x)
            at = depth
        if not all(isinstance(out, Tensor) and out.shape == outs[0].shape for out in outs):
            raise DNALError(
                f"{self.label}: what the blocks return differs in shape between the depths {self.depths}: a depth can "
                "be learned where one output can stand for another"
            )
        # sum over depths of g_1 ... g_k (1 - g_k+1) x_k. With all gates at 1 the earlier ends count 0, but they are
        # there: their channels are coupled with the last one's
        total = outs[-1]
        for out, weight in zip(reversed(outs[:-1]), reversed(weights)):
            rest = 1.0 - weight
            total = times(total, weight) + (out * rest if isinstance(rest, float) else times(out, rest))
        return total

    def _run(self, x: Any, first: int, last: int) -> Any:
        for block in self.blocks[first:last]:
            x = block(x)
        return x


class Inputs(Choice):
    """The sum or mean of some of the tensors of a list; at least one stays.

    Args:
        count: length of the list.
        reduction: "sum", or "mean" over the open ones.
        label: name of the decision.
    """

    def __init__(self, count: int, reduction: Literal["sum", "mean"], label: str) -> None:
        super().__init__(label)
        self.kept = list(range(count))
        self.reduction = reduction

    @property
    def units(self) -> list[str]:
        return [str(i) for i in self.kept]

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {}

    def drop(self, keep: Tensor) -> None:
        self.kept = [i for i, stays in zip(self.kept, keep.tolist()) if stays]

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        weights = self.weights()

        def term(x: Tensor) -> Callable[[Weight], Any]:
            return lambda weight: times(x, weight)

        total = self._sum([(weight, term(tensors[i])) for i, weight in zip(self.kept, weights)])
        if self.reduction == "sum":
            return total
        share = sum(weights)
        return total / (share.to(total.dtype) if isinstance(share, Tensor) else share)


def choices_of(model: nn.Module) -> dict[str, Choice]:
    """The choices that have something to decide, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Choice) and len(module.units) > module.least
    }
