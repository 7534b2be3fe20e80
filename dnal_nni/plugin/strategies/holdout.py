"""Batches of the evaluator's data, and the random numbers behind their order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from nni.nas.evaluator.pytorch import Lightning
from torch import Tensor

from ...errors import DNALError
from ...search.ranks import rank, world_size
from ..steps import same_random_numbers


class Holdout:
    """Passes over the validation data without end. They leave torch's random state as it is.

    Every pass has a seed of its own, so that its order can be had again: a search that goes on takes the batch that
    would have come next.

    Args:
        evaluator: of the search.
        who: the strategy, for messages.

    Raises:
        DNALError: there are no such data, or several loaders of them.
    """

    def __init__(self, evaluator: Lightning, who: str) -> None:
        data = evaluator.val_dataloaders
        if evaluator.datamodule is not None:
            with same_random_numbers():
                evaluator.datamodule.prepare_data()
                evaluator.datamodule.setup("fit")
                data = evaluator.datamodule.val_dataloader()
        if isinstance(data, (list, tuple)) and len(data) == 1:
            (data,) = data
        if data is None or isinstance(data, (list, tuple, dict)):
            found = "no" if data is None or not data else "several loaders of"
            raise DNALError(
                f"the evaluator has {found} validation data: the architecture of {who} learns from them, as that of "
                "NNI's DARTS does; give one loader, val_dataloaders=, of training images that the weights do not see"
            )
        self.data: Iterable[Any] = data
        self.seed = torch.initial_seed() % 2**31
        self.passes, self.taken = 0, 0
        self._batches: Iterator[Any] = iter(())
        self._order: Tensor | None = None  # state of the loader's generator

    def batch(self) -> Any:
        """The next batch; of several processes, the next ones in turn."""
        with self._apart():
            return [self._next() for _ in range(world_size())][rank()]

    def _next(self) -> Any:
        for _ in range(2):
            for batch in self._batches:
                self.taken += 1
                return batch
            self._begin(self.passes + 1)
        raise DNALError("the evaluator's validation data are empty: the architecture has nothing to learn from")

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """The loader's own generator too goes on as if nothing had happened: it may be that of the training data."""
        generator = getattr(self.data, "generator", None)
        with same_random_numbers():
            if not isinstance(generator, torch.Generator):
                yield
                return
            before = generator.get_state()
            if self._order is not None:
                generator.set_state(self._order)
            try:
                yield
            finally:
                self._order = generator.get_state()
                generator.set_state(before)

    def _begin(self, number: int) -> None:
        self.passes, self.taken = number, 0
        torch.manual_seed(self.seed + number)
        generator = getattr(self.data, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(self.seed + number)
        self._batches = iter(self.data)

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"seed": self.seed, "passes": self.passes, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Stand there."""
        self.seed = int(state["seed"])
        if int(state["passes"]):
            with self._apart():
                self._begin(int(state["passes"]))
                for _ in range(int(state["taken"])):
                    next(self._batches)
            self.taken = int(state["taken"])


class Randomness:
    """Torch's random state, and that of the generators of data loaders: what decides about the order of batches.

    Args:
        data: the evaluator's training data: a loader, or several.
    """

    def __init__(self, data: Any) -> None:
        loaders = data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else [data]
        found = [getattr(loader, "generator", None) for loader in loaders]
        self.generators = [generator for generator in found if isinstance(generator, torch.Generator)]

    def state_dict(self) -> dict[str, Any]:
        """Of now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda, "loaders": [one.get_state() for one in self.generators]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        if (had := len(state["loaders"])) != (here := len(self.generators)):
            raise DNALError(
                f"the search to be resumed had {had} data loaders with a generator of their own, here there are "
                f"{here}: make the evaluator as it was"
            )
        torch.set_rng_state(state["cpu"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
        for generator, one in zip(self.generators, state["loaders"]):
            generator.set_state(one.cpu())
