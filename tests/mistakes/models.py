"""Mistakes in making a pruner: the model, and its dummy input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnal_nni import DNALPruner

from . import CONV, Mistakes, Net, Stage


class Returns(Net):
    """Returns what it is told to."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(super().forward(x))


def converted(stage: Stage, prepare: str, convert: bool) -> nn.Module:
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    qat = "qat" in prepare
    model.train(qat)
    model.qconfig = (quantization.get_default_qat_qconfig if qat else quantization.get_default_qconfig)("fbgemm")
    getattr(quantization, prepare)(model, inplace=True)
    if convert:
        model(stage.x)
        quantization.convert(model.eval(), inplace=True)
    return model


def dynamic() -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(Net().eval(), {nn.Linear})


def inference() -> nn.Module:
    with torch.inference_mode():
        return Net()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def filled(value: float) -> nn.Module:
    model = Net()
    nn.init.constant_(model.conv1.weight, value)
    return model


def part_compiled() -> nn.Module:
    model = Net()
    model.conv2 = torch.compile(model.conv2, backend="eager")
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(8, 3))


def tied() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    layers[4].weight = layers[2].weight
    return nn.Sequential(*layers)


def loader(stage: Stage) -> DataLoader:
    return DataLoader(TensorDataset(stage.x, stage.y), 2)


def with_half_a_layer() -> nn.Module:
    model = Net()
    model.conv2.half()
    return model


