"""Whole networks with ways of their own: what they return, what they share, what they hook."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import network

IMAGES = torch.randn(2, 3, 12, 12)


class Detections(NamedTuple):
    scores: Tensor
    boxes: Tensor


@network(IMAGES)
class Detector(nn.Module):
    """A named tuple of two heads, permuted and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.cls, self.box, self.num_classes = nn.Conv2d(24, 6, 3, padding=1), nn.Conv2d(24, 8, 3, padding=1), 3

    def forward(self, x: Tensor) -> Detections:
        x = self.backbone(x)
        scores = self.cls(x).permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, self.num_classes)
        return Detections(scores, self.box(x).permute(0, 2, 3, 1).reshape(x.size(0), -1, 4))


@network(IMAGES)
class Hooked(nn.Module):
    """Features collected by forward hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.side, self.head = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.body[1].register_forward_hook(_Keep("first"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return y + self.side(self.body[1].first)[:, :, 2:, 2:]  # type: ignore[union-attr, operator, index]


class _Keep:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        setattr(module, self.name, output)


@network(IMAGES)
class ListOfStages(nn.Module):
    """HRNet-like: branches of several resolutions that exchange, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, 2, 1)])
        self.down, self.up = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        xs = [F.relu(stem(x)) for stem in self.stems]
        ys = [
            xs[0] + F.interpolate(self.up(xs[1]), size=xs[0].shape[2:], mode="bilinear", align_corners=False),
            xs[1] + self.down(xs[0]),
        ]
        size = ys[0].shape[-2:]
        return self.head(torch.cat([F.interpolate(F.relu(y), size, mode="nearest") for y in ys], 1))


@network(torch.randint(0, 20, (2, 12)), left="runs over these channels as over positions")
class TextCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.convs = nn.ModuleList([nn.Conv2d(1, 10, (k, 16)) for k in (2, 3)])
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).unsqueeze(1)
        pooled = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(p, p.size(2)).squeeze(2) for p in pooled], 1))


@network(torch.randn(2, 10, 6), share=0.95)
class GRUHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gru, self.fc = nn.Linear(6, 24), nn.GRU(24, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.gru(F.relu(self.proj(x)))
        return self.fc(out[:, -1, :]) + 0 * hidden.sum()


@network(torch.randn(2, 20), left="a function reads the weights of", share=1.0)
class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 16), nn.Linear(16, 8)
        self.b2, self.b1 = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.fc2(F.relu(self.fc1(x))))
        y = F.relu(F.linear(z, self.fc2.weight.t(), self.b2))
        return F.linear(y, self.fc1.weight.t(), self.b1)


@network(torch.randn(2, 3, 16, 16))
class SegNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, idx = F.max_pool2d(F.relu(self.enc(x)), 2, 2, return_indices=True)
        return self.dec(F.max_unpool2d(F.relu(self.mid(x)), idx, 2, 2))


@network(torch.randn(2, 3, 16, 16))
class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 24, 3, 2), nn.Conv2d(16, 4, 1)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        result = OrderedDict()
        x = F.relu(self.a(x))
        if self.training:
            result["aux"] = self.aux(x).mean((2, 3))
        result["out"] = self.fc(F.dropout(F.relu(self.b(x)).mean((2, 3)), 0.2, self.training))
        return result


@network(torch.randn(2, 3, 12, 12), left="the model does not run without some of its channels", share=0.9)
class VAE(nn.Module):
    """Two heads, and noise between them."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mu, self.log_var = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(576, 8), nn.Linear(576, 8)
        self.fc, self.dec = nn.Linear(8, 16 * 36), nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enc(x)).flatten(1)
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var) if self.training else mu
        return torch.sigmoid(self.dec(F.relu(self.fc(z)).view(-1, 16, 6, 6)))


@network(torch.randn(2, 3, 3, 8, 8))
class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim, self.enc = 8, nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.out = nn.Conv2d(6 + 8, 4 * 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _, height, width = x.size()
        h = torch.zeros(b, self.hidden_dim, height, width, device=x.device, dtype=x.dtype)
        c = torch.zeros_like(h)
        for i in range(t):
            combined = torch.cat([self.enc(x[:, i]), h], dim=1)
            cc_i, cc_f, cc_o, cc_g = torch.split(self.conv(combined), self.hidden_dim, dim=1)
            c = torch.sigmoid(cc_f) * c + torch.sigmoid(cc_i) * torch.tanh(cc_g)
            h = torch.sigmoid(cc_o) * torch.tanh(c)
        return self.out(h)


@network(torch.randn(2, 3, 3, 8, 8))
class ConvGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.enc = 8, nn.Conv2d(3, 6, 3, padding=1)
        self.gates, self.cand = nn.Conv2d(6 + 8, 2 * 8, 3, padding=1), nn.Conv2d(6 + 8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for frame in x.unbind(1):
            e = self.enc(frame)
            if h is None:
                h = e.new_zeros([e.size(0), self.hidden_size, *e.size()[2:]])
            r, u = torch.sigmoid(self.gates(torch.cat([e, h], 1))).chunk(2, 1)
            h = (1 - u) * h + u * torch.tanh(self.cand(torch.cat([e, r * h], 1)))
        return self.out(h)
