import copy
import subprocess
import sys
from typing import Any

import nni
import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from nni.compression import TorchEvaluator
from nni.compression.base.compressor import Pruner
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, measure, save_compressed, speedup
from dnal_nni.search.schedule import delta_paper, delta_per_step

Batches = list[tuple[Tensor, Tensor]]


def run(pruner: DNALPruner, model: nn.Module, batches: Batches, steps: int, **kwargs: Any) -> None:
    with pruner.search(steps, progress=False, **kwargs) as search:
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            search.step(F.cross_entropy(model(images), labels))


def evaluator(model: nn.Module, batches: Batches) -> TorchEvaluator:
    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        done = 0
        for _ in range(max_epochs or 1000):
            for batch in batches:
                if max_steps is not None and done >= max_steps:
                    return
                optimizer.zero_grad()
                training_step(batch, model).backward()
                optimizer.step()
                done += 1

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    return TorchEvaluator(training, optimizer, lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]))


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_the_budget_is_hit_and_the_gates_decide(small: nn.Module, x: Tensor, batches: Batches, fraction: float) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=fraction))
    run(pruner, small, batches, 300)
    slim = pruner.speedup()
    got = measure(slim, x).flops / measure(small, x).flops
    assert got == pytest.approx(fraction, rel=0.06)  # one unit of this tiny net is 5 % of it
    assert pruner.report.decided is not None and pruner.report.decided >= 0.9
    assert pruner.report.max_abs_diff is not None and pruner.report.max_abs_diff < 1e-5
    assert torch.allclose(small.eval()(x), slim.eval()(x), atol=1e-5)
    assert "target" in str(pruner.report) and "left whole" in str(pruner.report)
    assert "<td>conv1</td>" in pruner.report.to_html()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "mobilenet_v2"])
def test_the_budget_is_hit_on_cifar_networks(name: str) -> None:
    from cifar_models import MODELS

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for fraction in (0.3, 0.5, 0.7):
        model = MODELS[name](10, 1.0)
        pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=fraction))
        run(pruner, model, [(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))], 300)
        slim = pruner.speedup()
        pruner.unwrap_model()
        assert measure(slim, x).flops / measure(model, x).flops == pytest.approx(fraction, rel=0.01)
        assert pruner.report.decided is not None and pruner.report.decided >= 0.9


def test_same_seed_same_architecture(x: Tensor, batches: Batches, small: nn.Module) -> None:
    kept = []
    for _ in range(2):
        model = copy.deepcopy(small)
        pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
        run(pruner, model, batches, 40)
        pruner.harden()
        kept.append(torch.cat([gate.mask for gate in pruner.gates.values()]))
    assert torch.equal(*kept)


def test_frozen_weights_stand_still_and_unwrap_restores(small: nn.Module, x: Tensor, batches: Batches) -> None:
    before = copy.deepcopy(small.state_dict())
    parameters = list(small.parameters())
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(params=0.5))
    run(pruner, small, batches, 20)
    for name, value in small.named_parameters():
        assert torch.equal(value, before[name.replace(".parametrizations", "").removesuffix(".original")])
    run(pruner, small, batches, 20, optimizer=torch.optim.SGD(small.parameters(), 0.1))
    assert not torch.equal(small.fc.weight, before["fc.weight"])
    pruner.unwrap_model()
    after = small.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(a is b for a, b in zip(parameters, small.parameters())) and all(p.requires_grad for p in parameters)