MODELS: Mistakes = {
    "no model": (lambda s: DNALPruner(None, CONV, dummy_input=s.x), "model must be a torch.nn.Module, and is None"),
    "a state dict": (
        lambda s: DNALPruner(s.model.state_dict(), CONV, dummy_input=s.x),
        "model must be a torch.nn.Module, and is an OrderedDict; a state dict goes into one",
    ),
    "the class of the model": (
        lambda s: DNALPruner(Net, CONV, dummy_input=s.x),
        "model must be a torch.nn.Module, and is the class Net; this is the class, make one of it",
    ),
    "a path as the model": (
        lambda s: DNALPruner("model.pt", CONV, dummy_input=s.x),
        "model must be a torch.nn.Module, and is 'model.pt'",
    ),
    "a list of layers": (
        lambda s: DNALPruner([nn.Conv2d(1, 8, 3)], CONV, dummy_input=s.x),
        "model must be a torch.nn.Module, and is [a Conv2d]",
    ),
    "compiled": (
        lambda s: s.prune(torch.compile(Net(), backend="eager")),
        "the model (OptimizedModule) is compiled: give its _orig_mod, the module that torch.compile was",
    ),
    "a part compiled": (
        lambda s: s.prune(part_compiled()),
        "conv2 (OptimizedModule) is compiled: give its _orig_mod, the module that torch.compile was",
    ),
    "scripted": (
        lambda s: s.prune(torch.jit.script(Net().eval())),
        "the model (RecursiveScriptModule) was compiled by torch.jit, and its code cannot be changed: pass the module",
    ),
    "traced": (
        lambda s: s.prune(torch.jit.trace(Net().eval(), s.x)),
        "the model (TopLevelTracedModule) was compiled by torch.jit, and its code cannot be changed: pass the module",
    ),
    "an exported program": (
        lambda s: s.prune(torch.export.export(Net().eval(), (s.x,))),
        "model must be a torch.nn.Module, and is an ExportedProgram; pass the model that was exported",
    ),
    "the module of an exported program": (
        lambda s: s.prune(torch.export.export(Net().eval(), (s.x,)).module()),
        "the model (GraphModule) is an exported program: pass the model that was exported, and export",
    ),
    "dynamically quantized": (
        lambda s: s.prune(dynamic()),
        "fc (Linear) is quantized, and numbers of a few bits cannot learn: cut the network first, then",
    ),
    "statically quantized": (
        lambda s: s.prune(converted(s, "prepare", True)),
        "0 (Quantize) is quantized, and numbers of a few bits cannot learn: cut the network first, then",
    ),
    "prepared for calibration": (
        lambda s: s.prune(converted(s, "prepare", False)),
        "0.activation_post_process (HistogramObserver) is prepared for quantization: cut the network",
    ),
    "prepared for QAT": (
        lambda s: s.prune(converted(s, "prepare_qat", False)),
        "0.activation_post_process (FusedMovingAvgObsFakeQuantize) is prepared for quantization: cut the",
    ),
    "lazy layers": (
        lambda s: s.prune(lazy()),
        "0.weight has no shape yet: run the model once on an input, model(x), as lazy layers need",
    ),
    "made in inference mode": (
        lambda s: s.prune(inference()),
        "conv1.weight was made inside of torch.inference_mode(), and can never learn: take",
    ),
    "on meta": (
        lambda s: s.prune(on_meta()),
        "conv1.weight is on the meta device and has no values: model.to_empty(device=...), load weights",
    ),
    "in DataParallel": (
        lambda s: s.prune(nn.DataParallel(Net())),
        "the model (DataParallel) is wrapped in DataParallel: pass model.module; train with the wrapper",
    ),
    "no parameters": (
        lambda s: s.prune(nn.Sequential(nn.Flatten(), nn.ReLU())),
        "the model has no parameters: there is nothing to prune",
    ),
    "no layer of the type": (
        lambda s: s.prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
        "config_list[0]: the model has no layer of type 'Conv2d' (op_types)",
    ),
    "one layer, which the model returns": (
        lambda s: s.prune(nn.Conv2d(1, 8, 3)),
        "nothing in the model can be pruned (Conv2d: the model returns these channels)",
    ),
    "layers of one channel": (
        lambda s: s.prune(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 3))),
        "nothing in the model can be pruned (0: it has a single channel; 2: the model returns these",
    ),
    "tied weights": (
        lambda s: s.prune(tied()),
        "nothing in the model can be pruned (0: the weights of 2 are tied to another layer; 2: the",
    ),
    "weights that are nan": (
        lambda s: s.prune(filled(float("nan"))),
        "the model returns no finite number for the dummy_input: check its weights for NaN",
    ),
    "weights that are infinite": (
        lambda s: s.prune(filled(float("inf"))),
        "the model returns no finite number for the dummy_input: check its weights for NaN",
    ),
    "returns None": (
        lambda s: s.prune(Returns(lambda out: None)),
        "no tensor is found in what the model returns, so that there is nothing to compare a cut network",
    ),
    "returns a string": (
        lambda s: s.prune(Returns(lambda out: "cat")),
        "no tensor is found in what the model returns, so that there is nothing to compare a cut network",
    ),
    "returns numbers": (
        lambda s: s.prune(Returns(lambda out: out.argmax(1).tolist())),
        "no tensor is found in what the model returns, so that there is nothing to compare a cut network",
    ),
    "raises by itself": (
        lambda s: s.prune(Returns(lambda out: 1 / 0)),
        "the model rejects the dummy_input of shape (4, 1, 8, 8), float32, on cpu",
    ),
    "half a layer in float16": (
        lambda s: s.prune(with_half_a_layer()),
        "the model rejects the dummy_input of shape (4, 1, 8, 8), float32, on cpu",
    ),
    "has gates already": (
        lambda s: (s.prune(), s.prune()),
        "the model already has gates of another DNALPruner: call its unwrap_model() first",
    ),
    "already cut, and gated twice": (
        lambda s: (s.prune(s.cut()), s.prune()),
        "the model already has gates of another DNALPruner: call its unwrap_model() first",
    ),
}

