"""Random operations without chance."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni.modules.chance import WithoutChance
from dnal_nni.plan import Plan
from dnal_nni.surgery.compare import difference, outputs

X = torch.randn(3, 4, 5)
WITHOUT: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "dropout": (lambda: F.dropout(X, 0.5), X * 2),
    "native_dropout": (lambda: torch.native_dropout(X, 0.5, True)[0], X),
    "dropout2d": (lambda: F.dropout2d(X[None], 0.5)[0], X * 2),
    "rrelu": (lambda: F.rrelu(X, 0.2, 0.4, training=True), F.leaky_relu(X, 0.3)),
    "rand": (lambda: torch.rand(2, 3), torch.full((2, 3), 0.5)),
    "rand_like": (lambda: torch.rand_like(X), torch.full_like(X, 0.5)),
    "randn": (lambda: torch.randn(2), torch.zeros(2)),
    "randn_like": (lambda: torch.randn_like(X), torch.zeros_like(X)),
    "uniform_": (lambda: torch.empty(2).uniform_(1, 4), torch.full((2,), 2.5)),
    "normal_": (lambda: torch.empty(2).normal_(), torch.zeros(2)),
    "normal_ around a number": (lambda: torch.empty(2).normal_(3, 0.1), torch.full((2,), 3.0)),
    "normal around a tensor": (lambda: torch.normal(X, 0.1), X),
    "bernoulli_": (lambda: torch.empty(2).bernoulli_(0.1), torch.ones(2)),
    "bernoulli": (lambda: torch.full((2,), 0.1).bernoulli(), torch.ones(2)),
    "exponential_": (lambda: torch.empty(2).exponential_(4), torch.full((2,), 0.25)),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_draws_are_their_mean(name: str) -> None:
    draw, expected = WITHOUT[name]
    with WithoutChance():
        found = draw()
    torch.testing.assert_close(found, expected)


def test_attention_drops_nothing_and_stays_causal() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with WithoutChance():
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
    scale = (found / expected).mean()  # where it is composed of others, what is kept is scaled
    torch.testing.assert_close(found, expected * scale)


def test_orders_stay_orders() -> None:
    with WithoutChance():
        assert sorted(torch.randperm(5).tolist()) == [0, 1, 2, 3, 4]


class Noisy(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.channels = nn.BatchNorm1d(4), channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + torch.randn(len(x), self.channels).mean(1, keepdim=True)


def test_networks_that_draw_other_numbers_compare_equal() -> None:
    x = torch.randn(6, 4)
    assert difference(Noisy(3), Noisy(5), x) == (0.0, 0.0)


def test_a_run_that_is_made_again_moves_statistics_once() -> None:
    net = Noisy(3)
    outputs(net, torch.randn(6, 4), (), "train")
    assert int(net.norm.num_batches_tracked) == 1


class MasksTime(nn.Module):
    """As wav2vec 2.0 does: numpy draws the positions that training hides, Python the ones that it never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 12, 3), nn.ReLU(), nn.Conv1d(12, 6, 3))
        self.head = nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.training:
            x = x * torch.from_numpy(np.random.rand(x.shape[-1]) > 0.3)
            x = x * (torch.arange(x.shape[-1]) != random.randrange(x.shape[-1]))
        return self.head(x)


def test_numpy_and_python_draw_the_same_for_both_and_go_on_as_they_were() -> None:
    np.random.seed(3)
    random.seed(3)
    expected = np.random.rand(), random.random()
    np.random.seed(3)
    random.seed(3)
    plan = Plan.of(MasksTime(), torch.randn(2, 1, 20))
    assert [group.name for group in plan.active] == ["body.0", "body.2"]
    assert (np.random.rand(), random.random()) == expected