def test_resumed_equals_uninterrupted(small: nn.Module, x: Tensor, batches: Batches) -> None:
    whole = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x, budget=Budget(flops=0.5))
    run(whole, whole.bound_model, batches, 40)
    first = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x, budget=Budget(flops=0.5))
    with first.search(40, progress=False) as search:
        for images, labels in batches + batches:
            search.step(F.cross_entropy(first.bound_model(images), labels))
    second = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x, budget=Budget(flops=0.5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with second.search(40, progress=False) as search:
        for images, labels in batches * 3:
            search.step(F.cross_entropy(second.bound_model(images), labels))
    for a, b in zip(whole.gates.values(), second.gates.values()):
        assert torch.equal(a.s, b.s)


def test_the_paper_preset_follows_its_equations(small: nn.Module, x: Tensor, batches: Batches) -> None:
    assert [delta_paper(k, 10) for k in (0, 9)] == pytest.approx([10**0.4, 1e4])
    assert delta_paper(100, 1000) == delta_paper(199, 1000) == pytest.approx(10**0.8)
    assert [delta_per_step(0, 300), delta_per_step(299, 300)] == pytest.approx([30, 1e4])
    pruner = DNALPruner(small, CONV, dummy_input=x, preset="paper", lambda_=0.3)
    with pruner.search(10, progress=False) as search:
        gates = list(pruner.gates.values())
        assert all(bool((gate().detach() == 0.5).all()) for gate in gates)
        loss = F.cross_entropy(small(batches[0][0]), batches[0][1])
        g = gates[0]()
        # an independent derivative: finite differences of the task loss in float64
        reference = copy.deepcopy(small).double()
        search.step(loss)
        s = gates[0].s.detach().clone()
    assert torch.equal(g.detach(), torch.full_like(g, 0.5))
    from dnal_nni.modules.gates import AffineGate

    twin = next(m for m in reference.modules() if isinstance(m, AffineGate)).gates[0]

    def task(value: float) -> float:
        twin.s.data[0] = value
        return F.cross_entropy(reference(batches[0][0].double()), batches[0][1]).item()

    slope = (task(1e-5) - task(-1e-5)) / 2e-5
    assert float(s[0]) == pytest.approx(-0.01 * (slope + 0.3 * 0.25), rel=1e-3, abs=1e-7)


def test_nni_contract(small: nn.Module, x: Tensor, batches: Batches) -> None:
    pruner = DNALPruner(small, CONV, evaluator(small, batches), dummy_input=x, budget=Budget(flops=0.5))
    assert isinstance(pruner, Pruner)
    model, masks = pruner.compress(max_epochs=4)
    assert model is small and pruner.session.last is not None and pruner.session.last.steps == 4 * len(batches)
    assert set(masks) == {"stem", "conv1", "conv2", "last"} and masks["last"]["bias"].shape == (16,)
    assert masks["conv1"]["weight"].shape == small.conv1.weight.shape
    slim = pruner.speedup()
    assert slim.conv1.out_channels == int(masks["conv1"]["weight"][:, 0, 0, 0].sum())
    assert torch.equal(masks["stem"]["weight"][:, 0, 0, 0], masks["conv2"]["weight"][:, 0, 0, 0])


def test_own_loop_and_evaluator_agree(small: nn.Module, x: Tensor, batches: Batches) -> None:
    twin = copy.deepcopy(small)
    nnis = DNALPruner(small, CONV, evaluator(small, batches), dummy_input=x, budget=Budget(flops=0.5))
    nnis.compress(max_steps=24)
    own = DNALPruner(twin, CONV, dummy_input=x, budget=Budget(flops=0.5))
    run(own, twin, batches, 24, optimizer=torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9, weight_decay=1e-3))
    for a, b in zip(nnis.gates.values(), own.gates.values()):
        assert torch.equal(a.s, b.s)
    assert torch.equal(small.fc.weight, twin.fc.weight)


def test_config_list_selects_and_ratios_rule(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["stem"], "sparse_ratio": 0.25}]
    pruner = DNALPruner(small, config, dummy_input=x)
    assert {g.name: g.frozen for g in pruner.groups}["stem"] == "config_list does not select stem"
    assert list(pruner.gates) == ["conv1", "last"]
    run(pruner, small, batches, 20)
    slim = pruner.speedup()
    assert (slim.stem.out_channels, slim.conv1.out_channels, slim.last.out_channels) == (12, 6, 12)
    pruner.unwrap_model()
    norms = DNALPruner(small, [{"op_names_re": ["bn.*"]}], dummy_input=x)
    assert list(norms.gates) == ["stem", "conv1"]


def test_two_arguments_construct_and_the_input_is_asked_for(small: nn.Module) -> None:
    pruner = DNALPruner(small, CONV)
    with pytest.raises(DNALError, match="a dummy input is needed.*dummy_input=x"):
        pruner.gates  # noqa: B018


def test_an_evaluator_without_dummy_input_is_asked_for_one(small: nn.Module, batches: Batches) -> None:
    pruner = DNALPruner(small, CONV, evaluator(small, batches), budget=Budget(flops=0.5))
    with pytest.raises(DNALError, match="a dummy input is needed.*or an evaluator with one"):
        pruner.compress(max_steps=3)
    assert not any("parametrizations" in name for name, _ in small.named_modules())


def test_distributed_models_are_refused(small: nn.Module, x: Tensor) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small)
        for call in (lambda: DNALPruner(wrapped, CONV, dummy_input=x), lambda: speedup(wrapped, {}, x)):
            with pytest.raises(DNALError, match="wrapped in DistributedDataParallel: pass model.module"):
                call()
    finally:
        torch.distributed.destroy_process_group()


