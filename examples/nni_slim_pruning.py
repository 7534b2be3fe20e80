"""NNI's slim-pruning example, on scikit-learn's handwritten digits, with DNALPruner where SlimPruner stood.

    python examples/nni_slim_pruning.py --pruner slim      # NNI's SlimPruner, its masks cut by dnal_nni.speedup
    python examples/nni_slim_pruning.py --flops FRACTION   # DNALPruner, at the FLOPs that the first line ended with
    python examples/nni_slim_pruning.py                    # DNALPruner, for the same ratio of channels

Half a minute on one CPU core; nothing is downloaded. All but the lines under `args.pruner` is the same for both. A
ratio of channels says little about the size of a network, half of the channels may be the cheap or the dear half:
accuracies are comparable at equal FLOPs. On these digits every network ends at some 99 %, give or take two of the 500
images; right after the cut they differ.
"""

import argparse

import nni
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator
from nni.compression.pruning import SlimPruner
from quickstart import network
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from dnal_nni import Budget, DNALPruner, measure, speedup


def prepare_dataloader() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = random_split(data, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True, drop_last=True), DataLoader(test, batch_size=250)


def prepare_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return nni.trace(torch.optim.Adam)(model.parameters(), lr=0.003)


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, training_step, lr_scheduler, max_steps, max_epochs
) -> None:
    train_loader, _ = prepare_dataloader()
    max_steps = max_steps if max_steps is not None else max_epochs * len(train_loader)
    model.train()
    done = 0
    while done < max_steps:
        for batch in train_loader:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()
            done += 1
            if done == max_steps:
                return


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    model.eval()
    _, test_loader = prepare_dataloader()
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test_loader)
    return 100 * correct / len(test_loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruner", choices=["dnal", "slim"], default="dnal")
    parser.add_argument("--flops", type=float, help="fraction of the FLOPs that DNALPruner keeps, in place of a ratio")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="of training, of pruning and of fine-tuning, each")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the network is small
    dummy_input = torch.rand(8, 1, 8, 8)

    model = network()
    train(model, prepare_optimizer(model), training_step, None, None, args.epochs)
    whole = measure(model, dummy_input)
    print(f"Original model: {whole.params} parameters, {evaluate(model):.1f} %")

    config_list = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5, "global_group_id": 0, "max_sparse_ratio": 0.8}]
    evaluator = TorchEvaluator(train, prepare_optimizer(model), training_step, dummy_input=dummy_input)

    if args.pruner == "slim":
        pruner = SlimPruner(model, config_list, evaluator, training_steps=20 * args.epochs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        model = speedup(model, masks, dummy_input)
    else:
        if args.flops is not None:
            config_list = [{"op_types": ["BatchNorm2d"], "max_sparse_ratio": 0.8}]
        budget = None if args.flops is None else Budget(flops=args.flops)
        pruner = DNALPruner(model, config_list, evaluator, budget=budget)
        _, masks = pruner.compress(max_epochs=args.epochs)
        model = pruner.speedup()

    size = measure(model, dummy_input)
    share = f"{size.flops / whole.flops:.4f} of the FLOPs"
    print(f"Pruned model: {size.params} parameters, {evaluate(model):.1f} %, {share}")
    train(model, prepare_optimizer(model), training_step, None, None, args.epochs)
    print(f"Fine-tuned: {evaluate(model):.1f} %")


if __name__ == "__main__":
    main()
