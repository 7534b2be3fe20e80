"""The one call for those with a loader and a loss."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dnal_nni import Budget, DNALError, DNALPruner, compress, measure, report_of
from dnal_nni.report.record import Report
from dnal_nni.storage.state import save_state

HALF = Budget(flops=0.5)
Batches = list[tuple[Tensor, Tensor]]


def state(model: nn.Module) -> dict[str, object]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors | {f"{name} ({type(module).__name__})": module.training for name, module in model.named_modules()}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a if isinstance(a[name], Tensor))


def test_digits_from_a_loader_and_a_loss() -> None:
    """A real data set, trained here: half of the FLOPs are left, and the digits are read."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1500, 297])
    loader, held_out = DataLoader(train, 50, shuffle=True), DataLoader(test, 99)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    before = state(model)
    slim, report = compress(
        model,
        loader,
        nn.CrossEntropyLoss(),
        budget=HALF,
        validate=held_out,
        lr=0.05,
        search_epochs=2,
        epochs=2,
        progress=False,
    )
    assert same(state(model), before) and model.training
    assert measure(slim, images[:1]).flops == report.after.flops <= 0.505 * report.before.flops
    whole, tuned = report.accuracy
    right = sum(int((slim.eval()(x).argmax(1) == y).sum()) for x, y in held_out)
    assert tuned == pytest.approx(100 * right / 297) and whole > 60 and tuned > 85
    assert report.accuracy_cut is not None and {"search", "finetune"} <= report.seconds.keys()


def trained_on_digits(epochs: int) -> tuple[nn.Module, Tensor, Tensor, Batches]:
    """A network, all images and labels, and the batches of the first 1,500 that it was trained on."""
    torch.manual_seed(1)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    batches = list(zip(images[:1500].split(50), labels[:1500].split(50)))
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for x, y in epochs * batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, images, labels, batches


@pytest.mark.parametrize(("epochs", "lr"), [(25, 0.5), (0, 0.02)])
def test_a_search_that_unlearns_is_taken_back(epochs: int, lr: float) -> None:
    """Where the uncut network, cut to its widths or to those of a choice, and repaired, has the lower loss."""
    model, images, labels, batches = trained_on_digits(epochs)

    def right(network: nn.Module) -> float:
        return 100 * float((network.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean())

    before = state(model)
    slim, report = compress(
        model, batches, budget=HALF, validate=right, lr=lr, search_epochs=1, epochs=0, progress=False
    )
    assert same(state(model), before)
    kept = ("after the cut the layers were fitted", "the search is not used")
    notes = [note for note in report.notes if note.startswith(kept)]
    assert len(notes) == (epochs > 0) and report.accuracy[1] == right(slim) and report_of(slim) is report
    assert report.seconds["search"] > 0 and report.interventions.steps == 30
    assert report.after.flops == measure(slim, images[:1]).flops
    if notes:
        loss = float(torch.stack([F.cross_entropy(slim.eval()(x), y) for x, y in batches[:11]]).mean().detach())
        assert f"{loss:.3g} on 11 batches" in notes[0]


def test_without_a_search_what_goes_is_chosen_and_the_rest_repaired() -> None:
    model, images, labels, batches = trained_on_digits(25)
    before = state(model)
    held_out = [(images[1500:], labels[1500:])]
    slim, report = compress(model, batches, budget=HALF, validate=held_out, epochs=0, progress=False)
    assert same(state(model), before) and report.decided is None and "search" not in report.interventions.changed
    dense, left = report.accuracy
    assert dense > 80 and left > dense - 10  # a cut as it is leaves next to nothing
    assert report.after.flops == measure(slim, images[:1]).flops <= 0.509 * report.before.flops
    again, _ = compress(model, batches, budget=HALF, epochs=0, progress=False)
    assert same(state(slim), state(again))


TAUGHT: dict[str, tuple[Callable[..., Tensor] | None, Callable[[Tensor], Tensor]]] = {
    "cross entropy": (None, lambda scores: scores.softmax(1)),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda scores: scores.softmax(1)),
    "a logistic loss": (F.binary_cross_entropy_with_logits, torch.sigmoid),
    "another": (F.mse_loss, lambda scores: scores),
}


