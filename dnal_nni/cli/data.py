"""Data of the command line: a folder of images, or a function that returns loaders."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, has_file_allowed_extension
from torchvision.transforms import v2

from ..errors import DNALError, reason, told
from ..modules.running import FORWARD_ERRORS
from .settings import Settings
from .targets import load_callable

# what PIL raises for an image that is broken, or none
_UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError, *FORWARD_ERRORS)


class Loader(Protocol):
    """Batches ``(inputs, labels)``: a tensor whose first dimension is the batch, and int64 ``[batch]``."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class Data(NamedTuple):
    """Batches to train on and, where there are some, to test on; and what is to be said about them."""

    train: Loader
    test: Loader | None
    notes: list[str]


_OF_A_FOLDER = ("input", "batch_size", "workers", "mean", "std", "skip_unreadable")
_PARTS = ("train", "val", "test")
HELD_OUT = 10  # of a folder without a part to test on, every tenth image of each class


def check_out(settings: Settings) -> None:
    """Raise where the folder of the results would be taken for a class of the data."""
    folder, out = Path(settings.data), settings.out.resolve()
    for above in [folder / part for part in _PARTS] if (folder / "train").is_dir() else [folder]:
        if above.is_dir() and above.resolve() in (out, *out.parents):
            raise DNALError(f"--out {settings.out} is among the classes of {above}: choose a folder outside of it")


def loaders(settings: Settings) -> Data:
    """The data that the settings name.

    ``data`` is one of

    - a folder with ``train/CLASS/*.png`` and ``val/`` or ``test/`` beside ``train/``;
    - a folder ``CLASS/*.png``: every tenth image is held out to test on;
    - ``package.module:callable``, which returns ``(train, test)``, two loaders of ``(inputs, labels)``; test may be
      None.

    Raises:
        DNALError: where there is none of that, or no batch in it.
    """
    train: Any
    test: Any
    notes: list[str] = []
    if Path(settings.data).is_dir():
        train, test, notes = _folders(Path(settings.data), settings)
    else:
        if ":" not in settings.data:
            raise DNALError(f"there is no folder {settings.data}; a function is written package.module:function")
        made = load_callable(settings.data)
        with told(f"{settings.data}() fails"):
            pair = made()
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DNALError(f"{settings.data}() returns no pair (loader to train on, loader to test on or None)")
        train, test = pair
        unused = [name for name in _OF_A_FOLDER if getattr(settings, name) != getattr(Settings, name)]
        if unused:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            notes.append(f"not used, since {settings.data} gives what it gives: {given} (of a folder of images)")
    for what, loader in (("train", train), ("test", test)):
        if loader is None and what == "test":
            continue
        if not hasattr(loader, "__len__") or not hasattr(loader, "__iter__"):
            raise DNALError(f"{settings.data}: the {what} loader needs __iter__ and __len__, as a DataLoader has")
        if len(loader) == 0:
            raise DNALError(f"{settings.data}: the {what} loader gives no batch: it has fewer examples than one batch")
    return Data(train, test, notes)


def each(loader: Loader, name: str) -> Iterator[Any]:
    """The batches of a loader; what it raises, in this process or in its workers, is one sentence."""
    with told(f"the data of {name} cannot be read"):
        try:
            yield from loader
        except DNALError as error:
            raise DNALError(reason(error)) from error


def read_image(path: str) -> Image.Image:
    """In colour, as torchvision reads it; an error names the file."""
    try:
        return default_loader(path)
    except _UNREADABLE as error:
        raise DNALError(f"{path} cannot be read as an image: delete it, or give --skip-unreadable") from error


def _folders(folder: Path, settings: Settings) -> Data:
    shape = settings.input or (1, 3, 224, 224)
    if len(shape) != 4:
        raise DNALError(f"--input {','.join(map(str, shape))}: images need four numbers, for example 1,3,224,224")
    channels, height, width = shape[1:]
    mean, std = list(settings.mean), list(settings.std)
    if channels == 1 and len(mean) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) != channels:
        raise DNALError(f"--mean and --std have {len(mean)} numbers, the input {channels} channels")
    last: list[Any] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    first: list[Any] = [v2.Resize((height, width)), *([v2.Grayscale()] if channels == 1 else [])]
    flipped, plain = v2.Compose([*first, v2.RandomHorizontalFlip(), *last]), v2.Compose([*first, *last])
    unreadable: list[str] = []

    def is_image(path: str) -> bool:
        if not has_file_allowed_extension(path, IMG_EXTENSIONS):
            return False
        try:
            return not settings.skip_unreadable or read_image(path) is not None
        except DNALError:
            unreadable.append(path)
            return False

    with told(f"{folder} is no folder of images by class", (OSError, RuntimeError)):
        if (folder / "train").is_dir():
            others = [name for name in _PARTS[1:] if (folder / name).is_dir()]
            if not others:
                raise DNALError(f"{folder} has a train/, but neither val/ nor test/ beside it")
            train: Any = ImageFolder(str(folder / "train"), flipped, loader=read_image, is_valid_file=is_image)
            test: Any = ImageFolder(str(folder / others[0]), plain, loader=read_image, is_valid_file=is_image)
            if train.classes != test.classes:
                odd = sorted(set(train.classes) ^ set(test.classes))[0]
                raise DNALError(f"{folder}: the class {odd} is not in both train/ and {others[0]}/")
        else:
            train = ImageFolder(str(folder), flipped, loader=read_image, is_valid_file=is_image)
            test = copy.copy(train)
            test.transform = plain
            held = set(range(0, len(train), HELD_OUT))
            if len(held) == len(train):
                raise DNALError(f"{folder} has {len(train)} image, which is held out to test on: give more to train on")
            train, test = Subset(train, [i for i in range(len(train)) if i not in held]), Subset(test, sorted(held))
    classes: list[str] = getattr(train, "dataset", train).classes
    if len(classes) == 1:
        raise DNALError(f"{folder} has one class only, {classes[0]}: give the folder that has a folder for each class")
    more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    notes = [f"left out, since unreadable: {', '.join(unreadable[:3])}{more}"] if unreadable else []
    size = settings.batch_size
    # a last batch of one image has no batch statistics
    drop = len(train) > size
    common: dict[str, Any] = {"batch_size": size, "num_workers": settings.workers}
    return Data(DataLoader(train, shuffle=True, drop_last=drop, **common), DataLoader(test, **common), notes)
