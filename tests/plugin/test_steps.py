"""Counting the steps of an epoch: without a trace, and as many as a training makes."""

import copy
from typing import Any

import pytest
import torch
from evaluator_tools import CASES, Batches, Loops, Snapshot, initialised, loss_of, outputs_of, sgd, torch_evaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import TaylorPruner
from nni.compression.quantization import QATQuantizer
from nni.compression.utils import ForwardHook, TensorHook
from torch import nn

from dnal_nni import DNALError
from dnal_nni.plugin.evaluators import TorchEvaluator
from dnal_nni.plugin.steps import steps_per_epoch


def test_counting_evaluators_of_one_loop(small: nn.Module, batches: Batches) -> None:
    assert steps_per_epoch(initialised(torch_evaluator(small, batches), small), small, {}) == len(batches)


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")  # NNI's own patch, ours does not
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_counting_changes_nothing_and_agrees_with_training(name: str, bound: bool, small: nn.Module) -> None:
    loop, make, schedule, step, expected = CASES[name]
    optimizer = make(small)
    evaluator = TorchEvaluator(getattr(Loops(), loop), optimizer, step, schedule(optimizer))
    initialised(evaluator, small)
    trained: list[int] = []
    if bound:
        evaluator.bind_model(small, {})
        evaluator.patch_loss(lambda loss, batch: trained.append(0) or loss * 1.0)
        evaluator.patch_optimizer_step([], [lambda: trained.append(1)])
        hooks = [
            ForwardHook(small.fc, "fc", lambda kept: lambda *_: kept.append(1)),
            TensorHook(small.fc.bias, "bias", lambda kept: lambda grad: kept.append(1)),
        ]
        evaluator.register_hooks(hooks)
    small.bn1.eval()  # flags that differ from module to module
    small.stem.weight.grad = torch.ones_like(small.stem.weight)
    torch.manual_seed(5)
    before, held = Snapshot(small), dict(vars(evaluator))
    assert steps_per_epoch(evaluator, small, {}) == expected
    before.assert_same(small)
    assert held.keys() == vars(evaluator).keys() and all(held[k] is vars(evaluator)[k] for k in held)
    assert not trained
    if bound:
        assert not any(o.state for o in evaluator._optimizers) and not any(hook.buffer for hook in hooks)
        evaluator.train(None, 1)
        assert trained.count(1) == expected and trained.count(0) >= expected and all(hook.buffer for hook in hooks)


def test_counting_leaves_batches_that_are_kept_in_memory(small: nn.Module, batches: Batches) -> None:
    def step(batch: Any, model: nn.Module) -> Any:
        batch["images"].add_(1)
        return outputs_of(batch, model)

    def training(model: Any, optimizer: Any, training_step: Any, *_: Any) -> None:
        for batch in kept:
            training_step(batch, model)["loss"].backward()
            optimizer.step()

    kept = [{"images": images.clone(), "labels": labels} for images, labels in batches]
    assert steps_per_epoch(initialised(TorchEvaluator(training, sgd(small), step), small), small, {}) == len(batches)
    assert all(torch.equal(batch["images"], images) for batch, (images, _) in zip(kept, batches))


def test_counting_stops_with_a_reason_and_puts_back_after_errors(small: nn.Module, batches: Batches) -> None:
    with pytest.raises(DNALError, match="made no optimizer step in one epoch: check its data"):
        steps_per_epoch(initialised(torch_evaluator(small, []), small), small, {})

    def fails(model: Any, optimizer: Any, step: Any, *_: Any) -> None:
        model.eval()
        step(batches[0], model)
        model.fc.weight.data.zero_()
        raise RuntimeError("of the user")

    evaluator = initialised(TorchEvaluator(fails, sgd(small), loss_of), small)
    before = Snapshot(small)
    with pytest.raises(RuntimeError, match="of the user"):
        steps_per_epoch(evaluator, small, {})
    before.assert_same(small)
    evaluator = torch_evaluator(small, batches)
    evaluator._ori_training_step = lambda batch, model: 0.5
    with pytest.raises(DNALError, match="training_step returns a float: NNI takes a loss, a tuple"):
        steps_per_epoch(initialised(evaluator, small), small, {})


def fused(model: nn.Module, batches: Batches) -> tuple[Any, Any]:
    """Three compressors of NNI that learn in one training: all of its ways to step in."""
    teacher = copy.deepcopy(model)
    distiller = DynamicLayerwiseDistiller(
        model,
        [{"op_names": ["fc"], "target_names": ["_output_"], "lambda": 0.1, "apply_method": "mse"}],
        torch_evaluator(model, batches),
        teacher,
        lambda batch, teacher: teacher(batch[0]),
    )
    config = [{"op_names": ["conv2"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]
    quantizer = QATQuantizer.from_compressor(distiller, config, quant_start_step=2)
    pruner = TaylorPruner.from_compressor(quantizer, [{"op_names": ["stem"], "sparse_ratio": 0.5}], training_steps=6)
    return pruner, pruner.evaluator


def test_counting_beside_compressors_of_nni_is_as_if_it_had_not_been(small: nn.Module, batches: Batches) -> None:
    results = []
    for count in (0, 1):
        torch.manual_seed(0)
        model = copy.deepcopy(small)
        pruner, evaluator = fused(model, batches)
        names = pruner._get_param_names_map()
        evaluator.bind_model(model, names)
        for compressor in pruner.fused_compressors:
            compressor._fuse_preprocess(evaluator)
        for _ in range(2):  # fresh, and with a half-trained model under wrappers that have run
            for _ in range(count):
                before = Snapshot(model)
                assert steps_per_epoch(evaluator, model, names) == len(batches)
                before.assert_same(model)
            evaluator.train(None, 1)
        for compressor in pruner.fused_compressors:
            compressor._fuse_postprocess(evaluator)
        results.append((pruner.get_masks()["stem"]["weight"], {n: t.clone() for n, t in model.state_dict().items()}))
    (mask, tensors), (counted_mask, counted) = results
    assert 0 < mask.mean() < 1 and torch.equal(mask, counted_mask)
    assert "conv2._nni_wrapper._input_0_scale" in tensors and tensors.keys() == counted.keys()
    assert all(torch.equal(t, counted[n]) for n, t in tensors.items())