def test_save_and_load(small: nn.Module, x: Tensor, tmp_path: Any) -> None:
    pruner = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x)
    pruner.harden({"conv1": torch.arange(8) % 2 == 0})
    slim = pruner.speedup()
    save_compressed(slim, tmp_path / "slim.safetensors")
    loaded = load_compressed(copy.deepcopy(small), tmp_path / "slim.safetensors")
    assert torch.equal(loaded.eval()(x), slim.eval()(x)) and loaded.conv1.out_channels == 4
    assert [p.name for p in tmp_path.iterdir()] == ["slim.safetensors"]
    with pytest.raises(DNALError, match="does not fit the model: it has no weight"):
        load_compressed(nn.Conv2d(1, 12, 3), tmp_path / "slim.safetensors")
    (tmp_path / "bad").write_bytes(b"\xff" * 100)
    with pytest.raises(DNALError, match="cannot be read"):
        load_compressed(small, tmp_path / "bad")


def test_import_pulls_in_neither_nni_nor_matplotlib() -> None:
    code = "import sys, dnal_nni; bad = {'nni', 'matplotlib', 'torch'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


BAD = {
    "empty config_list": (dict(config_list=[]), "config_list=.*give a list of dicts"),
    "unknown op name": (dict(config_list=[{"op_names": ["nope"]}]), "no layer 'nope'"),
    "unknown op type": (dict(config_list=[{"op_types": ["Conv9d"]}]), "no layer of type 'Conv9d'"),
    "unknown key": (dict(config_list=[{"op_types": ["Conv2d"], "gate": 1}]), "key 'gate' is not supported"),
    "nothing selected": (
        dict(config_list=[{"op_types": ["Conv2d"], "exclude_op_types": ["Conv2d"]}]),
        "selects no layer",
    ),
    "nothing prunable": (dict(config_list=[{"op_types": ["Linear"]}]), "nothing in the model can be pruned.*stem"),
    "ratio": (dict(config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 1.5}]), "sparse_ratio=1.5"),
    "input rejected": (dict(dummy_input=torch.randn(1, 3, 8, 8)), "rejects the dummy_input of shape"),
    "unreachable": (dict(budget=Budget(flops=0.01)), "cannot be reached.*exclude fewer layers"),
    "more than there is": (dict(budget=Budget(flops=1e12)), "more than the model has"),
    "preset": (dict(preset="fast"), "preset='fast'"),
    "nan": (dict(dummy_input=torch.full((2, 1, 8, 8), float("nan"))), "no finite number for the dummy_input.*for NaN"),
    "no parameters": (dict(model=nn.ReLU()), "has no parameters"),
    "data parallel": (dict(model=nn.DataParallel(nn.Conv2d(1, 1, 1))), "DataParallel: pass model.module"),
    "evaluator": (dict(evaluator=3), "evaluator is a int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_cause_and_leaves_the_model(name: str, small: nn.Module, x: Tensor) -> None:
    arguments, message = BAD[name]
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(DNALError, match=message):
        DNALPruner(**{"model": small, "config_list": CONV, "dummy_input": x, **arguments})
    after = small.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert not any(hasattr(module, "_nni_wrapper") for module in small.modules())


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "half"])
def test_bad_budgets(value: Any) -> None:
    with pytest.raises(DNALError, match="must be a number > 0"):
        Budget(flops=value)


def test_a_budget_limits_something() -> None:
    with pytest.raises(DNALError, match="needs flops=, params= or latency="):
        Budget()


@pytest.mark.parametrize("multiple", [0, -8, 2.0, True])
def test_bad_multiples(small: nn.Module, x: Tensor, multiple: Any) -> None:
    with pytest.raises(DNALError, match="channel_multiple=.*must be a whole number >= 1"):
        DNALPruner(small, CONV, dummy_input=x, channel_multiple=multiple)


