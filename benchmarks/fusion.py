"""What a training loss tells of the place of fusion in examples/multimodal.py.

    python benchmarks/fusion.py --seeds 0 1 2 --out benchmarks/results/multimodal

The operations and widths of late fusion by hand (conv5, 8 and 16 channels, concatenation), fused at each of the three
places of the space, trained for 15 epochs; once with the pairs of picture and sound as they are, once with pairs drawn
anew for every batch, as the example does. A search that learns from training losses can only tell what these tell.
Needs espeak-ng; about a minute on one core. Writes OUT/places.jsonl and OUT/places.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    import multimodal
    from multimodal_space import Space
    from nni.nas.space import model_context

PLACES = ("early", "middle", "late")
KINDS = {"depth": 1, "op": "conv5", "fusion": "concat", "width1": 8, "width2": 16, "hidden": 84}


def fused(place: str) -> torch.nn.Module:
    kinds = KINDS | {"place": place}
    sample = {label: next(value for kind, value in kinds.items() if kind in label) for label in Space().simplify()}
    with model_context(sample):
        return Space()


def as_they_are(x: Tensor, y: Tensor) -> Tensor:
    return x


@torch.no_grad()
def loss(model: torch.nn.Module, data: multimodal.Pairs) -> float:
    return float(F.cross_entropy(model.eval()(data.x), data.y))


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| pairs | fused | training loss | loss, held out | test accuracy (%) |", "|---|---|---|---|---|"]
    for pairs in ("fixed", "drawn anew"):
        for place in PLACES:
            rows = [run for run in runs if (run["pairs"], run["place"]) == (pairs, place)]
            means = (statistics.mean(row[name] for row in rows) for name in ("train_loss", "held_loss", "accuracy"))
            lines.append("| {} | {} | {:.4f} | {:.3f} | {:.1f} |".format(pairs, place, *means))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--cache", type=Path, default=Path("out/multimodal"), help="where the speech is kept")
    parser.add_argument("--out", type=Path, default=Path("out/fusion"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    anew, runs = multimodal.paired, []
    for seed in args.seeds:
        data = multimodal.pairs("spoken", args.cache, seed)
        for pairs, draw in (("fixed", as_they_are), ("drawn anew", anew)):
            multimodal.paired = draw
            for place in PLACES:
                torch.manual_seed(seed)
                model = fused(place)
                multimodal.train(model, data[0], args.epochs, seed)
                run = {"seed": seed, "pairs": pairs, "place": place, "epochs": args.epochs}
                run |= {"train_loss": loss(model, data[0]), "held_loss": loss(model, data[1])}
                run |= {"accuracy": multimodal.accuracy(model, data[2])}
                run |= {"flops": multimodal.measure(model, data[0].x[:1]).flops, "commit": multimodal.commit()}
                run |= {"versions": multimodal.versions(), "device": f"{platform.machine()} CPU, 1 thread"}
                runs.append(run)
                print(seed, pairs, place, f"{run['train_loss']:.4f} {run['accuracy']:.2f}", flush=True)
    (args.out / "places.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (args.out / "places.md").write_text(table(runs))


if __name__ == "__main__":
    main()
