"""Two simulated systems, and iLQR on real rollouts with Jacobians from wherever they come: for ilqr.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vmap

Model = Callable[[Tensor, Tensor], Tensor]  # states [..., n] and inputs [..., m] to the next states [..., n]


def vehicle(x: Tensor, u: Tensor, wheelbase: float = 3.0, h: float = 0.1) -> Tensor:
    """A kinematic bicycle: position, heading, speed; steering, which saturates at 0.6 rad, and acceleration."""
    px, py, heading, speed = x.unbind(-1)
    steer, push = u.unbind(-1)
    steer = 0.6 * (steer / 0.6).tanh()
    move = (speed * heading.cos(), speed * heading.sin(), speed * steer.tan() / wheelbase, push)
    return x + h * torch.stack(move, -1)


def cartpole(x: Tensor, u: Tensor, pole: float = 0.1, h: float = 0.02) -> Tensor:
    """A cart with a pole of ``pole`` kg: angle (0 is up) and its rate, place of the cart and its speed; a force."""
    angle, rate, place, speed = x.unbind(-1)
    cart, half, g = 1.0, 0.5, 9.8
    sin, cos = angle.sin(), angle.cos()
    push = (u[..., 0] + pole * half * rate**2 * sin) / (cart + pole)
    turn = (g * sin - cos * push) / (half * (4 / 3 - pole * cos**2 / (cart + pole)))
    slide = push - pole * half * turn * cos / (cart + pole)
    return x + h * torch.stack((rate, turn, speed, slide), -1)


@dataclasses.dataclass(frozen=True)
class System:
    """One task: bring the system to its goal, at a cost that is a weighted sum of squares.

    Attributes:
        step: the true dynamics.
        wrong: the same with a parameter that is 30 % too large.
        start: mean of the initial states ``[n]``.
        spread: their standard deviation ``[n]``, over seeds.
        horizon: steps.
        inputs: range of the random inputs ``[m]`` that the first transitions are recorded with.
        noise: standard deviation of what is added to inputs to explore ``[m]``.
        residuals: from states ``[..., n]`` to what costs ``[..., r]``.
        weights: of the squared residuals ``[r]`` and, at the end, ``last``.
        effort: weights of the squared inputs ``[m]``.
        angle: which state is an angle; networks get its sine and cosine.
    """

    name: str
    step: Model
    wrong: Model
    start: tuple[float, ...]
    spread: tuple[float, ...]
    horizon: int
    inputs: tuple[float, ...]
    noise: tuple[float, ...]
    residuals: Callable[[Tensor], Tensor]
    weights: tuple[float, ...]
    last: tuple[float, ...]
    effort: tuple[float, ...]
    angle: int

    def first(self, seed: int) -> Tensor:
        """An initial state ``[n]``."""
        draw = torch.randn(len(self.start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.tensor(self.start, dtype=torch.float64) + draw * torch.tensor(self.spread, dtype=torch.float64)

    def cost(self, xs: Tensor, us: Tensor) -> Tensor:
        """Of trajectories: states ``[..., T + 1, n]`` and inputs ``[..., T, m]``."""
        r2 = self.residuals(xs) ** 2
        run = r2[..., :-1, :] @ r2.new_tensor(self.weights) + us**2 @ us.new_tensor(self.effort)
        return run.sum(-1) + r2[..., -1, :] @ r2.new_tensor(self.last)

    def quadratic(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``[T + 1, n]`` and Gauss-Newton Hessian ``[T + 1, n, n]`` of the cost of the states."""
        r, j = self.residuals(xs), vmap(jacrev(self.residuals))(xs)
        w = r.new_tensor([self.weights] * (len(xs) - 1) + [self.last])
        return 2 * torch.einsum("tr,tr,trn->tn", w, r, j), 2 * torch.einsum("tr,trn,trm->tnm", w, j, j)


VEHICLE = System(
    "vehicle", vehicle, lambda x, u: vehicle(x, u, wheelbase=3.9),
    start=(0, 0, 0, 4), spread=(0, 1, 0.1, 0.5), horizon=100, inputs=(1, 3), noise=(0.01, 0.1),
    residuals=lambda x: torch.stack((x[..., 1] + 10, x[..., 2], x[..., 3] - 8), -1),
    weights=(1, 1, 1), last=(1, 1, 1), effort=(10, 10), angle=2,
)  # fmt: skip
CARTPOLE = System(
    "cartpole", cartpole, lambda x, u: cartpole(x, u, pole=0.13),
    start=(torch.pi, 0, 0, 0), spread=(0.1, 0.1, 0.1, 0.1), horizon=150, inputs=(15,), noise=(1,),
    residuals=lambda x: torch.stack((x[..., 0].sin(), 1 - x[..., 0].cos(), x[..., 1], x[..., 2], x[..., 3]), -1),
    weights=(1, 1, 0.1, 1, 1), last=(1e4, 1e4, 1e3, 0, 0), effort=(0.1,), angle=0,
)  # fmt: skip


