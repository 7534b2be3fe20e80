"""DNAL in one training with NNI's other compressors."""

import copy
from typing import Any

import nni
import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from nni.compression import TorchEvaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, L1NormPruner, TaylorPruner
from nni.compression.quantization import QATQuantizer
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, measure, speedup

Batches = list[tuple[Tensor, Tensor]]
HALF = Budget(flops=0.5)
QUANTIZED = [
    {"op_types": ["Conv2d"], "quant_dtype": "int8", "target_names": ["_input_", "weight"]},
    {"op_types": ["BatchNorm2d"], "quant_dtype": "int8", "target_names": ["_output_"]},
]


class Run:
    """An evaluator on some batches; counts the steps and keeps the losses."""

    def __init__(self, model: nn.Module, batches: Batches, lr: float = 0.01) -> None:
        self.steps = 0
        self.losses: list[float] = []

        def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
            for step in range(max_steps if max_steps is not None else max_epochs * len(batches)):
                optimizer.zero_grad()
                loss = training_step(batches[step % len(batches)], model)
                loss.backward()
                optimizer.step()
                self.steps += 1
                self.losses.append(float(loss.detach()))

        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=lr, momentum=0.9)
        self.evaluator = TorchEvaluator(
            training,
            optimizer,
            lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]),
            dummy_input=batches[0][0],
        )


def distilled(model: nn.Module, evaluator: TorchEvaluator | None) -> DynamicLayerwiseDistiller:
    config = [{"op_types": ["Linear"], "lambda": 1e4, "apply_method": "kl"}]
    return DynamicLayerwiseDistiller(
        model, config, evaluator, copy.deepcopy(model).eval(), lambda batch, teacher: teacher(batch[0])
    )


def smaller(model: nn.Module, slim: nn.Module, x: Tensor) -> float:
    return measure(slim, x).flops / measure(model, x).flops


def test_a_distiller_before(small: nn.Module, x: Tensor, batches: Batches) -> None:
    run = Run(small, batches)
    pruner = DNALPruner.from_compressor(distilled(small, run.evaluator), CONV, budget=HALF)
    assert hasattr(small.fc, "_nni_wrapper") and pruner.evaluator is run.evaluator
    model, masks = pruner.compress(max_steps=60)
    assert run.steps == 60 and pruner.session.last is not None and pruner.session.last.done == 60
    slim = pruner.speedup()
    assert smaller(type(small)(), slim, x) == pytest.approx(0.5, rel=0.06)
    # the distiller's loss was in it
    torch.manual_seed(0)
    alone = type(small)()
    other = Run(alone, batches)
    DNALPruner(alone, CONV, other.evaluator, budget=HALF).compress(max_steps=60)
    assert sum(run.losses[:9]) > sum(other.losses[:9]) and masks.keys() == {"stem", "conv1", "conv2", "last"}
    pruner.unwrap_model()
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_a_quantizer_after(small: nn.Module, x: Tensor, batches: Batches) -> None:
    dense = copy.deepcopy(small)
    run = Run(small, batches)
    pruner = DNALPruner(small, CONV, run.evaluator, budget=HALF)
    quantizer = QATQuantizer.from_compressor(pruner, QUANTIZED)
    _, calibration = quantizer.compress(max_steps=60, max_epochs=None)
    assert run.steps == 60 and set(calibration) >= {"stem", "conv1", "bn1"}
    masks = pruner.get_masks()
    slim = pruner.speedup()  # of the model under the quantizer's wrappers, which it gets back
    assert smaller(dense, slim, x) == pytest.approx(0.5, rel=0.06) and hasattr(small.stem, "_nni_wrapper")
    assert not any(hasattr(module, "_nni_wrapper") for module in slim.modules())
    quantizer.unwrap_model()
    again = speedup(small, masks, x)
    assert all(torch.equal(a, b) for a, b in zip(slim.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(slim.fc.weight[:, 0], dense.fc.weight[:, 0])  # trained, not put back


def test_distiller_pruner_quantizer(small: nn.Module, x: Tensor, batches: Batches) -> None:
    dense = copy.deepcopy(small)
    run = Run(small, batches)
    pruner = DNALPruner.from_compressor(distilled(small, run.evaluator), CONV, budget=HALF)
    quantizer = QATQuantizer.from_compressor(pruner, QUANTIZED)
    quantizer.compress(max_steps=60, max_epochs=None)
    quantizer.unwrap_model()
    assert run.steps == 60 and smaller(dense, pruner.speedup(), x) == pytest.approx(0.5, rel=0.06)


def test_in_nnis_order_with_the_distiller_last(small: nn.Module, x: Tensor, batches: Batches) -> None:
    dense = copy.deepcopy(small)
    run = Run(small, batches)
    pruner = DNALPruner(small, CONV, run.evaluator, budget=HALF)
    config = [{"op_types": ["Linear"], "lambda": 0.5, "apply_method": "kl"}]
    distiller = DynamicLayerwiseDistiller.from_compressor(
        pruner, config, copy.deepcopy(dense).eval(), lambda batch, teacher: teacher(batch[0])
    )
    distiller.compress(max_steps=None, max_epochs=6)
    assert pruner.session.last is not None and pruner.session.last.done == pruner.session.last.steps == 48
    distiller.unwrap_model()
    assert smaller(dense, pruner.speedup(), x) == pytest.approx(0.5, rel=0.06)
    pruner.unwrap_model()
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), small.state_dict().values(), strict=True))