@pytest.mark.parametrize("searched", [0, 1])
@pytest.mark.parametrize("loss", TAUGHT)
def test_without_targets_the_uncut_network_teaches(
    loss: str, searched: int, small: nn.Module, batches: Batches
) -> None:
    """Bit for bit what comes of targets that are what it says."""
    small.train()
    before, (function, said) = state(small), TAUGHT[loss]
    settings = {"budget": HALF, "search_epochs": searched, "epochs": 2, "lr": 0.05, "progress": False}
    slim, report = compress(small, [x for x, _ in batches], function, **settings)
    assert same(state(small), before) and "the data have no targets" in report.notes[-1]
    with torch.no_grad():
        targets = [(x, said(copy.deepcopy(small).eval()(x))) for x, _ in batches]
    by_hand, _ = compress(small, targets, function, **settings)
    assert same(state(slim), state(by_hand))


def test_a_dataset_of_inputs_alone(small: nn.Module, x: Tensor) -> None:
    """Of which a DataLoader makes lists of one."""
    loader = DataLoader(TensorDataset(torch.cat([x] * 4)), 4)
    slim, report = compress(small, loader, budget=HALF, epochs=1, progress=False)
    assert measure(slim, x[:1]).flops == report.after.flops


class Several(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model(x)]


def test_what_is_no_tensor_teaches_nothing(small: nn.Module, x: Tensor) -> None:
    with pytest.raises(DNALError, match="inputs alone, and the model returns .*: what it says stands in for"):
        compress(Several(small), [x], budget=HALF, progress=False)


def test_validate_is_a_function_exclude_an_object_optimizer_a_factory(small: nn.Module, batches: Batches) -> None:
    seen: list[nn.Module] = []

    def validate(model: nn.Module) -> float:
        seen.append(model)
        return 10.0 * len(seen)

    slim, report = compress(
        small,
        batches,
        budget=Budget(flops=0.7),
        validate=validate,
        exclude=[small.stem, "last"],
        search_epochs=1,
        epochs=2,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
        keep_best=True,
        progress=False,
    )
    assert slim.stem.out_channels == 12 and slim.last.out_channels == 16 and slim.conv1.out_channels < 8
    assert seen[0] is small and seen[1:] == [slim] * 4  # dense, cut, two epochs, the best again
    assert report.accuracy == (10.0, 50.0) and any("best was kept" in note for note in report.notes)
    made = report.interventions
    assert made is not None and made.epochs == 1 and made.fixed["widths"] >= 1
    assert set(made.changed) == {"flops", "search_epochs", "epochs", "keep_best", "optimizer"}


