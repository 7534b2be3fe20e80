"""What the tests of supernets of NNI share. Import it behind ``pytest.importorskip("pytorch_lightning")``."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    import nni
    from nni.nas.evaluator.pytorch import Classification, DataLoader
    from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace, MutableLinear, Repeat

    from dnal_nni import DNALStrategy

QUIET = [
    # pytorch_lightning 2.6 with torch 2.14, and what it says of a tiny CPU run
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


def conv(kernel: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, kernel, 1, kernel // 2), nn.BatchNorm2d(width), nn.ReLU())


class Toy(ModelSpace):
    """NNI's primitives together: a choice of layers, one inside of another, of inputs, of a depth, of a width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        nested = nn.Sequential(conv(3), LayerChoice([conv(3), nn.Identity()], label="nested"))
        self.layer = LayerChoice({"c3": conv(3), "c5": conv(5), "nested": nested, "skip": nn.Identity()}, label="layer")
        self.inputs = InputChoice(2, 1, label="inputs")
        self.blocks = Repeat(lambda i: conv(3), (1, 3), label="depth")
        hidden = nni.choice("hidden", [12, 24])
        self.fc1 = MutableLinear(8, hidden)
        self.fc2 = MutableLinear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.blocks(self.inputs([x, self.layer(x)]))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Plain(ModelSpace):
    """Without a choice of width: whatever single path is found, the space can name it."""

    conv = staticmethod(conv)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.layer = LayerChoice({"c3": self.conv(3), "c5": self.conv(5), "skip": nn.Identity()}, label="layer")
        self.inputs = InputChoice(2, 1, label="inputs")
        self.blocks = Repeat(lambda i: self.conv(3), (1, 3), label="depth")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(self.blocks(self.inputs([x, self.layer(x)])).mean((2, 3)))


def evaluator(size: int = 8, channels: int = 1, epochs: int = 2, batches: int = 6, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * 8, channels, size, size, generator=generator)
    data = TensorDataset(images, torch.randint(0, 10, (len(images),), generator=generator))
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Classification(
        num_classes=10, learning_rate=1e-2, max_epochs=epochs, accelerator="cpu",
        train_dataloaders=DataLoader(data, batch_size=8), val_dataloaders=DataLoader(data, batch_size=8),
        **{**off, **kwargs},
    )  # fmt: skip


def check(strategy: DNALStrategy, size: int = 8, channels: int = 1, budget: float | None = None) -> nn.Module:
    """The network found costs what was asked for, is the gated one, and can be trained by the same evaluator."""
    slim = strategy.slim_model()
    report = strategy.report
    if budget is not None:
        assert report.after.flops / report.before.flops == pytest.approx(budget, rel=0.01)
    x = torch.randn(4, channels, size, size, dtype=torch.float64)
    gated, cut = copy.deepcopy(strategy.pruner.bound_model).double(), copy.deepcopy(slim).double()
    for module in (*gated.modules(), *cut.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for mode in (False, True):
        with torch.no_grad():
            expected, got = gated.train(mode)(x), cut.train(mode)(x)
        assert float((expected - got).abs().max()) < 1e-9 * float(expected.abs().max())
    before = [p.detach().clone() for p in slim.parameters()]
    evaluator(size, channels, epochs=1, batches=2).evaluate(slim)
    assert any(not torch.equal(a, b) for a, b in zip(before, slim.parameters()))
    return slim