def test_quantized_norms_are_left_to_the_quantizer(small: nn.Module, x: Tensor, batches: Batches) -> None:
    run = Run(small, batches)
    pruner = DNALPruner(small, CONV, run.evaluator, budget=HALF)
    assert pruner.groups[0].site == "norm"
    config = [{"op_types": ["BatchNorm2d"], "quant_dtype": "int8", "target_names": ["weight"]}]
    quantizer = QATQuantizer.from_compressor(pruner, config)
    quantizer.compress(max_steps=30, max_epochs=None)
    assert pruner.groups[0].site == "input"
    quantizer.unwrap_model()
    pruner.speedup()


def test_another_pruner_in_the_same_training(small: nn.Module, x: Tensor, batches: Batches) -> None:
    run = Run(small, batches)
    pruner = DNALPruner(small, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], run.evaluator)
    taylor = TaylorPruner.from_compressor(pruner, [{"op_names": ["last"], "sparse_ratio": 0.5}], training_steps=5)
    _, masks = taylor.compress(max_steps=30, max_epochs=None)
    taylor.unwrap_model()
    assert not bool(masks["last"]["weight"].all())
    both = {**masks, **pruner.get_masks()}
    slim = speedup(small, both, x)
    assert (slim.conv1.out_channels, slim.last.out_channels) == (4, 8)


def test_an_error_in_a_fused_training_leaves_the_evaluator_usable(small: nn.Module, batches: Batches) -> None:
    run = Run(small, batches, lr=1e30)
    pruner = DNALPruner.from_compressor(distilled(small, run.evaluator), CONV, budget=HALF)
    with pytest.raises(DNALError, match="the loss is nan or infinite"):
        pruner.compress(max_steps=20)
    assert run.evaluator.model is None and "train" not in vars(run.evaluator)
    pruner.unwrap_model()
    assert all(bool(value.isfinite().all()) for value in small.state_dict().values())


def test_a_training_that_ends_early_is_told(
    small: nn.Module, x: Tensor, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(small, batches)
    whole = run.evaluator.training_func
    run.evaluator.training_func = lambda *args: whole(*args[:-2], 5, None)
    pruner = DNALPruner(small, CONV, run.evaluator, budget=HALF)
    pruner.compress(max_steps=40)
    assert "the training ended after 5 of the 40 steps" in caplog.text
    assert smaller(type(small)(), pruner.speedup(), x) == pytest.approx(0.5, rel=0.06)


def test_scheduled_pruners_are_refused(small: nn.Module, batches: Batches) -> None:
    pruner = DNALPruner(small, CONV, Run(small, batches).evaluator, budget=HALF)
    with pytest.raises(DNALError, match="has its own schedule.*not inside AGPPruner"):
        AGPPruner(pruner, interval_steps=1, total_times=2)


def test_a_pruned_model_under_an_own_wrapper_is_refused(small: nn.Module, x: Tensor) -> None:
    L1NormPruner(small, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(DNALError, match="already wrapped by another NNI compressor: call its unwrap_model"):
        DNALPruner(small, CONV, dummy_input=x)


def kwargs(**values: Any) -> dict[str, Any]:
    return values


@pytest.mark.parametrize("steps", [kwargs(), kwargs(max_steps=3, max_epochs=1)])
def test_one_length_is_needed(small: nn.Module, batches: Batches, steps: dict[str, int]) -> None:
    pruner = DNALPruner(small, CONV, Run(small, batches).evaluator, budget=HALF)
    with pytest.raises(DNALError, match="exactly one of max_steps and max_epochs"):
        pruner.compress(**steps)
