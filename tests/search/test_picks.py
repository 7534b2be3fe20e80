"""DARTS-PRIME's architecture: options, DARTS's rule, regularisers, and weights that learn."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni.modules.choices import Depth
from dnal_nni.search.picks import Pick
from dnal_nni.search.prime import PrimeScores
from dnal_nni.search.proximity import ROUND, Consensus, distance

NODE = Pick("node", 6, 2, (0, 0, 1, 1, 2, 2))  # two of three inputs, two operations on each
LAYER = Pick("layer", 3, 1, (0, 0, 0))
INPUTS = Pick("inputs", 4, 2, (0, 0, 0, 0), apart=False)
DEPTH = Pick("depth", 2, 1, (0, 0, 0), chain=True)
PICKS = [NODE, LAYER, INPUTS, DEPTH]


def random(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(steps: int = 20, **settings: Any) -> PrimeScores:
    usual: dict[str, Any] = dict(
        activation="softmax", regularizer=None, rho=0.1, reach=1.0, every=1, share=1.0, cost=lambda g: g.mean()
    )
    return PrimeScores(PICKS, steps, **{**usual, **settings})


def test_options_compete_within_their_slot() -> None:
    alpha = random(6)
    expected = torch.cat([torch.softmax(part, 0) for part in alpha.split(2)])
    assert torch.allclose(NODE.activated(alpha), expected)
    assert torch.allclose(LAYER.activated(1000 * alpha[:3]), torch.softmax(1000 * alpha[:3], 0))


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_is_darts_s(seed: int) -> None:
    """Of all sets of two candidates on two different inputs, the one with the largest sum."""
    score = random(6, seed)
    sets = [pair for pair in itertools.combinations(range(6), 2) if pair[0] // 2 != pair[1] // 2]
    best = max(sets, key=lambda pair: float(score[list(pair)].sum()))
    assert NODE.rule(score).nonzero().flatten().tolist() == list(best)
    two = INPUTS.rule(score[:4])
    assert two.nonzero().flatten().tolist() == sorted(score[:4].topk(2).indices.tolist())
    assert int(LAYER.rule(score[:3]).argmax()) == int(score[:3].argmax())


def test_fewer_inputs_than_stay_take_more_of_one() -> None:
    pick = Pick("first", 3, 2, (0, 0, 0))
    assert pick.rule(torch.tensor([0.1, 0.7, 0.2])).tolist() == [0.0, 1.0, 1.0]


def test_a_depth_is_a_mixture_of_its_ends() -> None:
    class Add(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(number))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight

    a = torch.softmax(random(3), 0)
    blocks = Depth([Add(1.0), Add(10.0), Add(100.0)], [1, 2, 3], "depth")
    blocks.weights = lambda: list(DEPTH.gates(a))
    ends = torch.tensor([1.0, 11.0, 111.0], dtype=torch.float64)
    with torch.no_grad():
        assert float(blocks(torch.zeros(()))) == pytest.approx(float(a @ ends))
    assert (DEPTH.gates(DEPTH.rule(a)) > 0.5).tolist() == [a.argmax() > 0, a.argmax() > 1]


def test_the_distance_pulls_equally_hard_from_anywhere() -> None:
    for length in (1e-3, 1.0):
        x = (length * random(6)).requires_grad_()
        assert distance(x, [4, 2]).item() == pytest.approx((x[:4].norm() + x[4:].norm()).item())
        distance(x, [4, 2]).backward()
        assert x.grad is not None and float(x.grad[:4].norm()) == pytest.approx(1.0)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    distance(zero, [3]).backward()
    assert zero.grad is not None and not bool(zero.grad.any())


def test_the_consensus_is_admm() -> None:
    track = [torch.softmax(random(3, seed), 0) for seed in range(3 * ROUND)]
    consensus = Consensus(track[0], LAYER.rule)
    z, u = track[0].tolist(), [0.0] * 3
    for number, a in enumerate(track, 1):
        consensus.advance(a)
        if number % ROUND == 0:
            total = [float(x) + y for x, y in zip(a, u)]
            z = [float(i == total.index(max(total))) for i in range(3)]
            u = [y + float(x) - w for x, y, w in zip(a, u, z)]
    assert consensus.z.tolist() == z and consensus.u.tolist() == pytest.approx(u)
    assert consensus.residual(track[-1]).tolist() == pytest.approx(
        [float(x) - w + y for x, w, y in zip(track[-1], z, u)]
    )


@pytest.mark.parametrize("regularizer", ["proximity", "consensus", None])
def test_the_architecture_learns_by_adam_from_loss_and_regulariser(regularizer: Any) -> None:
    """Against the same, written out for a single layer."""
    made = PrimeScores(
        [LAYER], 20, activation="softmax", regularizer=regularizer, rho=0.5, reach=2.0, every=1, share=0.5,
        cost=lambda g: g.mean(),
    )  # fmt: skip
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([alpha], 2.0 / 10, betas=(0.5, 0.999), weight_decay=1e-3)
    worth = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    z = u = None
    for step in range(20):
        a = torch.softmax(alpha, 0)
        loss = a @ worth
        if regularizer == "proximity":
            one = torch.nn.functional.one_hot(a.argmax(), 3)
            loss = loss + step / 20 * 0.25 * (a - one).norm()
        if regularizer == "consensus":
            z, u = (a.detach(), torch.zeros(3)) if z is None or u is None else (z, u)
            loss = loss + 0.25 * (a - z + u).norm()
        adam.zero_grad()
        loss.backward()
        adam.step()
        made.update(worth, made.weights(0), step)
        if regularizer == "consensus" and (step + 1) % 10 == 0:
            a = torch.softmax(alpha.detach(), 0)
            z = torch.nn.functional.one_hot((a + u).argmax(), 3).double()
            u = u + a - z
        assert torch.allclose(made.weights(0), torch.softmax(alpha, 0), atol=1e-12)
    assert made.chosen().tolist() == [False, True, False]


def test_the_pull_makes_weights_discrete() -> None:
    def entropy(regularizer: Any) -> float:
        made = scores(200, regularizer=regularizer, rho=2.0, reach=8.0)
        worth = 0.05 * random(len(made.value))
        for step in range(200):
            made.update(worth + 0.3 * random(len(worth), step), made.weights(0), step)
        return made.entropy()

    assert entropy("proximity") < 0.8 * entropy(None)


def test_bounded_weights_do_not_compete_and_stay_at_zero() -> None:
    made = scores(200, activation="bounded", reach=3.0)
    node, layer, inputs, depth = made.weights(0).detach().split([6, 3, 4, 2])
    assert torch.allclose(node, torch.full((6,), 0.5, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(layer, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-3)

    def harm(step: int, sign: float) -> Tensor:
        """Of one candidate alone; the others' gradients change their sign all the time."""
        return torch.cat([torch.full((1,), sign), torch.full((14,), 0.1 * (-1) ** step)]).double()

    for step in range(100):
        made.update(harm(step, 1.0), made.weights(0), step)
    node, _, _, depth = made.weights(0).detach().split([6, 3, 4, 2])
    assert float(node[0]) == 0.0 and bool((node[1:] > 0.3).all())
    assert made.resting("node") == frozenset([0]) and made.resting("layer") == frozenset()
    for step in range(100, 200):
        made.update(harm(step, -1.0), made.weights(0), step)
    assert made.weights(0)[0].item() == 0.0
    # a depth is a softmax in any case
    assert depth.tolist() == pytest.approx([2 / 3, 1 / 2], abs=0.05)


def test_the_last_candidate_of_a_decision_does_not_fall() -> None:
    made = scores(100, activation="bounded", reach=3.0)
    for step in range(100):
        made.update(torch.ones(15, dtype=torch.float64), made.weights(0), step)
    chosen = [part.sum() for part in made.chosen().split([6, 3, 4, 2])]
    assert [int(count) for count in chosen[:3]] == [2, 1, 2]
    assert all(not made.resting(pick.label) >= set(range(pick.units)) for pick in PICKS)


def test_it_goes_on_from_its_state() -> None:
    def run(made: PrimeScores, steps: range) -> PrimeScores:
        for step in steps:
            made.update(random(len(made.value), step), made.weights(0), step)
        return made

    settings: dict[str, Any] = {"regularizer": "consensus", "activation": "bounded"}
    torch.manual_seed(0)
    whole = run(scores(40, **settings), range(40))
    torch.manual_seed(0)
    half = run(scores(40, **settings), range(17))
    again = scores(40, **settings)
    again.load_state_dict({name: tensor.clone() for name, tensor in half.state_dict().items()})
    run(again, range(17, 40))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
