"""The options of the commands: what each means, what it may be, and what it is where it is not given."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..budget import Budget
from ..errors import DNALError

T = TypeVar("T", bound="Options")


class Kind(NamedTuple):
    """What an option may be: how text is read, which values are right, how to say that, and of what it has several."""

    text: Callable[[str], Any]
    right: Callable[[Any], bool]
    said: str
    entry: Kind | None = None

    def read(self, value: Any) -> Any:
        """``value`` as text or as JSON has it; a ValueError where that is not to be read."""
        if self.entry is not None and isinstance(value, (list, tuple)):
            return tuple(map(self.entry.read, value))
        return self.text(value) if isinstance(value, str) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def whole(least: int, most: float = math.inf) -> Kind:
    """Whole numbers from ``least`` to ``most``."""
    said = f"a whole number of at least {least}" + (f", at most {most}" if most < math.inf else "")
    return Kind(int, lambda n: type(n) is int and least <= n <= most, said)


def several(entry: Kind, said: str) -> Kind:
    """Entries between commas, or in a list."""

    def right(value: Any) -> bool:
        return isinstance(value, tuple) and value != () and all(map(entry.right, value))

    return Kind(lambda text: tuple(map(entry.read, text.split(","))), right, said, entry)


LIMITS = ("flops", "params", "latency")  # of which a command may have several numbers
NUMBER = Kind(float, lambda x: _is_number(x) and x > 0, "a number above 0")
LIMIT = NUMBER._replace(said="a number above 0: up to 1 the fraction to keep, above 1 how many")
SHAPE = several(whole(1), "whole numbers, for example 1,3,224,224")
NUMBERS = several(Kind(float, _is_number, ""), "numbers, for example 0.5,0.5,0.5")
OBJECT = Kind(json.loads, lambda value: isinstance(value, dict), 'a JSON object, for example {"num_classes": 10}')
NAME = Kind(str, lambda value: isinstance(value, str) and value != "", "a name")
FILE = Kind(Path, lambda value: isinstance(value, Path), "a path")
GRAPH = Kind(str, lambda value: value == "torch-pruning", "torch-pruning, or leave it out")
FLAG = Kind(str, lambda value: isinstance(value, bool), "true or false")


def option(kind: Kind, help: str, default: Any = dataclasses.MISSING, metavar: str = "N", **argument: Any) -> Any:
    """A field that is an option of the command line; ``argument`` is what else argparse is to know."""
    metadata = {"kind": kind, "help": help, "metavar": metavar, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


def _shown(field: dataclasses.Field[Any]) -> str:
    """As it is written in a command."""
    metavar: str = field.metadata["metavar"]
    return metavar if metavar == "TARGET" else "--" + field.name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fields made by :func:`option`; their values may be given as text, or as JSON has them.

    Raises:
        DNALError: a value is not of its kind.
    """

    model: str = option(NAME, "the network, as package.module:function", metavar="TARGET", nargs="?")
    kwargs: dict[str, Any] = option(OBJECT, "keyword arguments of TARGET, as JSON", "{}", "JSON")
    weights: Path | None = option(FILE, "trained weights: safetensors, or a state dict of torch.save", None, "FILE")
    graph: Literal["torch-pruning"] | None = option(
        GRAPH, "torch-pruning: channels go together as its graph says; else as the operations do", None, "GRAPH"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.metadata["kind"]
            if value is None and field.default is None:
                continue
            try:
                read = kind.read(value)
            except (ValueError, RecursionError):
                read = None
            if not kind.right(read):
                typed = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                raise DNALError(f"{_shown(field)} {typed}: give {kind.said}")
            object.__setattr__(self, field.name, read)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Let a command have these options; what is given will be there as text, and nothing else."""
        for field in dataclasses.fields(cls):
            argument, help = dict(field.metadata["argument"]), field.metadata["help"]
            if field.metadata["kind"] is FLAG:
                argument["action"] = "store_true"
            else:
                argument["metavar"] = field.metadata["metavar"]
                if field.default is not None and field.default is not dataclasses.MISSING:
                    default = field.default if isinstance(field.default, tuple) else (field.default,)
                    help += f" ({','.join(map(str, default))})"
            name = field.name if argument.get("nargs") == "?" else _shown(field)
            parser.add_argument(name, default=argparse.SUPPRESS, help=help, **argument)

    @classmethod
    def of(cls: type[T], given: Mapping[str, Any], command: str) -> T:
        """Made of options by name; an error where one is unknown or missing."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                raise DNALError(f"there is no option {name!r}; see dnal {command} --help")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in given:
                raise DNALError(f"{_shown(field)} is missing; see dnal {command} --help")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspecting(Options):
    """The options of ``dnal inspect``."""

    input: tuple[tuple[int, ...], ...] = option(
        several(SHAPE, SHAPE.said),
        "shape of the input, as 1,3,224,224; once for every positional argument",
        metavar="SHAPE",
        action="append",
    )
    verify_seconds: float | None = option(
        NUMBER, "limit for comparing cut with gated copies; groups not compared by then are left whole", None, "SECONDS"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """The options of ``dnal compress``."""

    data: str = option(NAME, "a folder of images by class, or package.module:function for loaders", metavar="DATA")
    out: Path = option(FILE, "folder for the results; made if need be", metavar="DIR")
    flops: float | None = option(
        LIMIT, "FLOPs to keep: up to 1 a fraction, above 1 a number; if several, a run for each", None, "F", nargs="+"
    )
    params: float | None = option(LIMIT, "parameters to keep; of several options, all hold", None, "F", nargs="+")
    latency: float | None = option(LIMIT, "milliseconds of one input to keep", None, "MS", nargs="+")
    channel_multiple: int | None = option(
        whole(1), "channels are kept in multiples of N, or whole; else 8 on a GPU, for --latency and --onnx", None
    )
    input: tuple[int, ...] | None = option(SHAPE, "a folder's images get this size (1,3,224,224)", None, "SHAPE")
    search_epochs: int | None = option(
        whole(0), "epochs of a search ahead of the cut, in which the weights learn too; else 3 of a supernet, 0", None
    )
    epochs: int = option(whole(0), "epochs of fine-tuning", 10)
    lr: float = option(NUMBER, "learning rate of the weights in the search", 0.01, "LR")
    finetune_lr: float = option(NUMBER, "highest learning rate of fine-tuning", 0.01, "LR")
    keep_best: bool = option(FLAG, "keep the epoch of fine-tuning that tests best, not the last", False)
    batch_size: int = option(whole(1), "of a folder's images", 64)
    workers: int = option(whole(0, 1024), "processes that load a folder's images", 0)
    mean: tuple[float, ...] = option(
        NUMBERS, "of each colour of a folder's images, 0 to 1, as in their training", (0.485, 0.456, 0.406), "A,B,C"
    )
    std: tuple[float, ...] = option(NUMBERS, "likewise, the standard deviations", (0.229, 0.224, 0.225), "A,B,C")
    skip_unreadable: bool = option(FLAG, "leave out a folder's images that cannot be read; all are read first", False)
    seed: int = option(whole(0, 2**32 - 1), "of all random numbers", 0)
    device: str = option(NAME, "cpu, cuda, cuda:1, ...; auto is a GPU if there is one", "auto", "NAME")
    tensorboard: bool = option(FLAG, "write the search's curves for TensorBoard to OUT/tensorboard", False)
    onnx: bool = option(FLAG, "export the smaller network to OUT/slim.onnx, for one input", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise DNALError("--mean and --std: give as many numbers for one as for the other, and --std above 0")
        if min(self.mean) < 0 or max(*self.mean, *self.std) > 1:
            raise DNALError("--mean and --std: colours are numbers from 0 to 1 here: divide by 255")
        if self.flops is self.params is self.latency is None:
            raise DNALError("--flops, --params or --latency is missing, for example --flops 0.5")
        self.budget()

    def budget(self) -> Budget:
        """What the network may cost in the end."""
        try:
            return Budget(flops=self.flops, params=self.params, latency=self.latency)
        except DNALError as error:
            raise DNALError(f"{self.limits()}: {str(error).partition(': ')[2]}") from error

    def limits(self) -> str:
        """The budget as it was typed."""
        return " ".join(f"--{name} {value:.15g}" for name in LIMITS if (value := getattr(self, name)) is not None)
