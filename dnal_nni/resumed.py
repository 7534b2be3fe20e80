"""The file from which a call of :func:`~dnal_nni.compression.compress` goes on, after every epoch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import shown
from .errors import DNALError
from .outcome import file_report
from .report.record import Report
from .storage.compressed import load_compressed, save_compressed
from .storage.reports import read_report
from .storage.state import load_state, save_state

_SEARCH, _FINETUNE = "search", "finetune"


class Checkpoint:
    """What a call has done, and where it stands; of the cut network a second file tells, beside the first.

    Args:
        path: of the file; None: nothing is kept.
        model: the dense network.
        asked: by name, what must be the same where a call goes on: numbers and strings.
        beginning: the state of a stage at its beginning.

    Attributes:
        state: of the stage that is next.

    Raises:
        DNALError: the file is damaged, or of another call.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, model: nn.Module, asked: dict[str, Any], beginning: dict[str, Any]
    ) -> None:
        self.path, self.asked, self.model = None if path is None else Path(path), asked, model
        self.state: dict[str, Any] = {"stage": _SEARCH, "accuracy": None, **beginning}
        if self.path is not None and not self.path.parent.is_dir():
            raise DNALError(f"{self.path} cannot be written: there is no folder {self.path.parent}")
        if self.path is not None and self.path.exists():
            self.state = load_state(self.path)
            self._check()
            _set_random(self.state["random"])

    @property
    def cut(self) -> bool:
        """Whether what is left to do is fine-tuning."""
        return bool(self.state["stage"] == _FINETUNE)

    def _check(self) -> None:
        theirs = self.state.get("asked") if isinstance(self.state, dict) else None
        if not isinstance(theirs, dict):
            raise DNALError(f"{self.path} was not written by compress(checkpoint=...)")
        for name, value in self.asked.items():
            if theirs.get(name) != value:
                raise DNALError(
                    f"{self.path} is of a call with {name}={shown(theirs.get(name))}, and this one has {shown(value)}: "
                    "choose another checkpoint, or delete it"
                )
        own = self.model.state_dict()
        for name, tensor in {} if self.cut else self.state["model"].items():
            if not isinstance(own.get(name), Tensor) or own[name].shape != tensor.shape:
                raise DNALError(f"{self.path} does not fit the model: {name} is {list(tensor.shape)} in it")

    def search(self, accuracy: float | None, state: Mapping[str, Any]) -> None:
        """Keep the state of a search, and what ``validate`` said of the dense model."""
        self._save(stage=_SEARCH, accuracy=accuracy, **state)

    def finetune(self, state: Mapping[str, Any]) -> None:
        """Keep the state of fine-tuning."""
        self._save(stage=_FINETUNE, **state)

    def _save(self, **state: Any) -> None:
        if self.path is not None:
            save_state(self.path, {"asked": self.asked, "random": _random(), **state})

    def begin_finetune(self, slim: nn.Module, report: Report, beginning: dict[str, Any]) -> None:
        """Keep the cut network."""
        if self.path is not None:
            save_compressed(slim, self._network(self.path), report)
            self.finetune(beginning)
        self.state = beginning

    def network(self) -> tuple[nn.Module, Report]:
        """The cut network that was kept, and its report."""
        assert self.path is not None
        file = self._network(self.path)
        slim, report = load_compressed(copy.deepcopy(self.model), file), read_report(file)
        file_report(slim, report)
        return slim, report

    def done(self) -> None:
        """All is done: the files go."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self._network(self.path).unlink(missing_ok=True)

    @staticmethod
    def _network(path: Path) -> Path:
        return path.with_name(f"{path.stem}-cut.safetensors")


def _random() -> list[Tensor]:
    """The states of torch's random numbers: the CPU's, and those of every GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_random(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)
