"""YOLO networks of ultralytics at half of their FLOPs, chosen by norms without a search: what can be cut, and exactly?

    python benchmarks/yolo_cuts.py --out benchmarks/results/yolo_cuts.json

Needs ultralytics; random weights, 64 x 64 images; some ten minutes on one core. Every network is cut by
``DNALPruner.choose`` and run beside the gated one by ``speedup``, in eval and in train mode, as always. Goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch_pruning as tp
from provenance import provenance

from dnal_nni import Budget, DNALError, DNALPruner

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from yolo import YOLO, needed

NETWORKS = (
    "yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov9t", "yolov10n",
    "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls", "yolo12n", "yolo26n", "yolo26n-seg",
)  # fmt: skip


def cut(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    net, x = YOLO(f"{name}.yaml").model, torch.rand(1, 3, 64, 64)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    start = time.perf_counter()
    pruner = DNALPruner(
        net, [{"op_types": ["Conv2d"]}], dummy_input=x, outputs=needed, budget=Budget(flops=0.5), verify_seconds=120
    )
    built = time.perf_counter() - start
    pruner.choose(tp.importance.MagnitudeImportance())
    pruner.speedup()
    report = pruner.report
    return {
        "flops": [report.before.flops, report.after.flops],
        "params": [report.before.params, report.after.params],
        "relative_diff": report.relative_diff,
        "groups": len(report.groups),
        "whole": {group.name: group.frozen for group in report.groups if group.frozen is not None},
        "build_seconds": round(built, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/yolo_cuts.json"))
    args = parser.parse_args()
    path = args.out
    result = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    for name in args.networks:
        if name in result["networks"]:
            continue
        try:
            result["networks"][name] = cut(name)
        except DNALError as error:
            result["networks"][name] = {"error": str(error)}
        result["provenance"] = provenance("cpu", "torch", "ultralytics")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(name, {k: v for k, v in result["networks"][name].items() if k != "whole"}, flush=True)


if __name__ == "__main__":
    main()
