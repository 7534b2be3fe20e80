"""Other people's networks, from PyPI: as `zoo.py` has it, of the packages that are installed.

    pip install --no-deps segmentation-models-pytorch monai ultralytics pytorchcv facenet-pytorch open_clip_torch \\
        efficientnet-pytorch
    python benchmarks/zoo_others.py                   # what benchmarks/results/zoo_others.jsonl lacks for this commit
    python benchmarks/zoo_others.py --only smp_unet_resnet18 --again
    python benchmarks/zoo_others.py --table           # -> docs/models-others.md

Random weights, small inputs; transformers at small configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from zoo import ROOT, load, run_isolated, run_many, worker
from zoo_models import Entry
from zoo_one import VERIFY_SECONDS, run_model
from zoo_table import commits, summary

RESULTS = ROOT / "benchmarks" / "results" / "zoo_others.jsonl"
TABLE = ROOT / "docs" / "models-others.md"
WALL = 240.0

Maker = Callable[[], nn.Module]


@dataclasses.dataclass(frozen=True)
class Other(Entry):
    """A network that ``maker`` builds."""

    maker: Maker = nn.Identity

    def build(self) -> nn.Module:
        return self.maker()


def _of(path: str, *args: Any, **kwargs: Any) -> Maker:
    """A call of ``package.module:name``, imported when it is built."""

    def build() -> nn.Module:
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return build


class Yolo(nn.Module):
    """A detector's raw predictions in both modes; without its decoding, which keeps tensors between calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from ultralytics import YOLO

        self.model = YOLO(f"{name}.yaml").model

    def forward(self, x: Tensor) -> Any:
        out = self.model(x)
        return out[1] if isinstance(out, tuple) else out


class Transformer(nn.Module):
    """The tensors that one of transformers' models returns first."""

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, settings["config"])
        self.model = getattr(transformers, kind)(config(**{k: v for k, v in settings.items() if k != "config"}))

    def forward(self, x: Tensor) -> Any:
        return self.model(x)[0]


