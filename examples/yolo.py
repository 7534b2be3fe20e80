"""Cut a YOLO of ultralytics to half of its FLOPs, with ultralytics' own train, val, save and export around it.

    python examples/yolo.py --out out/yolo                                             # YOLOv8n, on drawn shapes
    python examples/yolo.py --model yolo11n.pt --data coco128.yaml --imgsz 640 --epochs 0 --out out/yolo11n

Needs ultralytics (pip install ultralytics onnx onnxruntime). The first takes some three minutes on one CPU core and
downloads nothing: images of squares, discs and bars are drawn to OUT/shapes. With --epochs 0 the network's own weights
are where it starts. Writes OUT/cut.pt, a checkpoint for YOLO(...), OUT/cut.onnx, and OUT/report.html.
docs/yolo.md says what each step is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules import C2f

from dnal_nni import Budget, DNALPruner


class KeepsWidths:
    """For any trainer of ultralytics: trains the network that it is given.

    Without it, ``model.train()`` builds the network anew from its yaml, at full width, and loads what fits: nothing.
    """

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """The cut network itself."""
        if weights is None:
            raise ValueError("give it the cut network: YOLO('cut.pt').train(trainer=CutTrainer, ...)")
        if weights.nc != self.data["nc"]:
            raise ValueError(f"the network has {weights.nc} classes, {self.args.data} has {self.data['nc']}")
        return weights


class CutTrainer(KeepsWidths, DetectionTrainer):
    """``YOLO("cut.pt").train(trainer=CutTrainer, ...)``; the same goes for SegmentationTrainer and the others."""


def needed(out: Any) -> Any:
    """What a YOLO returns but for the features beside its predictions, which nobody reads: they may lose channels."""
    if isinstance(out, dict):
        return {name: needed(value) for name, value in out.items() if name != "feats"}
    return [needed(value) for value in out] if isinstance(out, (tuple, list)) else out


def search(net: nn.Module, data: str, imgsz: int, batch: int, epochs: int, budget: Budget, lr: float) -> DNALPruner:
    """Learn the widths of ``net`` while its weights go on learning, on ultralytics' data and with its loss."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".dfl." not in name)  # checkpoints of ultralytics hold everything frozen
    kinds = [{"op_types": ["Conv2d", "ConvTranspose2d"]}]  # the second: of segmentation
    pruner = DNALPruner(net, kinds, dummy_input=torch.rand(1, 3, imgsz, imgsz), outputs=needed, budget=budget)
    description = check_det_dataset(data)
    net.args = get_cfg(overrides={"imgsz": imgsz, "task": "detect", "mosaic": 0})  # augmentation, gains of the loss
    images = build_yolo_dataset(net.args, description["train"], batch, description)
    loader = build_dataloader(images, batch, workers=0)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr)
    net.train()
    with pruner.search(epochs * len(loader), optimizer=optimizer) as run:
        while run.done < run.steps:
            for found in loader:
                found["img"] = found["img"].float() / 255
                loss, _ = net(found)  # by parts; a batch of ultralytics goes in, its loss comes out
                run.step(loss.sum())
    net.criterion = None
    return pruner


def ready(net: nn.Module) -> nn.Module:
    """The cut network, with the ``c`` by which export takes a C2f apart (its own forward chunks) as wide as it is."""
    for module in net.modules():
        if isinstance(module, C2f):
            module.c = module.cv1.conv.out_channels // 2
    return net


def shapes(folder: Path, size: int, train: int = 96, val: int = 32) -> Path:
    """Images of one to three squares, discs and bars on noise, with their boxes, as ultralytics wants them."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = Image.fromarray(random.integers(0, 90, (size, size, 3), dtype=np.uint8))
            draw, lines = ImageDraw.Draw(image), []
            for _ in range(random.integers(1, 4)):
                kind, side = int(random.integers(3)), int(random.integers(size // 5, size // 2))
                wide = side if kind < 2 else max(6, side // 4)
                x, y = (int(random.integers(0, size - extent)) for extent in (wide, side))
                colour = tuple(int(c) for c in random.integers(140, 255, 3))
                paint = draw.ellipse if kind == 1 else draw.rectangle
                paint((x, y, x + wide - 1, y + side - 1), fill=colour)
                box = (x + wide / 2, y + side / 2, wide, side)
                lines.append(f"{kind} " + " ".join(f"{value / size:.6f}" for value in box))
            image.save(folder / "images" / part / f"{i}.png")
            (folder / "labels" / part / f"{i}.txt").write_text("\n".join(lines))
    page = folder / "shapes.yaml"
    page.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: [square, disc, bar]\n")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov8n.yaml", help="a checkpoint, or a yaml, which starts at random")
    parser.add_argument("--data", help="a data set's yaml; without, shapes are drawn")
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30, help="of ultralytics' training ahead of the search")
    parser.add_argument("--search-epochs", type=int, default=6)
    parser.add_argument("--finetune-epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the weights in the search")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("out/yolo"))
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.data or str(shapes(args.out / "shapes", args.imgsz))
    common = {"data": data, "imgsz": args.imgsz, "batch": args.batch, "plots": False, "workers": 0, "verbose": False}
    training = {**common, "project": str(args.out.resolve()), "exist_ok": True}
    if not args.data:  # few and small images, so many and large steps
        training |= {"optimizer": "AdamW", "lr0": 0.003, "nbs": args.batch, "mosaic": 0, "warmup_epochs": 1}

    yolo = YOLO(args.model)
    if args.epochs:
        yolo.train(**training, epochs=args.epochs, name="dense")
    yolo.save(args.out / "dense.pt")
    before = 100 * YOLO(args.out / "dense.pt").val(**common).box.map50  # val() fuses what it is called on

    pruner = search(yolo.model, data, args.imgsz, args.batch, args.search_epochs, Budget(flops=args.flops), args.lr)
    yolo.model = ready(pruner.speedup())
    yolo.save(args.out / "cut.pt")
    cut = 100 * YOLO(args.out / "cut.pt").val(**common).box.map50
    if args.finetune_epochs:
        yolo = YOLO(args.out / "cut.pt")
        yolo.train(**training, epochs=args.finetune_epochs, name="cut", trainer=CutTrainer)
        yolo.save(args.out / "cut.pt")
    after = 100 * YOLO(args.out / "cut.pt").val(**common).box.map50

    report = pruner.report
    report.notes.append("accuracy is mAP50")
    report.accuracy, report.accuracy_cut = (before, after), cut
    (args.out / "report.html").write_text(report.to_html())
    print(report)
    exported = YOLO(args.out / "cut.pt").export(format="onnx", imgsz=args.imgsz, simplify=False)
    print(f"written: {args.out / 'cut.pt'}, {exported}, {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
