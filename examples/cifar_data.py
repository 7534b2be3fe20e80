"""CIFAR-10 in memory: decoded once into one uint8 tensor, then augmented a whole batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm.auto import tqdm

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, RGB


class Images(NamedTuple):
    pixels: Tensor  # uint8 [images, 32, 32, 3]
    labels: Tensor  # int64 [images]
    classes: int

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def load_images(root: Path, train: bool, subset: int, download: bool) -> Images:
    """Decode one split; `subset` > 0 takes that many images, the same ones every time."""
    split = "train" if train else "test"
    source: CIFAR10 | ImageFolder
    if download or (root / CIFAR10.base_folder).is_dir():
        source = CIFAR10(str(root), train, download=download)
    elif (root / split).is_dir():
        source = ImageFolder(str(root / split))
    else:
        raise SystemExit(f"--data {root}: neither {split}/ nor {CIFAR10.base_folder}/ is there (or pass --download)")
    labels = torch.tensor(source.targets)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: subset or None]
    pixels = torch.empty(len(chosen), 32, 32, 3, dtype=torch.uint8)
    for row, index in enumerate(tqdm(chosen.tolist(), desc=f"decode {split}", leave=False)):
        image = np.array(source[index][0])
        if image.shape != (32, 32, 3):
            raise SystemExit(f"--data {root}: image {index} of {split}/ is {image.shape}, expected (32, 32, 3)")
        pixels[row] = torch.from_numpy(image)
    return Images(pixels, labels[chosen], len(source.classes))


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32]."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def augmented(pixels: Tensor, generator: torch.Generator, margin: int = 4, flips: bool = True) -> Tensor:
    """Pad by `margin`, crop at a random place, flip every second image or so; uint8 in and out.

    The generator may live on the device of the pixels: then nothing is copied to it.
    """
    count, size = pixels.shape[:2]
    device = generator.device
    top, left = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=generator, device=device)
    flip = torch.rand(count, 1, generator=generator, device=device) < (0.5 if flips else 0.0)
    steps = torch.arange(size, device=device)
    rows = (top + steps).to(pixels.device)
    columns = (left + torch.where(flip, steps.flip(0), steps)).to(pixels.device)
    padded = F.pad(pixels, (0, 0, margin, margin, margin, margin))
    images = torch.arange(count, device=pixels.device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches_per_epoch(images: Images, batch_size: int) -> int:
    return max(1, len(images.labels) // batch_size)  # the incomplete last batch is dropped


def training_batches(
    images: Images, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (float32 [batch, 3, 32, 32], int64 [batch]); the order and the crops depend on `seed` alone.

    Of several processes, each gets its share of every batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.labels), generator=generator)
    for step in range(batches_per_epoch(images, batch_size)):
        chosen = order[step * batch_size : (step + 1) * batch_size].to(images.labels.device)
        pixels = augmented(images.pixels[chosen], generator)
        yield normalised(pixels[rank::ranks]), images.labels[chosen][rank::ranks]
