"""Channels that are put side by side, taken apart, and moved."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import block, network


@block()
class C2f(nn.Module):
    """YOLO."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.c = c // 2
        self.cv1, self.cv2 = nn.Conv2d(c, 2 * self.c, 1), nn.Conv2d(4 * self.c, c, 1)
        self.m = nn.ModuleList(nn.Conv2d(self.c, self.c, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@block()
class PartialConv(nn.Module):
    """FasterNet."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim_conv3 = dim // 4
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(self.dim_conv3, self.dim_conv3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.split(x, [self.dim_conv3, self.dim_untouched], dim=1)
        return torch.cat((self.partial_conv3(x1), x2), 1)


@block()
class InceptionDW(nn.Module):
    """InceptionNeXt: a split into unequal stored parts, each with its depthwise convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        gc = c // 4
        self.dw1, self.dw2 = (
            nn.Conv2d(gc, gc, 3, padding=1, groups=gc),
            nn.Conv2d(gc, gc, (1, 5), padding=(0, 2), groups=gc),
        )
        self.split_indexes = (c - 2 * gc, gc, gc)
        self.pw = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_id, x1, x2 = torch.split(x, self.split_indexes, dim=1)
        return self.pw(torch.cat((x_id, self.dw1(x1), self.dw2(x2)), dim=1))


@network(torch.randn(4, 3, 6, 6), share=0.85)
class TemporalShift(nn.Module):
    """TSM, of two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.n_segment, self.fold_div = 2, 8
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 16, 1), nn.Linear(16, 4)

    def shift(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // self.n_segment, self.n_segment, c, h, w)
        fold = c // self.fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(self.shift(self.conv1(x)))).mean((2, 3)))


@network(torch.randn(2, 3, 15, 15))
class UNet(nn.Module):
    """Milesial's: pads what it upsamples to the size of what it is put beside."""

    def __init__(self) -> None:
        super().__init__()

        def conv(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

        self.inc, self.down, self.bottom = conv(3, 8), conv(8, 16), conv(16, 32)
        self.up1, self.conv1 = nn.ConvTranspose2d(32, 16, 2, stride=2), conv(32, 16)
        self.up2, self.conv2, self.outc = nn.ConvTranspose2d(16, 8, 2, stride=2), conv(16, 8), nn.Conv2d(8, 2, 1)

    @staticmethod
    def beside(x1: Tensor, x2: Tensor) -> Tensor:
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([x2, x1], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down(F.max_pool2d(x1, 2))
        x3 = self.bottom(F.max_pool2d(x2, 2))
        x = self.conv1(self.beside(self.up1(x3), x2))
        return self.outc(self.conv2(self.beside(self.up2(x), x1)))


@network(torch.randn(2, 3, 16, 16))
class FPN(nn.Module):
    """Features in a dict, a top-down path, and a list of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.lateral = nn.ModuleDict({k: nn.Conv2d(c, 16, 1) for k, c in (("c1", 8), ("c2", 16), ("c3", 32))})
        self.smooth, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = {}
        for name in ("c1", "c2", "c3"):
            features[name] = x = F.relu(getattr(self, name)(x))
        top = self.lateral["c3"](features["c3"])
        outs = [self.head(self.smooth(top))]
        for name in ("c2", "c1"):
            side = self.lateral[name](features[name])
            top = side + F.interpolate(top, size=side.shape[-2:], mode="nearest")
            outs.insert(0, self.head(self.smooth(top)))
        return outs


@network(torch.randn(2, 1, 16, 20))
class CRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1))
        self.rnn, self.fc = nn.LSTM(32, 8, bidirectional=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        conv = F.adaptive_avg_pool2d(self.cnn(x), (1, None))
        output, _ = self.rnn(conv.squeeze(2).permute(2, 0, 1))
        t, b, h = output.size()
        return self.fc(output.view(t * b, h)).view(t, b, -1)


@network(torch.randn(2, 4, 24))
class TCN(nn.Module):
    """Causal convolutions: padded on both sides, chomped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 16, 3, padding=4, dilation=2))
        self.conv2, self.downsample = nn.Conv1d(16, 16, 3, padding=4, dilation=2), nn.Conv1d(4, 16, 1)
        self.linear = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, :-4].contiguous())
        y = F.relu(self.conv2(y)[:, :, :-4].contiguous())
        return self.linear(F.relu(y + self.downsample(x))[:, :, -1])