def roll(step: Model, x0: Tensor, us: Tensor) -> Tensor:
    """The states ``[..., T + 1, n]`` that inputs ``[..., T, m]`` lead to."""
    xs = [x0.expand(*us.shape[:-2], -1)]
    for t in range(us.shape[-2]):
        xs.append(step(xs[-1], us[..., t, :]))
    return torch.stack(xs, -2)


@torch.no_grad()
def jacobians(model: Model, xs: Tensor, us: Tensor) -> tuple[Tensor, Tensor]:
    """Of a model along a trajectory ``[T, n]``, ``[T, m]``: ``[T, n, n]`` and ``[T, n, m]``, all at once."""
    a, b = vmap(jacrev(model, (0, 1)))(xs, us)
    return a, b


def backward(system: System, xs: Tensor, us: Tensor, a: Tensor, b: Tensor, mu: float) -> tuple[Tensor, Tensor] | None:
    """Gains ``[T, m, n]`` and steps ``[T, m]`` of iLQR, in float64; None where ``Quu + mu I`` is not positive."""
    gradient, hessian = system.quadratic(xs)
    effort = us.new_tensor(system.effort)
    v, vv = gradient[-1], hessian[-1]
    gains, steps = [], []
    for t in reversed(range(len(us))):
        qx, qu = gradient[t] + a[t].T @ v, 2 * effort * us[t] + b[t].T @ v
        qxx, qux = hessian[t] + a[t].T @ vv @ a[t], b[t].T @ vv @ a[t]
        quu = torch.diag(2 * effort) + b[t].T @ vv @ b[t]
        root, failed = torch.linalg.cholesky_ex(quu + mu * torch.eye(len(effort), dtype=quu.dtype))
        if failed:
            return None
        solved = torch.cholesky_solve(torch.cat((qux, qu[:, None]), 1), root)
        gain, step = -solved[:, :-1], -solved[:, -1]
        v = qx + gain.T @ (quu @ step + qu) + qux.T @ step
        vv = qxx + gain.T @ quu @ gain + gain.T @ qux + qux.T @ gain
        gains.append(gain)
        steps.append(step)
    return torch.stack(gains[::-1]), torch.stack(steps[::-1])


def follow(step: Model, xs: Tensor, us: Tensor, gains: Tensor, steps: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """What the new policy does from ``xs[0]`` on, at each of the step sizes: states and inputs, ``[sizes, ...]``."""
    x = xs[0].expand(len(sizes), -1)
    states, inputs = [x], []
    for t in range(len(us)):
        u = us[t] + (x - xs[t]) @ gains[t].T + sizes[:, None] * steps[t]
        x = step(x, u)
        states.append(x)
        inputs.append(u)
    return torch.stack(states, 1), torch.stack(inputs, 1)


SIZES = 0.5 ** torch.arange(8, dtype=torch.float64)


@dataclasses.dataclass
class Controller:
    """iLQR from zero inputs: Jacobians of ``model``, rollouts and costs of ``plant``.

    Attributes:
        xs, us: the best trajectory so far, ``[T + 1, n]`` and ``[T, m]``.
        gains: of the policy that led to it ``[T, m, n]``.
        costs: of the best trajectory, after every iteration.
        rollouts: of ``plant``, so far. A line search ends with the first step that lowers the cost.
        seen: the last trajectory of every line search.
    """

    system: System
    plant: Model
    model: Model
    x0: Tensor

    def __post_init__(self) -> None:
        self.us = torch.zeros(self.system.horizon, len(self.system.effort), dtype=torch.float64)
        self.xs = roll(self.plant, self.x0, self.us)
        self.gains = torch.zeros(*self.us.shape, len(self.x0), dtype=torch.float64)
        self.costs, self.rollouts, self.mu = [float(self.system.cost(self.xs, self.us))], 1, 0.0
        self.seen = [(self.xs, self.us)]

    def iterate(self) -> bool:
        """One iteration; whether the cost fell by more than a millionth."""
        a, b = jacobians(self.model, self.xs[:-1], self.us)
        before = self.costs[-1]
        for _ in range(3):
            policy = backward(self.system, self.xs, self.us, a, b, self.mu)
            if policy is not None:
                xs, us = follow(self.plant, self.xs, self.us, *policy, SIZES)
                costs = self.system.cost(xs, us).nan_to_num(torch.inf)
                lower = (costs < before).nonzero()
                tried = int(lower[0]) + 1 if len(lower) else len(SIZES)
                self.rollouts += tried
                self.seen.append((xs[tried - 1], us[tried - 1]))
                if len(lower):
                    i = int(lower[0])
                    self.xs, self.us, self.gains = xs[i], us[i], policy[0]
                    self.costs.append(float(costs[i]))
                    self.mu = self.mu / 10 if self.mu > 1e-3 else 0.0
                    return before - self.costs[-1] > 1e-6 * before
            self.mu = max(10 * self.mu, 1e-3)
        self.costs.append(before)
        return False

    def run(self, iterations: int) -> float:
        """Iterate until nothing falls any more; the cost."""
        while len(self.costs) <= iterations and self.iterate():
            pass
        return self.costs[-1]
