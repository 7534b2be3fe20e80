"""TransformersEvaluator on the installed transformers, which are optional."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nni
import nni.compression as nnic
import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from evaluator_tools import Recorder, Snapshot, assert_same_gates, initialised, other, own_loop, searched, sgd
from nni.compression.pruning import TaylorPruner
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dnal_nni import Budget, DNALError, DNALPruner, measure
from dnal_nni.plugin.evaluators import check_evaluator, example_input, patch_steps, ready
from dnal_nni.plugin.shims import TransformersEvaluator
from dnal_nni.plugin.steps import steps_per_epoch


class Images(torch.utils.data.Dataset[Any]):
    def __init__(self, length: int = 22) -> None:
        generator = torch.Generator().manual_seed(4)
        self.images, self.length = torch.randn(length, 1, 16, 16, generator=generator), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.images[index], "labels": index % 10}


@pytest.fixture
def hf(tmp_path: Any) -> SimpleNamespace:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def model(kind: str = "ResNet") -> Any:
        torch.manual_seed(0)
        size = dict(num_channels=1, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
        extra = dict(embedding_size=8, layer_type="basic") if kind == "ResNet" else dict(num_stages=2, patch_size=2)
        config = getattr(transformers, f"{kind}Config")(**size, **extra)
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    def trainer(model: Any, optimizers: Any = (None, None), data: Any = None, also: Any = (), **arguments: Any) -> Any:
        quiet = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1)
        own = dict(per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.01)
        training = transformers.TrainingArguments(str(tmp_path), **{**quiet, **own, **arguments})
        return nni.trace(transformers.Trainer)(
            model=model, args=training, train_dataset=data or Images(), optimizers=optimizers, **dict(also)
        )

    return SimpleNamespace(library=transformers, model=model, trainer=trainer)


def scheduled(model: nn.Module) -> Any:
    optimizer = sgd(model)
    return optimizer, nni.trace(lr_scheduler.StepLR)(optimizer, 2, 0.5)


HF_OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "default": lambda m: (None, None),
    "traced": lambda m: (sgd(m), None),
    "scheduler": scheduled,
}


@pytest.mark.parametrize("kind", ["ResNet", "ConvNext"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", HF_OPTIMIZERS)
def test_transformers_trains_as_a_trainer_does(hf: SimpleNamespace, name: str, accumulate: int, kind: str) -> None:
    expected = {1: 6, 4: 2}[accumulate]
    plain, model = hf.model(kind), hf.model(kind)
    hf.trainer(plain, HF_OPTIMIZERS[name](plain), gradient_accumulation_steps=accumulate).train()
    trainer = hf.trainer(model, HF_OPTIMIZERS[name](model), gradient_accumulation_steps=accumulate)
    functions = dict(vars(hf.library.Trainer))
    evaluator = initialised(TransformersEvaluator(trainer), model)
    assert functions == dict(vars(hf.library.Trainer)) and trainer.optimizer_cls_and_kwargs is None
    before = Snapshot(model)
    assert steps_per_epoch(evaluator, model, {}) == expected
    before.assert_same(model)
    evaluator.bind_model(model, {})
    calls: list[int] = []
    evaluator.patch_loss(lambda loss, batch: loss * 1)
    evaluator.patch_optimizer_step([lambda: calls.append(0)], [lambda: calls.append(3)])
    patch_steps(evaluator, lambda: calls.append(1), lambda: calls.append(2))
    with ready(evaluator):
        evaluator.train(max_epochs=1)
    evaluator.unbind_model()
    assert calls == [1, 0, 3, 2] * expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


def test_transformers_passes_on_what_a_loss_is_divided_by_and_patches_no_evaluation(hf: SimpleNamespace) -> None:
    plain, model, patched = hf.model(), hf.model(), []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or 1)

    also = dict(compute_loss_func=loss, eval_dataset=Images(6))
    arguments = dict(gradient_accumulation_steps=4, eval_strategy="epoch", per_device_eval_batch_size=2)
    hf.trainer(plain, also=also, **arguments).train()
    evaluator = initialised(TransformersEvaluator(hf.trainer(model, also=also, **arguments)), model)
    evaluator.bind_model(model, {})
    evaluator.patch_loss(lambda loss, batch: patched.append(len(batch["pixel_values"])) or loss)
    evaluator.train(max_epochs=1)
    assert patched == [4, 4, 4, 4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


def test_a_search_in_transformers_sees_fresh_gradients(hf: SimpleNamespace) -> None:
    model = hf.model()
    trainer = hf.trainer(model, (sgd(model), None), max_steps=3, max_grad_norm=0.0)
    evaluator = initialised(TransformersEvaluator(trainer), model)
    for _ in range(2):  # no patch leaks from one run into the next
        evaluator.bind_model(model, {})
        recorder = Recorder(model.classifier[1].weight)
        evaluator.patch_loss(recorder.expect)
        patch_steps(evaluator, recorder.before, recorder.after)
        evaluator.train(max_epochs=2)  # not the 3 steps of the arguments
        assert recorder.steps == ["before", "after"] * 12
        evaluator.train(max_steps=2)
        assert recorder.steps == ["before", "after"] * 14
        arguments = evaluator.traced_trainer.args
        assert (arguments.max_steps, arguments.num_train_epochs) == (3, 1)
        evaluator.unbind_model()

    def fails(loss: Tensor, batch: Any) -> Tensor:
        raise RuntimeError("of the user")

    evaluator.bind_model(model, {})
    evaluator.patch_loss(fails)
    with pytest.raises(RuntimeError, match="of the user"):
        evaluator.train(max_epochs=2)
    assert (arguments.max_steps, arguments.num_train_epochs) == (3, 1)


def test_a_search_in_transformers_is_a_search_in_a_loop(hf: SimpleNamespace) -> None:
    model, twin, x = hf.model(), hf.model(), torch.randn(2, 1, 16, 16)
    evaluator = TransformersEvaluator(hf.trainer(model, (sgd(model), None)), dummy_input=x)
    assert example_input(initialised(evaluator, model)) is x
    seen: list[Any] = []
    evaluator.bind_model(model, {})
    evaluator.patch_loss(lambda loss, batch: seen.append({k: v.clone() for k, v in batch.items()}) or loss * 0.0)
    weights = copy.deepcopy(model.state_dict())
    evaluator.train(max_epochs=1)  # the Trainer's batches
    evaluator.unbind_model()
    model.load_state_dict(weights)
    found = searched(evaluator, model, x, 6, max_epochs=1)
    twin.train()
    assert_same_gates(found, own_loop(twin, x, lambda batch: twin(**batch).loss, seen))


def test_the_pruner_compresses_in_transformers(hf: SimpleNamespace) -> None:
    model, x = hf.model(), torch.randn(2, 1, 16, 16)
    evaluator = TransformersEvaluator(hf.trainer(model, (sgd(model), None)), dummy_input=x)
    pruner = DNALPruner(model, CONV, evaluator, budget=Budget(flops=0.5))
    pruner.compress(max_epochs=2)
    assert pruner.session.last is not None and pruner.session.last.done == pruner.session.last.steps == 12
    slim = pruner.speedup()
    assert measure(slim, x).flops / measure(hf.model(), x).flops == pytest.approx(0.5, rel=0.1)
    assert torch.allclose(slim.eval()(x).logits, model.eval()(x).logits, atol=1e-5)


def test_nnis_taylor_pruner_runs_in_transformers(hf: SimpleNamespace) -> None:
    model = hf.model()
    evaluator = TransformersEvaluator(hf.trainer(model))
    pruner = TaylorPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, training_steps=5)
    _, masks = pruner.compress()
    assert len(masks) > 3 and all(0 < mask["weight"].mean() < 1 for mask in masks.values())


def test_trainers_that_nni_cannot_use(hf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.model()

    def refused(message: str, trainer: Any) -> None:
        with pytest.raises(DNALError, match=message):
            check_evaluator(TransformersEvaluator(trainer), model)

    with pytest.raises(DNALError, match=r"does not run on transformers \d.*build it as dnal_nni.plugin.evaluators.T"):
        check_evaluator(nnic.TransformersEvaluator(hf.trainer(model)), model)
    refused("holds another model", hf.trainer(hf.model()))
    refused(r"untraced AdamW", hf.trainer(model, (torch.optim.AdamW(model.parameters()), None)))
    optimizer = sgd(model)
    refused("untraced StepLR", hf.trainer(model, (optimizer, lr_scheduler.StepLR(optimizer, 1))))
    refused("holds no parameter of the model", hf.trainer(model, (sgd(other()), None)))
    trainer = hf.trainer(model)
    trainer.args.load_best_model_at_end = True
    refused("load_best_model_at_end=True would undo the search", trainer)
    trainer = hf.trainer(model)
    trainer.model_init = hf.model
    refused("has a model_init, which would discard the gates", trainer)
    trainer = hf.trainer(model)
    trainer.is_fsdp_enabled = True
    refused("shards the model", trainer)
    trainer = hf.trainer(model)
    trainer.args._n_gpu = 2  # DataParallel, which transformers takes by itself where it finds two
    refused("uses several devices.*one device.*CUDA_VISIBLE_DEVICES=0", trainer)
    monkeypatch.setattr("dnal_nni.plugin.evaluators.version", lambda package: "4.46.3")
    refused("transformers 4.46.3 is installed: a TransformersEvaluator needs 4.57 or later", hf.trainer(model))


def test_transformers_without_a_length_asks_for_max_steps(hf: SimpleNamespace) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield Images(1)[0]

    model = hf.model()
    trainer = hf.trainer(model, data=Endless(), max_steps=4)
    evaluator = initialised(TransformersEvaluator(trainer), model)
    with pytest.raises(DNALError, match="train_dataset has no length: pass max_steps instead of max_epochs"):
        steps_per_epoch(evaluator, model, {})
    evaluator.bind_model(model, {})
    steps: list[int] = []
    patch_steps(evaluator, lambda: None, lambda: steps.append(1))
    evaluator.train(max_steps=3)
    assert len(steps) == 3
