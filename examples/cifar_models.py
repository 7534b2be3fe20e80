"""The CIFAR networks of the pruning literature, for 32x32 images.

ResNet: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
VGG: Simonyan & Zisserman, arXiv 1409.1556, configuration D with batch norm, as ported to CIFAR by Liu & Deng (2015).
MobileNetV2: Sandler et al., arXiv 1801.04381, table 2, with the first two strides at 1: a 32x32 image is small enough.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

VGG16_PLAN: tuple[int | str, ...] = (
    64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool",
)  # fmt: skip

# expansion, output channels, blocks, stride of the first block
MOBILENET_V2_PLAN: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 for ImageNet
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width: float) -> int:
    """The number of channels at a width multiplier, at least one."""
    return max(1, round(channels * width))


def conv_bn(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: nn.Module | None = None
) -> nn.Sequential:
    """Convolution (same padding, no bias), batch norm and, where given, the activation."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(channels_out)]
    return nn.Sequential(*layers, relu) if relu is not None else nn.Sequential(*layers)


def init_weights(model: nn.Module) -> None:
    """He initialisation of every convolution (arXiv 1502.01852); norms and classifiers keep torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        same_shape = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same_shape else conv_bn(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """Stem, three stages of `blocks` basic blocks at 16, 32 and 64 channels, mean pooling, one linear layer."""

    def __init__(self, blocks: int, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        widths = [scaled(channels, width) for channels in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self.stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = self.stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = self.stage(widths[1], widths[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        init_weights(self)

    @staticmethod
    def stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels_out, stride)
        return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return out


class VGG(nn.Module):
    """3x3 convolutions with batch norm and max pooling down to one pixel, then one linear layer."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in plan:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            channels_out = scaled(entry, width)
            layers += conv_bn(channels, channels_out, 3, relu=nn.ReLU(inplace=True))
            channels = channels_out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; the identity is added where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn(channels_in, hidden, 1, relu=nn.ReLU6(inplace=True)))
        layers.append(conv_bn(hidden, hidden, 3, stride, groups=hidden, relu=nn.ReLU6(inplace=True)))
        layers.append(conv_bn(hidden, channels_out, 1))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x) if self.residual else self.conv(x)
        return out


class MobileNetV2(nn.Module):
    """Stem at stride 1, 17 inverted residuals, 1x1 head of 1280 channels, mean pooling, one linear layer."""

    def __init__(self, plan: tuple[tuple[int, int, int, int], ...], num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [conv_bn(3, channels, 3, relu=nn.ReLU6(inplace=True))]
        for expansion, base, blocks, stride in plan:
            channels_out = scaled(base, width)
            for block in range(blocks):
                layers.append(InvertedResidual(channels, channels_out, expansion, stride if block == 0 else 1))
                channels = channels_out
        head = scaled(1280, width)
        layers.append(conv_bn(channels, head, 1, relu=nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(head, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return out


def resnet20(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-20 (6n+2 layers, n=3), arXiv 1512.03385: 0.27 M parameters."""
    return ResNet(3, num_classes, width)


def resnet56(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-56 (6n+2 layers, n=9), arXiv 1512.03385: 0.86 M parameters."""
    return ResNet(9, num_classes, width)


def vgg16_bn(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG-16 with batch norm and one linear layer, arXiv 1409.1556: 14.7 M parameters."""
    return VGG(VGG16_PLAN, num_classes, width)


def mobilenet_v2(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2, arXiv 1801.04381: 2.2 M parameters."""
    return MobileNetV2(MOBILENET_V2_PLAN, num_classes, width)


MODELS: dict[str, Callable[[int, float], nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": mobilenet_v2,
}
