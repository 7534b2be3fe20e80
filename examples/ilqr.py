"""Control a simulated vehicle, or swing a pole up, with a learned dynamics network; then cut that network and go on.

    python examples/ilqr.py --out out/ilqr
    python examples/ilqr.py --system cartpole --seeds 0 1 2 3 4 --out out/ilqr_cartpole

The first takes about a minute on one CPU core, the second some twenty; nothing is downloaded. iLQR needs the
derivatives of the dynamics along a trajectory. Here they are those of the true system, of one with a parameter that is
30 % wrong, or of a network (800-400, linear layers) that learns from the recorded transitions while the controller runs
(after arXiv 2011.10737: derivatives from the network, rollouts and costs from the system). Then `DNALPruner` cuts the
network to a quarter of its FLOPs (`--flops 0.25 0.05`: and to a twentieth) on the same transitions, and the controller
goes on with what is left. Beside it: the same size by random pruning, several times, and a small network (128-64) by
hand.

Writes OUT/runs.jsonl, a line for every seed (those that are there are not repeated), OUT/table.md and OUT/curves.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from ilqr_systems import CARTPOLE, VEHICLE, Controller, System, follow, jacobians, roll
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.cost.latency import latencies
from dnal_nni.report.record import Report, versions

BATCH = 256
Trajectory = tuple[Tensor, Tensor]  # states [T + 1, n] and inputs [T, m]


class Learned(nn.Module):
    """Dynamics as a network: standardised states and inputs to the standardised change of the state.

    Args:
        system: whose ``angle`` the network gets as sine and cosine, so that a turn more makes no difference.
        hidden: widths of the layers in between.
    """

    def __init__(self, system: System, hidden: tuple[int, ...] = (800, 400)) -> None:
        super().__init__()
        states, inputs = len(system.start), len(system.effort)
        self.angle = system.angle
        layers: list[nn.Module] = []
        width = states + 1 + inputs
        for wider in hidden:
            layers += [nn.Linear(width, wider), nn.BatchNorm1d(wider), nn.SiLU()]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Linear(width, states))
        for name, size in (("mean", states + 1 + inputs), ("scale", states + 1 + inputs), ("change", states)):
            self.register_buffer(name, torch.ones(size, dtype=torch.float64))

    def features(self, x: Tensor, u: Tensor) -> Tensor:
        angle = x[..., self.angle : self.angle + 1]
        rest = (x[..., : self.angle], x[..., self.angle + 1 :])
        return torch.cat((angle.sin(), angle.cos(), *rest, u), -1)

    def standardise(self, xs: Tensor, us: Tensor, after: Tensor) -> None:
        features = self.features(xs, us)
        self.mean, self.scale = features.mean(0), features.std(0)
        self.change = (after - xs).std(0)

    def pairs(self, data: list[Trajectory]) -> tuple[Tensor, Tensor]:
        """What the layers are trained on: inputs ``[N, f]`` and targets ``[N, n]``."""
        xs, us, after = transitions(data)
        inputs = (self.features(xs, us) - self.mean) / self.scale
        return inputs.float(), ((after - xs) / self.change).float()

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """The next states ``[..., n]``."""
        inputs = ((self.features(x, u) - self.mean) / self.scale).float()
        change = self.layers(inputs.reshape(-1, inputs.shape[-1])).reshape(x.shape)
        return x + self.change * change.double()


def transitions(data: list[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """States, inputs and the states behind them, ``[N, ...]``."""
    return (
        torch.cat([xs[:-1] for xs, _ in data]),
        torch.cat([us for _, us in data]),
        torch.cat([xs[1:] for xs, _ in data]),
    )


def batches(pairs: tuple[Tensor, Tensor], epochs: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """All batches of some epochs, in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(pairs[0]), generator=generator).split(BATCH)[:-1] for _ in range(epochs)]
    return [(pairs[0][rows], pairs[1][rows]) for epoch in order for rows in epoch]


