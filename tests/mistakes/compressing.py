"""Mistakes in a call of ``compress``: the batches, the loss, the validation, the optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dnal_nni import Budget, compress

from . import Mistakes, Net, Stage


class Torn(Dataset[Any]):
    """Cannot give its fourth example."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 3:
            raise KeyError("row 3")
        return torch.randn(1, 8, 8), 0


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter([(torch.randn(1, 8, 8), 0)])


class Claims(list[Any]):
    """Says that it is longer than it is."""

    def __len__(self) -> int:
        return 9


class Nested(Net):
    """Returns a dict."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


def call(**settings: Any) -> Any:
    """A call of ``compress``; what is a function of a stage is made on it."""

    def do(stage: Stage) -> None:
        given = {name: make(stage) for name, make in settings.items()}
        batches = [(stage.x, stage.y)] * 3
        short = {"loader": batches, "budget": Budget(flops=0.5), "search_epochs": 1, "epochs": 1, "progress": False}
        compress(stage.model, **short | given)

    return do


def on(model: Any, **settings: Any) -> Any:
    """The same, of another model."""

    def do(stage: Stage) -> None:
        stage.keep(model())
        call(**settings)(stage)

    return do


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def nan_at_last(stage: Stage) -> Any:
    """A loss that is fine in the search, and nan in fine-tuning."""
    calls = iter(range(100))
    return lambda outputs, targets: F.cross_entropy(outputs, targets) * (1 if next(calls) < 3 else float("nan"))


def each_at_last(stage: Stage) -> Any:
    """A loss that is one number in the search, and one of each example in fine-tuning."""
    calls = iter(range(100))
    return lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="mean" if next(calls) < 3 else "none")


def in_inference_mode(stage: Stage) -> None:
    with torch.inference_mode():
        call()(stage)


CALLS: Mistakes = {
    "compress: a generator": (
        call(loader=lambda s: ((s.x, s.y) for _ in range(3))),
        "compress(loader=...) is a generator: give a DataLoader, or a list of batches; a generator has no length",
    ),
    "compress: a loader without a length": (
        call(loader=lambda s: DataLoader(Stream())),
        "compress(loader=...) is a DataLoader of data without a length: give them a __len__, or a list of batches",
    ),
    "compress: a data set": (
        call(loader=lambda s: TensorDataset(s.x, s.y)),
        "compress(loader=...) is a TensorDataset: give a list, a DataLoader or whatever a loop can run over",
    ),
    "compress: a data set to validate on": (
        call(validate=lambda s: TensorDataset(s.x, s.y)),
        "compress(validate=...) is a TensorDataset: give a list, a DataLoader or whatever a loop can run over",
    ),
    "compress: batches of numpy": (
        call(loader=lambda s: [(s.x.numpy(), s.y.numpy())]),
        "compress(loader=...) gives (a float32 ndarray of shape [4, 1, 8, 8], an int64 ndarray of shape [4]), and",
    ),
    "compress: batches with a third": (
        call(loader=lambda s: [(s.x, s.y, s.y)]),
        "compress(loader=...) gives (a float32 Tensor of shape [4, 1, 8, 8], an int64 Tensor of shape [4], an int64",
    ),
    "compress: pixels that are bytes": (
        call(loader=lambda s: [(s.x.byte(), s.y)]),
        "the model rejects the dummy_input of shape (1, 1, 8, 8), uint8, on cpu: Input type (unsigned char)",
    ),
    "compress: labels in a column": (
        call(loader=lambda s: [(s.x, s.y[:, None])]),
        "compress(loss=...) fails on a float32 Tensor of shape [4, 10], which the model returns, and targets, an int64",
    ),
    "compress: a validation of vectors": (
        call(validate=lambda s: [(s.x, F.one_hot(s.y, 10))]),
        "the accuracy is of scores [batch, classes] and classes [batch], and not of a float32 Tensor of shape [4, 10]",
    ),
    "compress: a validation of two numbers": (
        call(validate=lambda s: lambda model: (0.3, 98.0)),
        "compress(validate=...) returns (0.3, 98.0): return a number, more is better",
    ),
    "compress: everything in its place but the budget's name": (
        lambda s: compress(s.model, [(s.x, s.y)], F.cross_entropy, Budget(flops=0.5)),  # type: ignore[misc]
        "compress: too many positional arguments; without a name it takes model, loader, loss",
    ),
    "compress: loader and model swapped": (
        lambda s: compress([(s.x, s.y)], s.model, budget=Budget(flops=0.5)),  # type: ignore[arg-type]
        "compress(loader=...) is a Net: give a list, a DataLoader or whatever a loop can run over",
    ),
    "compress: a checkpoint in a folder that is none": (
        call(checkpoint=lambda s: "none/run.safetensors"),
        "none/run.safetensors cannot be written: there is no folder none",
    ),
    "compress: a folder for the checkpoint": (call(checkpoint=lambda s: "."), ". cannot be read: "),
    "compress: batches that are dicts": (
        call(loader=lambda s: [{"image": s.x}]),
        "compress(loader=...) gives {'image': a float32 Tensor of shape [4, 1, 8, 8]}, and should give (inputs,",
    ),
    "compress: no batch": (call(loader=lambda s: []), "compress(loader=...) gives no batch"),
    "compress: a batch for the batches": (
        call(loader=lambda s: (s.x, s.y)),
        "compress(loader=...) gives a float32 Tensor of shape [4, 1, 8, 8], and should give (inputs, targets)",
    ),
    "compress: data that fail": (
        call(loader=lambda s: DataLoader(Torn(), 2)),
        "compress(loader=...) fails: 'row 3'",
    ),
    "compress: a wrong length": (
        call(loader=lambda s: Claims([(s.x, s.y)] * 3)),
        "compress(loader=...) gives 3 batches, and its len() is 9: give it the length that it has",
    ),
    "compress: one example for a norm": (
        on(
            lambda: nn.Sequential(nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1), nn.Flatten()),
            loader=lambda s: [(s.x, s.y), (s.x[:1], s.y[:1])],
        ),
        "the model rejects a batch of the loader (a float32 Tensor of shape [1, 1, 8, 8]): Expected more than 1 value",
    ),
    "compress: labels that are floats": (
        call(loader=lambda s: [(s.x, s.y.float())]),
        "compress(loss=...) fails on a float32 Tensor of shape [4, 10], which the model returns, and targets, a",
    ),
    "compress: labels beyond the scores": (
        call(loader=lambda s: [(s.x, s.y + 50)]),
        "compress(loss=...) fails on ... out of bounds",
    ),
    "compress: labels of another length": (
        call(loader=lambda s: [(s.x, s.y[:2])]),
        "compress(loss=...) fails on ... and targets, an int64 Tensor of shape [2]",
    ),
    "compress: a model that returns a dict": (
        on(Nested),
        "compress(loss=...) fails on {'logits': a float32 Tensor of shape [4, 10]}, which the model returns",
    ),
    "compress: the class of a loss": (
        call(loss=lambda s: nn.CrossEntropyLoss),
        "compress(loss=...) is the class CrossEntropyLoss: this is the class, make one of it: CrossEntropyLoss()",
    ),
    "compress: a loss of the model": (
        call(loss=lambda s: lambda model, outputs, targets: outputs.sum()),
        "compress(loss=...) fails on ... missing 1 required positional argument",
    ),
    "compress: a loss that is None": (call(loss=lambda s: lambda o, t: None), "compress(loss=...): the loss is None"),
    "compress: a loss of every example": (
        call(loss=lambda s: nn.CrossEntropyLoss(reduction="none")),
        "compress(loss=...): the loss has shape [4]: make one number of it, loss.mean()",
    ),
    "compress: a loss of every example at last": (
        call(loss=each_at_last),
        "compress(loss=...): the loss has shape [4]: make one number of it, loss.mean()",
    ),
    "compress: a loss that is nan at last": (
        call(loss=nan_at_last),
        "the loss is nan or infinite in epoch 1 of fine-tuning: lower lr",
    ),
    "compress: a validation that fails": (
        call(validate=lambda s: lambda model: model.accuracy),
        "compress(validate=...) fails on the model: 'Net' object has no attribute 'accuracy'",
    ),
    "compress: a validation that is nan": (
        call(validate=lambda s: lambda model: float("nan")),
        "compress(validate=...) returns nan: return a number, more is better",
    ),
    "compress: a number for the validation": (
        call(validate=lambda s: 98.0),
        "compress(validate=...) is 98.0: give a list, a DataLoader or whatever a loop can run over, a function or None",
    ),
    "compress: an optimizer of the model": (
        call(optimizer=lambda s: lambda parameters: torch.optim.SGD(s.model.parameters(), 0.01)),
        "compress(optimizer=...) returns a SGD of other parameters than it is given",
    ),
    "compress: an optimizer that fails": (
        call(optimizer=lambda s: lambda parameters: torch.optim.SGD(parameters, -1.0)),
        "compress(optimizer=...) fails: Invalid learning rate: -1.0",
    ),
    "compress: an optimizer, made": (
        call(optimizer=lambda s: torch.optim.SGD(s.model.parameters(), 0.01)),
        "compress(optimizer=...) is a SGD: give a function or None",
    ),
    "compress: everything frozen": (
        on(frozen),
        "every parameter of the model is frozen, and fine-tuning could change none: unfreeze some",
    ),
    "compress: in inference mode": (
        in_inference_mode,
        "inside of torch.inference_mode() nothing can learn or be compared: leave it first",
    ),
    "compress: a number for the budget": (
        call(budget=lambda s: 0.5),
        "compress(budget=...) is 0.5: give a Budget, for example Budget(flops=0.5)",
    ),
    "compress: misspelt": (
        call(epoch=lambda s: 3),
        "compress: got an unexpected keyword argument 'epoch'; did you mean",
    ),
}
