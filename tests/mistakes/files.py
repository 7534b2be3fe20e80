"""Mistakes with files and reports."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dnal_nni import load_compressed, save_compressed
from dnal_nni.report.record import Report
from dnal_nni.storage.reports import read_report

from . import Mistakes, Net, Stage


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 7)


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def of_file(write: Any, read: Any = None) -> Any:
    """A file that ``write(path, stage)`` leaves, and a model that is to be made of it."""

    def do(stage: Stage) -> None:
        path = Path("file.safetensors")
        write(path, stage)
        (read or (lambda path, stage: load_compressed(stage.keep(Net()), path)))(path, stage)

    return do


def zipped(path: Path, stage: Stage) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("slim", "1")


def saved(path: Path, stage: Stage) -> None:
    save_compressed(stage.cut(), path)


def damaged(change: Any) -> Any:
    def write(path: Path, stage: Stage) -> None:
        saved(path, stage)
        path.write_bytes(change(path.read_bytes()))

    return write


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def into(model: Any) -> Any:
    return lambda path, stage: load_compressed(stage.keep(model()), path)


def into_gated(path: Path, stage: Stage) -> None:
    stage.prune()
    load_compressed(stage.model, path)


def checkpoint(path: Path, stage: Stage) -> None:
    Stage().prune().save_checkpoint(path)


def taken_up(**settings: Any) -> Any:
    return lambda path, stage: stage.prune(**settings).load_checkpoint(path)


def of_an_open_file(path: Path, stage: Stage) -> None:
    with path.open("rb") as file:
        load_compressed(stage.model, file)


def saved_to(path: str) -> Any:
    return lambda stage: save_compressed(stage.cut(), path)


def below_a_file(path: Path, stage: Stage) -> None:
    path.touch()
    save_compressed(stage.cut(), path / "slim.safetensors")


FILES: Mistakes = {
    "load: a path with a zero byte": (lambda s: load_compressed(s.model, "a\0b"), "'a\\x00b' is no path"),
    "save: below a file": (
        lambda s: below_a_file(Path("file.safetensors"), s),
        "file.safetensors/slim.safetensors cannot be written: Not a directory",
    ),
    "save: no name": (saved_to(""), "'.' is no name of a file"),
    "save: a device": (
        saved_to("/dev/null"),
        "/dev/null cannot be written: it is a device or a pipe, which a file would replace",
    ),
    "load: no file": (
        lambda s: load_compressed(s.model, "nothing.safetensors"),
        "nothing.safetensors cannot be read: No such file or directory",
    ),
    "load: a folder": (of_file(lambda path, s: path.mkdir()), "file.safetensors cannot be read: Is a directory"),
    "load: an empty file": (
        of_file(lambda path, s: path.touch()),
        "file.safetensors cannot be read: it is empty; give a file of save_compressed",
    ),
    "load: text": (
        of_file(lambda path, s: path.write_text("hello " * 99)),
        "file.safetensors cannot be read: it is no safetensors file, or is damaged; give a file",
    ),
    "load: bytes of an image": (
        of_file(lambda path, s: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))),
        "file.safetensors cannot be read: it is no safetensors file, or is damaged; give a file",
    ),
    "load: a zip": (
        of_file(zipped),
        "file.safetensors cannot be read: it is a zip, as torch.save writes",
    ),
    "load: a pickle": (
        of_file(lambda path, s: path.write_bytes(pickle.dumps({"a": 1}))),
        "file.safetensors cannot be read: it is no safetensors file, or is damaged; give a file",
    ),
    "load: of torch.save": (
        of_file(lambda path, s: torch.save(s.model.state_dict(), path)),
        "file.safetensors cannot be read: it is a zip, as torch.save writes",
    ),
    "load: a whole model of torch.save": (
        of_file(lambda path, s: torch.save(nn.Linear(2, 2), path)),
        "file.safetensors cannot be read: it is a zip, as torch.save writes",
    ),
    "load: plain safetensors": (
        of_file(lambda path, s: save_file(s.model.state_dict(), path)),
        "file.safetensors was not written by save_compressed (format None)",
    ),
    "load: a checkpoint": (
        of_file(checkpoint),
        "file.safetensors was not written by save_compressed (format 'dnal_nni/state/1')",
    ),
    "load: cut short": (
        of_file(damaged(lambda data: data[:-40])),
        "file.safetensors cannot be read: it is no safetensors file, or is damaged",
    ),
    "load: a bit flipped": (
        of_file(damaged(flipped)),
        "file.safetensors is damaged: its bytes do not have their checksum; get the file again",
    ),
    "load: into another head": (
        of_file(saved, into(Wider)),
        "file.safetensors does not fit the model: fc.bias is [10], the model's is [7]",
    ),
    "load: into another module tree": (
        of_file(saved, into(Renamed)),
        "file.safetensors does not fit the model: it has no net.conv1.weight",
    ),
    "load: into another network": (
        of_file(saved, into(lambda: nn.Linear(2, 2))),
        "file.safetensors does not fit the model: it has no weight",
    ),
    "load: into another dtype": (
        of_file(saved, into(lambda: Net().half())),
        "file.safetensors does not fit the model: bn1.bias is torch.float32, the model's is torch.float16",
    ),
    "load: into a gated model": (
        of_file(saved, into_gated),
        "load_compressed: this network has gates: call pruner.unwrap_model(), or build a fresh one",
    ),
    "load: into a compiled model": (
        of_file(saved, into(lambda: torch.compile(Net(), backend="eager"))),
        "the model (OptimizedModule) is compiled: give its _orig_mod, the module that torch.compile was",
    ),
    "load: into DataParallel": (
        of_file(saved, into(lambda: nn.DataParallel(Net()))),
        "the model (DataParallel) is wrapped in DataParallel: pass model.module; train with the wrapper",
    ),
    "load: into the class": (
        of_file(saved, lambda path, s: load_compressed(Net, path)),
        "load_compressed(model=...) is the class Net: give a torch.nn.Module; this is the class, make",
    ),
    "load: swapped": (
        of_file(saved, lambda path, s: load_compressed(str(path), s.model)),
        "load_compressed(model=...) is 'file.safetensors': give a torch.nn.Module; are model and path",
    ),
    "load: without a model": (
        of_file(saved, lambda path, s: load_compressed(path)),
        "load_compressed: missing a required argument: 'path'",
    ),
    "load: a state dict": (
        lambda s: load_compressed(s.model, s.model.state_dict()),
        "load_compressed(path=...) is an OrderedDict: give a string or a path",
    ),
    "load: a number": (
        lambda s: load_compressed(s.model, 3),
        "load_compressed(path=...) is 3: give a string or a path",
    ),
    "load: an open file": (
        of_file(saved, of_an_open_file),
        "load_compressed(path=...) is a BufferedReader: give a string or a path",
    ),
    "save: swapped": (
        lambda s: save_compressed("slim.safetensors", s.model),
        "save_compressed(slim=...) is 'slim.safetensors': give a torch.nn.Module; are slim and path",
    ),
    "save: a state dict": (
        lambda s: save_compressed(s.model.state_dict(), "slim.safetensors"),
        "save_compressed(slim=...) is an OrderedDict: give a torch.nn.Module",
    ),
    "save: without a path": (
        lambda s: save_compressed(s.model),
        "save_compressed: missing a required argument: 'path'",
    ),
    "save: with gates on": (
        lambda s: save_compressed(s.prune().bound_model, "slim.safetensors"),
        "save_compressed: this network still has gates: save what speedup() returned",
    ),
    "save: into a folder that is none": (
        lambda s: save_compressed(s.cut(), "no/such/slim.safetensors"),
        "no/such/slim.safetensors cannot be written: No such file or directory",
    ),
    "save: over a folder": (
        of_file(lambda path, s: path.mkdir(), lambda path, s: save_compressed(s.cut(), path)),
        "file.safetensors cannot be written: Is a directory",
    ),
    "save: compiled": (
        lambda s: save_compressed(torch.compile(s.cut(), backend="eager"), "slim.safetensors"),
        "the model (OptimizedModule) is compiled: give its _orig_mod, the module that torch.compile was",
    ),
    "save: in DataParallel": (
        lambda s: save_compressed(nn.DataParallel(s.cut()), "slim.safetensors"),
        "the model (DataParallel) is wrapped in DataParallel: pass model.module; train with the wrapper",
    ),
    "save: a dict for the report": (
        lambda s: save_compressed(s.cut(), "slim.safetensors", {"flops": 1}),
        "save_compressed(report=...) is {'flops': 1}: give a Report or None",
    ),
    "checkpoint: no file": (
        lambda s: s.prune().load_checkpoint("nothing"),
        "nothing cannot be read: No such file or directory",
    ),
    "checkpoint: a cut network": (
        of_file(saved, taken_up()),
        "file.safetensors was not written by save_checkpoint (format 'dnal_nni/1')",
    ),
    "checkpoint: of another model": (
        of_file(checkpoint, lambda path, s: s.prune(Wider()).load_checkpoint(path)),
        "file.safetensors does not fit the model: fc.weight is [10, 12], the model's is [7, 12]",
    ),
    "checkpoint: of another preset": (
        of_file(checkpoint, taken_up(preset="paper")),
        "load_state_dict: the search ran with preset='default', here it is 'paper': make the pruner as",
    ),
    "checkpoint: of another budget": (
        of_file(checkpoint, taken_up(budget=None)),
        "load_state_dict: the search ran with budget={'flops': 0.5}, here it is None: make the pruner as",
    ),
    "checkpoint: with an optimizer that it lacks": (
        of_file(checkpoint, lambda p, s: s.prune().load_checkpoint(p, torch.optim.SGD(s.model.parameters(), 0.1))),
        "file.safetensors holds no optimizer: load_checkpoint(path, optimizer) and save_checkpoint alike",
    ),
    "checkpoint: a rate for the optimizer": (
        lambda s: s.prune().save_checkpoint("c", 0.01),
        "save_checkpoint(optimizer=...) is 0.01: give a torch.optim.Optimizer or None",
    ),
    "checkpoint: into a folder that is none": (
        lambda s: s.prune().save_checkpoint("no/such/checkpoint"),
        "no/such/checkpoint cannot be written: No such file or directory",
    ),
    "report: no file": (lambda s: read_report(Path("nothing")), "there is no report nothing"),
    "report: other JSON": (
        of_file(lambda path, s: path.write_text("[1]"), lambda path, s: read_report(path)),
        "file.safetensors is no safetensors file, or is damaged: it has no header",
    ),
    "report: of something else": (
        lambda s: Report.from_dict({"a": 1}),
        "this is no report of dnal_nni: it has no 'before'",
    ),
    "report: from a list": (
        lambda s: Report.from_dict([1]),
        "this is no report of dnal_nni: its values are not of the right form",
    ),
}


def report_of(stage: Stage) -> Report:
    pruner = stage.searched()
    pruner.speedup()
    return pruner.report


def setting(name: str, value: Any) -> Any:
    return lambda stage: setattr(report_of(stage), name, value)


REPORTS: Mistakes = {
    "a page to a file": (
        lambda s: report_of(s).to_html("page.html"),  # type: ignore[call-arg]
        "to_html: too many positional arguments; it takes none",
    ),
    "accuracy is one number": (setting("accuracy", 98.0), "report.accuracy is 98.0: give two numbers, (before, after)"),
    "accuracy has three numbers": (
        setting("accuracy", (98.0, 97.0, 96.0)),
        "report.accuracy is (98.0, 97.0, 96.0): give two numbers, (before, after)",
    ),
    "accuracy is text": (setting("accuracy", "98 %"), "report.accuracy is '98 %': give two numbers, (before, after)"),
    "accuracy is misspelt": (setting("acuracy", (98.0, 97.0)), "a report has no acuracy: did you mean accuracy?"),
    "accuracy_cut is a pair": (
        setting("accuracy_cut", (98.0, 97.0)),
        "report.accuracy_cut is (98.0, 97.0): give a number or None",
    ),
    "latency_ms is one number": (setting("latency_ms", 3), "report.latency_ms is 3: give two numbers, (before, after)"),
    "notes is text": (setting("notes", "mine"), "report.notes is 'mine': give a list"),
    "a picture in a folder that is none": (
        lambda s: report_of(s).plot_widths("no/such/widths.png"),
        "no/such/widths.png cannot be written: No such file or directory",
    ),
    "a picture of a kind that is none": (
        lambda s: report_of(s).plot_widths("widths.docx"),
        "widths.docx cannot be written: Format 'docx' is not supported (supported formats: avif, eps",
    ),
    "a picture without a name": (
        lambda s: report_of(s).plot_widths(),
        "plot_widths: missing a required argument: 'path'",
    ),
    "a picture to a number": (
        lambda s: report_of(s).plot_widths(7),
        "plot_widths(path=...) is 7: give a string or a path",
    ),
    "tensorboard to a file": (
        lambda s: (Path("f").touch(), report_of(s).to_tensorboard("f")),
        "f cannot be written: File exists",
    ),
}
