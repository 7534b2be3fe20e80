"""The paper's search, against torch's own SGD and autograd."""

import pytest
import torch
from torch import Tensor

from dnal_nni.search.paper import PAPER_LR, PAPER_MOMENTUM, PaperScores
from dnal_nni.search.schedule import delta_paper

STEPS, LAMBDA = 20, 0.3
SIZES = [3, 2]


def task(g: Tensor, step: int) -> Tensor:
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    return ((g - wanted).square() * (1 + 0.1 * step)).sum()


def test_steps_are_those_of_sgd_on_the_penalised_loss() -> None:
    scores = PaperScores(5, STEPS, LAMBDA)
    s = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([s], PAPER_LR, momentum=PAPER_MOMENTUM)
    for step in range(STEPS):
        value, delta = scores.gates(step)
        assert torch.equal(value, s.detach()) and float(delta) == delta_paper(step, STEPS)
        parts = [part.clone().requires_grad_() for part in value.split(SIZES)]
        g = torch.sigmoid(delta * torch.cat(parts))
        grads = torch.autograd.grad(scores.penalised(task(g, step), parts), parts)
        scores.update(torch.cat(grads), g, step)

        optimizer.zero_grad()
        (task(torch.sigmoid(delta_paper(step, STEPS) * s), step) + LAMBDA * torch.sigmoid(s).sum()).backward()
        optimizer.step()
    assert torch.allclose(scores.value, s.detach(), atol=1e-12) and float(s.detach().std()) > 1e-3


def test_a_step_may_be_counted_on_the_device() -> None:
    scores = PaperScores(5, STEPS, LAMBDA)
    for step in (0, 7, STEPS - 1):
        assert torch.equal(scores.gates(step)[1], scores.gates(torch.tensor([step]))[1])


def test_it_goes_on_where_it_was() -> None:
    first, second = PaperScores(5, STEPS, LAMBDA), PaperScores(5, STEPS, LAMBDA)
    grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    first.update(grad, grad, 0)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for scores in (first, second):
        scores.update(grad, grad, 1)
        scores.settle()  # nothing: gates move to the end
    assert torch.equal(first.value, second.value) and first.moving == STEPS
    # the order of a cut is that of the gates, not of what the last gradient made of them
    assert torch.equal(first.rank(grad), grad) and float(first.cost(grad)) == pytest.approx(0.0)