def test_wrapped_models_are_refused(small: nn.Module, x: Tensor) -> None:
    from nni.compression.pruning import L1NormPruner

    DNALPruner(small, CONV, dummy_input=x)
    with pytest.raises(DNALError, match="already has gates"):
        DNALPruner(small, CONV, dummy_input=x)
    other = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    L1NormPruner(other, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(DNALError, match="already wrapped by another NNI compressor"):
        DNALPruner(other, CONV, dummy_input=x)


def test_nan_loss_puts_everything_back(small: nn.Module, x: Tensor, batches: Batches) -> None:
    before = copy.deepcopy(small.state_dict())
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    with pytest.raises(DNALError, match="the loss is nan or infinite at search step 4"):
        with pruner.search(20, optimizer=optimizer, progress=False) as search:
            for step, (images, labels) in enumerate(batches):
                search.step(F.cross_entropy(small(images), labels) * (float("nan") if step == 4 else 1))
    pruner.unwrap_model()
    after = small.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_an_interrupted_search_leaves_a_usable_model(small: nn.Module, x: Tensor, batches: Batches) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    with pytest.raises(KeyboardInterrupt):
        with pruner.search(20, progress=False) as search:
            search.step(F.cross_entropy(small(batches[0][0]), batches[0][1]))
            raise KeyboardInterrupt
    assert all(p.requires_grad for n, p in small.named_parameters())
    dense = small.eval()(x)
    pruner.unwrap_model()
    assert dense.shape == small(x).shape and not any("parametrizations" in n for n, _ in small.named_modules())


def test_harden_is_checked(small: nn.Module, x: Tensor) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x)
    with pytest.raises(DNALError, match="nothing has been learned"):
        pruner.speedup()
    for keep, message in [
        ({"nope": torch.ones(8, dtype=torch.bool)}, "no gate 'nope'"),
        ({"conv1": torch.ones(9, dtype=torch.bool)}, r"bool tensor of shape \[8\]"),
        ({"conv1": torch.zeros(8, dtype=torch.bool)}, "would lose every channel"),
    ]:
        with pytest.raises(DNALError, match=message):
            pruner.harden(keep)
    with pytest.raises(DNALError, match="whole number"):
        with pruner.search(0):
            pass
    with pytest.raises(DNALError, match="needs an evaluator"):
        pruner.compress(max_steps=3)


class Detector(nn.Module):
    """Returns its features beside its predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        stem = self.stem(x)
        body = self.body(stem)
        return {"predictions": self.head(body), "features": [stem, body]}


@pytest.mark.parametrize("outputs", ["predictions", ["predictions"], lambda out: out["predictions"]])
def test_outputs_that_are_not_needed_lose_channels(outputs: Any) -> None:
    x = torch.randn(2, 3, 20, 20)
    pruner = DNALPruner(Detector(), CONV, dummy_input=x, outputs=outputs, budget=Budget(flops=0.5))
    assert list(pruner.gates) == ["stem.0", "body.0"]
    pruner.harden({"stem.0": torch.arange(16) < 9, "body.0": torch.arange(24) % 2 == 0})
    slim = pruner.speedup()
    assert [f.shape[1] for f in slim(x)["features"]] == [9, 12]
    whole = "nothing in the model can be pruned .stem.0: the model returns these channels"
    with pytest.raises(DNALError, match=whole):
        DNALPruner(Detector(), CONV, dummy_input=x)
    with pytest.raises(DNALError, match="outputs='boxes': the model returns a dict without it"):
        DNALPruner(Detector(), CONV, dummy_input=x, outputs="boxes")


def test_types_that_the_model_lacks_matter_only_if_nothing_is_left() -> None:
    x = torch.randn(2, 3, 20, 20)
    config = [{"op_types": ["Conv2d", "Linear"]}]  # of NNI's quickstart
    assert list(DNALPruner(Detector(), config, dummy_input=x, outputs="predictions").gates) == ["stem.0", "body.0"]
    with pytest.raises(DNALError, match=r"config_list\[0\]: the model has no layer of type 'Linear' or 'Conv1d'"):
        DNALPruner(Detector(), [{"op_types": ["Linear", "Conv1d"]}], dummy_input=x)


def test_what_a_person_reads_of_a_pruner_and_its_groups(small: nn.Module, x: Tensor) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    active = len(pruner.plan.active)
    plan = f"Plan: {active} of {len(pruner.groups)} channel groups can be cut; Budget(flops=0.5)"
    assert repr(pruner) == f"<DNALPruner of a Small; {plan}>" and repr(pruner.plan) == f"<{plan}>"
    first, whole = pruner.plan.active[0], next(g for g in pruner.groups if g.frozen)
    assert repr(first).startswith(f"<{first.name}: {first.channels} units of ") and "gate: " in repr(first)
    assert repr(whole).endswith(f"left whole: {whole.frozen}>")
    pruner.unwrap_model()
    assert "no dummy_input yet" in repr(DNALPruner(small, CONV))