def interrupted_at(call: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A cross entropy that is interrupted at its so-manieth call."""
    calls = itertools.count(1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    return loss


@pytest.mark.parametrize("stopped", [[3], [8], [18], [9, 6, 14]], ids=str)
def test_interrupted_it_goes_on_from_its_checkpoint(stopped: list[int], tmp_path: Path) -> None:
    """In the search (5 steps an epoch, 2 of them), in fine-tuning (3 epochs), several times: to the same network."""
    data = TensorDataset(torch.randn(40, 1, 8, 8), torch.randint(0, 10, (40,)))
    loader = DataLoader(data, 8, shuffle=True)
    path = tmp_path / "run.safetensors"

    def call(loss: Callable[..., Tensor], checkpoint: Path | None) -> tuple[nn.Module, Report]:
        torch.manual_seed(0)
        model = nn.Sequential(Small(), nn.Dropout(0.1))
        before = state(model)
        settings = dict(budget=HALF, validate=[(data.tensors[0], data.tensors[1])], keep_best=True, progress=False)
        try:
            return compress(model, loader, loss, search_epochs=2, epochs=3, checkpoint=checkpoint, **settings)
        finally:
            assert same(state(model), before)

    slim, report = call(F.cross_entropy, None)
    for number in stopped:
        with pytest.raises(KeyboardInterrupt):
            call(interrupted_at(number), path)
    if stopped[-1] > 5:
        assert path.exists()
    again, told = call(F.cross_entropy, path)
    assert same(state(again), state(slim)) and report_of(again) is told
    assert (told.accuracy, told.accuracy_cut, told.notes) == (report.accuracy, report.accuracy_cut, report.notes)
    assert told.interventions == report.interventions and not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_call_is_refused(small: nn.Module, batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    settings = dict(budget=HALF, search_epochs=2, epochs=1, checkpoint=path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        compress(small, batches, interrupted_at(len(batches) + 1), **settings)
    whole = path.read_bytes()
    for other, said in (
        (dict(epochs=3), r"is of a call with epochs=1, and this one has 3: choose another checkpoint, or delete it"),
        (dict(budget=Budget(flops=0.7)), r"is of a call with budget=\{'flops': 0.5\}, and this one has"),
    ):
        with pytest.raises(DNALError, match=said):
            compress(small, batches, **settings | other)
    with pytest.raises(DNALError, match="does not fit the model"):
        compress(nn.Sequential(small), batches, **settings)
    with pytest.raises(DNALError, match="cannot be written: there is no folder"):
        compress(small, batches, **settings | dict(checkpoint=tmp_path / "none" / "run.safetensors"))
    path.write_bytes(whole[:-9])
    with pytest.raises(DNALError, match="damaged"):
        compress(small, batches, **settings)
    save_state(path, [1])
    with pytest.raises(DNALError, match="was not written by"):
        compress(small, batches, **settings)


def test_exclude_of_a_pruner_names_objects(small: nn.Module, x: Tensor) -> None:
    pruner = DNALPruner(small, CONV, dummy_input=x, exclude=[small.conv1])
    reasons = {group.name: group.frozen for group in pruner.groups}
    assert reasons["conv1"] == "config_list does not select conv1" and reasons["stem"] is None


MISTAKES = {
    "a path for the loader": (dict(loader="data"), "loader=...) is 'data': give a DataLoader"),
    "a generator": (dict(loader=(batch for batch in [1])), "is a generator: give a DataLoader, or a list of batches"),
    "an empty loader": (dict(loader=[]), "loader=...) gives no batch"),
    "images, labels and names": (dict(loader=[(torch.randn(2, 1, 8, 8),) * 3]), "and should give (inputs, targets)"),
    "images alone to validate": (dict(validate=[torch.randn(2, 1, 8, 8)]), "inputs alone, and the accuracy is of"),
    "other images": (dict(loader=[(torch.randn(2, 3, 8, 8), torch.zeros(2).long())]), "rejects the dummy_input"),
    "a name for the loss": (dict(loss="cross_entropy"), "loss=...) is 'cross_entropy': give a function"),
    "a loss of every example": (dict(loss=nn.CrossEntropyLoss(reduction="none")), "has shape [8]: make one number"),
    "a loss that is a number": (dict(loss=lambda out, y: 0.5), "the loss is 0.5: give the loss of a batch"),
    "a number for the budget": (dict(budget=0.5), "budget=...) is 0.5: give a Budget"),
    "no budget": (dict(budget=None), "budget=...) is None: give a Budget"),
    "no epoch of the search": (dict(search_epochs=-1), "search_epochs=-1): give a whole number of at least 0"),
    "half an epoch": (dict(epochs=1.5), "epochs=...) is 1.5: give a whole number"),
    "a rate of zero": (dict(lr=0), "lr=0): give a number above 0"),
    "the best of nothing": (dict(keep_best=True), "give validate="),
    "validate says nothing": (dict(validate=lambda model: None), "validate=...) returns None: return a number"),
    "validate is empty": (dict(validate=[]), "validate=...) gives no batch"),
    "an optimizer made already": (
        dict(optimizer=torch.optim.SGD([torch.zeros(1)], 0.1)), "optimizer=...) is a SGD: give a function"
    ),
    "a factory of nothing": (dict(optimizer=lambda parameters: None), "returns None: return an optimizer"),
    "exclude of a stranger": (dict(exclude=[nn.Linear(2, 2)]), "is no layer of the model: give one of its own"),
    "exclude misspelt": (dict(exclude=["conv11"]), "'conv11' is no layer of the model; did you mean 'conv1'?"),
    "exclude is a module": (dict(exclude=nn.Linear(2, 2)), "exclude=a Linear: give a list of names or modules"),
    "epochs misspelt": (dict(epoch=3), "did you mean 'epochs'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_and_changes_nothing(name: str, small: nn.Module, batches: Batches) -> None:
    given, sentence = MISTAKES[name]
    before = copy.deepcopy(state(small))
    settings = {"loader": batches, "budget": HALF, "search_epochs": 1, "epochs": 0, "progress": False, **given}
    with pytest.raises(DNALError) as caught:
        compress(small, **settings)
    assert sentence in str(caught.value)
    assert same(state(small), before) and all(p.requires_grad and p.grad is None for p in small.parameters())
