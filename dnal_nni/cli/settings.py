"""The settings of ``dnal compress``."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..budget import Budget
from ..errors import DNALError


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one run, as on the command line.

    Attributes:
        model: the network, as ``package.module:callable``.
        data: a folder of images, or ``package.module:callable``: see :mod:`dnal_nni.cli.data`.
        out: folder for the results.
        flops: fraction of the FLOPs to keep, or, above 1, how many.
        params: the same of the parameters.
        latency: the same of a forward pass on one input, in milliseconds. Of several limits, all hold.
        kwargs: keyword arguments of ``model``.
        weights: file with its state dict.
        input: shape of one input batch; for a folder of images, their size.
        search_epochs: epochs of the search, in which the weights learn too.
        epochs: epochs of fine-tuning after the cut.
        lr: learning rate of the weights while searching.
        finetune_lr: the highest of fine-tuning.
        mean: of each colour in a folder's images, of 0 to 1.
        std: likewise, the standard deviation.
    """

    model: str
    data: str
    out: Path
    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Path | None = None
    input: tuple[int, ...] | None = None
    search_epochs: int = 3
    epochs: int = 10
    lr: float = 0.01
    finetune_lr: float = 0.01
    batch_size: int = 64
    workers: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("search_epochs", 1), ("epochs", 0), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DNALError(f"{name} is {value!r}: give a whole number of at least {least}")
        for name in ("lr", "finetune_lr"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise DNALError(f"{name} is {value!r}: give a number above 0")
        if len(self.mean) != len(self.std) or not all(deviation > 0 for deviation in self.std):
            raise DNALError("mean and std: give as many numbers for one as for the other, and std above 0")
        self.budget()

    def budget(self) -> Budget:
        return Budget(flops=self.flops, params=self.params, latency=self.latency)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return values