@network(torch.randn(2, 1, 6, 8, 8))
class R2Plus1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Conv3d(1, 12, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(12, 16, (3, 1, 1))
        self.bn, self.fc = nn.BatchNorm3d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.time(F.relu(self.space(x)))))
        return self.fc(F.adaptive_avg_pool3d(x, 1).view(x.size(0), -1))


@network(torch.randn(2, 3, 16, 16), left="log_softmax runs over the channels")
class Flattened(nn.Module):
    """The usual classifier: conv, pool, view, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 2 * 2, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)

    def num_flat_features(self, x: Tensor) -> int:
        n = 1
        for s in x.size()[1:]:
            n *= s
        return n


@network(torch.randn(2, 3, 16, 16), left="the model does not run without some of its channels", share=1.0)
class Literal(nn.Module):
    """A size in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 20, 5)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.adaptive_max_pool2d(x, 4).reshape(-1, 320)
        return self.fc2(F.dropout(F.relu(self.fc1(x)), training=self.training))


@network(torch.randn(2, 3, 12, 12))
class Capsules(nn.Module):
    """Primary capsules, squashed; their dimension stays, their number goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.capsules, self.dim = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, stride=2), 8
        self.out = nn.Linear(32 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.capsules(F.relu(self.conv(x)))
        u = u.view(u.size(0), -1, self.dim, *u.shape[2:])
        squared = (u**2).sum(2, keepdim=True)
        u = squared / (1 + squared) * u / (squared.sqrt() + 1e-8)
        return self.out(u.flatten(1))


@block()
class Folded(nn.Module):
    """Patches unfolded, scaled and folded again."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(c, c, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        patches = F.unfold(x, 2, stride=2) * self.scale
        return F.fold(patches, x.shape[-2:], 2, stride=2)


@block()
class EinsumPixels(nn.Module):
    """Einsum with a bare matrix, and a reshape as einops does it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.randn(24, c)), nn.Conv2d(24 * 4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.einsum("bchw,oc->bohw", x, self.weight))
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        return self.conv(x)


@block()
class Cumulative(nn.Module):
    """Along space: sums, sorting, the largest values."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(c, c, 1), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.conv(x), dim=-1) / x.shape[-1]
        largest = x.flatten(2).topk(4, dim=-1)[0].mean(-1)
        return x * torch.sigmoid(self.fc(largest))[..., None, None]


@block()
class GeM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.p, self.fc = nn.Conv2d(c, 2 * c, 1), nn.Parameter(torch.ones(1) * 3), nn.Linear(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).clamp(min=1e-6).pow(self.p)
        x = F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1.0 / self.p)
        return self.fc(x.squeeze(-1).squeeze(-1))


@block(left="a single channel is taken by itself")
class ContextGate(nn.Module):
    """Tensor split into three, by one attribute."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dim = c
        self.f, self.h, self.proj = nn.Linear(c, 2 * c + 2), nn.Conv2d(c, c, 1), nn.Linear(c, c)
        self.focal = nn.Conv2d(c, c, 3, padding=1, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        C = x.shape[1]
        x = self.f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        q, ctx, gates = torch.split(x, (C, C, 2), 1)
        ctx = F.gelu(self.focal(ctx))
        ctx = ctx * gates[:, 0:1] + ctx.mean((2, 3), keepdim=True) * gates[:, 1:]
        return self.proj((q * self.h(ctx)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
