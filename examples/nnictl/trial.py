"""One trial: train the quickstart's network on digits, search, cut and fine-tune it with the settings of NNI's tuner.

    python examples/nnictl/trial.py

Without NNI's server it takes DEFAULTS. Some five seconds on one CPU core, and about 98 % accuracy.
"""

import json
import sys
from pathlib import Path
from typing import Any

import nni
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from dnal_nni import Budget, DNALPruner

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the quickstart
from quickstart import accuracy, batches, digits, network, train

DEFAULTS = {"flops": 0.5, "search": {"_name": "default", "arch_lr": 1.0}}
EPOCHS = {"train": 5, "search": 4, "fine-tune": 4}


def run(flops: float, search: dict[str, Any]) -> dict[str, Any]:
    """Compress the network; reports the validation accuracy after each epoch of the search to NNI.

    Args:
        flops: fraction of the FLOPs to keep.
        search: DNALPruner's preset as "_name", and its arguments ``arch_lr`` and ``lambda_``.

    Returns:
        "default": validation accuracy in percent, which the tuner maximises. "flops": fvcore's count.
        Then the settings: NNI's own record of them can be that of another trial (microsoft/nni issue 5726).
    """
    torch.manual_seed(0)
    train_x, val_x, train_y, val_y = digits()
    model = network()
    train(model, batches(train_x, train_y, EPOCHS["train"], 0), 0.1, "train")

    preset, arguments = search["_name"], {name: value for name, value in search.items() if name != "_name"}
    pruner = DNALPruner(
        model,
        [{"op_types": ["Conv2d"]}],
        dummy_input=val_x[:1],
        budget=Budget(flops=flops),
        preset=preset,
        **arguments,
    )
    data = batches(train_x, train_y, EPOCHS["search"], 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    with pruner.search(steps=len(data), optimizer=None if preset == "paper" else optimizer) as steps:
        for i, (x, y) in enumerate(data, 1):
            model.train()
            steps.step(F.cross_entropy(model(x), y))
            if i % (len(data) // EPOCHS["search"]) == 0:
                nni.report_intermediate_result(accuracy(model, val_x, val_y))
    slim = pruner.speedup()
    update_bn(data[:20], slim)
    train(slim, batches(train_x, train_y, EPOCHS["fine-tune"], 2), 0.05, "fine-tune")
    result = {"default": accuracy(slim, val_x, val_y), "flops": pruner.report.after.flops}
    return result | {"budget": flops, "preset": preset} | arguments


def main() -> None:
    torch.set_num_threads(1)  # trials run side by side
    result = run(**(DEFAULTS | nni.get_next_parameter()))
    nni.report_final_result(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
