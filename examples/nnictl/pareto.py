"""Draw accuracy against FLOPs from the trials of an experiment, with the Pareto front, and print the front.

    nnictl experiment export ID --type json --filename trials.json
    python examples/nnictl/pareto.py trials.json pareto.png
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Point = tuple[float, float]  # FLOPs, accuracy
Result = dict[str, Any]  # what trial.py reports


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats, by rising FLOPs: every other point costs no less for no more accuracy."""
    best: list[Point] = []
    for flops, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((flops, accuracy))
    return best


def point(result: Result) -> Point:
    return result["flops"], result["default"]


def read(path: Path) -> list[Result]:
    """The final results in NNI's export as JSON."""
    return [json.loads(trial["value"]) for trial in json.loads(path.read_text())]


def draw(results: list[Result], path: Path) -> None:
    """Write the picture: MFLOPs, percent, and a colour for each of DNALPruner's presets."""
    from matplotlib.figure import Figure  # opens no window, whatever the backend

    figure = Figure((6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines = {f"preset {name}": [point(r) for r in results if r["preset"] == name] for name in ("default", "paper")}
    for label, points in lines.items():
        axes.plot([f / 1e6 for f, _ in points], [a for _, a in points], "o", label=label)
    best = front(map(point, results))
    axes.step([f / 1e6 for f, _ in best], [a for _, a in best], "k-", where="post", zorder=0, label="Pareto front")
    axes.set(xlabel="MFLOPs", ylabel="validation accuracy (%)")
    axes.legend()
    figure.savefig(path, dpi=150)


def show(results: list[Result], path: Path) -> None:
    """Print the trials on the front, and draw all."""
    best = front(map(point, results))
    for result in sorted(results, key=point):
        if point(result) in best:
            settings = {name: value for name, value in result.items() if name not in ("default", "flops")}
            print(f"{result['flops'] / 1e6:.3f} MFLOPs  {result['default']:.2f} %  {json.dumps(settings)}")
    draw(results, path)
    print(f"written: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path, help="what nnictl experiment export wrote")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    show(read(args.trials), args.picture)