SMP = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "PAN")
MONAI: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "UNet": ((1, 1, 32, 32, 32), {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}),
    "SegResNet": ((1, 1, 32, 32, 32), {"init_filters": 8, "blocks_down": (1, 2, 2), "blocks_up": (1, 1)}),
    "DynUNet": (
        (1, 1, 32, 32, 32),
        {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]},
    ),
    "VNet": ((1, 1, 32, 32, 32), {}),
    "DenseNet121": ((4, 1, 32, 32, 32), {}),  # its last map is one voxel: norms need several examples
}
TRANSFORMERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet": (
        "ResNetForImageClassification",
        (2, 3, 64, 64),
        {"config": "ResNetConfig", "embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        (2, 3, 64, 64),
        {"config": "ConvNextConfig", "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        (2, 3, 64, 64),
        {"config": "MobileViTConfig", "image_size": 64, "neck_hidden_sizes": [16, 16, 32, 48, 64, 80, 160]},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        (2, 3, 64, 64),
        {
            "config": "SegformerConfig",
            "hidden_sizes": [16, 32, 64, 96],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 48,
        },
    ),
    **{
        name: (
            f"{kind}ForImageClassification",
            (2, 3, 64, 64),
            {
                "config": f"{kind}Config",
                "image_size": 64,
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                **more,
            },
        )
        for name, kind, more in (
            ("vit", "ViT", {"intermediate_size": 192}),
            ("deit", "DeiT", {"intermediate_size": 192}),
            ("dinov2", "Dinov2", {"patch_size": 16}),
        )
    },
    "swin": (
        "SwinForImageClassification",
        (2, 3, 64, 64),
        {
            "config": "SwinConfig",
            "image_size": 64,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "whisper_encoder": (
        "WhisperForAudioClassification",
        (2, 80, 200),
        {
            "config": "WhisperConfig",
            "d_model": 96,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "max_source_positions": 100,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        (2, 4000),
        {
            "config": "Wav2Vec2Config",
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "conv_dim": (64,) * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "attention_dropout": 0.0,  # inside of the fused kernel it draws for every head
        },
    ),
}
PYTORCHCV = """
    resnet10 preresnet10 resnext26_32x4d seresnet10 senet16 cbam_resnet18 bam_resnet18 ibn_resnet50 airnet50_1x64d_r2
    condensenet74_c4_g4 sparsenet121 pyramidnet101_a360 dpn68 shufflenet_g3_w1 menet108_8x1_g3 mobilenet_w1 igcv3_w1
    mnasnet_b1 darknet53 dla34 hrnet_w18_small_v1 bagnet9 peleenet squeezenet_v1_0
    """.split()


def _others() -> Iterator[Other]:
    def other(name: str, source: str, shape: tuple[int, ...], maker: Maker) -> Other:
        return Other(name, source, name, "classification", shape, maker=maker)

    for architecture in SMP:
        for encoder in ("resnet18", "mobilenet_v2"):
            if (architecture, encoder) == ("PAN", "mobilenet_v2"):
                encoder = "resnet34"
            maker = _of(f"segmentation_models_pytorch:{architecture}", encoder, encoder_weights=None)
            size = 256 if architecture == "PAN" else 64  # it pools a map of a thirty-second three times
            shape = (2, 3, size, size)
            yield other(f"smp_{architecture.lower()}_{encoder}", "segmentation_models_pytorch", shape, maker)
    for name, (shape, settings) in MONAI.items():
        dims = {} if name == "VNet" else {"spatial_dims": 3}
        outputs = {"out_channels": 2} if name != "VNet" else {}
        inputs = {"in_channels": 1} if name != "VNet" else {}
        maker = _of(f"monai.networks.nets:{name}", **{**dims, **inputs, **outputs, **settings})
        yield other(f"monai_{name.lower()}", "monai", shape, maker)
    for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n"):
        yield other(name, "ultralytics", (2, 3, 64, 64), functools.partial(Yolo, name))
    for name, (kind, shape, settings) in TRANSFORMERS.items():
        yield other(f"transformers_{name}", "transformers", shape, functools.partial(Transformer, kind, settings))
    for name in PYTORCHCV:
        yield other(f"pytorchcv_{name}", "pytorchcv", (2, 3, 224, 224), _of("pytorchcv.model_provider:get_model", name))
    facenet = _of("facenet_pytorch:InceptionResnetV1", pretrained=None)
    yield other("facenet_inception_resnet_v1", "facenet_pytorch", (2, 3, 128, 128), facenet)
    yield other("efficientnet_pytorch_b0", "efficientnet_pytorch", (2, 3, 64, 64), _efficientnet)
    clip = _of(
        "open_clip.modified_resnet:ModifiedResNet", layers=(1, 1, 1, 1), output_dim=64, heads=8, image_size=64, width=32
    )
    yield other("open_clip_modified_resnet", "open_clip", (2, 3, 64, 64), clip)


def _efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0")


OTHERS = {entry.name: entry for entry in _others()}


def table() -> str:
    """The results as a page of the documentation."""
    records = load(RESULTS)
    rows = [records[name] for name in OTHERS if name in records]
    lines = [
        "# Other people's networks",
        "",
        "Written by `python benchmarks/zoo_others.py --table` from `benchmarks/results/zoo_others.jsonl`; do not edit.",
        "",
        f"{summary(rows)}. Columns as in [Models](models.md). Package commit {commits(rows)}.",
        "",
        "| network | of | input | groups | FLOPs left | difference | seconds | left whole because |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        groups, flops = row.get("groups", {}), row.get("flops", {})
        gap = max(row.get("relative", {}).values(), default=None)
        cells = [
            row["model"],
            OTHERS[row["model"]].source,
            "x".join(map(str, row["input"])),
            f"{groups['gated']} / {groups['all']}" if groups else "-",
            f"{flops['left']:.2f}" if "left" in flops else "-",
            row["status"] if gap is None or row["status"] != "exact" else f"{gap:.0e}",
            f"{row['wall_seconds']:.0f}",
            ", ".join(f"{reason} ({n})" for reason, n in row.get("reasons", {}).items() if reason != "model output")
            or row.get("error", ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also what is there for this commit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write docs/models-others.md and run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=VERIFY_SECONDS, help="limit of each verification")
    args = parser.parse_args()
    if args.worker:
        worker(lambda report: run_model(OTHERS[args.worker], args.seconds, report))
    elif args.table:
        TABLE.write_text(table())
    else:
        names = [name for name in args.only.split(",") if name] or list(OTHERS)
        run = functools.partial(run_isolated, seconds=args.seconds, wall=WALL, script=__file__)
        records = run_many((OTHERS[name] for name in names), args.out, run, 1, args.again)
        print(summary([records[name] for name in OTHERS if name in records]))


if __name__ == "__main__":
    main()