INPUTS: Mistakes = {
    "none": (
        lambda s: s.prune(dummy_input=None).search(3),
        "a dummy input is needed to trace the model: DNALPruner(..., dummy_input=x), or an evaluator",
    ),
    "three colours for one": (
        lambda s: s.prune(dummy_input=torch.randn(2, 3, 8, 8)),
        "the model rejects the dummy_input of shape (2, 3, 8, 8), float32, on cpu",
    ),
    "no batch": (
        lambda s: s.prune(dummy_input=torch.randn(8, 8)),
        "the model rejects the dummy_input of shape (8, 8), float32, on cpu",
    ),
    "an empty batch": (
        lambda s: s.prune(dummy_input=torch.randn(0, 1, 8, 8)),
        "the dummy_input has no elements: give it a batch of at least one",
    ),
    "a shape": (
        lambda s: s.prune(dummy_input=(1, 1, 8, 8)),
        "the dummy_input is (1, 1, 8, 8), and has no tensor in it: give what your model takes, such as",
    ),
    "a size": (
        lambda s: s.prune(dummy_input=torch.Size([1, 1, 8, 8])),
        "the dummy_input is a Size, and has no tensor in it: give what your model takes, such as one",
    ),
    "a list of numbers": (
        lambda s: s.prune(dummy_input=[[0.0] * 8] * 8),
        "the dummy_input is [[0.0, 0.0, 0.0, 0.0, ...], [0.0, 0.0, 0.0, 0.0, ...], [0.0, 0.0, 0.0, 0.0",
    ),
    "a number": (
        lambda s: s.prune(dummy_input=224),
        "the dummy_input is 224, and has no tensor in it: give what your model takes, such as one batch",
    ),
    "a string": (
        lambda s: s.prune(dummy_input="1,1,8,8"),
        "the dummy_input is '1,1,8,8', and has no tensor in it: give what your model takes, such as one",
    ),
    "numpy": (
        lambda s: s.prune(dummy_input=np.zeros((1, 1, 8, 8), np.float32)),
        "the dummy_input is a float32 ndarray of shape [1, 1, 8, 8], and has no tensor in it: give what",
    ),
    "bytes of an image": (
        lambda s: s.prune(dummy_input=torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
        "the model rejects the dummy_input of shape (1, 1, 8, 8), uint8, on cpu",
    ),
    "float64": (
        lambda s: s.prune(dummy_input=s.x.double()),
        "the model rejects the dummy_input of shape (4, 1, 8, 8), float64, on cpu",
    ),
    "float16": (
        lambda s: s.prune(dummy_input=s.x.half()),
        "the model rejects the dummy_input of shape (4, 1, 8, 8), float16, on cpu",
    ),
    "on meta": (
        lambda s: s.prune(dummy_input=s.x.to("meta")),
        "the model rejects the dummy_input of shape (4, 1, 8, 8), float32, on meta",
    ),
    "a batch with labels": (
        lambda s: s.prune(dummy_input=(s.x, s.y)),
        "the model rejects the dummy_input (a float32 Tensor of shape [4, 1, 8, 8], an int64 Tensor of",
    ),
    "a batch with labels, as the loader has it": (
        lambda s: s.prune(dummy_input=next(iter(loader(s)))),
        "the model rejects the dummy_input (a float32 Tensor of shape [2, 1, 8, 8], an int64 Tensor of",
    ),
    "a loader": (
        lambda s: s.prune(dummy_input=loader(s)),
        "the dummy_input is a DataLoader, and has no tensor in it: give what your model takes, such as",
    ),
    "a dict with another name": (
        lambda s: s.prune(dummy_input={"image": s.x}),
        "the model rejects the dummy_input (image=a float32 Tensor of shape [4, 1, 8, 8]): Net.forward()",
    ),
    "an empty dict": (
        lambda s: s.prune(dummy_input={}),
        "the model rejects the dummy_input (): Net.forward() missing 1 required positional argument",
    ),
    "an empty tuple": (
        lambda s: s.prune(dummy_input=()),
        "the model rejects the dummy_input (): Net.forward() missing 1 required positional argument",
    ),
    "nan": (
        lambda s: s.prune(dummy_input=s.x * float("nan")),
        "the model returns no finite number for the dummy_input: check its weights for NaN",
    ),
    "the model": (
        lambda s: s.prune(dummy_input=s.model),
        "the dummy_input is a Net, and has no tensor in it: give what your model takes, such as one",
    ),
    "a position that the output lacks": (
        lambda s: s.prune(outputs=[7]),
        "outputs=7: the model returns a Tensor without it",
    ),
    "a key that the output lacks": (
        lambda s: s.prune(outputs="logits"),
        "outputs='logits': the model returns a Tensor without it",
    ),
    "outputs that are no key": (
        lambda s: s.prune(outputs=1.5),
        "DNALPruner(outputs=...) is 1.5: give a whole number, a string, a list, a function or None",
    ),
}
