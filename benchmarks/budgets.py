"""Is a budget hit? `Budget(flops=0.5)` and `0.3` on classifiers of torchvision and timm, ten search steps each.

    python benchmarks/budgets.py                       # what benchmarks/results/budgets.jsonl lacks for this commit
    python benchmarks/budgets.py --only resnet18,timm_beit_base_patch16_224 --again

Random weights, random images of `zoo_models.py`'s sizes, a batch of two, one thread; every model in a process of its
own. One JSON line a model: fvcore's count of the cut network, as a share of the dense one's, and the seconds of the
plan (one for both budgets) and of the searches. A few seconds to two minutes a model on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from zoo import ROOT, run_isolated, run_many
from zoo_models import MODELS, Entry
from zoo_one import Record, plain

from dnal_nni import Budget, DNALError, measure
from dnal_nni.plan import Plan
from dnal_nni.session import Session

RESULTS = ROOT / "benchmarks" / "results" / "budgets.jsonl"
BUDGETS = (0.5, 0.3)
WITHIN = 0.01
STEPS = 10
TIMM = """
    beit_base_patch16_224 cait_xxs24_224 coatnet_pico_rw_224 convnext_atto cspresnet50 davit_tiny dla34 dpn68
    edgenext_xx_small efficientformer_l1 efficientnet_b0_gn fastvit_t8 ghostnet_100 hrnet_w18_small
    inception_next_atto levit_128s mixer_s32_224 mobilenetv4_conv_small mobilevit_xxs nest_tiny nf_resnet26 pit_ti_224
    poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 res2net50_26w_4s resnest14d swin_tiny_patch4_window7_224
    twins_svt_small vit_tiny_patch16_224 vovnet39a xcit_nano_12_p16_224
""".split()
NAMES = [
    *(name for name, entry in MODELS.items() if entry.source == "torchvision" and entry.task == "classification"),
    *(name for name in (f"timm_{name}" for name in TIMM) if name in MODELS),
]


def run_model(entry: Entry) -> Record:
    """Both budgets of one model."""
    torch.manual_seed(0)
    model = entry.build().train()
    (x,), labels = entry.inputs(4, torch.float32), torch.tensor([1, 2])
    record: Record = {"model": entry.name, "input": list(x.shape), "left": {}, "seconds": {}, "phase": "done"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        plan = Plan.of(model, x)
        record["seconds"]["plan"] = round(time.perf_counter() - start, 2)
        dense = measure(model, x).flops
        for share in BUDGETS:
            start = time.perf_counter()
            try:
                session = Session(model, plan.with_budget(Budget(flops=share)))
                with session.search(STEPS, progress=False) as search:
                    for _ in range(STEPS):
                        search.step(F.cross_entropy(_first(model(x)), labels))
                record["left"][str(share)] = round(measure(session.speedup(), x).flops / dense, 4)
                session.detach()
            except DNALError as error:
                record["left"][str(share)] = plain(str(error))
            record["seconds"][str(share)] = round(time.perf_counter() - start, 2)
    record["status"] = "hit" if hit(record) else "missed"
    return record


def _first(out: object) -> torch.Tensor:
    """The logits among what a classifier returns: torchvision's Inceptions return further ones, timm's VOLO too."""
    while not isinstance(out, torch.Tensor):
        out = out[0]  # type: ignore[index]
    return out


def hit(record: Record) -> bool:
    """Whether both budgets are met within 1 % of the dense network's FLOPs."""
    left = record["left"]
    return all(isinstance(left[str(b)], float) and abs(left[str(b)] - b) <= WITHIN for b in BUDGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also what the results have for this commit")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        print(json.dumps(run_model(MODELS[options.worker])), flush=True)
        return
    names = options.only.split(",") if options.only else NAMES
    run = functools.partial(run_isolated, script=__file__, wall=900.0)
    run_many([MODELS[name] for name in names], options.results, run, 1, options.again)


if __name__ == "__main__":
    main()