def train(layers: nn.Module, data: list[tuple[Tensor, Tensor]], lr: float = 2e-3) -> None:
    """Adam with a one-cycle learning rate, mean squared error."""
    optimizer = torch.optim.Adam(layers.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(data), pct_start=0.1)
    layers.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        F.mse_loss(layers(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    layers.eval()


@torch.no_grad()
def error(layers: nn.Module, pairs: tuple[Tensor, Tensor]) -> float:
    return float(F.mse_loss(layers.eval()(pairs[0]), pairs[1]))


def explore(system: System, x0: Tensor, count: int, seed: int) -> list[Trajectory]:
    """Rollouts with random inputs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, system.horizon, len(system.inputs))
    draw = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    us = draw * torch.tensor(system.inputs, dtype=torch.float64)
    return list(zip(roll(system.step, x0, us), us))


def learn(
    system: System, x0: Tensor, model: Learned, args: argparse.Namespace, seed: int
) -> tuple[Controller, list[Trajectory]]:
    """iLQR with a network that is trained again whenever it helps no more; and everything that was recorded."""
    data = explore(system, x0, args.trials, seed)
    model.standardise(*transitions(data))
    train(model.layers, batches(model.pairs(data), args.epochs, seed))
    controller = Controller(system, system.step, model, x0)
    recorded, before = 0, torch.inf
    for again in range(args.rounds):
        controller.run(args.iterations)
        data += controller.seen[recorded:]
        recorded = len(controller.seen)
        if before - controller.costs[-1] <= 1e-4 * controller.costs[-1]:  # nothing new: look around
            noise = torch.randn(5, *controller.us.shape, dtype=torch.float64) * torch.tensor(system.noise)
            data += list(zip(roll(system.step, x0, controller.us + noise), controller.us + noise))
            controller.rollouts += len(noise)
        before = controller.costs[-1]
        train(model.layers, batches(model.pairs(data), args.again, seed + again + 1), 5e-4)
    controller.run(args.iterations)
    controller.rollouts += args.trials
    return controller, data


def commit() -> str | None:
    """The git commit this script stands at; None outside of a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def pruner_of(model: Learned, share: float, dummy: Tensor) -> DNALPruner:
    linear = [{"op_types": ["Linear"]}]
    return DNALPruner(copy.deepcopy(model.layers), linear, dummy_input=dummy, budget=Budget(flops=share))


def searched(
    model: Learned, pairs: tuple[Tensor, Tensor], share: float, epochs: int, seed: int
) -> tuple[nn.Module, nn.Module, Report]:
    """The layers that a search leaves, as they are and fine-tuned: a quarter of the epochs, and the others."""
    pruner = pruner_of(model, share, pairs[0][:1])
    layers = pruner.bound_model.train()
    data = batches(pairs, epochs // 4, seed)
    optimizer = torch.optim.Adam(layers.parameters(), 2e-3)
    with pruner.search(len(data), optimizer=optimizer, progress=False) as search:
        for inputs, targets in data:
            search.step(F.mse_loss(layers(inputs), targets))
    slim = pruner.speedup().eval()
    tuned = copy.deepcopy(slim)
    train(tuned, batches(pairs, epochs - epochs // 4, seed + 1))
    return slim, tuned, pruner.report


def at_random(
    model: Learned, pairs: tuple[Tensor, Tensor], share: float, epochs: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    """As many FLOPs by random pruning, as they are and fine-tuned for as long as search and fine-tuning take."""
    pruner = pruner_of(model, share, pairs[0][:1])
    pruner.choose(tp.importance.RandomImportance())
    slim = pruner.speedup().eval()
    tuned = copy.deepcopy(slim)
    train(tuned, batches(pairs, epochs, seed))
    return slim, tuned


class Sweep(nn.Module):
    """The derivatives of a model along a trajectory, as something to be timed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, xs: Tensor, us: Tensor) -> Tensor:
        return jacobians(self.model, xs, us)[0]


def one(system: System, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Everything with one seed."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    x0 = system.first(seed)
    true = Controller(system, system.step, system.step, x0)
    true.run(args.iterations)
    planned = Controller(system, system.wrong, system.wrong, x0)
    planned.run(args.iterations)
    states, inputs = follow(
        system.step, planned.xs, planned.us, planned.gains, torch.zeros_like(planned.us), torch.ones(1).double()
    )
    crooked = Controller(system, system.step, system.wrong, x0)
    crooked.run(args.iterations)
    dense = Learned(system)
    learned, data = learn(system, x0, dense, args, seed)
    seconds = {"control and learn": time.perf_counter() - start}
    print(f"seed {seed}: cost {true.costs[-1]:.1f} with the true model, {learned.costs[-1]:.1f} with a learned one")

    pairs = dense.pairs(data)
    held = dense.pairs(explore(system, x0, 10, seed + 1000) + [(true.xs, true.us)])

    def with_layers(layers: nn.Module) -> Learned:
        model = copy.deepcopy(dense)
        model.layers = layers
        return model

    networks: dict[str, list[Learned]] = {"learned": [copy.deepcopy(dense)]}
    untuned: dict[str, list[Learned]] = {}
    widths: dict[str, Any] = {}
    train(networks["learned"][0].layers, batches(pairs, args.tune, seed))
    for share in args.flops:
        name = f"slim, {share:.0%}"
        start = time.perf_counter()
        cut, slim, report = searched(dense, pairs, share, args.tune, seed)
        seconds[name] = time.perf_counter() - start
        widths[name] = {group.name: [group.units, group.kept] for group in report.groups if group.frozen is None}
        networks[name], untuned[name] = [with_layers(slim)], [with_layers(cut)]
        name = f"random pruning, {share:.0%}"
        drawn = [at_random(dense, pairs, share, args.tune, seed + 100 * i) for i in range(args.draws)]
        networks[name] = [with_layers(tuned) for _, tuned in drawn]
        untuned[name] = [with_layers(drawn[0][0])]
    networks["small by hand"] = [with_layers(Learned(system, (128, 64)).layers)]
    whole = args.epochs + args.rounds * args.again + args.tune
    train(networks["small by hand"][0].layers, batches(pairs, whole, seed))

    starts = [x0, *(system.first(1000 + 10 * seed + i) for i in range(args.starts - 1))]
    best = [Controller(system, system.step, system.step, x).run(args.iterations) for x in starts]

    def judged(models: list[Learned]) -> tuple[dict[str, Any], Controller]:
        """Of networks of one kind: means, the costs of each, and the first one's way from the first start."""
        runs = [[Controller(system, system.step, model, x) for x in starts] for model in models]
        costs = [[run.run(args.iterations) for run in of_one] for of_one in runs]
        over = [statistics.mean(cost / least - 1 for cost, least in zip(of_one, best)) for of_one in costs]
        wrong = statistics.mean(error(model.layers, held) for model in models)
        return {"error": wrong, "costs": costs, "each": over, "over_true": statistics.mean(over)}, runs[0][0]

    rows: dict[str, Any] = {}
    ways: dict[str, Controller] = {}
    for name, models in networks.items():
        rows[name], ways[name] = judged(models)
        rows[name]["flops"] = statistics.mean(measure(model.layers, pairs[0][:1]).flops for model in models)
        if name in untuned:
            rows[name]["not_tuned"] = judged(untuned[name])[0]
    curve = ways[f"slim, {args.flops[0]:.0%}"]
    times = latencies([Sweep(models[0]) for models in networks.values()], (true.xs[:-1], true.us))
    for row, milliseconds in zip(rows.values(), times):
        row["sweep_ms"] = milliseconds
    trajectories = {
        "true model": true.xs, "wrong model": states[0], "learned": learned.xs, "slim": curve.xs
    }  # fmt: skip
    return {
        "system": system.name, "seed": seed, "true": true.costs[-1], "true_rollouts": true.rollouts,
        "wrong": float(system.cost(states, inputs)), "wrong_derivatives": crooked.costs[-1],
        "learned": learned.costs[-1], "rollouts": learned.rollouts, "networks": rows, "true_starts": best,
        "widths": widths,
        "costs": {"true model": true.costs, "learned": learned.costs, "slim": curve.costs},
        "trajectories": {name: xs.float().round(decimals=4).tolist() for name, xs in trajectories.items()},
        "seconds": seconds,
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds and, behind a sign, standard deviations; costs are shares above the true model's."""

    def spread(values: list[float], form: str = ".2f") -> str:
        deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}"

    def over(name: str) -> str:
        return spread([100 * (run[name] / run["true"] - 1) for run in runs])

    lines = [
        f"{runs[0]['system']}, {len(runs)} seeds; cost above that of iLQR with the true model, in %", "",
        "| iLQR with | cost above (%) | rollouts of the system |", "|---|---|---|",
        f"| the true model | 0 | {spread([run['true_rollouts'] for run in runs], '.0f')} |",
        f"| a wrong model, planned on it, followed with its gains | {over('wrong')} | 1 |",
        f"| derivatives of the wrong model, real rollouts | {over('wrong_derivatives')} | |",
        f"| a network that learns meanwhile | {over('learned')} | {spread([run['rollouts'] for run in runs], '.0f')} |",
        "", "| the network from then on | kFLOPs | cost above (%) | the same, not fine-tuned | error, held out (1e-4) "
        "| Jacobian sweep (ms) |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in runs[0]["networks"]:
        rows = [run["networks"][name] for run in runs]
        cut = [100 * row["not_tuned"]["over_true"] for row in rows if "not_tuned" in row]
        cells = [
            spread([row["flops"] / 1e3 for row in rows], ".1f"),
            spread([100 * row["over_true"] for row in rows], ".3f"),
            spread(cut) if cut else "",
            spread([1e4 * row["error"] for row in rows], ".1f"),
            spread([row["sweep_ms"] for row in rows]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for share in runs[0]["settings"]["flops"]:
        pairs = [[run["networks"][f"{kind}, {share:.0%}"] for kind in ("slim", "random pruning")] for run in runs]
        apart = [100 * (slim["over_true"] - drawn["over_true"]) for slim, drawn in pairs]
        ahead = statistics.mean(sum(slim["over_true"] < one for one in drawn["each"]) for slim, drawn in pairs)
        lines.append(
            f"At {share:.0%}, slim less the mean of random prunings, by seed: {spread(apart, '.3f')} points; "
            f"ahead of {ahead:.1f} of {len(pairs[0][1]['each'])}."
        )
    return "\n".join(lines) + "\n"


def picture(run: dict[str, Any], path: Path) -> None:
    """Where it goes, what that costs by iteration, and what the derivatives take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    where, costs, times = figure.subplots(1, 3)
    vehicle = run["system"] == "vehicle"
    for name, xs in run["trajectories"].items():
        style = {"linestyle": "--"} if name == "wrong model" else {}
        across = [x[0] if vehicle else 0.02 * t for t, x in enumerate(xs)]
        where.plot(across, [x[1] if vehicle else x[0] for x in xs], label=name, **style)
    where.set(title="trajectory", xlabel="x (m)" if vehicle else "time (s)", ylabel="y (m)" if vehicle else "angle")
    for name, values in run["costs"].items():
        costs.plot(values, label=name)
    costs.set(title="cost on the system", xlabel="iteration", yscale="log")
    names = list(run["networks"])
    times.bar(names, [run["networks"][name]["sweep_ms"] for name in names])
    times.set(title="a sweep of Jacobians (ms)")
    times.tick_params(axis="x", labelrotation=20)
    where.legend()
    costs.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("vehicle", "cartpole"), default="vehicle")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.25], help="fractions of the FLOPs to keep")
    parser.add_argument("--draws", type=int, default=5, help="random prunings at each of them")
    parser.add_argument("--trials", type=int, default=100, help="rollouts with random inputs, to begin with")
    parser.add_argument("--epochs", type=int, default=20, help="of the first training")
    parser.add_argument("--rounds", type=int, default=3, help="times that the network learns again from what it saw")
    parser.add_argument("--again", type=int, default=10, help="epochs of each of them")
    parser.add_argument("--tune", type=int, default=20, help="epochs of search and fine-tuning together")
    parser.add_argument("--iterations", type=int, default=300, help="of iLQR, at most")
    parser.add_argument("--starts", type=int, default=5, help="initial states that each network is judged from")
    parser.add_argument("--out", type=Path, default=Path("out/ilqr"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    system = {"vehicle": VEHICLE, "cartpole": CARTPOLE}[args.system]
    log = args.out / "runs.jsonl"
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "out")}
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = [run for run in runs if run["settings"] == settings]
    for seed in args.seeds:
        if all(run["seed"] != seed for run in runs):
            run = one(system, args, seed)
            run |= {"settings": settings, "command": shlex.join(["python", *sys.argv]), "commit": commit()}
            run |= {"versions": versions(), "device": f"{platform.machine()} CPU, 1 thread"}
            runs.append(run)
            with log.open("a") as file:
                file.write(json.dumps(run) + "\n")
    (args.out / "table.md").write_text(table(runs))
    picture(runs[0], args.out / "curves.png")
    print(f"\n{table(runs)}\nwritten: {log}, {args.out / 'table.md'}, {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()
